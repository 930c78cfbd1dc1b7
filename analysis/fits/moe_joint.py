"""Loss against active parameters, training tokens and routed experts: the joint law of Ludziejewski et al. 2025, arXiv 2502.05172.

`L = A E^^delta N^(alpha + gamma ln E^) + B E^^omega D^(beta + zeta ln E^) + C`, where E^ is the number of experts E, saturating at
both ends as in Clark et al. 2022 (`routing.py`): one expert counts as E_start, and ever more as E_max. Exponents have the paper's signs.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (C; log A, alpha, delta, gamma and log B, beta, omega,
zeta about the means of log N, log D and log E; log E_start, log E_max / E_start).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.interval import ends, percent, takes_level
from analysis.fits.points import Points, read_points
from analysis.fits.refits import FEW_RUNS, covariance_of, fit_all, resampled_weights, verdict
from analysis.fits.routing import RATIO, START, saturating
from analysis.fits.runs import distinct, require_resamples
from analysis.fits.scatter import judge_scatter, slopes_of, with_scatter
from analysis.fits.types import Estimate, Fit, Status, with_doubt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
POWERS, BENDS = (-2.0, -0.01), (-3.0, 3.0)
"""Admissible exponents of N and D at the mean of log E, and all other exponents, about the means."""
NAMES = ("C", "A", "alpha", "delta", "gamma", "B", "beta", "omega", "zeta", "E_start", "E_max")
LEAST_RUNS = 14
FLAT = 1e-11  # curvature, relative to the diagonal, below which other parameters fit as well


@dataclass(frozen=True)
class MoeJointLaw:
    """The law at given runs, sizes and losses in logs; its objective is the sum of squares of log loss."""

    log_n_N: Array
    log_d_N: Array
    log_e_N: Array
    log_y_N: Array

    @property
    def means(self) -> tuple[float, float, float]:
        """Of log N, log D and log E."""
        return float(self.log_n_N.mean()), float(self.log_d_N.mean()), float(self.log_e_N.mean())

    def bounds(self) -> tuple[Array, Array]:
        most = np.exp(self.log_y_N.max())
        low, high = ([np.log(most) + shift, POWERS[end], BENDS[end], BENDS[end]] * 2 for shift, end in ((-30, 0), (5, 1)))
        return np.array([0.0, *low, *np.log([START[0], RATIO[0]])]), np.array([most, *high, *np.log([START[1], RATIO[1]])])

    def starts(self) -> Array:
        """A grid over exponents and saturation, the rest by least squares of the law without gamma and zeta -> [G, K]."""
        found, weight_N1 = [], np.exp(-self.log_y_N)[:, None]
        n_mean, d_mean, e_mean = self.means
        one_N = np.ones_like(self.log_y_N)
        for start, ratio, alpha, beta in itertools.product((1.3, 3.0, 8.0), (10.0, 100.0, 1e3), (-0.15, -0.25, -0.5), (-0.15, -0.25, -0.5)):
            saturation = np.log([start, ratio])
            z_N = np.log(10) * saturating(np.exp(self.log_e_N), *saturation[:, None, None])[0][0] - e_mean
            by_n_N, by_d_N = np.exp(alpha * (self.log_n_N - n_mean)), np.exp(beta * (self.log_d_N - d_mean))
            basis_N5 = np.stack([one_N, by_n_N, by_n_N * z_N, by_d_N, by_d_N * z_N], axis=1)
            linear_5 = np.linalg.lstsq(basis_N5 * weight_N1, one_N, rcond=None)[0]
            c, a, b = np.maximum(linear_5[[0, 1, 3]], 1e-2 * np.exp(self.log_y_N.min()))
            delta, omega = np.clip(linear_5[[2, 4]] / (a, b), -1, 1)
            found.append([c, np.log(a), alpha, delta, 0.0, np.log(b), beta, omega, 0.0, *saturation])
        return np.clip(found, *self.bounds())

    def log_value(self, theta_RK: Array, log_n_X: Array, log_d_X: Array, log_e_X: Array) -> Array:
        """log L^ -> [R, X]."""
        return np.log(self._terms(theta_RK, log_n_X, log_d_X, log_e_X)[0])

    def at_runs(self, theta_RK: Array) -> Array:
        """log L^ of the runs -> [R, N]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a step too far is not lower, and so not taken
            return self.log_value(theta_RK, self.log_n_N, self.log_d_N, self.log_e_N)

    def losses(self, theta_GK: Array) -> Array:
        return np.minimum(np.nan_to_num((self.at_runs(theta_GK) - self.log_y_N) ** 2, nan=1e9), 1e9)

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """The Hessian is Gauss and Newton's: the law fits to a hundredth, so what it leaves out is small."""
        with np.errstate(over="ignore", invalid="ignore"):
            value_RN, by_n_RN, by_d_RN, n_N, d_N, z_RN, (by_start_RN, by_ratio_RN) = self._terms(
                theta_RK, self.log_n_N, self.log_d_N, self.log_e_N
            )
            delta, gamma, omega, zeta = theta_RK.T[[3, 4, 7, 8], :, None]
            by_z_RN = by_n_RN * (delta + gamma * n_N) + by_d_RN * (omega + zeta * d_N)
            columns = [np.ones_like(value_RN)]
            for term_RN, x_N in ((by_n_RN, n_N), (by_d_RN, d_N)):
                columns += [term_RN, term_RN * x_N, term_RN * z_RN, term_RN * x_N * z_RN]
            columns += [by_z_RN * by_start_RN, by_z_RN * by_ratio_RN]
            slope_RNK = np.nan_to_num(np.stack(columns, axis=2) / value_RN[:, :, None])
            r_RN = np.log(value_RN) - self.log_y_N
            f_R = (w_RN * r_RN**2).sum(1)
        weighted_RKN = (slope_RNK * w_RN[:, :, None]).swapaxes(1, 2)
        gradient_RK = 2 * (weighted_RKN @ np.nan_to_num(r_RN)[:, :, None])[:, :, 0]
        return np.where(np.isfinite(f_R), f_R, np.inf), gradient_RK, 2 * weighted_RKN @ slope_RNK

    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        """The parameters as published, by name -> [B]."""
        c, log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_start, log_ratio = theta_BK.T
        n_mean, d_mean, e_mean = self.means
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            a = level * np.exp(log_a - alpha * n_mean - delta * e_mean + gamma * n_mean * e_mean)
            b = level * np.exp(log_b - beta * d_mean - omega * e_mean + zeta * d_mean * e_mean)
            own = (a, alpha - gamma * e_mean, delta - gamma * n_mean, gamma, b, beta - zeta * e_mean, omega - zeta * d_mean, zeta)
            return dict(zip(NAMES, (level * c, *own, np.exp(log_start), np.exp(log_start + log_ratio)), strict=True))

    def _terms(self, theta_RK: Array, log_n_X: Array, log_d_X: Array, log_e_X: Array) -> tuple[Any, ...]:
        """L^, its terms of N and of D, log N, log D and log E^ about the means, and how log E^ changes with either saturation."""
        n_mean, d_mean, e_mean = self.means
        c, log_a, alpha, delta, gamma, log_b, beta, omega, zeta, log_start, log_ratio = theta_RK.T[:, :, None]
        z_RX, *slopes = (np.log(10) * each for each in saturating(np.exp(log_e_X), log_start, log_ratio))
        z_RX, n_X, d_X = z_RX - e_mean, log_n_X - n_mean, log_d_X - d_mean
        by_n_RX = np.exp(log_a + alpha * n_X + delta * z_RX + gamma * n_X * z_RX)
        by_d_RX = np.exp(log_b + beta * d_X + omega * z_RX + zeta * d_X * z_RX)
        return c + by_n_RX + by_d_RX, by_n_RX, by_d_RX, n_X, d_X, z_RX, slopes


