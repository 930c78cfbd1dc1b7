"""How evenly a model uses its experts and rows, and how many n-grams of a text share a row of a hashed table.

With n distinct n-grams thrown into m rows at random, m (1 - (1 - 1/m)^n) rows are read, and an n-gram shares its row
with another one with the probability 1 - (1 - 1/m)^(n - 1). A hash that is worse than that loses more.

Shape letters: P positions, N look-back ids, H tables, R entries (rows or experts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsemem.probes.reading import LayerReading

COLUMNS = (
    *("pool", "layer", "table", "order", "entries", "reads", "coverage", "coverage_random", "entropy", "evenness"),
    *("largest_over_mean", "ngrams", "shared", "shared_random"),
)


def usage_rows(readings: Sequence[LayerReading]) -> Iterator[dict[str, Any]]:
    """A row for each layer, and for each table of n-grams: see `load` and `collisions`."""
    for reading in readings:
        known = dict.fromkeys(COLUMNS) | {"pool": reading.pool, "layer": reading.block}
        yield known | load(reading.reads_N)
        for table, (first, end, order) in enumerate(_tables(reading), 1):
            ids_PN, rows_PH = (torch.cat(each) for each in zip(*reading.hashed, strict=True))
            rows_P = rows_PH[:, table - 1] - first
            own = {"table": table, "order": order} | load(reading.reads_N[first:end])
            yield known | own | collisions(ids_PN[:, :order], rows_P, end - first)


def _tables(reading: LayerReading) -> list[tuple[int, int, int]]:
    """First row, end and order of each table of n-grams."""
    if not reading.hashed:
        return []
    first_H = reading.tables[0].first_H.tolist()
    return list(zip(first_H, (*first_H[1:], len(reading.reads_N)), reading.orders_H, strict=True))


def load(reads_R: Tensor) -> dict[str, Any]:
    """`coverage`, the share of entries that are read at all; `entropy` of reads over entries, nats, and `evenness`, the
    same over its largest value, log(entries); `largest_over_mean`, 1 where all are read as often.

    >>> {name: round(value, 3) for name, value in load(torch.tensor([2, 2, 0, 0])).items()}
    {'entries': 4, 'reads': 4, 'coverage': 0.5, 'entropy': 0.693, 'evenness': 0.5, 'largest_over_mean': 2.0}
    """
    total = int(reads_R.sum())
    share_R = reads_R.double() / max(total, 1)
    entropy = float(-torch.special.xlogy(share_R, share_R).sum())
    return {
        "entries": len(reads_R),
        "reads": total,
        "coverage": float((reads_R > 0).double().mean()),
        "entropy": entropy,
        "evenness": entropy / math.log(len(reads_R)) if len(reads_R) > 1 else None,
        "largest_over_mean": float(share_R.max() * len(reads_R)),
    }


def collisions(ids_PN: Tensor, rows_P: Tensor, rows: int) -> dict[str, Any]:
    """`ngrams`, how many distinct ones there are, and `shared`, the share of them whose row another one has too; with
    `coverage_random` and `shared_random`, the closed forms.

    Args:
        ids_PN: an n-gram each.
        rows_P: the row that it has in a table of so many `rows`.
    """
    distinct, place = np.unique(ids_PN.numpy(), axis=0, return_index=True)
    count, n = np.bincount(rows_P.numpy()[place], minlength=rows), len(distinct)
    empty = (1 - 1 / rows) ** n
    return {
        "ngrams": n,
        "coverage_random": 1 - empty,
        "shared": float(count[count > 1].sum() / n),
        "shared_random": 1 - (1 - 1 / rows) ** (n - 1),
    }
