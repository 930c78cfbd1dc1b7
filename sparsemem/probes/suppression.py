"""What the loss is without a pool's sparse parameters, where the rest of the model stays as it was trained.

- `zero`: the pool adds nothing; of routed experts, the shared ones are left (`SparseLayer.without`). The rest was
  trained with an input that it then lacks, so the increase mixes what the pool knows with that shock.
- `mean_row`: every row of a table becomes the mean of those that the text reads: an input as usual, without content.
- `other_ngram`: each position looks up the rows of another position of its batch, drawn at random: an input as usual,
  with wrong content. Of tables that are looked up by tokens; where a score weighs rows, there is no n-gram to exchange.

The increase over the plain loss is paired token by token.

Shape letters: B sequences, T positions, H tables, R rows, C width of a row, P positions of the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsemem.memory.table import MemoryTable
from sparsemem.model import Transformer
from sparsemem.probes.bootstrap import named, ratio
from sparsemem.probes.reading import LayerReading, by_pool, forget
from sparsemem.probes.sample import Mask, Sample
from sparsemem.train.evaluate import token_losses
from sparsemem.train.text_loss import ORDERS

ZERO, MEAN_ROW, OTHER_NGRAM = KINDS = ("zero", "mean_row", "other_ngram")


def suppression_rows(
    model: Transformer, sample: Sample, plain_ST: Tensor, readings: list[LayerReading], precision: torch.dtype
) -> Iterator[dict[str, Any]]:
    """For each pool and suppression, over all tokens and by how often the n-gram before them occurs in the training
    text: the plain `loss`, the `increase` and its 95% interval over sequences. What a pool has not is not measured: its
    increase is empty.

    Args:
        plain_ST: losses of the whole model.
        readings: what it read then.
    """
    plain_P, scored_P = plain_ST.flatten().numpy(), (sample.windows[1] >= 0).flatten().numpy()
    for pool, layers in by_pool(readings):
        own = {order for reading in layers for order in reading.orders_H}
        for kind in KINDS:
            increase_P = _increase(model, sample, plain_P, layers, kind, precision)
            for row in _parts(sample, plain_P, increase_P, scored_P, sorted({*ORDERS[1:], *own})):
                yield {"pool": pool, "suppression": kind} | row


def _increase(
    model: Transformer,
    sample: Sample,
    plain_P: npt.NDArray[np.float64],
    layers: Sequence[LayerReading],
    kind: str,
    precision: torch.dtype,
) -> npt.NDArray[np.float64] | None:
    """Nats of each position; None where the pool has no such thing."""
    if not suppressible(layers, kind):
        return None
    with suppressed(layers, kind):
        losses = [each.double().flatten().cpu() for each in token_losses(model, *sample.windows, precision)]
    forget(layers)
    return torch.cat(losses).numpy() - plain_P


def _parts(
    sample: Sample,
    plain_P: npt.NDArray[np.float64],
    increase_P: npt.NDArray[np.float64] | None,
    scored_P: Mask,
    orders: Sequence[int],
) -> Iterator[dict[str, Any]]:
    def row(chosen_P: Mask, order: int | None, least: int | None, most: int | None) -> dict[str, Any]:
        count, *sums = sample.sums(chosen_P, plain_P * chosen_P, (0 if increase_P is None else increase_P) * chosen_P)
        loss, *_ = ratio(sums[0], count)
        increase = (None, None, None) if increase_P is None else ratio(sums[1], count)
        known = {"order": order, "least": least, "most": most, "tokens": int(count.sum()), "loss": loss}
        return known | named("increase", increase)

    yield row(scored_P, None, None, None)
    for order in orders if increase_P is not None and sample.knows_training else ():
        for least, most, chosen_P in sample.bins(order):
            yield row(scored_P & chosen_P, order, least, most)


# --- what is done to the layers ---------------------------------------------------------------------------------------


def suppressible(layers: Sequence[LayerReading], kind: str) -> bool:
    """Whether these layers have what a suppression takes away."""
    return kind == ZERO or any(reading.hashed if kind == OTHER_NGRAM else reading.tables for reading in layers)


@contextmanager
def suppressed(layers: Sequence[LayerReading], kind: str) -> Iterator[None]:
    """Layers of one pool, suppressed until the end of the block."""
    with ExitStack() as stack:
        if kind == ZERO:
            for reading in layers:
                hook = reading.layer.register_forward_hook(lambda layer, given, _: layer.without(*given))
                stack.callback(hook.remove)
            yield
            return
        draws = torch.Generator("cpu").manual_seed(0)
        reads = dict[MemoryTable, Tensor]()  # layers may share a table
        for reading in layers:
            for table in reading.tables:
                reads[table] = reads.get(table, torch.zeros_like(reading.reads_N)) + reading.reads_N
        for table, reads_R in reads.items():
            if kind == MEAN_ROW:
                stack.enter_context(_mean_rows(table, reads_R))
            else:
                hook = table.register_forward_pre_hook(lambda _, given: _exchanged(given[0], draws))
                stack.callback(hook.remove)
        yield


@contextmanager
def _mean_rows(table: MemoryTable, reads_R: Tensor) -> Iterator[None]:
    own_RC = table.rows_RC.data
    table.rows_RC.data = mean_rows(own_RC, reads_R.to(own_RC.device), table.first_H)
    try:
        yield
    finally:
        table.rows_RC.data = own_RC


def mean_rows(rows_RC: Tensor, reads_R: Tensor, first_H: Tensor) -> Tensor:
    """Each table's rows all the mean of those that are read, as often as they are; of a table that is never read, of
    all.
    """
    ends_H = torch.cat((first_H[1:], first_H.new_tensor([len(rows_RC)])))
    parts = list[Tensor]()
    for first, end in zip(first_H.tolist(), ends_H.tolist(), strict=True):
        weight_R = reads_R[first:end].double()
        weight_R = weight_R if float(weight_R.sum()) else torch.ones_like(weight_R)
        mean_C = (weight_R / weight_R.sum()) @ rows_RC[first:end].double()
        parts.append(mean_C.to(rows_RC.dtype).expand(end - first, -1))
    return torch.cat(parts)


def _exchanged(rows_BTH: Tensor, draws: torch.Generator) -> Tensor:
    """Row numbers of each position given to another one, those of all tables together."""
    place_P = torch.randperm(rows_BTH.shape[:2].numel(), generator=draws).to(rows_BTH.device)
    return rows_BTH.flatten(0, 1)[place_P].view_as(rows_BTH)