@dataclass(frozen=True, kw_only=True)
class MoeJointFit(Fit):
    """The joint law of experts. Intervals are percentile intervals over resampled runs; losses are in the unit of their column."""

    columns: tuple[str, str, str]
    """Of active parameters, training tokens and routed experts."""
    scatter: float | None = None
    """Root mean square of log loss around the law."""
    _law: MoeJointLaw | None = field(default=None, repr=False, compare=False)
    _theta_BK: Array = field(default_factory=lambda: np.zeros((0, len(NAMES))), repr=False, compare=False)
    """Row 0 is the fit of the data, the others are those of the resamples."""
    _points: Points | None = field(default=None, repr=False, compare=False)

    def predict(self, params: Any, tokens: Any, experts: Any) -> pd.DataFrame:
        """The law with its pointwise band -> the columns of the sizes, loss, low, high.

        Raises:
            AnalysisError: no law was fitted, a size is not positive or experts are fewer than one.
        """
        if self._law is None or self._points is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        x_3X = np.array(
            [each.ravel() for each in np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (params, tokens, experts)))]
        )
        if not ((x_3X > 0).all() and (x_3X[2] >= 1).all()):
            raise AnalysisError("predict: sizes must be positive and experts at least 1")
        losses_BX = self._points.level * np.exp(self._law.log_value(self._theta_BK, *np.log(x_3X)))
        low_X, high_X = np.quantile(losses_BX[1:], ends(), axis=0)
        return pd.DataFrame(dict(zip(self.columns, x_3X, strict=True)) | {"loss": losses_BX[0], "low": low_X, "high": high_X})

    def residuals(self) -> pd.DataFrame:
        """Every run against the law -> row, the columns of the sizes, measured, predicted, low, high (the band of the law there)."""
        if self._points is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        return self._points.against(self.predict)

    def summary(self) -> str:
        lines = []
        if self.parameters:
            gamma, zeta, most = (self.parameters[name] for name in ("gamma", "zeta", "E_max"))
            lines.append(
                f"An e-fold of effective experts changes the exponent of {self.columns[0]} by {gamma.value:+.4f} ({percent()} interval "
                f"{gamma.low:+.4f} to {gamma.high:+.4f}) and that of {self.columns[1]} by {zeta.value:+.4f} ({zeta.low:+.4f} to "
                f"{zeta.high:+.4f}); experts saturate at {most.value:.3g} ({most.low:.3g} to {most.high:.3g})."
            )
        if self.scatter is not None:
            lines.append(f"Runs lie {self.scatter:.2%} around the law (root mean square).")
        return with_doubt(self.status, self.message, lines)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws, at the median parameters -> series (run, curve), group (experts), x (tokens), loss, low, high."""
        from analysis.figures.law import curves_of, runs_of

        size, tokens, experts = self.columns
        runs = self.residuals()
        d_X = np.geomspace(runs[tokens].min(), runs[tokens].max(), 61)
        tables = [runs_of(runs[tokens], runs["measured"], runs[experts])]
        tables += [curves_of(self.predict(runs[size].median(), d_X, e), tokens, e) for e in np.unique(runs[experts])]
        return pd.concat(tables, ignore_index=True)

    def plot(self, ax: Axes) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, self.drawn(), self.columns[1], self.conventions["loss"], self.columns[2])


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
        frame: one run, or one checkpoint, a row, all of one kind of router; a dense model has one expert. A column `trial_id` names the
            rows used; of a column `status` only what says finished is.
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
        AnalysisError: a column is missing, holds text, a size that is not positive or fewer than one expert, or a trial id is repeated.
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
        "admissible": f"at the means of log N, log D and log E: powers of N and D {POWERS[0]:g} to {POWERS[1]:g}, other exponents "
        f"{BENDS[0]:g} to {BENDS[1]:g}; E_start {START[0]:g} to {START[1]:g}, E_max / E_start {RATIO[0]:g} to {RATIO[1]:g}; C not negative",
        "interval": f"{percent()} percentile, not widened for few runs; below {FEW_RUNS} the message says so",
        "resampling": f"{f'runs of column {run}' if run else 'rows'}, drawn with replacement",
        "resamples": resamples,
        "random_seed": random_seed,
        "numpy": np.__version__,
    }
    common: dict[str, Any] = {"law": "moe-joint", "columns": columns, "rows": points.rows, "conventions": conventions}
    refusal = _refusal(points, columns)
    if refusal:
        return MoeJointFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    log_n_N, log_d_N, log_e_N = np.log(points.x_TN)
    law = MoeJointLaw(log_n_N, log_d_N, log_e_N, np.log(points.y_N / points.level))
    data, draws = fit_all(law, resampled_weights(points.clusters_N, resamples, np.random.default_rng(random_seed)))
    theta_BK = np.vstack([data.theta_BK, draws.theta_BK])
    low_K, high_K = law.bounds()
    limits = [
        (each_BK[:, k], f"{'E_max / E_start' if name == 'E_max' else name} stopped at an end of its range")
        for k, name in enumerate(NAMES)
        for each_BK in (theta_BK <= low_K, theta_BK >= high_K)
    ]
    remedy = "Train at more sizes, tokens or numbers of experts."
    status, message = verdict(data, draws, limits, remedy, int(points.clusters_N.max()) + 1)
    free_K = (theta_BK[0] > low_K) & (theta_BK[0] < high_K)
    slopes_NK = slopes_of(law.at_runs, theta_BK[0], free_K)
    size_K = np.linalg.svd(slopes_NK / np.maximum(np.linalg.norm(slopes_NK, axis=0), 1e-300), compute_uv=False)
    if status is Status.CONVERGED and size_K[-1] ** 2 < FLAT:
        status, message = Status.NO_INTERIOR_MINIMUM, f"other parameters fit as well: {remedy[0].lower()}{remedy[1:]} {message}".strip()
    rest_N = law.log_y_N - law.at_runs(theta_BK[:1])[0]
    status, message = with_scatter(status, message, *judge_scatter(points, rest_N, slopes_NK))
    table = law.table(theta_BK, points.level)
    return MoeJointFit(
        status=status,
        message=points.with_left_out(message),
        parameters={name: Estimate.of(values[0], values[1:]) for name, values in table.items()},
        covariance=covariance_of(table),
        objective=float(data.objective_B[0]),
        scatter=float(np.sqrt(np.mean(rest_N**2))),
        _law=law,
        _theta_BK=theta_BK,
        _points=points,
        **common,
    )


def _refusal(points: Points, columns: tuple[str, str, str]) -> tuple[Status, str] | None:
    """Why no law can be fitted, or None."""
    refusal = points.refusal()
    if refusal:
        return refusal
    if len(points.y_N) < LEAST_RUNS:
        return Status.TOO_FEW_POINTS, f"{len(points.y_N)} rows; eleven parameters need at least {LEAST_RUNS}: train more."
    for column, x_N, least in zip(columns, points.x_TN, (3, 3, 4), strict=True):
        if distinct(x_N) < least:
            return Status.TOO_FEW_POINTS, f"`{column}` has {distinct(x_N)} distinct value(s); the law needs at least {least}."
    return None
