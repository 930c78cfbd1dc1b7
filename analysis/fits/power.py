"""The power law with a floor, `L = E + A x^-alpha`, fitted to many resamples of the same means at once.

It is written `L = c + s (u^-alpha - 1) / alpha` with u = x / x0: then A and E do not run away together as alpha falls,
and at alpha = 0 it is the straight line `c - s log u`, which is thus nested in it. E = c - s / alpha, A = s x0^alpha /
alpha.

Letters: B resamples, I points, X any points, R alphas tried at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.fits.exponential import growth
from analysis.fits.linear import whitened
from analysis.fits.noise import SeedModel

Array = np.ndarray
ALPHA = (0.0, 3.0)
ROUNDS, STEPS = 3, 32
"""The search looks at so many steps between its ends, then between the neighbours of the best, and so on: to 1e-4 of
the range.
"""
POLISH = 40
"""From there steps by Newton's rule on the derivative lead to where rounding alone moves alpha; a bisection where they
would leave the neighbours of the best.
"""


def box_cox(log_X: Array, alpha_B: Array) -> Array:
    """(u^-alpha - 1) / alpha at log u -> [B, X], -log u where alpha is 0: in `c + s x this` the power law passes
    smoothly into the line.
    """
    curved_B1 = alpha_B[:, None] > 0
    safe_B1 = np.where(curved_B1, alpha_B[:, None], 1.0)
    return np.where(curved_B1, np.expm1(-safe_B1 * log_X) / safe_B1, -log_X)


def fit_means(model: SeedModel, log_I: Array, y_BI: Array) -> tuple[Array, Array]:
    """A search over alpha with c and s solved inside (variable projection) -> c, s, alpha [B, 3], and the weighted
    squares [B].
    """
    ones_I, unit_II = whitened(model, np.ones(len(log_I)), np.eye(len(log_I)))

    def centred(values_BI: Array) -> Array:
        values_BI = values_BI @ unit_II.T
        return values_BI - np.outer(values_BI @ ones_I, ones_I) / (ones_I @ ones_I)

    def solve(alpha_BR: Array) -> tuple[Array, Array]:
        g_BRI = centred(box_cox(log_I, alpha_BR.ravel())).reshape(*alpha_BR.shape, -1)
        s_BR = (g_BRI * target_BI[:, None]).sum(2) / (g_BRI**2).sum(2)
        return s_BR, ((target_BI[:, None] - s_BR[:, :, None] * g_BRI) ** 2).sum(2)

    def slopes(alpha_B: Array) -> tuple[Array, Array]:
        """First and second derivative by alpha of half the squares, s solved inside."""
        g_BI, d_BI, e_BI = (centred(each) for each in _curved(log_I, alpha_B))
        size_B, along_B = (g_BI**2).sum(1), (g_BI * target_BI).sum(1)
        s_B = along_B / size_B
        rest_BI = target_BI - s_B[:, None] * g_BI
        turn_B = ((d_BI * target_BI).sum(1) - 2 * s_B * (g_BI * d_BI).sum(1)) / size_B  # ds/dalpha
        first_B = -s_B * (d_BI * rest_BI).sum(1)
        down_BI = -turn_B[:, None] * g_BI - s_B[:, None] * d_BI
        return first_B, -turn_B * (d_BI * rest_BI).sum(1) - s_B * ((e_BI * rest_BI).sum(1) + (d_BI * down_BI).sum(1))

    target_BI, row_B = centred(y_BI), np.arange(len(y_BI))
    low_B, high_B = (np.full(len(y_BI), end) for end in ALPHA)
    for _ in range(ROUNDS):
        alpha_BR = low_B[:, None] + (high_B - low_B)[:, None] * np.linspace(0, 1, STEPS + 1)
        best_B = solve(alpha_BR)[1].argmin(1)
        alpha_B = alpha_BR[row_B, best_B]
        low_B, high_B = alpha_BR[row_B, np.maximum(best_B - 1, 0)], alpha_BR[row_B, np.minimum(best_B + 1, STEPS)]
    alpha_B = _level(slopes, alpha_B, low_B, high_B)
    alpha_B = np.where(alpha_B < 1e-6, 0.0, alpha_B)  # so near to the line, E and A would be rounding errors
    s_B1, squares_B1 = solve(alpha_B[:, None])
    c_B = (y_BI - s_B1 * box_cox(log_I, alpha_B)) @ unit_II.T @ ones_I / (ones_I @ ones_I)
    return np.stack([c_B, s_B1[:, 0], alpha_B], axis=1), squares_B1[:, 0]


def _curved(log_I: Array, alpha_B: Array) -> tuple[Array, Array, Array]:
    """`box_cox` and its first two derivatives by alpha -> [B, I] each."""
    value, slope, bend = growth(-alpha_B[:, None] * log_I)
    return -log_I * value, log_I**2 * slope, -(log_I**3) * bend


def _level(slopes: Callable[[Array], tuple[Array, Array]], alpha_B: Array, low_B: Array, high_B: Array) -> Array:
    """Where the first derivative passes 0 upwards between the ends, or the end that it points to."""
    ends = low_B, high_B
    rises_B, falls_B = slopes(low_B)[0] >= 0, slopes(high_B)[0] <= 0
    alpha_B, low_B, high_B = alpha_B.copy(), low_B.copy(), high_B.copy()
    for _ in range(POLISH):
        first_B, second_B = slopes(alpha_B)
        low_B, high_B = np.where(first_B < 0, alpha_B, low_B), np.where(first_B < 0, high_B, alpha_B)
        with np.errstate(divide="ignore", invalid="ignore"):
            next_B = alpha_B - first_B / second_B
        within_B = (second_B > 0) & (next_B >= low_B) & (next_B <= high_B)
        next_B = np.where(within_B, next_B, (low_B + high_B) / 2)
        if np.abs(next_B - alpha_B).max(initial=0) < 1e-14:
            break
        alpha_B = next_B
    return np.where(rises_B, ends[0], np.where(falls_B, ends[1], alpha_B))
