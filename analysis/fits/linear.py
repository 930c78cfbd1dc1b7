"""Laws that are linear in their parameters, fitted to the means of points. Student's t is exact for them, so nothing is
resampled.

The means come from `noise.seed_model` with their covariance; generalised least squares uses all of it, so a point with
more seeds counts for more, and what a seed gives to all points alike widens no comparison.

Letters: I points, K parameters, X any points.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.special import stdtr  # scipy.stats would take a second to import

from analysis.fits.noise import Noise, SeedModel
from analysis.fits.types import Estimate

Array = np.ndarray
Name = TypeVar("Name", bound=Hashable)
LEVEL = 0.05
"""Chance, corrected for the number of questions, below which a difference is told from noise."""
TIE = 2.0
"""AICc difference below which two laws are not told apart (Burnham and Anderson, Model Selection and Multimodel
Inference, sec. 2.6).
"""


@dataclass(frozen=True)
class LinearFit:
    """Parameters and where they come from."""

    theta_K: Array
    map_KI: Array
    """Linear map from the means to the parameters."""
    covariance_KK: Array
    noise: Noise
    squares: float
    """Weighted sum of squares of the means around the law; a weight is the number of runs that a mean is worth."""

    def estimate(self, along_K: Array) -> Estimate:
        """A linear combination of the parameters with its 95% interval."""
        return _interval(along_K @ self.theta_K, along_K @ self.covariance_KK @ along_K, self.noise)

    def predict(self, design_XK: Array) -> dict[str, Array]:
        """The law at the rows of a design, with its pointwise band -> loss, low, high, each [X]."""
        loss_X = design_XK @ self.theta_K
        half_X = self.noise.t * np.sqrt(np.einsum("xk,kl,xl->x", design_XK, self.covariance_KK, design_XK))
        return {"loss": loss_X, "low": loss_X - half_X, "high": loss_X + half_X}


def fit_linear(model: SeedModel, design_IK: Array, noise: Noise) -> LinearFit:
    """Generalised least squares of the means on the columns of the design, which must be independent."""
    x_IK, y_I, unit_II = whitened(model, design_IK, model.mean_I, np.eye(len(design_IK)))
    inverse_KI = np.linalg.pinv(x_IK)
    theta_K = inverse_KI @ y_I
    covariance_KK = noise.sd**2 * inverse_KI @ inverse_KI.T
    return LinearFit(theta_K, inverse_KI @ unit_II, covariance_KK, noise, float(np.sum((y_I - x_IK @ theta_K) ** 2)))


def leftover(model: SeedModel, design_IK: Array) -> Noise:
    """What a law leaves over, to stand in for the noise of a study that repeats nothing."""
    df = max(1, design_IK.shape[0] - design_IK.shape[1])
    return Noise(math.sqrt(fit_linear(model, design_IK, Noise(1, 1)).squares / df), df)


def combine(model: SeedModel, weights_I: Array, noise: Noise) -> Estimate:
    """A linear combination of the means with its 95% interval."""
    return _interval(weights_I @ model.mean_I, weights_I @ model.covariance_II @ weights_I * noise.sd**2, noise)


def chance(difference: Estimate, noise: Noise) -> float:
    """Chance of so large a difference if there were none: p value of Student's t, two-sided."""
    return (
        float(2 * stdtr(noise.df, -abs(difference.value) / difference.se))
        if difference.se > 0
        else float(difference.value == 0)
    )


def holm(chances: Mapping[Name, float]) -> dict[Name, float]:
    """Holm's step-down correction (Scand. J. Stat. 6, 1979): the k-th least p value times the number not less than it,
    never falling.
    """
    corrected: dict[Name, float] = {}
    least = 0.0
    for k, name in enumerate(sorted(chances, key=lambda name: chances[name])):
        least = max(least, min(1.0, (len(chances) - k) * chances[name]))
        corrected[name] = least
    return corrected


def covariance(model: SeedModel, weights_KI: Array, noise: Noise) -> tuple[tuple[float, ...], ...]:
    """Of several linear combinations of the means."""
    return nested(noise.sd**2 * weights_KI @ model.covariance_II @ weights_KI.T)


def nested(matrix: Array) -> tuple[tuple[float, ...], ...]:
    """A matrix as a fit holds it."""
    return tuple(tuple(map(float, row)) for row in matrix)


def whitened(model: SeedModel, *arrays: Array) -> tuple[Array, ...]:
    """Arrays over the points, transformed so that the noise of the means is independent and of one run's size."""
    lower_II = np.linalg.cholesky(model.covariance_II)
    return tuple(np.linalg.solve(lower_II, array) for array in arrays)


def part(model: SeedModel, own_I: Array) -> SeedModel:
    """The model of some of the points, with the noise of all."""
    own = {name: getattr(model, name)[own_I] for name in ("x_I", "mean_I", "counts_I", "map_IN")}
    return replace(model, **own)


def left_out_errors(model: SeedModel, design_IK: Array) -> Array:
    """Mean of each point less what the law, fitted to all others, predicts for it -> [I]; NaN where the others do not
    determine the law.

    In closed form, without a refit: (Q m)_i / Q_ii with Q = C^-1 - C^-1 X (X' C^-1 X)^-1 X' C^-1 (Dubrule, Math. Geol.
    15, 1983).
    """
    precision_II = np.linalg.inv(model.covariance_II)
    weighted_IK = precision_II @ design_IK
    q_II = precision_II - weighted_IK @ np.linalg.solve(design_IK.T @ weighted_IK, weighted_IK.T)
    determined_I = np.diag(q_II) > 1e-9 * np.diag(precision_II)
    return np.where(determined_I, q_II @ model.mean_I / np.where(determined_I, np.diag(q_II), 1.0), np.nan)


def _interval(value: float, variance: float, noise: Noise) -> Estimate:
    se = math.sqrt(max(variance, 0.0))
    return Estimate(float(value), float(value - noise.t * se), float(value + noise.t * se), se)
