"""Loss against a model's size and its number of routed experts: the law of Clark et al. 2022, arXiv 2202.01169,
equations 10 and 11.

`log10 L = a log10 N + b log10 E^ + c log10 N log10 E^ + d`, where E^ is the number of experts E, saturating at both
ends: `1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max`. So one expert counts as E_start, and ever more as E_max.

Letters: B resamples, R those still moving, G starts, N runs, K parameters (a, b, c, d with log10 N about its mean, log
E_start, log E_max / E_start), X points to predict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.points import read_points
from analysis.fits.refits import covariance_of, fit_all, of_bootstrap, resampled_weights, verdict
from analysis.fits.runs import require_resamples
from analysis.fits.scatter import judge_scatter, slopes_of, with_scatter
from analysis.fits.sizes_fit import SizesFit
from analysis.fits.types import Estimate
from analysis.interval import percent, takes_level

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
START = (1.0, 100.0)
RATIO = (2.0, 1e6)
"""Admissible E_start and E_max / E_start."""


def saturating(e_X: Array, log_start_B1: Array, log_ratio_B1: Array) -> tuple[Array, Array, Array]:
    """log10 E^ and its derivatives by log E_start and log E_max / E_start -> each [B, X]."""
    v = np.exp(-log_start_B1 - log_ratio_B1)
    u = np.exp(-log_start_B1) - v
    q_BX = e_X - 1 + 1 / u
    h_BX = 1 / q_BX + v
    scale_BX = -1 / (h_BX * np.log(10))
    return -np.log10(h_BX), scale_BX * (-1 / (u * q_BX**2) - v), scale_BX * (v / (u * q_BX) ** 2 - v)


@dataclass(frozen=True)
class RoutingLaw:
    """The law at given runs; its objective is the sum of squares of log10 loss."""

    log_n_N: Array
    """log10 N less its mean."""
    e_N: Array
    log_y_N: Array
    """log10 of the loss."""

    def bounds(self) -> tuple[Array, Array]:
        return np.r_[np.full(4, -np.inf), np.log([START[0], RATIO[0]])], np.r_[
            np.full(4, np.inf), np.log([START[1], RATIO[1]])
        ]

    def starts(self) -> Array:
        """A grid over E_start and E_max, the rest by linear least squares -> [G, K]."""
        start, ratio = np.meshgrid(np.log(np.geomspace(1.2, 20, 8)), np.log(np.geomspace(4, 1e4, 10)), indexing="ij")
        nonlinear_G2 = np.stack([start.ravel(), ratio.ravel()], axis=1)
        design_GN4 = self._design(nonlinear_G2, self.log_n_N, self.e_N)
        linear_G4 = (np.linalg.pinv(design_GN4) @ self.log_y_N[:, None])[:, :, 0]
        return np.hstack([linear_G4, nonlinear_G2])

    def log_value(self, theta_BK: Array, log_n_X: Array, e_X: Array) -> Array:
        """log10 L^ -> [B, X]."""
        return np.einsum("bxj,bj->bx", self._design(theta_BK[:, 4:], log_n_X, e_X), theta_BK[:, :4])

    def losses(self, theta_GK: Array) -> Array:
        return (self.log_value(theta_GK, self.log_n_N, self.e_N) - self.log_y_N) ** 2

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """The Hessian is Gauss and Newton's: the law fits to a hundredth, so what it leaves out is small."""
        z_RN, by_start_RN, by_ratio_RN = saturating(self.e_N, theta_RK[:, [4]], theta_RK[:, [5]])
        a, b, c, d = theta_RK.T[:4, :, None]
        steep_RN = b + c * self.log_n_N
        r_RN = a * self.log_n_N + steep_RN * z_RN + d - self.log_y_N
        flat_RN = np.zeros_like(z_RN)
        columns = (
            flat_RN + self.log_n_N,
            z_RN,
            self.log_n_N * z_RN,
            flat_RN + 1,
            steep_RN * by_start_RN,
            steep_RN * by_ratio_RN,
        )
        slope_RNK = np.stack(columns, axis=2)
        weighted_RKN = (slope_RNK * w_RN[:, :, None]).swapaxes(1, 2)
        return (w_RN * r_RN**2).sum(1), 2 * (weighted_RKN @ r_RN[:, :, None])[:, :, 0], 2 * weighted_RKN @ slope_RNK

    @staticmethod
    def _design(nonlinear_B2: Array, log_n_X: Array, e_X: Array) -> Array:
        z_BX = saturating(e_X, nonlinear_B2[:, :1], nonlinear_B2[:, 1:])[0]
        ones_BX = np.ones_like(z_BX)
        return np.stack([ones_BX * log_n_X, z_BX, log_n_X * z_BX, ones_BX], axis=2)


