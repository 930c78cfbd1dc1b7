"""Loss when data are repeated: the law of Muennighoff et al. 2023, arXiv 2305.16264.

`L = E + A N'^-alpha + B D'^-beta`. Of D tokens U are unique, the others are worth ever less:
`D' = U + U R_D* (1 - exp(-(D/U - 1) / R_D*))`. Parameters beyond those that the unique tokens are best trained with,
`U_N = min(N, N_opt(U))`, fade alike with R_N*. N_opt is that of the same law without repeats: `N_opt(U) = G (G U)^(beta/alpha)`,
`G = (alpha A / (beta B))^(1 / (alpha + beta))`.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (E, log A and log B at the mean sizes, alpha, beta,
log R_D*, log R_N*).
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
from analysis.fits.runs import distinct, require_resamples
from analysis.fits.scatter import judge_scatter, slopes_of, with_scatter
from analysis.fits.types import Estimate, Fit, Status, with_doubt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
ALPHA, FADES = (0.02, 2.0), (0.1, 1000.0)
"""Admissible exponents, and R_D* and R_N*."""
NAMES = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
LEAST_RUNS = 10
FLAT = 1e-9  # curvature, relative to the diagonal, below which other parameters fit as well


def faded(base: Array, log_ratio: Array, fade: Array) -> Array:
    """What `base x ratio` is worth, ratio at least 1: base (1 + R* (1 - exp(-(ratio - 1) / R*)))."""
    return base * (1 - fade * np.expm1(-np.maximum(np.expm1(log_ratio), 0) / fade))


@dataclass(frozen=True)
class DataConstrainedLaw:
    """The law at given runs, sizes and losses in logs; its objective is the sum of squares of log loss."""

    log_n_N: Array
    log_d_N: Array
    log_u_N: Array
    log_y_N: Array

    @property
    def means(self) -> tuple[float, float]:
        """Of log N and log D, where A and B are taken."""
        return float(self.log_n_N.mean()), float(self.log_d_N.mean())

    def bounds(self) -> tuple[Array, Array]:
        most = np.exp(self.log_y_N.max())
        low = [0.0, np.log(most) - 30, np.log(most) - 30, *(ALPHA[0],) * 2, *(np.log(FADES[0]),) * 2]
        return np.array(low), np.array([most, np.log(most) + 5, np.log(most) + 5, *(ALPHA[1],) * 2, *(np.log(FADES[1]),) * 2])

    def starts(self) -> Array:
        """A grid over exponents and fading, the rest by least squares with every parameter counted -> [G, K]."""
        low_K, high_K = self.bounds()
        found, weight_N1 = [], np.exp(-self.log_y_N)[:, None]
        (n_mean, d_mean), unique_N = self.means, np.minimum(self.log_u_N, self.log_d_N)
        for alpha, beta, fade, other in itertools.product((0.2, 0.35, 0.6), (0.2, 0.35, 0.6), (3.0, 15.0, 60.0), (3.0, 15.0)):
            log_d_N = np.log(faded(np.exp(unique_N), self.log_d_N - unique_N, np.array(fade)))
            basis = [np.ones_like(log_d_N), np.exp(-alpha * (self.log_n_N - n_mean)), np.exp(-beta * (log_d_N - d_mean))]
            linear_3 = np.linalg.lstsq(np.stack(basis, axis=1) * weight_N1, np.ones(len(log_d_N)), rcond=None)[0]
            e, a, b = np.maximum(linear_3, 1e-2 * np.exp(self.log_y_N.min()))
            found.append([e, np.log(a), np.log(b), alpha, beta, np.log(fade), np.log(other)])
        return np.clip(found, low_K, high_K)

    def log_value(self, theta_RK: Array, log_n_X: Array, log_d_X: Array, log_u_X: Array) -> Array:
        """log L^ -> [R, X]."""
        e, log_a, log_b, alpha, beta, log_fade_d, log_fade_n = theta_RK.T[:, :, None]
        n_mean, d_mean = self.means
        level_a, level_b = log_a + alpha * n_mean, log_b + beta * d_mean
        log_g = (np.log(alpha / beta) + level_a - level_b) / (alpha + beta)
        log_u_X = np.minimum(log_u_X, log_d_X)
        log_base_RX = np.minimum(log_n_X, log_g + beta / alpha * (log_g + log_u_X))
        log_n_RX = log_base_RX + np.log(faded(np.ones(1), log_n_X - log_base_RX, np.exp(log_fade_n)))
        log_d_RX = log_u_X + np.log(faded(np.ones(1), log_d_X - log_u_X, np.exp(log_fade_d)))
        return np.log(e + np.exp(level_a - alpha * log_n_RX) + np.exp(level_b - beta * log_d_RX))

    def at_runs(self, theta_RK: Array) -> Array:
        """log L^ of the runs -> [R, N]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # a step too far is not lower, and so not taken
            return self.log_value(theta_RK, self.log_n_N, self.log_d_N, self.log_u_N)

    def losses(self, theta_GK: Array) -> Array:
        return np.minimum(np.nan_to_num((self.at_runs(theta_GK) - self.log_y_N) ** 2, nan=1e9), 1e9)

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """By central differences; the Hessian is Gauss and Newton's: the law fits to a hundredth, so what it leaves out is small."""
        step = 1e-6
        steps_KK = step * np.eye(theta_RK.shape[1])
        r_RN = self.at_runs(theta_RK) - self.log_y_N
        slope = [(self.at_runs(theta_RK + each_K) - self.at_runs(theta_RK - each_K)) / (2 * step) for each_K in steps_KK]
        slope_RNK = np.nan_to_num(np.stack(slope, axis=2))
        weighted_RKN = (slope_RNK * w_RN[:, :, None]).swapaxes(1, 2)
        f_R = (w_RN * r_RN**2).sum(1)
        gradient_RK = 2 * (weighted_RKN @ np.nan_to_num(r_RN)[:, :, None])[:, :, 0]
        return np.where(np.isfinite(f_R), f_R, np.inf), gradient_RK, 2 * weighted_RKN @ slope_RNK

    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        """The parameters as published, by name -> [B]."""
        e, log_a, log_b, alpha, beta, fade_d, fade_n = theta_BK.T
        n_mean, d_mean = self.means
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            a, b = level * np.exp(log_a + alpha * n_mean), level * np.exp(log_b + beta * d_mean)
            return dict(zip(NAMES, (level * e, a, b, alpha, beta, np.exp(fade_d), np.exp(fade_n)), strict=True))


