"""Whether runs scatter as runs of one kind do: repeats against each other, and all of them against a law.

A sweep of hyperparameters in one table, or two data sets, has repeats that no seed sets so far apart; a law through
them is one of neither.

Letters: N runs, C cells (runs of equal sizes), K parameters of a law, T sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import fdtrc  # scipy.stats would take a second to import

from analysis.fits.points import Points
from analysis.fits.runs import ALIKE
from analysis.fits.types import REFUTED
from analysis.status import Status
from sparsemem.values import listed

Array = np.ndarray
SAME = 1.0001
"""Runs whose sizes differ by less than this factor are of one cell."""
GROSS = 0.1
"""Part of the loss beyond which a run is off. Seeds differ by a hundredth or less, routed models by up to four."""
WIDE = 0.02
"""Standard deviation of repeats, as part of the loss, from which on there is something to say."""
MANY = 0.1
"""Part of the runs that may be off; more are no odd ones."""
REMEDY = (
    "keep the best of each cell (--best-of-cell) where they are a sweep of settings, or fit each kind apart (--group "
    "COLUMN)."
)


def cells_of(x_TN: Array) -> Array:
    """Number of the cell of each run -> [N], 0, 1, ..."""
    code_TN = np.empty(x_TN.shape, int)
    for code_N, x_N in zip(code_TN, x_TN, strict=True):
        order = np.argsort(x_N, kind="stable")
        code_N[order] = np.cumsum(np.diff(np.log(x_N[order]), prepend=np.log(x_N[order[:1]])) > np.log(SAME))
    return np.unique(code_TN, axis=1, return_inverse=True)[1].ravel()


def judge_scatter(points: Points, rest_N: Array, slopes_NK: Array | None = None) -> tuple[str, str]:
    """Why the law is refuted, and what there is to doubt; '' where there is nothing.

    Args:
        rest_N: log loss less that of the law.
        slopes_NK: derivatives of the law's log loss by its parameters, for the F test of lack of fit; None: it is made
            elsewhere.
    """
    log_y_N, size_N, cells_N = np.log(points.y_N), np.abs(rest_N), cells_of(points.x_TN)
    counts_C = np.bincount(cells_N)
    least_C = np.full(len(counts_C), np.inf)
    np.minimum.at(least_C, cells_N, log_y_N)
    above_N, repeats = log_y_N - least_C[cells_N], int(counts_C[counts_C > 1].sum())
    if (above_N > np.log1p(GROSS)).sum() > max(1, MANY * repeats):
        worst = int(above_N.argmax())
        return (
            f"runs of one size differ by up to {np.expm1(above_N[worst]):.0%} ({points.at[worst]}), more than seeds "
            f"do: {REMEDY}",
            "",
        )
    if (size_N > np.log1p(GROSS)).sum() > max(1, MANY * len(rest_N)):
        worst = int(size_N.argmax())
        scatter = f"{np.expm1(np.median(size_N)):.0%} (median; {points.at[worst]}: {np.expm1(rest_N[worst]):+.0%})"
        return f"runs lie {scatter} off the law, so it is not theirs, or they are of several kinds: {REMEDY}", ""
    doubts = []
    off = np.flatnonzero(size_N > np.log1p(max(GROSS, 6 * float(np.median(size_N)))))
    if len(off):
        named = listed(
            [f"{points.at[i]} ({np.expm1(rest_N[i]):+.0%})" for i in off[np.argsort(-size_N[off], kind="stable")]]
        )
        doubts.append(
            f"far off the law, which hardly heeds them: {named}; leave out those that diverged, or train them again."
        )
    pure_N = log_y_N - (np.bincount(cells_N, log_y_N) / counts_C)[cells_N]
    free, squares, lack = len(log_y_N) - len(counts_C), float(pure_N @ pure_N), len(counts_C)
    if free and squares <= free * ALIKE**2:
        doubts.append(
            f"{repeats} rows repeat each other to the last digit: copies narrow every interval, so keep one of each."
        )
    elif free and squares > free * WIDE**2:
        doubts.append(f"runs of one size differ by {np.sqrt(squares / free):.1%} (standard deviation): {REMEDY}")
    single = points.clusters_N.max() + 1 == len(log_y_N)
    if (
        slopes_NK is not None
        and free
        and squares > free * ALIKE**2
        and single
        and not len(off)
        and lack > slopes_NK.shape[1]
    ):
        # The objective is no sum of squares; one step leads to the least squares that the F test asks for.
        left_N, lack = rest_N - slopes_NK @ np.linalg.lstsq(slopes_NK, rest_N, rcond=None)[0], lack - slopes_NK.shape[1]
        p = float(fdtrc(lack, free, max(float(left_N @ left_N) - squares, 0.0) / lack / (squares / free)))
        if p < REFUTED:
            reason = (
                f"the law misses the runs by more than repeats of a size differ (p = {p:.1g}): fit a narrower range, "
                "or another law."
            )
            return reason, " ".join(doubts)
    return "", " ".join(doubts)


def around(points: Points, predicted_N: Array) -> str:
    """How far runs lie around a law, in a sentence: the median, which odd runs hardly move, and the farthest run where
    it is far off.
    """
    rest_N = np.log(points.y_N / predicted_N)
    median, worst = float(np.median(np.abs(rest_N))), int(np.abs(rest_N).argmax())
    far = abs(rest_N[worst]) > max(np.log1p(GROSS), 6 * median)
    farthest = f"; {points.at[worst]} lies {np.expm1(rest_N[worst]):+.0%} off" if far else ""
    return f"Runs lie {np.expm1(median):.2%} around the law (median{farthest})."


def with_scatter(status: Status, message: str, reason: str, doubts: str) -> tuple[Status, str]:
    """The status and the message with what `judge_scatter` says: its reason first, its doubts last."""
    return Status.POOR_FIT if reason else status, " ".join(filter(None, (reason, message, doubts)))


def slopes_of(log_value: Callable[[Array], Array], theta_K: Array, free_K: Array) -> Array:
    """Derivatives of a law by its free parameters, by central differences -> [N, K].

    Args:
        log_value: parameters [R, K] -> log loss [R, N].
    """
    steps_KK = (np.eye(len(theta_K)) * (1e-6 * np.abs(theta_K) + 1e-12))[free_K]
    up_KN, down_KN = log_value(theta_K + steps_KK), log_value(theta_K - steps_KK)
    return (up_KN - down_KN).T / (2 * steps_KK.sum(1))
