"""One law fitted to the runs and to every resample of them.

A resample is a row of weights: how often each run was drawn. So whatever is evaluated once serves all of them. Each
starts from the best of all points known from the fit of the runs, and is started again wherever another's minimum turns
out to be lower than its own.

Letters: B resamples, R those still moving, G points known, N runs, K parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from analysis.fits.newton import SAME, STEPS, Minimum, minimise
from analysis.interval import percent
from analysis.status import Status

Array = np.ndarray
FIRST_STEPS, FOLLOWED = 20, 16
"""All starts descend so many steps, then the lowest of them to their minima."""
ROUNDS, LOOKED_AT = 5, 500
"""How often the resamples are compared, and with how many minima of others."""
APART = 1e-3
"""Minima of the data farther apart than this in a parameter are two."""
UNSETTLED = 0.03
"""Part of the resamples without a minimum beyond which their intervals are not to be quoted."""
FEW_RUNS = 8
"""Below it the percentile intervals of a bootstrap are too narrow: with 5 or 6 runs they cover some 87 of 100 times."""


class Problem(Protocol):
    """Many fits of one law: its objective differs from row to row."""

    def bounds(self) -> tuple[Array, Array]:
        """Ends of the admissible range of each parameter -> [K], [K]."""
        ...

    def starts(self) -> Array:
        """Points to descend from -> [G, K]."""
        ...

    def objectives(self, theta_GK: Array, rows_R: Array) -> Array:
        """Objective of each row at each point -> [R, G]."""
        ...

    def derivatives(self, theta_RK: Array, rows_R: Array) -> tuple[Array, Array, Array]:
        """Objective, gradient and Hessian of each row at its own point -> [R], [R, K], [R, K, K]."""
        ...


class Law(Protocol):
    """A law at given runs, whose objective is a sum over the runs."""

    def bounds(self) -> tuple[Array, Array]:
        """Ends of the admissible range of each parameter -> [K], [K]."""
        ...

    def starts(self) -> Array:
        """Points to descend from -> [G, K]."""
        ...

    def losses(self, theta_GK: Array) -> Array:
        """What each run adds to the objective -> [G, N]."""
        ...

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """Weighted objective, gradient and Hessian -> [R], [R, K], [R, K, K]."""
        ...


@dataclass(frozen=True)
class _Weighted:
    """A law under rows of weights, row 0 the runs as they are."""

    law: Law
    w_BN: Array

    def bounds(self) -> tuple[Array, Array]:
        return self.law.bounds()

    def starts(self) -> Array:
        return self.law.starts()

    def objectives(self, theta_GK: Array, rows_R: Array) -> Array:
        return np.asarray(self.w_BN[rows_R] @ self.law.losses(theta_GK).T)

    def derivatives(self, theta_RK: Array, rows_R: Array) -> tuple[Array, Array, Array]:
        return self.law.derivatives(theta_RK, self.w_BN[rows_R])


def of_bootstrap(run: str | None, resamples: int, random_seed: int) -> dict[str, Any]:
    """How intervals were made, for the conventions of a fit."""
    return {
        "interval": f"{percent()} percentile, not widened for few runs; below {FEW_RUNS} the message says so",
        "resampling": f"{f'runs of column {run}' if run else 'rows'}, drawn with replacement",
        "resamples": resamples,
        "random_seed": random_seed,
        "numpy": np.__version__,
    }


def fit_all(law: Law, w_BN: Array) -> tuple[Minimum, Minimum]:
    """The fit of the runs (one row) and of every row of weights."""
    every = fit_rows(
        _Weighted(law, np.vstack([np.ones((1, w_BN.shape[1])), w_BN])), len(w_BN) + 1, 1e-24 * w_BN.shape[1]
    )
    return Minimum(*(each[:1] for each in every)), Minimum(*(each[1:] for each in every))


def fit_rows(problem: Problem, count: int, negligible: float, valleys: int = 0) -> Minimum:
    """The lowest minimum of every row, row 0 that of the data, restarted from the resamples' minima as those are.

    Args:
        count: rows.
        negligible: objective below which a row is an exact fit and rests.
        valleys: from so many of the lowest minima of the data every row descends too, not only from the lowest of all
            points known.
    """
    low_K, high_K = problem.bounds()

    def descend(theta_BK: Array, rows_B: Array, steps: int = STEPS) -> Minimum:
        return minimise(
            lambda theta_RK, own: problem.derivatives(theta_RK, rows_B[own]), theta_BK, low_K, high_K, negligible, steps
        )

    starts_GK = np.clip(problem.starts(), low_K, high_K)
    data_G = np.zeros(len(starts_GK), int)
    first = descend(starts_GK, data_G, FIRST_STEPS)
    lowest = np.argsort(first.objective_B, kind="stable")[:FOLLOWED]
    found = descend(first.theta_BK[lowest], data_G[lowest])
    known_GK = np.vstack([found.theta_BK, first.theta_BK, starts_GK])
    every_B = np.arange(count)
    start_B = problem.objectives(known_GK, every_B).argmin(1)
    theta_BK, f_B, settled_B = descend(known_GK[start_B], every_B)

    def lower(more: Minimum, rows_R: Array) -> bool:
        """Keep the minima that are lower than a row's own; whether there were any."""
        below = more.objective_B < f_B[rows_R] * (1 - SAME)
        rows = rows_R[below]
        theta_BK[rows], f_B[rows], settled_B[rows] = (
            more.theta_BK[below],
            more.objective_B[below],
            more.settled_B[below],
        )
        return bool(below.any())

    for theta_K in _apart(found)[:valleys]:
        elsewhere_R = np.flatnonzero(np.abs(known_GK[start_B] - theta_K).max(1) > APART)
        lower(descend(np.repeat(theta_K[None], len(elsewhere_R), axis=0), elsewhere_R), elsewhere_R)
    for _ in range(ROUNDS):
        others_GK = theta_BK[:: max(1, len(theta_BK) // LOOKED_AT)]
        others_BG = problem.objectives(others_GK, every_B)
        again_R = np.flatnonzero((others_BG.min(1) < f_B * (1 - SAME)) & (f_B > negligible))
        if not len(again_R) or not lower(descend(others_GK[others_BG[again_R].argmin(1)], again_R), again_R):
            break
    return Minimum(theta_BK, f_B, settled_B)


def _apart(found: Minimum) -> list[Array]:
    """Distinct minima, the lowest first."""
    kept: list[Array] = []
    for theta_K in found.theta_BK[np.argsort(found.objective_B, kind="stable")]:
        if all(np.abs(theta_K - other).max() > APART for other in kept):
            kept.append(theta_K)
    return kept


def verdict(
    data: Minimum, draws: Minimum, ends: Sequence[tuple[Array, str]], remedy: str, runs: int
) -> tuple[Status, str]:
    """The status of a fit and what there is to doubt about it.

    Args:
        ends: for each end of a range, which rows stopped there (row 0: the data) and what that says.
        remedy: what to do where the fit of the data did.
        runs: that were drawn from.
    """
    hit = [words for hit_B, words in ends if hit_B[0]]
    often = [
        f"in {hit_B[1:].mean():.0%} of the resamples {words}"
        for hit_B, words in ends
        if not hit_B[0] and hit_B[1:].mean() > 0.025
    ]
    doubts = [f"{'; '.join(often)}: those intervals end where the admissible range does."] if often else []
    lost = float(np.mean(~draws.settled_B))
    if lost:
        doubts.append(
            f"{np.sum(~draws.settled_B)} of {len(draws.settled_B)} resamples did not settle; they are kept as they are."
        )
    if runs < FEW_RUNS:
        doubts.append(f"{runs} runs to draw from: intervals over fewer than {FEW_RUNS} are too narrow, so train more.")
    status, first = Status.CONVERGED, []
    if hit:
        status, first = Status.BOUND_HIT, [f"{'; '.join(hit)}. {remedy}".strip()]
    elif not data.settled_B[0]:  # also where it never left its start
        status = Status.NO_INTERIOR_MINIMUM
        first = [
            "the descent found no point where the objective is level: look for outliers, or train over a wider range "
            "of every size."
        ]
    elif lost > UNSETTLED:
        status, first = (
            Status.NO_INTERIOR_MINIMUM,
            ["too many resamples found no minimum, so the intervals say little: train more runs."],
        )
    return status, " ".join([*first, *doubts])


def covariance_of(table: dict[str, Array]) -> tuple[tuple[float, ...], ...]:
    """Of parameters by name, row 0 of each that of the data and so left out."""
    with np.errstate(over="ignore", invalid="ignore"):
        return tuple(map(tuple, np.cov(np.array(list(table.values()))[:, 1:]).tolist()))


def resampled_weights(clusters_N: Array, count: int, rng: np.random.Generator) -> Array:
    """How often each run is drawn when clusters of runs are drawn with replacement -> [B, N]."""
    clusters = int(clusters_N.max()) + 1
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), count).astype(float)[:, clusters_N]
