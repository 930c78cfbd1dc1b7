"""Loss against the precision that weights are trained in: the law of Kumar et al. 2024, arXiv 2411.04330.

`L = E + A N'^-alpha + B D^-beta`, where of N parameters trained in P bits `N' = N (1 - exp(-P / gamma))` count. The paper multiplies such
a factor for each of weights, activations and the KV cache; here it is one, for whichever precision was varied.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (E, log A and log B at the mean sizes, alpha, beta,
log gamma).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.points import Points, read_points
from analysis.fits.refits import of_bootstrap
from analysis.fits.runs import distinct, require_resamples
from analysis.fits.sized_law import SizedFit, SizedLaw, fit_sized
from analysis.interval import percent, takes_level
from analysis.status import Status

Array = np.ndarray
ALPHA, GAMMAS = (0.02, 2.0), (0.05, 100.0)
"""Admissible exponents, and bits."""
NAMES = ("E", "A", "B", "alpha", "beta", "gamma")
LEAST_RUNS = 9


def counted(bits: Array, gamma: Array) -> Array:
    """Share of the parameters that counts: 1 - exp(-bits / gamma)."""
    return -np.expm1(-bits / gamma)


@dataclass(frozen=True)
class PrecisionLaw(SizedLaw):
    """The law of precision; its sizes are parameters, tokens and bits."""

    NAMES = LIMITED = NAMES
    FLAT = 1e-9

    def bounds(self) -> tuple[Array, Array]:
        most = np.exp(self.log_y_N.max())
        low = [0.0, np.log(most) - 30, np.log(most) - 30, *(ALPHA[0],) * 2, np.log(GAMMAS[0])]
        return np.array(low), np.array([most, np.log(most) + 5, np.log(most) + 5, *(ALPHA[1],) * 2, np.log(GAMMAS[1])])

    def starts(self) -> Array:
        """A grid over exponents and gamma, the rest by least squares -> [G, K]."""
        found, weight_N1 = [], np.exp(-self.log_y_N)[:, None]
        (log_n_N, log_d_N, log_p_N), (n_mean, d_mean, _) = self.log_x_TN, self.means
        for alpha, beta, gamma in itertools.product((0.2, 0.35, 0.6), (0.2, 0.35, 0.6), (0.5, 2.0, 6.0)):
            log_n = log_n_N + np.log(counted(np.exp(log_p_N), np.array(gamma)))
            basis = [np.ones_like(log_n), np.exp(-alpha * (log_n - n_mean)), np.exp(-beta * (log_d_N - d_mean))]
            linear_3 = np.linalg.lstsq(np.stack(basis, axis=1) * weight_N1, np.ones(len(log_n)), rcond=None)[0]
            e, a, b = np.maximum(linear_3, 1e-2 * np.exp(self.log_y_N.min()))
            found.append([e, np.log(a), np.log(b), alpha, beta, np.log(gamma)])
        return np.clip(found, *self.bounds())

    def log_value(self, theta_RK: Array, *log_x: Array) -> Array:
        log_n_X, log_d_X, log_p_X = log_x
        e, log_a, log_b, alpha, beta, log_gamma = theta_RK.T[:, :, None]
        n_mean, d_mean, _ = self.means
        log_n_RX = log_n_X + np.log(counted(np.exp(log_p_X), np.exp(log_gamma)))
        return np.log(e + np.exp(log_a - alpha * (log_n_RX - n_mean)) + np.exp(log_b - beta * (log_d_X - d_mean)))

    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        e, log_a, log_b, alpha, beta, log_gamma = theta_BK.T
        n_mean, d_mean, _ = self.means
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            a, b = level * np.exp(log_a + alpha * n_mean), level * np.exp(log_b + beta * d_mean)
            return dict(zip(NAMES, (level * e, a, b, alpha, beta, np.exp(log_gamma)), strict=True))


@dataclass(frozen=True, kw_only=True)
class PrecisionFit(SizedFit):
    """The law of precision. The third of `columns` is that of the bits."""

    def predict(self, params: Any, tokens: Any, bits: Any) -> pd.DataFrame:
        """The law with its pointwise band -> the columns of the sizes, loss, low, high.

        Raises:
            AnalysisError: no law was fitted or a size is not positive.
        """
        return self._band(params, tokens, bits)

    def _found(self) -> str:
        gamma = self.parameters["gamma"]
        shares = ", ".join(f"{counted(np.array(bits), np.array(gamma.value)):.1%} in {bits}" for bits in (4, 8, 16))
        return (
            f"Of the parameters {shares} bits count as they would in full precision "
            f"(gamma {gamma.value:.3g} bits, {percent()} interval {gamma.low:.3g} to {gamma.high:.3g})."
        )


@takes_level
def fit_precision(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    bits: str,
    loss: str,
    run: str | None = None,
    resamples: int = 400,
    random_seed: int = 0,
) -> PrecisionFit:
    """Fit the law of precision.

    Args:
        frame: one run, or one checkpoint, a row. A column `trial_id` names the rows used; of a column `status` only what says finished is.
        params: column of the parameters.
        tokens: column of the training tokens.
        bits: column of the bits of precision in training, such as 4 or 16.
        loss: column of the loss.
        run: column that says which rows are checkpoints of one run, drawn together.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, or a trial id is repeated.
    """
    require_resamples(resamples, "fit_precision")
    columns = (params, tokens, bits)
    points = read_points(frame, columns, loss, run, "fit_precision")
    conventions = {
        "columns": {"N": params, "D": tokens, "P": bits},
        "loss": loss,
        "form": "loss = E + A (N (1 - exp(-P / gamma)))^-alpha + B D^-beta",
        "objective": "sum over rows of (log fitted loss - log loss)^2, natural logarithms",
        "admissible": f"exponents {ALPHA[0]:g} to {ALPHA[1]:g}, gamma {GAMMAS[0]:g} to {GAMMAS[1]:g} bits, E not negative",
        **of_bootstrap(run, resamples, random_seed),
    }
    common: dict[str, Any] = {"law": "precision", "columns": columns, "rows": points.rows, "conventions": conventions}
    if refusal := _refusal(points, columns):
        return PrecisionFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    return fit_sized(PrecisionFit, PrecisionLaw, points, common, "Train at more sizes, or in fewer bits.")


def _refusal(points: Points, columns: tuple[str, str, str]) -> tuple[Status, str] | None:
    """Why no law can be fitted, or None."""
    if refusal := points.refusal():
        return refusal
    if len(points.y_N) < LEAST_RUNS:
        return Status.TOO_FEW_POINTS, f"{len(points.y_N)} rows; six parameters need at least {LEAST_RUNS}: train more."
    for column, x_N in zip(columns, points.x_TN, strict=True):
        if distinct(x_N) < 3:
            return Status.TOO_FEW_POINTS, f"`{column}` has {distinct(x_N)} distinct value(s); its law needs at least 3."
    return None