@dataclass(frozen=True, kw_only=True)
class RoutingFit(SizesFit):
    """The routing law, of the size and the number of experts."""

    EXPERTS = 1

    _law: RoutingLaw | None = field(default=None, repr=False, compare=False)
    _mean: float = field(default=0.0, repr=False, compare=False)
    """Of log10 N."""
    _theta_BK: Array = field(default_factory=lambda: np.zeros((0, 6)), repr=False, compare=False)
    """Row 0 is the fit of the data, the others are those of the resamples."""

    def _losses(self, x_TX: Array) -> Array:
        assert self._law
        return 10 ** self._law.log_value(self._theta_BK, np.log10(x_TX[0]) - self._mean, x_TX[1])

    def _found(self) -> str:
        b, c, most = (self.parameters[name] for name in ("b", "c", "E_max"))
        return (
            f"log10 loss changes by {b.value:+.3f} ({percent()} interval {b.low:+.3f} to {b.high:+.3f}) per tenfold of "
            f"effective experts, and by {c.value:+.4f} ({c.low:+.4f} to {c.high:+.4f}) more for every tenfold of "
            f"{self.columns[0]}; experts saturate at {most.value:.3g} ({most.low:.3g} to {most.high:.3g})."
        )

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> series (run, curve), group (size), x (experts), loss, low, high."""
        from analysis.figures.law import curves_of, runs_of

        size, experts = self.columns
        runs = self.residuals()
        e_X = np.geomspace(runs[experts].min(), runs[experts].max(), 61)
        tables = [runs_of(runs[experts], runs["measured"], runs[size])]
        tables += [curves_of(self.predict({size: n, experts: e_X}), experts, n) for n in np.unique(runs[size])]
        return pd.concat(tables, ignore_index=True)

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, data, self.columns[1], self.conventions["loss"], self.columns[0])


@takes_level
def fit_routing(
    frame: pd.DataFrame,
    *,
    params: str,
    experts: str,
    loss: str,
    run: str | None = None,
    resamples: int = 1000,
    random_seed: int = 0,
) -> RoutingFit:
    """Fit the routing law.

    Args:
        frame: one run, or one checkpoint, a row, all of one kind of router; a dense model has one expert. A column
            `trial_id` names the rows used; of a column `status` only `finished` is.
        params: column of the size of the dense model that a token passes, N.
        experts: column of the number of routed experts, E.
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
    require_resamples(resamples, "fit_routing")
    points = read_points(frame, (params, experts), loss, run, "fit_routing")
    if (points.x_TN[1] < 1).any():
        raise AnalysisError(f"fit_routing: column `{experts}` must hold 1 (dense) or more")
    common: dict[str, Any] = {
        "law": "routing",
        "columns": (params, experts),
        "rows": points.rows,
        "conventions": _conventions(params, experts, loss, run, resamples, random_seed),
    }
    if refusal := points.too_few((params, experts), "six", 8, (2, 4), more="train more sizes and numbers of experts"):
        return RoutingFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    log_n_N = np.log10(points.x_TN[0])
    mean = float(log_n_N.mean())
    law = RoutingLaw(log_n_N - mean, points.x_TN[1], np.log10(points.y_N))
    data, draws = fit_all(law, resampled_weights(points.clusters_N, resamples, np.random.default_rng(random_seed)))
    theta_BK = np.vstack([data.theta_BK, draws.theta_BK])
    a, b, c, d, log_start, log_ratio = theta_BK.T
    table = {
        "a": a,
        "b": b - c * mean,
        "c": c,
        "d": d - a * mean,
        "E_start": np.exp(log_start),
        "E_max": np.exp(log_start + log_ratio),
    }
    status, message = verdict(data, draws, _ends(law, theta_BK), "", int(points.clusters_N.max()) + 1)
    low_K, high_K = law.bounds()
    free_K = (theta_BK[0] > low_K) & (theta_BK[0] < high_K)

    def log_loss(theta_RK: Array) -> Array:
        return np.log(10) * law.log_value(theta_RK, law.log_n_N, law.e_N)

    rest_N = np.log(points.y_N) - log_loss(theta_BK[:1])[0]
    status, message = with_scatter(
        status, message, *judge_scatter(points, rest_N, slopes_of(log_loss, theta_BK[0], free_K))
    )
    mean_square = float(data.objective_B[0]) / len(log_n_N)
    return RoutingFit(
        status=status,
        message=points.with_left_out(message),
        parameters={name: Estimate.of(values) for name, values in table.items()},
        covariance=covariance_of(table),
        objective=mean_square,
        scatter=float(np.log(10) * np.sqrt(mean_square)),
        _law=law,
        _mean=mean,
        _theta_BK=theta_BK,
        _points=points,
        **common,
    )


def _conventions(
    params: str, experts: str, loss: str, run: str | None, resamples: int, random_seed: int
) -> dict[str, Any]:
    return {
        "columns": {"N": params, "E": experts},
        "loss": loss,
        "form": "log10 loss = a log10 N + b log10 E^ + c log10 N log10 E^ + d, 1/E^ = 1/(E - 1 + 1/(1/E_start - "
        "1/E_max)) + 1/E_max",
        "objective": "mean over rows of (log10 fitted loss - log10 loss)^2",
        "admissible": f"E_start {START[0]:g} to {START[1]:g}, E_max / E_start {RATIO[0]:g} to {RATIO[1]:g}",
        **of_bootstrap(run, resamples, random_seed),
    }


def _ends(law: RoutingLaw, theta_BK: Array) -> tuple[tuple[Array, str], ...]:
    """Which rows stopped at which end of a range, and what that says."""
    (start_low, ratio_low), (start_high, ratio_high) = (each[4:] for each in law.bounds())
    start_B, ratio_B = theta_BK[:, 4], theta_BK[:, 5]
    return (
        (start_B <= start_low, "E_start stopped at 1: no dulled effect of the first experts shows"),
        (start_B >= start_high, f"E_start stopped at {START[1]:g}"),
        (ratio_B <= ratio_low, f"E_max stopped at {RATIO[0]:g} E_start: experts seem to change nothing"),
        (ratio_B >= ratio_high, f"E_max stopped at {RATIO[1]:g} E_start: experts do not saturate in this range"),
    )
