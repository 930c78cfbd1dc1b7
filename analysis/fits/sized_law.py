"""A law of loss against three sizes, fitted by least squares of log loss: what such laws share.

A law names its parameters, its range, its starts and its formula; the fit, its intervals, its status and its figure are
these.

Letters: T sizes, R rows of parameters, B resamples, G starts, N runs, X points, K parameters.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import pandas as pd

from analysis.fits.points import Points
from analysis.fits.refits import covariance_of, fit_all, resampled_weights, verdict
from analysis.fits.scatter import judge_scatter, slopes_of, with_scatter
from analysis.fits.sizes_fit import SizesFit
from analysis.fits.types import Estimate
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
F = TypeVar("F", bound="SizedFit")


@dataclass(frozen=True)
class SizedLaw(ABC):
    """A law at given runs, sizes and losses in logs; its objective is the sum of squares of log loss."""

    NAMES: ClassVar[tuple[str, ...]]
    """Of the parameters as published."""
    LIMITED: ClassVar[tuple[str, ...]]
    """Of the parameters in which it descends, as a message names one that stopped at an end of its range."""
    FLAT: ClassVar[float]
    """Curvature, relative to the diagonal, below which other parameters fit as well."""

    log_x_TN: Array
    log_y_N: Array

    @property
    def means(self) -> tuple[float, ...]:
        """Of the logs of the sizes."""
        return tuple(float(log_x_N.mean()) for log_x_N in self.log_x_TN)

    @abstractmethod
    def bounds(self) -> tuple[Array, Array]:
        """Ends of the admissible range of each parameter -> [K], [K]."""

    @abstractmethod
    def starts(self) -> Array:
        """Points to descend from -> [G, K]."""

    @abstractmethod
    def log_value(self, theta_RK: Array, *log_x: Array) -> Array:
        """log L^ -> [R, X]."""

    def derivatives(self, theta_RK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """Weighted objective, gradient and Hessian, by central differences -> [R], [R, K], [R, K, K]."""
        step = 1e-6
        steps_KK = step * np.eye(theta_RK.shape[1])
        slope = [
            (self.at_runs(theta_RK + each_K) - self.at_runs(theta_RK - each_K)) / (2 * step) for each_K in steps_KK
        ]
        return self.squares(self.at_runs(theta_RK) - self.log_y_N, np.stack(slope, axis=2), w_RN)

    @abstractmethod
    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        """The parameters as published, by name -> [B]."""

    def at_runs(self, theta_RK: Array) -> Array:
        """log L^ of the runs -> [R, N]."""
        with np.errstate(
            over="ignore", invalid="ignore", divide="ignore"
        ):  # a step too far is not lower, and so not taken
            return self.log_value(theta_RK, *self.log_x_TN)

    def losses(self, theta_GK: Array) -> Array:
        return np.minimum(np.nan_to_num((self.at_runs(theta_GK) - self.log_y_N) ** 2, nan=1e9), 1e9)

    @staticmethod
    def squares(r_RN: Array, slope_RNK: Array, w_RN: Array) -> tuple[Array, Array, Array]:
        """Weighted squares of residuals, their gradient and Hessian from how log L^ changes with each parameter.

        The Hessian is Gauss and Newton's: the law fits to a hundredth, so what it leaves out is small.
        """
        slope_RNK, f_R = np.nan_to_num(slope_RNK), (w_RN * r_RN**2).sum(1)
        weighted_RKN = (slope_RNK * w_RN[:, :, None]).swapaxes(1, 2)
        gradient_RK = 2 * (weighted_RKN @ np.nan_to_num(r_RN)[:, :, None])[:, :, 0]
        return np.where(np.isfinite(f_R), f_R, np.inf), gradient_RK, 2 * weighted_RKN @ slope_RNK


@dataclass(frozen=True)
class CountedLaw(SizedLaw):
    """`L = E + A N'^-alpha + B D'^-beta`, where further parameters say how much of the parameters N and the tokens D
    counts.

    Its K parameters are E, log A and log B at the mean sizes, alpha, beta and the logs of the further ones.
    """

    FLAT = 1e-9
    POWERS: ClassVar[tuple[float, float]] = (0.02, 2.0)
    """Admissible exponents."""
    FURTHER: ClassVar[tuple[float, float]]
    """Admissible values of each further parameter."""
    TRIED: ClassVar[tuple[tuple[float, ...], ...]]
    """Values of each further parameter to start from."""

    @abstractmethod
    def counted_at_start(self, further: tuple[float, ...]) -> tuple[Array, Array]:
        """log N' and log D' of the runs -> [N], [N]; what exponents and levels enter may be left out."""

    @abstractmethod
    def counted(
        self, log_x: Sequence[Array], further: Sequence[Array], powers: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        """log N' and log D' -> [R, X], [R, X].

        Args:
            further: the further parameters, in logs [R, 1].
            powers: log A, log B (of sizes in their unit), alpha and beta [R, 1].
        """

    def bounds(self) -> tuple[Array, Array]:
        most, further = np.exp(self.log_y_N.max()), len(self.TRIED)
        low = [0.0, np.log(most) - 30, np.log(most) - 30, *(self.POWERS[0],) * 2, *(np.log(self.FURTHER[0]),) * further]
        high = [most, np.log(most) + 5, np.log(most) + 5, *(self.POWERS[1],) * 2, *(np.log(self.FURTHER[1]),) * further]
        return np.array(low), np.array(high)

    def starts(self) -> Array:
        """A grid over exponents and further parameters, the rest by least squares -> [G, K]."""
        found, weight_N1 = [], np.exp(-self.log_y_N)[:, None]
        n_mean, d_mean, _ = self.means
        for alpha, beta, *further in itertools.product((0.2, 0.35, 0.6), (0.2, 0.35, 0.6), *self.TRIED):
            log_n_N, log_d_N = self.counted_at_start(tuple(further))
            basis = [np.ones_like(log_d_N), np.exp(-alpha * (log_n_N - n_mean)), np.exp(-beta * (log_d_N - d_mean))]
            linear_3 = np.linalg.lstsq(np.stack(basis, axis=1) * weight_N1, np.ones(len(log_d_N)), rcond=None)[0]
            e, a, b = np.maximum(linear_3, 1e-2 * np.exp(self.log_y_N.min()))
            found.append([e, np.log(a), np.log(b), alpha, beta, *np.log(further)])
        return np.clip(found, *self.bounds())

    def log_value(self, theta_RK: Array, *log_x: Array) -> Array:
        e, log_a, log_b, alpha, beta, *further = theta_RK.T[:, :, None]
        n_mean, d_mean, _ = self.means
        level_a, level_b = log_a + alpha * n_mean, log_b + beta * d_mean
        log_n_RX, log_d_RX = self.counted(log_x, further, (level_a, level_b, alpha, beta))
        return np.array(np.log(e + np.exp(level_a - alpha * log_n_RX) + np.exp(level_b - beta * log_d_RX)))

    def table(self, theta_BK: Array, level: float) -> dict[str, Array]:
        e, log_a, log_b, alpha, beta, *further = theta_BK.T
        n_mean, d_mean, _ = self.means
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            a, b = level * np.exp(log_a + alpha * n_mean), level * np.exp(log_b + beta * d_mean)
            return dict(zip(self.NAMES, (level * e, a, b, alpha, beta, *np.exp(further)), strict=True))


def ranged(name: str, ends: tuple[float, float]) -> str:
    """A range of admissible values in words."""
    return f"{name} {ends[0]:g} to {ends[1]:g}"


@dataclass(frozen=True, kw_only=True)
class SizedFit(SizesFit):
    """A law of parameters, training tokens and what it adds to them, in the order of `columns`."""

    _law: SizedLaw | None = field(default=None, repr=False, compare=False)
    _theta_BK: Array = field(default_factory=lambda: np.zeros((0, 0)), repr=False, compare=False)
    """Row 0 is the fit of the data, the others are those of the resamples."""

    def _losses(self, x_TX: Array) -> Array:
        assert self._law
        assert self._points
        return self._points.level * np.exp(self._law.log_value(self._theta_BK, *np.log(x_TX)))

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws, at the median parameters -> series (run, curve), group (the third size), x (tokens), loss,
        low, high.
        """
        from analysis.figures.law import curves_of, runs_of

        size, tokens, third = self.columns
        runs = self.residuals()
        d_X = np.geomspace(runs[tokens].min(), runs[tokens].max(), 61)
        tables = [runs_of(runs[tokens], runs["measured"], runs[third])]
        for value in np.unique(runs[third]):
            curve = self.predict({size: runs[size].median(), tokens: d_X, third: value})
            tables.append(curves_of(curve, tokens, value))
        return pd.concat(tables, ignore_index=True)

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, data, self.columns[1], self.conventions["loss"], self.columns[2])


