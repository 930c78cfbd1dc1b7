"""Loss against active parameters, training tokens and routed experts: the joint law of Ludziejewski et al. 2025, arXiv
2502.05172.

`L = A E^^delta N^(alpha + gamma ln E^) + B E^^omega D^(beta + zeta ln E^) + C`, where E^ is the number of experts E,
saturating at both ends as in Clark et al. 2022 (`routing.py`): one expert counts as E_start, and ever more as E_max.
Exponents have the paper's signs.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (C; log A, alpha, delta, gamma and
log B, beta, omega, zeta about the means of log N, log D and log E; log E_start, log E_max / E_start).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.points import read_points
from analysis.fits.refits import of_bootstrap
from analysis.fits.routing import RATIO, START, saturating
from analysis.fits.runs import require_resamples
from analysis.fits.sized_law import SizedFit, SizedLaw, fit_sized
from analysis.interval import percent, takes_level

Array = np.ndarray
POWERS, BENDS = (-2.0, -0.01), (-3.0, 3.0)
"""Admissible exponents of N and D at the mean of log E, and all other exponents, about the means."""
NAMES = ("C", "A", "alpha", "delta", "gamma", "B", "beta", "omega", "zeta", "E_start", "E_max")
LEAST_RUNS = 14


@dataclass(frozen=True)
class MoeJointLaw(SizedLaw):
    """The joint law of experts; its sizes are active parameters, tokens and routed experts."""

    NAMES = NAMES
    LIMITED = (*NAMES[:-1], "E_max / E_start")
    FLAT = 1e-11

    def bounds(self) -> tuple[Array, Array]:
        most = np.exp(self.log_y_N.max())
        low, high = (
            [np.log(most) + shift, POWERS[end], BENDS[end], BENDS[end]] * 2 for shift, end in ((-30, 0), (5, 1))
        )
        return np.array([0.0, *low, *np.log([START[0], RATIO[0]])]), np.array(
            [most, *high, *np.log([START[1], RATIO[1]])]
        )

    def starts(self) -> Array:
        """A grid over exponents and saturation, the rest by least squares of the law without gamma and
        zeta -> [G, K].
        """
        found, weight_N1 = [], np.exp(-self.log_y_N)[:, None]
        (log_n_N, log_d_N, log_e_N), (n_mean, d_mean, e_mean) = self.log_x_TN, self.means
        one_N = np.ones_like(self.log_y_N)
        for start, ratio, alpha, beta in itertools.product(
            (1.3, 3.0, 8.0), (10.0, 100.0, 1e3), (-0.15, -0.25, -0.5), (-0.15, -0.25, -0.5)
        ):
            saturation = np.log([start, ratio])
            z_N = np.log(10) * saturating(np.exp(log_e_N), *saturation[:, None, None])[0][0] - e_mean
            by_n_N, by_d_N = np.exp(alpha * (log_n_N - n_mean)), np.exp(beta * (log_d_N - d_mean))
            basis_N5 = np.stack([one_N, by_n_N, by_n_N * z_N, by_d_N, by_d_N * z_N], axis=1)
            linear_5 = np.linalg.lstsq(basis_N5 * weight_N1, one_N, rcond=None)[0]
            c, a, b = np.maximum(linear_5[[0, 1, 3]], 1e-2 * np.exp(self.log_y_N.min()))
            delta, omega = np.clip(linear_5[[2, 4]] / (a, b), -1, 1)
            found.append([c, np.log(a), alpha, delta, 0.0, np.log(b), beta, omega, 0.0, *saturation])
        return np.clip(found, *self.bounds())

    def log_value(self, theta_RK: Array, *log_x: Array) -> Array:
        return np.array(np.log(self._terms(theta_RK, *log_x)[0]))

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        with np.errstate(over="ignore", invalid="ignore"):
            value_RN, by_n_RN, by_d_RN, n_N, d_N, z_RN, (by_start_RN, by_ratio_RN) = self._terms(
                theta_RK, *self.log_x_TN
            )
            delta, gamma, omega, zeta = theta_RK.T[[3, 4, 7, 8], :, None]
            by_z_RN = by_n_RN * (delta + gamma * n_N) + by_d_RN * (omega + zeta * d_N)
            columns = [np.ones_like(value_RN)]
            for term_RN, x_N in ((by_n_RN, n_N), (by_d_RN, d_N)):
                columns += [term_RN, term_RN * x_N, term_RN * z_RN, term_RN * x_N * z_RN]
            columns += [by_z_RN * by_start_RN, by_z_RN * by_ratio_RN]
            return self.squares(np.log(value_RN) - self.log_y_N, np.stack(columns, axis=2) / value_RN[:, :, None], w_RN)

    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        c, log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_start, log_ratio = theta_BK.T
        n_mean, d_mean, e_mean = self.means
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            a = level * np.exp(log_a - alpha * n_mean - delta * e_mean + gamma * n_mean * e_mean)
            b = level * np.exp(log_b - beta * d_mean - omega * e_mean + zeta * d_mean * e_mean)
            own = (
                a,
                alpha - gamma * e_mean,
                delta - gamma * n_mean,
                gamma,
                b,
                beta - zeta * e_mean,
                omega - zeta * d_mean,
                zeta,
            )
            return dict(zip(NAMES, (level * c, *own, np.exp(log_start), np.exp(log_start + log_ratio)), strict=True))

    def _terms(self, theta_RK: Array, log_n_X: Array, log_d_X: Array, log_e_X: Array) -> tuple[Any, ...]:
        """L^, its terms of N and of D, log N, log D and log E^ about the means, and how log E^ changes with either
        saturation.
        """
        n_mean, d_mean, e_mean = self.means
        c, log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_start, log_ratio = theta_RK.T[:, :, None]
        z_RX, *slopes = (np.log(10) * each for each in saturating(np.exp(log_e_X), log_start, log_ratio))
        z_RX, n_X, d_X = z_RX - e_mean, log_n_X - n_mean, log_d_X - d_mean
        by_n_RX = np.exp(log_a + alpha * n_X + delta * z_RX + gamma * n_X * z_RX)
        by_d_RX = np.exp(log_b + beta * d_X + omega * z_RX + zeta * d_X * z_RX)
        return c + by_n_RX + by_d_RX, by_n_RX, by_d_RX, n_X, d_X, z_RX, slopes


@dataclass(frozen=True, kw_only=True)
class MoeJointFit(SizedFit):
    """The joint law of experts. The first of `columns` is that of the active parameters, the third that of the routed
    experts.
    """

    EXPERTS = 2

    def _found(self) -> str:
        gamma, zeta, most = (self.parameters[name] for name in ("gamma", "zeta", "E_max"))
        return (
            f"An e-fold of effective experts changes the exponent of {self.columns[0]} by {gamma.value:+.4f} "
            f"({percent()} interval {gamma.low:+.4f} to {gamma.high:+.4f}) and that of {self.columns[1]} by "
            f"{zeta.value:+.4f} ({zeta.low:+.4f} to {zeta.high:+.4f}); experts saturate at {most.value:.3g} "
            f"({most.low:.3g} to {most.high:.3g})."
        )


@takes_level
def fit_moe_joint(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    experts: str,
    loss: str,
    run: str | None = None,
    resamples: int = 200,
    random_seed: int = 0,
) -> MoeJointFit:
    """Fit the joint law of experts.

    Args:
        frame: one run, or one checkpoint, a row, all of one kind of router; a dense model has one expert. A column
            `trial_id` names the rows used; of a column `status` only what says finished is.
        params: column of the active parameters.
        tokens: column of the training tokens.
        experts: column of the number of routed experts.
        loss: column of the loss.
        run: column that says which rows are checkpoints of one run, drawn together.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text, a size that is not positive or fewer than one expert, or a trial
            id is repeated.
    """
    require_resamples(resamples, "fit_moe_joint")
    columns = (params, tokens, experts)
    points = read_points(frame, columns, loss, run, "fit_moe_joint")
    if (points.x_TN[2] < 1).any():
        raise AnalysisError(f"fit_moe_joint: column `{experts}` must hold 1 (dense) or more")
    conventions = {
        "columns": {"N": params, "D": tokens, "E": experts},
        "loss": loss,
        "form": "loss = A E^^delta N^(alpha + gamma ln E^) + B E^^omega D^(beta + zeta ln E^) + C, "
        "1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max",
        "objective": "sum over rows of (log fitted loss - log loss)^2, natural logarithms",
        "admissible": f"at the means of log N, log D and log E: powers of N and D {POWERS[0]:g} to {POWERS[1]:g}, "
        f"other exponents {BENDS[0]:g} to {BENDS[1]:g}; E_start {START[0]:g} to {START[1]:g}, E_max / E_start "
        f"{RATIO[0]:g} to {RATIO[1]:g}; C not negative",
        **of_bootstrap(run, resamples, random_seed),
    }
    common: dict[str, Any] = {"law": "moe-joint", "columns": columns, "rows": points.rows, "conventions": conventions}
    if refusal := points.too_few(columns, "eleven", LEAST_RUNS, (3, 3, 4)):
        return MoeJointFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    return fit_sized(MoeJointFit, MoeJointLaw, points, common, "Train at more sizes, tokens or numbers of experts.")
