"""Minimise many small problems at once: damped Newton steps within a box, every row at its own pace.

Made for bootstrap refits: hundreds or thousands of rows with a handful of parameters each, whose objective, gradient
and Hessian come from one array expression. A row leaves the batch as soon as no step can lower it.

Letters: B rows, R those still moving, K parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Derivatives = Callable[[Array, Array], tuple[Array, Array, Array]]
"""(theta [R, K], row numbers [R]) -> objective [R], gradient [R, K], Hessian [R, K, K]."""
STEPS = 300  # nearly all rows rest after fifteen
SETTLED, DONE = 1e-10, 1e-14  # what a full step would still gain, relative to the objective
# part of the objective by which another minimum must be lower to be taken: of equal ones the first found stays
SAME = 1e-9
# full steps at the end, judged by the gradient: there the objective is level within its rounding, a parameter is not
# yet
POLISH = 4
TINY = 1e-12  # so near to an end of its range a parameter is put there
FLAT = 1e-9  # least curvature, relative to the diagonal, that a step relies on
# beyond it, beside a diagonal of 0, eigenvalues may not converge where a process flushes denormal numbers, as training
# does
HUGE = 1e12


class Minimum(NamedTuple):
    """Where every row came to rest."""

    theta_BK: Array
    objective_B: Array
    settled_B: Array
    """Whether a further full Newton step would gain next to nothing; False where the steps ran out or got stuck."""


def minimise(
    derivatives: Derivatives, theta_BK: Array, low_K: Array, high_K: Array, negligible: float, steps: int = STEPS
) -> Minimum:
    """Descend from `theta_BK`; no row ever rises by more than rounding.

    Steps are damped after Levenberg and Marquardt. A parameter at an end of its range that wants to leave it is held; a
    step that would leave the range ends there, so that parameters which balance each other keep their balance.

    Args:
        negligible: objective below which a row is an exact fit and rests.
    """
    theta_BK = np.clip(theta_BK, low_K, high_K)
    count = len(theta_BK)
    f_B, g_BK, h_BKK = derivatives(theta_BK, np.arange(count))
    damping_B, gain_B = np.full(count, 1e-3), np.full(count, np.inf)
    live_R = np.flatnonzero(np.isfinite(f_B))
    for _ in range(steps):
        at_RK, g_RK = theta_BK[live_R], g_BK[live_R]
        bottom_RK, top_RK = at_RK <= low_K, at_RK >= high_K
        held_RK = (bottom_RK & (g_RK > 0)) | (top_RK & (g_RK < 0))
        move_RK, gain_B[live_R] = _step(g_RK, h_BKK[live_R], held_RK, damping_B[live_R])
        moving_R = (gain_B[live_R] > DONE * f_B[live_R]) & (f_B[live_R] > negligible) & (damping_B[live_R] < 1e9)
        live_R, at_RK, move_RK = live_R[moving_R], at_RK[moving_R], move_RK[moving_R]
        if not len(live_R):
            break
        outward_RK = (bottom_RK[moving_R] & (move_RK < 0)) | (top_RK[moving_R] & (move_RK > 0))
        turned = np.flatnonzero(outward_RK.any(1))
        if len(turned):  # pulled over the end by another parameter, though its own gradient points inside
            rows, held_RK = live_R[turned], (held_RK[moving_R] | outward_RK)[turned]
            move_RK[turned] = _step(g_BK[rows], h_BKK[rows], held_RK, damping_B[rows])[0]
        far_R1 = (np.abs(move_RK) / (1 + np.abs(at_RK))).max(1, keepdims=True)
        move_RK *= np.minimum(1, 2 / np.maximum(far_R1, 1e-300))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            room_RK = np.where(move_RK == 0, 0, (np.where(move_RK < 0, low_K, high_K) - at_RK) / move_RK)
        trial_RK = at_RK + np.where(room_RK > 0, room_RK, np.inf).min(1, keepdims=True).clip(max=1) * move_RK
        trial_RK = np.where(trial_RK < low_K + TINY, low_K, np.where(trial_RK > high_K - TINY, high_K, trial_RK))
        f_R, g_RK, h_RKK = derivatives(trial_RK, live_R)
        lower_R = f_R < f_B[live_R]  # not so for NaN
        better = live_R[lower_R]
        theta_BK[better], f_B[better], g_BK[better], h_BKK[better] = (
            trial_RK[lower_R],
            f_R[lower_R],
            g_RK[lower_R],
            h_RKK[lower_R],
        )
        damping_B[live_R] = np.maximum(np.where(lower_R, damping_B[live_R] / 5, damping_B[live_R] * 8), 1e-12)
    settled_B = (gain_B <= SETTLED * f_B) | (f_B <= negligible)
    _polish(derivatives, theta_BK, f_B, g_BK, h_BKK, low_K, high_K, np.flatnonzero(settled_B))
    return Minimum(theta_BK, f_B, settled_B)


def _polish(
    derivatives: Derivatives,
    theta_BK: Array,
    f_B: Array,
    g_BK: Array,
    h_BKK: Array,
    low_K: Array,
    high_K: Array,
    live_R: Array,
) -> None:
    """Full Newton steps, in place, as long as they make a further one gain less: to where rounding alone moves a
    parameter.
    """
    move_RK, gain_R = full_step(theta_BK[live_R], g_BK[live_R], h_BKK[live_R], low_K, high_K)
    for _ in range(POLISH):
        if not len(live_R):
            return
        trial_RK = np.clip(theta_BK[live_R] + move_RK, low_K, high_K)
        f_R, g_RK, h_RKK = derivatives(trial_RK, live_R)
        move_RK, left_R = full_step(trial_RK, g_RK, h_RKK, low_K, high_K)
        better_R = (left_R < gain_R) & (f_R <= f_B[live_R] * (1 + SAME))
        live_R, gain_R, move_RK = live_R[better_R], left_R[better_R], move_RK[better_R]
        theta_BK[live_R], f_B[live_R] = trial_RK[better_R], f_R[better_R]


def full_step(at_RK: Array, g_RK: Array, h_RKK: Array, low_K: Array, high_K: Array) -> tuple[Array, Array]:
    """The undamped step from a point in the box, and what it would gain -> [R, K], [R]."""
    finite_R = np.isfinite(h_RKK).all((1, 2)) & np.isfinite(g_RK).all(1)
    g_RK, h_RKK = np.where(finite_R[:, None], g_RK, 0), np.where(finite_R[:, None, None], h_RKK, np.eye(g_RK.shape[1]))
    held_RK = ((at_RK <= low_K) & (g_RK > 0)) | ((at_RK >= high_K) & (g_RK < 0))
    move_RK, gain_R = _step(g_RK, h_RKK, held_RK, np.zeros(len(at_RK)))
    return move_RK, np.where(finite_R, gain_R, np.inf)


def _step(g_RK: Array, h_RKK: Array, held_RK: Array, damping_R: Array) -> tuple[Array, Array]:
    """The damped step, and what a full one would gain -> [R, K], [R].

    The Hessian is scaled to a unit diagonal and its eigenvalues are taken by size, so the step goes downhill where the
    objective is not convex.
    """
    scale_RK = np.sqrt(np.abs(np.einsum("rkk->rk", h_RKK))) + 1e-150
    free_RKK = ~(held_RK[:, :, None] | held_RK[:, None])
    scaled_RKK = np.clip(h_RKK / (scale_RK[:, :, None] * scale_RK[:, None]), -HUGE, HUGE)
    size_RK, axes_RKK = np.linalg.eigh(np.where(free_RKK, scaled_RKK, np.eye(g_RK.shape[1])))
    size_RK = np.maximum(np.abs(size_RK), FLAT)
    along_RK = np.einsum("rkj,rk->rj", axes_RKK, np.where(held_RK, 0, g_RK / scale_RK))
    move_RK = -np.einsum("rkj,rj->rk", axes_RKK, along_RK / (size_RK + damping_R[:, None])) / scale_RK
    return np.where(held_RK, 0, move_RK), (along_RK**2 / size_RK).sum(1) / 2
