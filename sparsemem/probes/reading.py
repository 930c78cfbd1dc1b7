"""What a model's sparse layers read and let in while it is evaluated, told by the layers themselves
(`SparseLayer.note`). It must not know any mechanism.

Shape letters: B sequences, T positions, A reads, H tables, M branches of a gate, N entries (rows of all tables, or
experts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsemem.counting import occurrences
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.memory.table import MemoryTable
from sparsemem.model import Transformer, placed_layers
from sparsemem.train.evaluate import token_losses

GATE = "gate_mean"


@dataclass
class LayerReading:
    """Of one layer, in the order of the text."""

    pool: str
    block: int
    """0: before the first."""
    layer: SparseLayer
    reads_N: Tensor
    gates: list[Tensor] = field(default_factory=list)
    """(B T, M) each; none of a layer without a gate."""
    parts: list[Tensor] = field(default_factory=list)
    """|what is let in| / |what the layer is fed|, (B T, M) each, or (B T, 1) where all branches share it."""
    hashed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Ids of n-grams and their rows over all tables, (B T, N) and (B T, H) each."""
    orders_H: tuple[int, ...] = ()

    @property
    def tables(self) -> list[MemoryTable]:
        return [each for each in self.layer.modules() if isinstance(each, MemoryTable)]


@torch.no_grad()
def read(
    model: Transformer, inputs_ST: Tensor, targets_ST: Tensor, precision: torch.dtype
) -> tuple[Tensor, list[LayerReading]]:
    """One evaluation: the loss of each position, (S, T) float64, and a `LayerReading` of each sparse layer."""
    found, hooks = list[LayerReading](), list[Any]()
    for pool, block, layer in placed_layers(model):
        reading = LayerReading(pool, block, layer, torch.zeros(entries(layer), dtype=torch.int64, device="cpu"))
        found.append(reading)
        fed: dict[str, tuple[Tensor, Tensor]] = {}
        hooks.append(layer.register_forward_pre_hook(lambda _, given, fed=fed: fed.update(of=given)))
        layer.listener = _listener(reading, fed)
    try:
        losses = [each.double().cpu() for each in token_losses(model, inputs_ST, targets_ST, precision)]
    finally:
        for hook, reading in zip(hooks, found, strict=True):
            hook.remove()
            reading.layer.listener = None
        forget(found)
    return torch.cat(losses), found


def entries(layer: SparseLayer) -> int:
    """Rows of all its tables; of a layer without any, such as one of experts, what it chooses among."""
    return layer.rows or max((len(weight) for weight, _ in layer.reads()), default=0)


def _listener(reading: LayerReading, fed: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    def listen(rows_A: Tensor, gated: Tensor, means: Mapping[str, Tensor]) -> None:
        x_BTD, tokens_BT = fed["of"]
        reading.reads_N += occurrences(rows_A.flatten(), len(reading.reads_N)).cpu()
        if GATE in means:
            reading.gates.append(means[GATE].double().flatten(0, 1).cpu())
            let_in, x = (each.double().norm(dim=-1).view(x_BTD.shape[:2].numel(), -1) for each in (gated, x_BTD))
            reading.parts.append((let_in / x).cpu())
        ngrams = reading.layer.ngrams(tokens_BT)
        if ngrams is not None:
            ids_BTN, reading.orders_H = ngrams
            reading.hashed.append((ids_BTN.flatten(0, 1).cpu(), rows_A.flatten(0, 1).cpu()))

    return listen


def forget(readings: Sequence[LayerReading]) -> None:
    """What layers have logged of evaluations that are none of a trial's."""
    for reading in readings:
        if reading.layer.rows:
            reading.layer.usage()


def by_pool(readings: Sequence[LayerReading]) -> Iterator[tuple[str, list[LayerReading]]]:
    for pool in dict.fromkeys(each.pool for each in readings):
        yield pool, [each for each in readings if each.pool == pool]