def fit_sized(
    kind: Callable[..., F],
    law_of: Callable[[Array, Array], SizedLaw],
    points: Points,
    common: dict[str, Any],
    remedy: str,
) -> F:
    """Fit a law to runs that can tell it.

    Args:
        kind: the class of the fit.
        law_of: the law at given logs of sizes [T, N] and of losses over their level [N].
        common: `law`, `columns`, `rows` and `conventions` of the fit; the last say how to resample.
        remedy: what to train where other parameters fit as well, a sentence.
    """
    law = law_of(np.log(points.x_TN), np.log(points.y_N / points.level))
    resamples, random_seed = (common["conventions"][name] for name in ("resamples", "random_seed"))
    data, draws = fit_all(law, resampled_weights(points.clusters_N, resamples, np.random.default_rng(random_seed)))
    theta_BK = np.vstack([data.theta_BK, draws.theta_BK])
    low_K, high_K = law.bounds()
    limits = [
        (each_BK[:, k], f"{name} stopped at an end of its range")
        for k, name in enumerate(law.LIMITED)
        for each_BK in (theta_BK <= low_K, theta_BK >= high_K)
    ]
    status, message = verdict(data, draws, limits, remedy, int(points.clusters_N.max()) + 1)
    slopes_NK = slopes_of(law.at_runs, theta_BK[0], (theta_BK[0] > low_K) & (theta_BK[0] < high_K))
    size_K = np.linalg.svd(slopes_NK / np.maximum(np.linalg.norm(slopes_NK, axis=0), 1e-300), compute_uv=False)
    if status is Status.CONVERGED and size_K[-1] ** 2 < law.FLAT:
        status, message = (
            Status.NO_INTERIOR_MINIMUM,
            f"other parameters fit as well: {remedy[0].lower()}{remedy[1:]} {message}".strip(),
        )
    rest_N = law.log_y_N - law.at_runs(theta_BK[:1])[0]
    status, message = with_scatter(status, message, *judge_scatter(points, rest_N, slopes_NK))
    table = law.table(theta_BK, points.level)
    return kind(
        status=status,
        message=points.with_left_out(message),
        parameters={name: Estimate.of(values) for name, values in table.items()},
        covariance=covariance_of(table),
        objective=float(data.objective_B[0]),
        scatter=float(np.sqrt(np.mean(rest_N**2))),
        _law=law,
        _theta_BK=theta_BK,
        _points=points,
        **common,
    )