@dataclass(frozen=True, kw_only=True)
class DataConstrainedFit(Fit):
    """The law of repeated data. Intervals are percentile intervals over resampled runs; losses are in the unit of their column."""

    columns: tuple[str, str, str]
    """Of parameters, training tokens and unique tokens."""
    scatter: float | None = None
    """Root mean square of log loss around the law."""
    _law: DataConstrainedLaw | None = field(default=None, repr=False, compare=False)
    _theta_BK: Array = field(default_factory=lambda: np.zeros((0, 7)), repr=False, compare=False)
    """Row 0 is the fit of the data, the others are those of the resamples."""
    _points: Points | None = field(default=None, repr=False, compare=False)

    def predict(self, params: Any, tokens: Any, unique: Any) -> pd.DataFrame:
        """The law with its pointwise band -> the columns of the sizes, loss, low, high.

        Raises:
            AnalysisError: no law was fitted or a size is not positive.
        """
        if self._law is None or self._points is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        x_3X = np.array(
            [each.ravel() for each in np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (params, tokens, unique)))]
        )
        if not (x_3X > 0).all():
            raise AnalysisError("predict: sizes must be positive")
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
            fade, other = self.parameters["R_D"], self.parameters["R_N"]
            lines.append(
                f"Repeats are worth new data up to about {fade.value:.3g} times ({percent()} interval {fade.low:.3g} to {fade.high:.3g}), "
                f"parameters beyond what the unique data ask for up to {other.value:.3g} ({other.low:.3g} to {other.high:.3g}) times."
            )
        if self.scatter is not None:
            lines.append(f"Runs lie {self.scatter:.2%} around the law (root mean square).")
        return with_doubt(self.status, self.message, lines)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws, at the median parameters -> series (run, curve), group (unique tokens), x (tokens), loss, low, high."""
        from analysis.figures.law import curves_of, runs_of

        size, tokens, unique = self.columns
        runs = self.residuals()
        d_X = np.geomspace(runs[tokens].min(), runs[tokens].max(), 61)
        tables = [runs_of(runs[tokens], runs["measured"], runs[unique])]
        tables += [curves_of(self.predict(runs[size].median(), d_X, u), tokens, u) for u in np.unique(runs[unique])]
        return pd.concat(tables, ignore_index=True)

    def plot(self, ax: Axes) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, self.drawn(), self.columns[1], self.conventions["loss"], self.columns[2])


@takes_level
def fit_data_constrained(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    unique: str,
    loss: str,
    run: str | None = None,
    resamples: int = 400,
    random_seed: int = 0,
) -> DataConstrainedFit:
    """Fit the law of repeated data.

    Args:
        frame: one run, or one checkpoint, a row. A column `trial_id` names the rows used; of a column `status` only what says finished is.
        params: column of the parameters.
        tokens: column of the training tokens, repeats counted.
        unique: column of the unique tokens among them; where it is larger than `tokens` nothing was repeated.
        loss: column of the loss.
        run: column that says which rows are checkpoints of one run, drawn together.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, or a trial id is repeated.
    """
    require_resamples(resamples, "fit_data_constrained")
    columns = (params, tokens, unique)
    points = read_points(frame, columns, loss, run, "fit_data_constrained")
    conventions = {
        "columns": {"N": params, "D": tokens, "U": unique},
        "loss": loss,
        "form": "loss = E + A N'^-alpha + B D'^-beta; D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D))), and N' alike with R_N and "
        "min(N, N_opt(U)) in place of U",
        "objective": "sum over rows of (log fitted loss - log loss)^2, natural logarithms",
        "admissible": f"exponents {ALPHA[0]:g} to {ALPHA[1]:g}, R_D and R_N {FADES[0]:g} to {FADES[1]:g}, E not negative",
        "interval": f"{percent()} percentile, not widened for few runs; below {FEW_RUNS} the message says so",
        "resampling": f"{f'runs of column {run}' if run else 'rows'}, drawn with replacement",
        "resamples": resamples,
        "random_seed": random_seed,
        "numpy": np.__version__,
    }
    common: dict[str, Any] = {"law": "data-constrained", "columns": columns, "rows": points.rows, "conventions": conventions}
    refusal = _refusal(points, columns)
    if refusal:
        return DataConstrainedFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    log_n_N, log_d_N, log_u_N = np.log(points.x_TN)
    law = DataConstrainedLaw(log_n_N, log_d_N, log_u_N, np.log(points.y_N / points.level))
    data, draws = fit_all(law, resampled_weights(points.clusters_N, resamples, np.random.default_rng(random_seed)))
    theta_BK = np.vstack([data.theta_BK, draws.theta_BK])
    low_K, high_K = law.bounds()
    limits = [
        (each_BK[:, k], f"{name} stopped at an end of its range")
        for k, name in enumerate(NAMES)
        for each_BK in (theta_BK <= low_K, theta_BK >= high_K)
    ]
    remedy = "Train at more repeats, sizes or unique tokens."
    status, message = verdict(data, draws, limits, remedy, int(points.clusters_N.max()) + 1)
    free_K = (theta_BK[0] > low_K) & (theta_BK[0] < high_K)
    slopes_NK = slopes_of(law.at_runs, theta_BK[0], free_K)
    size_K = np.linalg.svd(slopes_NK / np.maximum(np.linalg.norm(slopes_NK, axis=0), 1e-300), compute_uv=False)
    if status is Status.CONVERGED and size_K[-1] ** 2 < FLAT:
        status, message = Status.NO_INTERIOR_MINIMUM, f"other parameters fit as well: {remedy[0].lower()}{remedy[1:]} {message}".strip()
    rest_N = law.log_y_N - law.at_runs(theta_BK[:1])[0]
    status, message = with_scatter(status, message, *judge_scatter(points, rest_N, slopes_NK))
    table = law.table(theta_BK, points.level)
    return DataConstrainedFit(
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
        return Status.TOO_FEW_POINTS, f"{len(points.y_N)} rows; seven parameters need at least {LEAST_RUNS}: train more."
    for column, x_N in zip(columns[:2], points.x_TN, strict=False):
        if distinct(x_N) < 3:
            return Status.TOO_FEW_POINTS, f"`{column}` has {distinct(x_N)} distinct value(s); its power needs at least 3."
    _, d_N, u_N = points.x_TN
    if (d_N > 2 * u_N).sum() < 3:
        words = (
            f"fewer than 3 runs see `{columns[2]}` more than twice, so nothing says what repeats are worth: repeat more, or use chinchilla."
        )
        return Status.TOO_FEW_POINTS, words
    return None
