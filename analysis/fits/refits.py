"""One law fitted to the runs and to every resample of them.

A resample is a row of weights: how often each run was drawn. So whatever is evaluated once serves all of them. Each starts from the
best of all points known from the fit of the runs, and is started again wherever another's minimum turns out to be lower than its own.

Letters: B resamples, R those still moving, G points known, N runs, K parameters.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from analysis.fits.newton import STEPS, Minimum, minimise

Array = np.ndarray
FIRST_STEPS, FOLLOWED = 20, 16
"""All starts descend so many steps, then the lowest of them to their minima."""
ROUNDS, LOOKED_AT = 5, 500
"""How often the resamples are compared, and with how many minima of others."""


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

    def objectives(theta_GK: Array) -> Array:
        return w_BN @ law.losses(theta_GK).T

    starts_GK = np.clip(law.starts(), low_K, high_K)
    ones_GN = np.ones((len(starts_GK), w_BN.shape[1]))
    first = descend(starts_GK, ones_GN, FIRST_STEPS)
    lowest = np.argsort(first.objective_B, kind="stable")[:FOLLOWED]
    found = descend(first.theta_BK[lowest], ones_GN[lowest])
    best = [int(found.objective_B.argmin())]
    data = Minimum(found.theta_BK[best], found.objective_B[best], found.settled_B[best])

    known_GK = np.vstack([found.theta_BK, first.theta_BK, starts_GK])
    draws = descend(known_GK[objectives(known_GK).argmin(1)], w_BN)
    theta_BK, f_B, settled_B = draws.theta_BK, draws.objective_B, draws.settled_B
    for _ in range(ROUNDS):
        others_GK = theta_BK[:: max(1, len(theta_BK) // LOOKED_AT)]
        others_BG = objectives(others_GK)
        again = np.flatnonzero((others_BG.min(1) < f_B * (1 - 1e-9)) & (f_B > negligible))
        if not len(again):
            break
        more = descend(others_GK[others_BG[again].argmin(1)], w_BN[again])
        lower = more.objective_B < f_B[again]
        if not lower.any():
            break
        again = again[lower]
        theta_BK[again], f_B[again], settled_B[again] = more.theta_BK[lower], more.objective_B[lower], more.settled_B[lower]
    return data, Minimum(theta_BK, f_B, settled_B)


def resampled_weights(clusters_N: Array, count: int, rng: np.random.Generator) -> Array:
    """How often each run is drawn when clusters of runs are drawn with replacement -> [B, N]."""
    clusters = int(clusters_N.max()) + 1
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), count).astype(float)[:, clusters_N]
