"""What finding the rows by product keys costs: parameters, products and bytes a token."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from sparsemem.accounting import Account, always_active
from sparsemem.mechanisms.mechanism import Index
from sparsemem.mechanisms.product_key.fields import ProductKey

if TYPE_CHECKING:
    from sparsemem.config import Model


def index_cost(memory: ProductKey, keys: tuple[int, int]) -> Index:
    """What finding the rows costs in one layer, for a table of `keys` (before its virtual expansion).

    For each head, with p_row = min(m, n_row) and p_column alike:

    - scoring: 2 x key width x max(r, 1) x (n_row + n_column);
    - candidates: one sum for each pair of the i-th row key and the j-th column key with i j <= m. With Tucker, p_row
      p_column pairs: `2 r (n_row + n_column)` for the filter, `2 r^2 p_row + 2 r p_row p_column` for the summed core,
      and `cores x m x (2 r^2 + 2 r)` for each core's score of the chosen rows;
    - sorting: n_row log2 p_row + n_column log2 p_column + pairs x log2 m.
    """
    rank, top_m = memory.tucker_rank, memory.top_m
    (rows, columns), (first, second) = logical_keys(memory, keys), candidates_of(memory, keys)
    scoring = 2 * memory.key_dim * max(rank, 1) * (rows + columns)
    pairs = candidates = len(undominated(first, second, top_m))
    if rank:
        pairs = first * second
        candidates = 2 * rank * (rows + columns + rank * first + pairs) + memory.cores * top_m * 2 * rank * (rank + 1)
    sorting = rows * math.log2(first) + columns * math.log2(second) + pairs * math.log2(top_m)
    return Index(memory.heads * scoring, memory.heads * candidates, round(memory.heads * sorting))


def key_parameters(memory: ProductKey, keys: tuple[int, int]) -> int:
    """Values of all keys of one layer, of both sides and all heads and ranks."""
    return (
        (1 if memory.shared_keys else memory.heads)
        * max(memory.tucker_rank, 1)
        * memory.key_dim
        * sum(logical_keys(memory, keys))
    )


def retrieval_account(config: Model, memory: ProductKey, keys: tuple[int, int]) -> Account:
    """Closed form of one layer's retrieval; every token is multiplied with all of it.

    FLOPs: query projection `2 D F`, convolution `2 J D`, and `scoring` and `candidates` of `index_cost`; keys that
    heads share are scored by each. Of the candidates, only the chosen rows' weights have a backward pass.
    """
    features, index = query_features(memory), index_cost(memory, keys)
    norms = {"none": 0, "batch": 2 * features, "layer": 2 * memory.key_dim}[memory.norm]
    cores = memory.cores * memory.heads * memory.tucker_rank**2
    weighing = 2 * (memory.tucker_rank + 1) * memory.tucker_rank * memory.cores * memory.heads * memory.top_m
    scored = always_active(norms + key_parameters(memory, keys) + cores, flops=index.scoring + index.candidates)
    projections = always_active((features + memory.query_conv) * config.width)
    return projections + scored + Account(selection_flops=index.candidates - weighing)


def logical_keys(memory: ProductKey, keys: tuple[int, int]) -> tuple[int, int]:
    """Row keys and column keys that are scored: sqrt(E) times those of the table."""
    times = math.isqrt(memory.virtual_tables)
    return times * keys[0], times * keys[1]


def candidates_of(memory: ProductKey, keys: tuple[int, int]) -> tuple[int, int]:
    rows, columns = logical_keys(memory, keys)
    return min(memory.top_m, rows), min(memory.top_m, columns)


def queries_of(memory: ProductKey) -> int:
    return memory.heads // 2 if memory.shared_query else memory.heads


def query_features(memory: ProductKey) -> int:
    return queries_of(memory) * 2 * (memory.tucker_rank if memory.query_per_rank else 1) * memory.key_dim


@functools.cache
def undominated(rows: int, columns: int, top_m: int) -> tuple[tuple[int, int], ...]:
    """Pairs of places in two sorted lists, from 0, that may be among the top-m sums.

    >>> undominated(3, 3, 3)
    ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))
    """
    return tuple((i, j) for i in range(rows) for j in range(min(columns, top_m // (i + 1))))
