"""Minimise many small problems at once: damped Newton steps within a box, every row at its own pace.

Made for bootstrap refits: hundreds or thousands of rows with a handful of parameters each, whose objective, gradient and Hessian come
from one array expression. A row leaves the batch as soon as no step can lower it.

Letters: B rows, R those still moving, K parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Derivatives = Callable[[Array, Array], tuple[Array, Array, Array]]
"""(theta [R, K], row numbers [R]) -> objective [R], gradient [R, K], Hessian [R, K, K]."""
STEPS = 2000  # a curved valley with a floor near 0 takes hundreds; nearly all rows rest after fifteen
SETTLED, DONE = 1e-10, 1e-14  # what a full step would still gain, relative to the objective
FLAT = 1e-9  # least curvature, relative to the diagonal, that a step relies on


@dataclass(frozen=True)
class Minimum:
    """Where every row came to rest."""

    theta_BK: Array
    objective_B: Array
    settled_B: Array
    """Whether a further full Newton step would gain next to nothing; False where the steps ran out or got stuck."""


def minimise(derivatives: Derivatives, theta_BK: Array, low_K: Array, high_K: Array, negligible: float) -> Minimum:
    """Descend from `theta_BK`; no row ever rises.

    The Hessian is scaled to a unit diagonal and its eigenvalues are taken by size, so a step goes downhill where the objective is not
    convex; it is damped after Levenberg and Marquardt. A parameter at an end of its range that wants to leave it is held.

    Args:
        negligible: objective below which a row is an exact fit and rests.
    """
    theta_BK = np.clip(theta_BK, low_K, high_K)
    count, k = theta_BK.shape
    f_B, g_BK, h_BKK = derivatives(theta_BK, np.arange(count))
    damping_B, gain_B = np.full(count, 1e-3), np.full(count, np.inf)
    live_R = np.flatnonzero(np.isfinite(f_B))
    for _ in range(STEPS):
        g_RK, h_RKK, at_RK = g_BK[live_R], h_BKK[live_R], theta_BK[live_R]
        held_RK = ((at_RK <= low_K) & (g_RK > 0)) | ((at_RK >= high_K) & (g_RK < 0))
        free_RKK = ~(held_RK[:, :, None] | held_RK[:, None])
        scale_RK = np.sqrt(np.abs(np.einsum("rkk->rk", h_RKK))) + 1e-150
        unit_RKK = np.where(free_RKK, h_RKK / (scale_RK[:, :, None] * scale_RK[:, None]), np.eye(k))
        size_RK, axes_RKK = np.linalg.eigh(unit_RKK)
        size_RK = np.maximum(np.abs(size_RK), FLAT)
        along_RK = np.einsum("rkj,rk->rj", axes_RKK, np.where(held_RK, 0, g_RK / scale_RK))
        gain_B[live_R] = (along_RK**2 / size_RK).sum(1) / 2
        resting_R = (gain_B[live_R] <= DONE * f_B[live_R]) | (f_B[live_R] <= negligible) | (damping_B[live_R] > 1e9)
        moving_R = ~resting_R
        live_R = live_R[moving_R]
        if not len(live_R):
            break
        damped_RK = along_RK[moving_R] / (size_RK[moving_R] + damping_B[live_R, None])
        move_RK = -np.einsum("rkj,rj->rk", axes_RKK[moving_R], damped_RK) / scale_RK[moving_R]
        move_RK *= np.minimum(1, 2 / np.maximum(np.abs(move_RK).max(1, keepdims=True), 1e-300))  # parameters are logs and exponents
        trial_RK = np.clip(theta_BK[live_R] + move_RK, low_K, high_K)
        f_R, g_RK, h_RKK = derivatives(trial_RK, live_R)
        lower_R = f_R < f_B[live_R]  # not so for NaN
        better = live_R[lower_R]
        theta_BK[better], f_B[better], g_BK[better], h_BKK[better] = trial_RK[lower_R], f_R[lower_R], g_RK[lower_R], h_RKK[lower_R]
        damping_B[live_R] = np.maximum(np.where(lower_R, damping_B[live_R] / 5, damping_B[live_R] * 8), 1e-12)
    return Minimum(theta_BK, f_B, (gain_B <= SETTLED * f_B) | (f_B <= negligible))
