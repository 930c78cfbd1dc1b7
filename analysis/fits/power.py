"""The power law with a floor, `L = E + A x^-alpha`, fitted to many resamples of the same means at once.

It is written `L = c + s (u^-alpha - 1) / alpha` with u = x / x0: then A and E do not run away together as alpha falls, and at alpha = 0 it
is the straight line `c - s log u`, which is thus nested in it. E = c - s / alpha, A = s x0^alpha / alpha.

Letters: B resamples, I points, X any points, G alphas of the grid.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.fits.linear import whitened
from analysis.fits.noise import SeedModel

Array = np.ndarray
ALPHA = (0.0, 3.0)


def box_cox(log_X: Array, alpha_B: Array) -> Array:
    """(u^-alpha - 1) / alpha at log u -> [B, X], -log u where alpha is 0: in `c + s x this` the power law passes smoothly into the line."""
    curved_B1 = alpha_B[:, None] > 1e-9
    safe_B1 = np.where(curved_B1, alpha_B[:, None], 1.0)
    return np.where(curved_B1, np.expm1(-safe_B1 * log_X) / safe_B1, -log_X)


def fit_power(model: SeedModel, log_I: Array, y_BI: Array) -> tuple[Array, Array]:
    """A search over alpha with c and s solved inside (variable projection) -> c, s, alpha [B, 3], and the weighted squares [B]."""
    ones_I, unit_II = whitened(model, np.ones(len(log_I)), np.eye(len(log_I)))

    def centred(values_BI: Array) -> Array:
        return values_BI - np.outer(values_BI @ ones_I, ones_I) / (ones_I @ ones_I)

    target_BI = centred(y_BI @ unit_II.T)

    def solve(alpha_B: Array) -> tuple[Array, Array]:
        g_BI = centred(box_cox(log_I, alpha_B) @ unit_II.T)
        s_B = (g_BI * target_BI).sum(1) / (g_BI**2).sum(1)
        return s_B, ((target_BI - s_B[:, None] * g_BI) ** 2).sum(1)

    grid_G = np.linspace(*ALPHA, 61)
    best_B = np.stack([solve(np.array([alpha]))[1] for alpha in grid_G]).argmin(0)
    low_B, high_B = grid_G[np.maximum(best_B - 1, 0)], grid_G[np.minimum(best_B + 1, len(grid_G) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left_B, right_B = high_B - golden * (high_B - low_B), low_B + golden * (high_B - low_B)
        falls_B = solve(left_B)[1] > solve(right_B)[1]
        low_B, high_B = np.where(falls_B, left_B, low_B), np.where(falls_B, high_B, right_B)
    alpha_B = (low_B + high_B) / 2
    for end in ALPHA:  # the search ends inside its bracket, however near to an end of the range
        alpha_B = np.where(solve(np.array([end]))[1] <= solve(alpha_B)[1], end, alpha_B)
    s_B, squares_B = solve(alpha_B)
    c_B = (y_BI - s_B[:, None] * box_cox(log_I, alpha_B)) @ unit_II.T @ ones_I / (ones_I @ ones_I)
    return np.stack([c_B, s_B, alpha_B], axis=1), squares_B
