"""Which trials of a study are held against each other, and how deep one's layers stand in another beyond what two seeds
differ by. It must not know torch's models.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsemem.config import Trial
from sparsemem.mechanisms import POOLS
from sparsemem.probes.alignment import layers_taken, soft_alignment

SHARES, SEEDS = "shares", "seeds"


def pairs(trials: Sequence[Trial]) -> Iterator[tuple[str, Trial, Trial]]:
    """Those of one seed and different shares (`SHARES`), and those of one share and different seeds (`SEEDS`, the
    null), which else agree; of training, only the tokens have to, as each share may have a tuned rate.
    """
    for first, second in itertools.combinations(trials, 2):
        if not _alike(first, second):
            continue
        if first.seed == second.seed and first.shares != second.shares:
            yield SHARES, first, second
        elif first.seed != second.seed and (first.shares, first.train) == (second.shares, second.train):
            yield SEEDS, first, second


def _alike(first: Trial, second: Trial) -> bool:
    """But for shares, seed and training; a memory that only one of them holds may have any settings."""
    if (first.data, first.budget) != (second.data, second.budget):
        return False
    one, other = first.model.model_dump(), second.model.model_dump()
    return all(value == other[name] or (name in POOLS and None in (value, other[name])) for name, value in one.items())


def share_of(trial: Trial) -> str:
    """Names its shares in a table: rho, `dense`, or each pool's where there are more than two."""
    if trial.rho is None:
        return "dense"
    if len(trial.shares) > 2:
        return " ".join(f"{pool}={share:g}" for pool, share in trial.shares.items())
    return f"{trial.rho:g}"


def alignments(compared: Sequence[tuple[str, Trial, Trial, Tensor]]) -> list[dict[str, Any]]:
    """A row for each pair of different shares, in either order, and each layer of the second: its soft alignment index
    in layers of the reference, that of the reference's other seeds (the mean; None without any, or at a layer that the
    reference lacks), and the difference.

    Args:
        compared: as `pairs` gives them, with the CKA of blocks alone, (P, Q).
    """
    ordered = [
        each
        for kind, first, second, cka_PQ in compared
        for each in ((kind, first, second, cka_PQ), (kind, second, first, cka_PQ.T))
    ]
    nulls: dict[str, list[list[float]]] = {}
    for kind, reference, _, cka_PQ in ordered:
        if kind == SEEDS:
            nulls.setdefault(reference.id, []).append(soft_alignment(cka_PQ, layers_taken(len(cka_PQ))))
    rows = []
    for kind, reference, trial, cka_PQ in ordered:
        if kind != SHARES:
            continue
        taken = layers_taken(len(cka_PQ))
        own = [statistics.fmean(layer) for layer in zip(*nulls.get(reference.id, []), strict=True)]
        for layer, index in enumerate(soft_alignment(cka_PQ, taken), 1):
            null = own[layer - 1] if layer <= len(own) else None
            rows += [
                {
                    "reference_id": reference.id,
                    "trial_id": trial.id,
                    "reference_share": share_of(reference),
                    "share": share_of(trial),
                    "seed": trial.seed,
                    "layer": layer,
                    "layers_taken": taken,
                    "index": index,
                    "null": null,
                    "difference": None if null is None else index - null,
                }
            ]
    return rows


def by_share(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float | None, float | None, int]]:
    """Reference's share, the other's, mean difference over layers, its standard error over seeds (None of a single
    one), and the number of seeds, of `alignments`; several pairs of one seed count as one.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        seeds = found.setdefault((row["reference_share"], row["share"]), {})
        layers = seeds.setdefault(row["seed"], [])
        if row["difference"] is not None and not math.isnan(row["difference"]):
            layers.append(row["difference"])
    table = list[tuple[str, str, float | None, float | None, int]]()
    for (reference, share), seeds in found.items():
        means = [statistics.fmean(layers) for layers in seeds.values() if layers]
        error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
        table.append((reference, share, statistics.fmean(means) if means else None, error, len(means)))
    return table
