"""The arithmetic of the law over several budgets (`joint`) and its nested models: what they say of loss, their fit, and
their score.

Letters: B resamples, R those still moving, C budgets, F factors, I means over all budgets, K parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, combinations_with_replacement

import numpy as np

from analysis.fits.joint_curve import Curve
from analysis.fits.newton import Minimum
from analysis.fits.noise import Noise, SeedModel
from analysis.fits.refits import fit_rows

Array = np.ndarray
PRIOR_SD = 30.0
"""Of a normal prior on every parameter, in the parameter's own unit, about `CENTRES`, slopes about 0: so weak that it
moves no number that the data say anything of, and where they say nothing, as of the shape of a curve without depth, one
answer is left.
"""
EXACT = 1e-20
"""Sum of squares, in units of the noise, below which a fit is exact."""
VALLEYS = 3
"""From so many minima of the data every resample starts, beside the best of all points known."""


@dataclass(frozen=True)
class Means:
    """Share means of all budgets, and how to weigh them."""

    x_I: Array
    y_BI: Array
    """Row 0 is the data, the others resamples."""
    budget_I: Array
    z_CF: Array
    """Decimal logarithms of the factors."""
    models: tuple[SeedModel, ...]
    noises: tuple[Noise, ...]
    """Of a run in each budget."""
    weigh_II: Array
    """Takes the level of each budget off, and makes the noise of what is left independent and of size 1."""
    seeds_C: Array

    @property
    def df(self) -> int:
        """Behind the noise of all budgets."""
        return int(sum(model.df for model in self.models))

    def part(self, own_C: Array, z_CF: Array) -> Means:
        """Some of the budgets, under these factors."""
        own = np.flatnonzero(own_C)
        own_I = np.isin(self.budget_I, own)
        return replace(
            self,
            x_I=self.x_I[own_I],
            y_BI=self.y_BI[:, own_I],
            budget_I=np.searchsorted(own, self.budget_I[own_I]),
            z_CF=z_CF,
            models=tuple(self.models[c] for c in own),
            noises=tuple(self.noises[c] for c in own),
            weigh_II=self.weigh_II[np.ix_(own_I, own_I)],
            seeds_C=self.seeds_C[own],
        )


@dataclass(frozen=True)
class Law:
    """The fitted models: row 0 is that of the data, the others those of the resamples. Every row chose a model of its
    own.
    """

    curves: tuple[Curve, ...]
    theta: tuple[Array, ...]
    chosen_B: Array
    z_CF: Array
    """Decimal logarithms of the factors of its budgets."""
    shares: Array
    """Sampled ones."""

    @property
    def centre_F(self) -> Array:
        return np.asarray(self.z_CF.mean(0))

    @property
    def spread_F(self) -> Array:
        return np.asarray(np.ptp(self.z_CF, axis=0))

    @property
    def low(self) -> float:
        return float(self.shares.min())

    @property
    def high(self) -> float:
        return float(self.shares.max())

    def optimum(self, log_F: Array) -> Array:
        """Best share at one budget in each row -> [B]."""
        z_F = log_F - self.centre_F
        each = [
            curve.optimum(theta, z_F, self.low, self.high) for curve, theta in zip(self.curves, self.theta, strict=True)
        ]
        return np.stack(each)[self.chosen_B, np.arange(len(self.chosen_B))]

    def value(self, log_F: Array, x_X: Array) -> Array:
        """Loss less the level at one budget in each row -> [B, X]."""
        z_XF = np.repeat((log_F - self.centre_F)[None], len(x_X), axis=0)
        found_BX = np.empty((len(self.chosen_B), len(x_X)))
        for place, (curve, theta_BK) in enumerate(zip(self.curves, self.theta, strict=True)):
            own_B = self.chosen_B == place
            found_BX[own_B] = curve.value(theta_BK[own_B], x_X, z_XF)
        return found_BX

    @property
    def fullest(self) -> Law:
        """The law in which every factor may move the optimum, in all rows."""
        return replace(self, chosen_B=np.full(len(self.chosen_B), len(self.curves) - 1))


def nested(factors: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Which factors move the optimum: none, each alone, ..., all."""
    return [each for count in range(len(factors) + 1) for each in combinations(factors, count)]


