"""The power law with a floor, `L = E + A x^-alpha`, fitted to many resamples of the same means at once.

It is written `L = c + s (u^-alpha - 1) / alpha` with u = x / x0: then A and E do not run away together as alpha falls, and at alpha = 0 it
is the straight line `c - s log u`, which is thus nested in it. E = c - s / alpha, A = s x0^alpha / alpha.

Letters: B resamples, I points, X any points, R alphas tried at once.
"""

from __future__ import annotations

import numpy as np

from analysis.fits.linear import whitened
from analysis.fits.noise import SeedModel

Array = np.ndarray
ALPHA = (0.0, 3.0)
ROUNDS, STEPS = 8, 32
"""The search looks at so many steps between its ends, then between the neighbours of the best, and so on: to 1e-9 of the range."""


def box_cox(log_X: Array, alpha_B: Array) -> Array:
    """(u^-alpha - 1) / alpha at log u -> [B, X], -log u where alpha is 0: in `c + s x this` the power law passes smoothly into the line."""
    curved_B1 = alpha_B[:, None] > 0
    safe_B1 = np.where(curved_B1, alpha_B[:, None], 1.0)
    return np.where(curved_B1, np.expm1(-safe_B1 * log_X) / safe_B1, -log_X)


def fit_means(model: SeedModel, log_I: Array, y_BI: Array) -> tuple[Array, Array]:
    """A search over alpha with c and s solved inside (variable projection) -> c, s, alpha [B, 3], and the weighted squares [B]."""
    ones_I, unit_II = whitened(model, np.ones(len(log_I)), np.eye(len(log_I)))

    def centred(values_BI: Array) -> Array:
        values_BI = values_BI @ unit_II.T
        return values_BI - np.outer(values_BI @ ones_I, ones_I) / (ones_I @ ones_I)

    def solve(alpha_BR: Array) -> tuple[Array, Array]:
        g_BRI = centred(box_cox(log_I, alpha_BR.ravel())).reshape(*alpha_BR.shape, -1)
        s_BR = (g_BRI * target_BI[:, None]).sum(2) / (g_BRI**2).sum(2)
        return s_BR, ((target_BI[:, None] - s_BR[:, :, None] * g_BRI) ** 2).sum(2)

    target_BI, row_B = centred(y_BI), np.arange(len(y_BI))
    low_B, high_B = (np.full(len(y_BI), end) for end in ALPHA)
    for _ in range(ROUNDS):
        alpha_BR = low_B[:, None] + (high_B - low_B)[:, None] * np.linspace(0, 1, STEPS + 1)
        best_B = solve(alpha_BR)[1].argmin(1)
        alpha_B = alpha_BR[row_B, best_B]
        low_B, high_B = alpha_BR[row_B, np.maximum(best_B - 1, 0)], alpha_BR[row_B, np.minimum(best_B + 1, STEPS)]
    alpha_B = np.where(alpha_B < 1e-6, 0.0, alpha_B)  # so near to the line, E and A would be rounding errors
    s_B1, squares_B1 = solve(alpha_B[:, None])
    c_B = (y_BI - s_B1 * box_cox(log_I, alpha_B)) @ unit_II.T @ ones_I / (ones_I @ ones_I)
    return np.stack([c_B, s_B1[:, 0], alpha_B], axis=1), squares_B1[:, 0]
