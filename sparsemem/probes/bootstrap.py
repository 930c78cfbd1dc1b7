"""Intervals over sequences: tokens of one sequence depend on each other, so whole sequences are drawn again, with
replacement.

Every quantity here is made of sums over tokens, so that a resample is a weighted sum over sequences.

Shape letters: S sequences, R resamples, K quantities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LOW, HIGH = 0.025, 0.975

Numbers = npt.NDArray[np.float64]
Estimate = tuple[float | None, float | None, float | None]
"""Value and 95% interval; None where there is none: nothing was counted, or there is one sequence only."""


def ratio(total_S: Numbers, count_S: Numbers) -> Estimate:
    """Mean over tokens, of the sums and the numbers of tokens of each sequence.

    >>> ratio(np.array([2.0, 4.0]), np.array([1.0, 1.0]))
    (3.0, 2.0, 4.0)
    """
    return estimate(lambda total_R, count_R: total_R / count_R, total_S, count_S)


def rank_correlation(x_P: Numbers, y_P: Numbers, sequence_P: npt.NDArray[np.int64], sequences: int) -> Estimate:
    """Spearman's, ties at their mean rank. Ranks are those of all tokens, also in a resample.

    Args:
        sequence_P: number of each token's sequence, below `sequences`.
    """
    if len(x_P) < 2:
        return None, None, None
    x_P, y_P = (mean_ranks(each) for each in (x_P, y_P))
    x_P, y_P = x_P - x_P.mean(), y_P - y_P.mean()
    sums = [
        np.bincount(sequence_P, each, sequences).astype(np.float64)
        for each in (None, x_P, y_P, x_P**2, y_P**2, x_P * y_P)
    ]

    def correlation(n: Numbers, x: Numbers, y: Numbers, xx: Numbers, yy: Numbers, xy: Numbers) -> Numbers:
        return np.asarray((xy - x * y / n) / np.sqrt((xx - x**2 / n) * (yy - y**2 / n)))

    return estimate(correlation, *sums)


def mean_ranks(values_P: Numbers) -> Numbers:
    """From 0; equal values share the mean of their ranks.

    >>> mean_ranks(np.array([7.0, 3.0, 7.0, 9.0]))
    array([1.5, 0. , 1.5, 3. ])
    """
    _, place_P, count = np.unique(values_P, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count + 1) / 2)[place_P])


def estimate(of: Callable[..., Numbers], *sums_S: Numbers) -> Estimate:
    """A function of sums over sequences, of all of them and of each resample."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of(*(each.sum() for each in sums_S)))
        if not np.isfinite(value):
            return None, None, None
        if len(sums_S[0]) < 2:
            return value, None, None
        drawn_RS = _drawn(len(sums_S[0]))
        found_R = np.asarray(of(*(drawn_RS @ each for each in sums_S)))
    found_R = found_R[np.isfinite(found_R)]
    low, high = np.quantile(found_R, (LOW, HIGH)) if len(found_R) else (None, None)
    return value, None if low is None else float(low), None if high is None else float(high)


@lru_cache(maxsize=1)
def _drawn(sequences: int) -> Numbers:
    """How often each sequence is in each resample, (R, S): the same for all quantities, which so stay paired."""
    draws = np.random.default_rng(0).multinomial(sequences, np.full(sequences, 1 / sequences), RESAMPLES)
    return draws.astype(np.float64)


def named(name: str, found: Estimate) -> dict[str, float | None]:
    """Columns of a table: the value and its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