@dataclass(frozen=True)
class _Rows:
    """The fits of a curve to all rows of means: half the squared deviations in units of the noise, and half the
    prior's.
    """

    curve: Curve
    means: Means

    @cached_property
    def z_IF(self) -> Array:
        return (self.means.z_CF - self.means.z_CF.mean(0))[self.means.budget_I]

    def bounds(self) -> tuple[Array, Array]:
        low_K, high_K = self.curve.bounds.T
        return low_K, high_K

    def starts(self) -> Array:
        curve = self.curve
        firsts = np.linspace(0, 1, 6) if curve.shape == "cubic" else np.linspace(-3, 3, 6)
        shapes = (
            [(g,) for g in (-0.7, 0.0, 0.7)]
            if curve.shape == "cubic"
            else [(p, q) for p in (0.4, 0.9) for q in (0.5, 3.0)]
        )
        places = [curve.names.index(name) for name, _ in curve.terms]
        starts = np.zeros((len(firsts) * len(shapes) * 2, len(curve.names)))
        starts[:, places] = [
            (first, amplitude, *rest) for first in firsts for rest in shapes for amplitude in (-3.0, -1.0)
        ]
        return starts

    def objectives(self, theta_GK: Array, rows_R: Array) -> Array:
        target_RI = self.means.y_BI[rows_R] @ self.means.weigh_II.T
        value_GI = self.curve.value(theta_GK, self.means.x_I, self.z_IF) @ self.means.weigh_II.T
        prior_G = ((theta_GK - self.curve.centre_K) ** 2).sum(1) / PRIOR_SD**2
        return np.asarray(
            ((target_RI**2).sum(1)[:, None] - 2 * target_RI @ value_GI.T + (value_GI**2).sum(1) + prior_G) / 2
        )

    def derivatives(self, theta_RK: Array, rows_R: Array) -> tuple[Array, Array, Array]:
        means, (term_K, by_KI, blocks) = self.means, self._linear
        value_RI, slope_RIT, bend_RITT = self.curve.derivatives(theta_RK, means.x_I, self.z_IF)
        rest_RI = (means.y_BI[rows_R] - value_RI) @ means.weigh_II.T
        pull_RI = rest_RI @ means.weigh_II
        slope_RKI = slope_RIT[:, :, term_K].swapaxes(1, 2) * by_KI
        white_RKI = slope_RKI @ means.weigh_II.T
        off_RK = (theta_RK - self.curve.centre_K) / PRIOR_SD**2
        f_R = ((rest_RI**2).sum(1) + (off_RK**2).sum(1) * PRIOR_SD**2) / 2
        g_RK = off_RK - (slope_RKI @ pull_RI[:, :, None])[:, :, 0]
        h_RKK = white_RKI @ white_RKI.swapaxes(1, 2) + np.eye(len(term_K)) / PRIOR_SD**2
        for (t, u), (first, last, products_IZ) in blocks.items():
            block_RKK = ((pull_RI * bend_RITT[:, :, t, u]) @ products_IZ).reshape(len(theta_RK), len(first), len(last))
            h_RKK[:, first[:, None], last] -= block_RKK
            if t < u:
                h_RKK[:, last[:, None], first] -= block_RKK.swapaxes(1, 2)
        return np.where(np.isfinite(f_R), f_R, np.inf), g_RK, h_RKK

    @cached_property
    def _linear(self) -> tuple[Array, Array, dict[tuple[int, int], tuple[Array, Array, Array]]]:
        """Term of each parameter, what multiplies it there [K, I], and for two terms their parameters and the products
        of these.
        """
        terms, z_IF, factors = self.curve.terms, self.z_IF, self.curve.factors
        term_K = np.repeat(np.arange(len(terms)), [1 + len(by) for _, by in terms])
        ones_I = np.ones(len(z_IF))
        by_KI = np.stack(
            [ones_I if by is None else z_IF[:, factors.index(by)] for _, own in terms for by in (None, *own)]
        )
        blocks = {}
        for t, u in combinations_with_replacement(range(len(terms)), 2):
            first, last = np.flatnonzero(term_K == t), np.flatnonzero(term_K == u)
            blocks[t, u] = first, last, (by_KI[first][:, None] * by_KI[last]).reshape(-1, len(ones_I)).T
        return term_K, by_KI, blocks


def fit_curve(curve: Curve, means: Means) -> Minimum:
    """Parameters of every row of means -> [B, K]. The data start from a grid; a resample from the best of all points
    that the data's descents know and from the data's own minima, and again wherever another resample's minimum is lower
    than its own (`refits.fit_rows`).
    """
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far is not lower, and so not taken
        return fit_rows(_Rows(curve, means), len(means.y_BI), EXACT, VALLEYS)


def deviations(curve: Curve, theta_BK: Array, means: Means) -> Array:
    """Deviations of the means from the law, in units of their noise -> [B, I]."""
    z_IF = (means.z_CF - means.z_CF.mean(0))[means.budget_I]
    return np.asarray((means.y_BI - curve.value(theta_BK, means.x_I, z_IF)) @ means.weigh_II.T)


def aiccs(curve: Curve, theta_BK: Array, means: Means) -> Array:
    """Akaike's criterion over runs, each budget with a noise level of its own -> [B]; infinite where too few runs allow
    it.

    A resample has the noise of the study and its own, so half of its squares count.
    """
    budgets = len(means.models)
    runs_C = np.array([model.counts_I.sum() for model in means.models])
    rest_BI = deviations(curve, theta_BK, means)
    squares_CB = [(rest_BI[:, means.budget_I == c] ** 2).sum(1) * noise.sd**2 for c, noise in enumerate(means.noises)]
    squares_BC = np.stack(squares_CB, axis=1)
    squares_BC[1:] /= 2
    free, runs = len(curve.names) + budgets + int((means.seeds_C - 1).sum()) + budgets, int(runs_C.sum())
    if runs - free <= 1:
        return np.full(len(squares_BC), np.inf)
    pure_C = np.array([model.squares for model in means.models])
    return np.asarray(
        np.log((pure_C + squares_BC) / runs_C) @ runs_C + 2 * free + 2 * free * (free + 1) / (runs - free - 1)
    )
