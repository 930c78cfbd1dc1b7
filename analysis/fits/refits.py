"""One law fitted to the runs and to every resample of them.

A resample is a row of weights: how often each run was drawn. So whatever is evaluated once serves all of them. Each starts from the
best of all points known from the fit of the runs, and is started again wherever another's minimum turns out to be lower than its own.

Letters: B resamples, R those still moving, G points known, N runs, K parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from analysis.fits.newton import STEPS, Minimum, minimise
from analysis.fits.types import Status

Array = np.ndarray
FIRST_STEPS, FOLLOWED = 20, 16
"""All starts descend so many steps, then the lowest of them to their minima."""
ROUNDS, LOOKED_AT = 5, 500
"""How often the resamples are compared, and with how many minima of others."""
UNSETTLED = 0.03
"""Part of the resamples without a minimum beyond which their intervals are not to be quoted."""
FEW_RUNS = 8
"""Below it the percentile intervals of a bootstrap are too narrow: with 5 or 6 runs they cover some 87 of 100 times."""


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


def fit_all(law: Law, w_BN: Array) -> tuple[Minimum, Minimum]:
    """The fit of the runs (one row) and of every row of weights."""
    low_K, high_K = law.bounds()
    negligible = 1e-24 * w_BN.shape[1]

    def descend(theta_BK: Array, own_BN: Array, steps: int = STEPS) -> Minimum:
        return minimise(lambda theta_RK, rows: law.derivatives(theta_RK, own_BN[rows]), theta_BK, low_K, high_K, negligible, steps)

    def objectives(theta_GK: Array, own_BN: Array) -> Array:
        return own_BN @ law.losses(theta_GK).T

    starts_GK = np.clip(law.starts(), low_K, high_K)
    ones_GN = np.ones((len(starts_GK), w_BN.shape[1]))
    first = descend(starts_GK, ones_GN, FIRST_STEPS)
    lowest = np.argsort(first.objective_B, kind="stable")[:FOLLOWED]
    found = descend(first.theta_BK[lowest], ones_GN[lowest])
    known_GK = np.vstack([found.theta_BK, first.theta_BK, starts_GK])
    all_BN = np.vstack([ones_GN[:1], w_BN])  # row 0: the runs as they are, restarted from the resamples' minima as those are
    every = descend(known_GK[objectives(known_GK, all_BN).argmin(1)], all_BN)
    theta_BK, f_B, settled_B = every.theta_BK, every.objective_B, every.settled_B
    for _ in range(ROUNDS):
        others_GK = theta_BK[:: max(1, len(theta_BK) // LOOKED_AT)]
        others_BG = objectives(others_GK, all_BN)
        again = np.flatnonzero((others_BG.min(1) < f_B * (1 - 1e-9)) & (f_B > negligible))
        if not len(again):
            break
        more = descend(others_GK[others_BG[again].argmin(1)], all_BN[again])
        lower = more.objective_B < f_B[again]
        if not lower.any():
            break
        again = again[lower]
        theta_BK[again], f_B[again], settled_B[again] = more.theta_BK[lower], more.objective_B[lower], more.settled_B[lower]
    return Minimum(theta_BK[:1], f_B[:1], settled_B[:1]), Minimum(theta_BK[1:], f_B[1:], settled_B[1:])


def verdict(data: Minimum, draws: Minimum, ends: Sequence[tuple[Array, str]], remedy: str, runs: int) -> tuple[Status, str]:
    """The status of a fit and what there is to doubt about it.

    Args:
        ends: for each end of a range, which rows stopped there (row 0: the data) and what that says.
        remedy: what to do where the fit of the data did.
        runs: that were drawn from.
    """
    hit = [words for hit_B, words in ends if hit_B[0]]
    often = [f"in {hit_B[1:].mean():.0%} of the resamples {words}" for hit_B, words in ends if not hit_B[0] and hit_B[1:].mean() > 0.025]
    doubts = [f"{'; '.join(often)}: those intervals end where the admissible range does."] if often else []
    lost = float(np.mean(~draws.settled_B))
    if lost:
        doubts.append(f"{lost:.1%} of the resamples did not settle; they are kept as they are.")
    if runs < FEW_RUNS:
        doubts.append(f"{runs} runs to draw from: intervals over fewer than {FEW_RUNS} are too narrow, so train more.")
    status, first = Status.CONVERGED, []
    if hit:
        status, first = Status.BOUND_HIT, [f"{'; '.join(hit)}. {remedy}".strip()]
    elif not data.settled_B[0]:  # also where it never left its start
        status = Status.NO_INTERIOR_MINIMUM
        first = ["the descent found no point where the objective is level: look for outliers, or train over a wider range of every size."]
    elif lost > UNSETTLED:
        status, first = Status.NO_INTERIOR_MINIMUM, ["too many resamples found no minimum, so the intervals say little: train more runs."]
    return status, " ".join([*first, *doubts])


def covariance_of(table: dict[str, Array]) -> tuple[tuple[float, ...], ...]:
    """Of parameters by name, row 0 of each that of the data and so left out."""
    with np.errstate(over="ignore", invalid="ignore"):
        return tuple(map(tuple, np.cov(np.array(list(table.values()))[:, 1:]).tolist()))


def resampled_weights(clusters_N: Array, count: int, rng: np.random.Generator) -> Array:
    """How often each run is drawn when clusters of runs are drawn with replacement -> [B, N]."""
    clusters = int(clusters_N.max()) + 1
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), count).astype(float)[:, clusters_N]
