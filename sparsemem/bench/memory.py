"""`sparsemem bench memory`: what memories cost on the device that trains, as ratios taken in one run.

- `layer/*`: forward, backward and update of one layer of each mechanism, over those of a layer of routed experts alone
  (`moe`). Each memory has a feed-forward beside it, as wide as brings its activated parameters to those of the experts:
  what a budget does in a model, and so what a model pays for the memory. Inputs are normal, token ids uniform: nearly
  every n-gram is another, the worst case for a table.
- `update/*`: one update of the rows that were read, with the forgetting of their gradient, in tables of growing size;
  `looked-up`: rows side by side, whose gradient the optimiser sorts; `pooled`: the values of a product-key memory.
  `same`: the very rows, so that time grows only if something passes over the whole table; `spread`: as many rows from
  all over the table, which leave the caches.
- `gather/*`: bytes of rows per second of the pooled sum over random rows, as a share of what the device reads of random
  rows: the plain sum of as many, which writes next to nothing. `index_select` also writes what it reads, as a lookup
  does. Every turn draws new rows. `copy` counts the bytes that it reads and those that it writes.

Shape letters: B sequences, T positions, S = B x T tokens, D model width, M rows that a token reads, A reads (S x M).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import BYTES_PER_PARAMETER, STEP_OVER_FORWARD, Account
from sparsemem.bench.measure import Place, Row, measurement, over, progress, speeds, take_turns, training_place
from sparsemem.bench.step import MEASURED
from sparsemem.config import Model, Train
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, POOLS, Vocabulary
from sparsemem.memory.table import MemoryTable, Reads
from sparsemem.model import Sizes, count_model
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer

VOCABULARY, ROUTED, RATE = 4096, 64, 1e-6
TRAIN = Train(batch_tokens=1, lr=RATE)
SHAPES: dict[str, dict[str, Any]] = MEASURED["layers"]
UPDATE_ROWS, UPDATE_READS, UPDATE_ROUNDS = (
    (100_000, 1_000_000, 10_000_000),
    (2048, 16),
    25,
)  # reads: tokens, rows of each
LOOKED_UP_WIDTH, POOLED_WIDTH = 8, 16
CACHE_BYTES = 2**28  # more than the caches hold
GATHER_TABLES, GATHER_READS, GATHER_ROUNDS = (
    ((4_000_000, 32), (500_000, 256)),
    (2048, 32),
    25,
)  # rows and width: 512 MB each


def bench_memory() -> Iterator[Row]:
    """Measurements of layers, of updates and of gathers."""
    place = training_place()
    for shape, fields in SHAPES.items():
        progress(f"memory: layers, {shape}")
        yield from _layers(place, shape, **fields)
    for pooled in (False, True):
        progress(f"memory: updates, {'pooled' if pooled else 'looked-up'}")
        yield from _updates(place.in_fp32(), pooled)
    for rows, width in GATHER_TABLES:
        progress(f"memory: gathers, {_size(rows, width)}")
        yield from _gathers(place.in_fp32(), rows, width)


# --- layers -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One mechanism, with the feed-forward that comes to the activated parameters of the routed experts."""

    def __init__(self, config: Model, pool: str, sizes: Sizes) -> None:
        super().__init__()
        (placed,) = POOLS[pool].build(config, sizes, Vocabulary(torch.arange(VOCABULARY), separator=0))
        self.mechanism = placed.layer
        self.ffn = FeedForward(config, sizes.shared_width) if sizes.shared_width else None

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the output, (B, T, D), and the auxiliary loss, a scalar or None."""
        returned = self.mechanism(x_BTD, tokens_BT)
        y_BTD, auxiliary = returned if isinstance(returned, tuple) else (returned, None)
        return (y_BTD if self.ffn is None else y_BTD + self.ffn(x_BTD)), auxiliary


def equal_sizes(config: Model, rows: int) -> dict[str, Sizes]:
    """Sizes of each mechanism's layer, of equal activated parameters to half a unit of the feed-forward's width.

    Args:
        rows: of each table: a square number; hashed tables take primes from there upward.
    """
    sizes = {EXPERTS.name: Sizes(ROUTED, 0)}
    active, unit = (
        layer_account(config, EXPERTS.name, sizes[EXPERTS.name]).active,
        feed_forward_account(config.width, 1).active,
    )
    for pool in (pool for pool in config.pools if pool in MEMORY_POOLS):
        given = config.model_copy(update={pool: config.pools[pool].model_copy(update={"rows": rows})})
        bare = Sizes(0, 0, {pool: MEMORY_POOLS[pool].given(given)})
        sizes[pool] = replace(bare, shared_width=round((active - layer_account(config, pool, bare).active) / unit))
    return sizes


def layer_account(config: Model, pool: str, sizes: Sizes) -> Account:
    """Of the mechanism and its feed-forward."""
    mechanism = count_model(config, sizes, context=1, vocabulary=0).parts[pool]
    return mechanism + feed_forward_account(config.width, sizes.shared_width)


def _layers(
    place: Place, shape: str, rounds: int, batch: tuple[int, int], rows: int, model: dict[str, Any]
) -> list[Row]:
    config = Model.model_validate(model)
    sizes = equal_sizes(config, rows)
    steps = {pool: _layer_step(place, Layer(config, pool, each), config.width, batch) for pool, each in sizes.items()}
    flops = {pool: layer_account(config, pool, each).flops * STEP_OVER_FORWARD for pool, each in sizes.items()}
    return speeds(place, "layer", shape, math.prod(batch), steps, flops, (EXPERTS.name,), rounds)


def _layer_step(place: Place, layer: Layer, width: int, batch: tuple[int, int]) -> Callable[[], float]:
    initialize(layer, seed=0)
    optimizer = Optimizer(layer.to(place.device), TRAIN)

    def step(x_BTD: Tensor, gradient_BTD: Tensor, tokens_BT: Tensor) -> None:
        with place.autocast():
            y_BTD, auxiliary = layer(x_BTD, tokens_BT)
        loss = torch.dot(y_BTD.flatten().float(), gradient_BTD.flatten())
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step(RATE, done=0.0)
        layer.mechanism.end_step()

    def turn() -> float:
        x_BTD, gradient_BTD = (torch.randn(*batch, width, device=place.device) for _ in range(2))
        tokens_BT = torch.randint(VOCABULARY, batch, device=place.device)
        x_BTD.requires_grad_()
        return place.timed(lambda: step(x_BTD, gradient_BTD, tokens_BT))

    return turn


# --- updates ----------------------------------------------------------------------------------------------------------


def _updates(place: Place, pooled: bool) -> Iterator[Row]:
    contenders, other = {}, torch.zeros(CACHE_BYTES // BYTES_PER_PARAMETER, device=place.device)
    tokens, reads = UPDATE_READS
    width = POOLED_WIDTH if pooled else LOOKED_UP_WIDTH
    for rows in UPDATE_ROWS:
        table = MemoryTable((rows,), width, std=0.02)
        initialize(table, seed=0)
        optimizer = Optimizer(table.to(place.device), TRAIN)
        for which, among in (("same", UPDATE_ROWS[0]), ("spread", rows)):
            rows_SM = torch.randperm(among, generator=torch.Generator().manual_seed(0))[: tokens * reads].view(
                tokens, reads
            )
            contenders[which, rows] = _update(place, table, optimizer, rows_SM.to(place.device), pooled, other)
    seconds = take_turns(contenders, UPDATE_ROUNDS)
    for (which, rows), times in seconds.items():
        small = {} if rows == UPDATE_ROWS[0] else {"ratio_to_small": over(times, seconds[which, UPDATE_ROWS[0]])}
        name = f"update/{'pooled' if pooled else 'looked-up'}-{which}"
        yield measurement(name, _size(rows, width), [1e3 * spent for spent in times], "ms", place, **small)


def _update(
    place: Place, table: MemoryTable, optimizer: Optimizer, rows_SM: Tensor, pooled: bool, other: Tensor
) -> Callable[[], float]:
    weights_SM1 = torch.rand(*rows_SM.shape, 1, device=place.device)

    def turn() -> float:
        read = table.pool(Reads(rows_SM), weights_SM1) if pooled else table(rows_SM.view(1, -1, 1))
        read.sum().backward()
        other.add_(1.0)
        return place.timed(lambda: optimizer.step(RATE, done=0.0))

    return turn


# --- gathers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _gathers(place: Place, rows: int, width: int) -> list[Row]:
    table = MemoryTable((rows,), width, std=0.02)
    initialize(table, seed=0)
    table.to(place.device)
    weights_SM1 = torch.rand(*GATHER_READS, 1, device=place.device)
    out_AC = torch.empty(math.prod(GATHER_READS), width, device=place.device)
    first_half, second_half = table.rows_RC.chunk(2)

    def pool() -> float:
        rows_SM = torch.randint(rows, GATHER_READS, device=place.device)
        return place.timed(lambda: table.pool(Reads(rows_SM), weights_SM1))

    def random_read() -> float:
        rows_SM = torch.randint(rows, GATHER_READS, device=place.device)
        return place.timed(lambda: F.embedding_bag(rows_SM, table.rows_RC, mode="sum"))

    def index_select() -> float:
        rows_A = torch.randint(rows, (len(out_AC),), device=place.device)
        return place.timed(lambda: torch.index_select(table.rows_RC, 0, rows_A, out=out_AC))

    def copy() -> float:
        return place.timed(lambda: first_half.copy_(second_half))

    seconds = take_turns(
        {"pool": pool, "random-read": random_read, "index_select": index_select, "copy": copy}, GATHER_ROUNDS
    )
    ratios = {"share_of_random_read": over(seconds["random-read"], seconds["pool"])}
    ratios["ratio_to_index_select"] = over(seconds["index_select"], seconds["pool"])
    found = []
    for name, times in seconds.items():
        moved = BYTES_PER_PARAMETER * (
            rows * width if name == "copy" else out_AC.numel()
        )  # of each half: one is read, one written
        rates = [moved / 1e9 / spent for spent in times]
        found.append(
            measurement(
                f"gather/{name}", _size(rows, width), rates, "GB/s", place, **(ratios if name == "pool" else {})
            )
        )
    return found


def _size(rows: int, width: int) -> str:
    return f"{rows / 1e6:g}Mx{width}"
