"""How far the gates of a memory open, and at what: n-gram frequency, pointwise mutual information, ends of units.

A gate says how much of a row is let in, not how large the row is: hence also the share |gate x value| / |hidden state|.
Every branch of every layer is measured; none is chosen.

Shape letters: P positions, M branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsemem.probes.bootstrap import Estimate, estimate, named, rank_correlation, ratio
from sparsemem.probes.reading import LayerReading
from sparsemem.probes.sample import Mask, Sample
from sparsemem.train.text_loss import ORDERS

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Numbers = npt.NDArray[np.float64]


def gate_rows(sample: Sample, readings: Sequence[LayerReading]) -> Iterator[dict[str, Any]]:
    """A row for each layer with a gate, branch and measure: `value`, its 95% interval over sequences, and the number of
    tokens.

    Measures: `mean`, `std` and quantiles of the gate; `part`, the mean of |gate x value| / |hidden state|;
    `rank_correlation_frequency` and `rank_correlation_information`, Spearman's with how often the n-gram of `order`
    that ends there occurs in the training text and with its pointwise mutual information; `by_frequency`, the mean
    where that number is from `least` to `most`; `ends` and `elsewhere`, the mean where a unit of several tokens ends
    and where none does, and `ends_less_elsewhere`.
    """
    for reading in readings:
        if not reading.gates:
            continue
        gates_PM, parts_PM = (torch.cat(each).numpy() for each in (reading.gates, reading.parts))
        for branch in range(gates_PM.shape[1]):
            part_P = parts_PM[:, min(branch, parts_PM.shape[1] - 1)]
            for row in _measures(sample, gates_PM[:, branch], part_P):
                known = {"pool": reading.pool, "layer": reading.block, "branch": branch + 1}
                yield known | {"measure": "", "order": None, "least": None, "most": None} | row


def _measures(sample: Sample, gate_P: Numbers, part_P: Numbers) -> Iterator[dict[str, Any]]:
    every_P = np.ones(len(gate_P), dtype=bool)
    yield _row("mean", mean(sample, gate_P, every_P), every_P)
    spread = float(gate_P.std()), None, None
    yield _row("std", spread, every_P)
    for quantile in QUANTILES:
        yield _row(f"quantile_{quantile:g}", (float(np.quantile(gate_P, quantile)), None, None), every_P)
    yield _row("part", mean(sample, part_P, every_P), every_P)
    if sample.knows_training:
        for order in ORDERS[1:]:
            yield from _by_ngram(sample, gate_P, order)
    ends_P = sample.unit_ends_P
    yield _row("ends", mean(sample, gate_P, ends_P), ends_P)
    yield _row("elsewhere", mean(sample, gate_P, ~ends_P), ~ends_P)
    sums = [sample.sums(gate_P * chosen_P, chosen_P) for chosen_P in (ends_P, ~ends_P)]
    less = estimate(lambda at, n, off, m: at / n - off / m, *sums[0], *sums[1])
    yield _row("ends_less_elsewhere", less, every_P)


def _by_ngram(sample: Sample, gate_P: Numbers, order: int) -> Iterator[dict[str, Any]]:
    counts_P, information_P = sample.occurrences_P(order), sample.information_P(order)
    for name, values_P, known_P in (
        ("frequency", counts_P.astype(float), counts_P >= 0),
        ("information", information_P, ~np.isnan(information_P)),
    ):
        found = rank_correlation(gate_P[known_P], values_P[known_P], sample.sequence_P[known_P], sample.sequences)
        yield _row(f"rank_correlation_{name}", found, known_P) | {"order": order}
    for least, most, chosen_P in sample.bins(order):
        bounds = {"order": order, "least": least, "most": most}
        yield _row("by_frequency", mean(sample, gate_P, chosen_P), chosen_P) | bounds


def mean(sample: Sample, values_P: Numbers, chosen_P: Mask) -> Estimate:
    """Over the chosen positions, with its interval over sequences."""
    return ratio(*sample.sums(np.where(chosen_P, values_P, 0.0), chosen_P))


def _row(measure: str, found: Estimate, counted_P: Mask) -> dict[str, Any]:
    return {"measure": measure} | named("value", found) | {"tokens": int(counted_P.sum())}


def text_rows(sample: Sample, readings: Sequence[LayerReading]) -> Iterator[dict[str, Any]]:
    """Each token of the middle sequence of the sample, which no model has a say in, with all gates at it: a column
    `gate LAYER.BRANCH` each.
    """
    first = sample.sequences // 2 * sample.context
    gates = {
        f"gate {reading.block}.{branch + 1}": torch.cat(reading.gates)[:, branch]
        for reading in readings
        if reading.gates
        for branch in range(reading.gates[0].shape[1])
    }
    for place in range(first, first + sample.context) if gates else ():
        token = int(sample.ids[place])
        text = sample.tokenizer.decode([token], skip_special_tokens=False)
        yield {"token": token, "text": text, **{name: float(gate_P[place]) for name, gate_P in gates.items()}}
