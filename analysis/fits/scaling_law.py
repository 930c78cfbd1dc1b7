"""Loss against compute in several mechanisms at once, `L = E + A (C / C0)^-alpha`: the means of their runs with the
noise of two kinds, the laws that are nested in each other, and how they are fitted.

A rung is one size and length. What a seed gives to all mechanisms of a rung moves its level, and so the exponents; what
is left moves the mechanisms of a rung against each other, and so the compute multipliers. Both are measured from the
repeats, and the fit weighs the means by them.

Letters: B resamples, R rows of parameters, I means (a mechanism at a rung), M mechanisms, N runs, F floors, K
parameters (F floors, M logarithms of A, M exponents), X any places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from analysis.fits.newton import Minimum
from analysis.fits.noise import SeedModel, seed_model
from analysis.fits.refits import fit_rows

Array = np.ndarray
ALPHA = (1e-3, 4.0)
"""Admissible exponents."""
STARTS = (0.0, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
"""Floors to start from, as parts of the least mean."""
EXACT = 1e-20
"""Sum of squares, in units of the noise, below which a fit is exact."""


@dataclass(frozen=True)
class RungMeans:
    """Means of the mechanisms at the rungs, for the average seed, and their noise."""

    mechanism_I: Array
    rung_I: Array
    log_c_I: Array
    """Natural logarithm of C / C0."""
    mean_I: Array
    models: tuple[SeedModel, ...]
    """Of each rung: its mechanisms in the place of shares."""
    seeds: tuple[int, ...]
    """Of each rung."""
    sd: float
    """Of one run once the effect of its seed at its rung is off; NaN where nothing is repeated."""
    df: int
    level_squares: float
    """Sum of squares of the seeds' effects on whole rungs."""
    level_df: int
    level_runs: float
    """So many times the variance of such an effect is in `level_squares`."""

    @classmethod
    def of(cls, mechanism_N: Array, rung_N: Array, log_c_N: Array, y_N: Array, seeds_N: Array) -> RungMeans:
        """Rungs are 0, 1, ..., rising. Where seeds of one rung cannot be linked by two mechanisms, its repeats are of
        both kinds of noise; they count only where no rung is linked.
        """
        models, seeds, logs, within, free, linked = [], [], [], [], [], []
        for rung in range(int(rung_N.max()) + 1):
            own_N = rung_N == rung
            model = seed_model(mechanism_N[own_N], y_N[own_N], seeds_N[own_N])
            models.append(model)
            seeds.append(len(np.unique(seeds_N[own_N])))
            logs.append(np.array([log_c_N[own_N & (mechanism_N == m)][0] for m in model.x_I]))
            free.append(int(own_N.sum()) - len(model.mean_I))
            within.append(model.spread**2 * free[-1] if free[-1] else 0.0)
            linked.append(model.df < free[-1])
        chosen = [r for r, each in enumerate(linked) if each or not any(linked)]
        df, squares = sum(models[r].df for r in chosen), sum(models[r].squares for r in chosen)
        pairs = [r for r in chosen if linked[r]]
        return cls(
            mechanism_I=np.concatenate([model.x_I for model in models]),
            rung_I=np.repeat(np.arange(len(models)), [len(model.x_I) for model in models]),
            log_c_I=np.concatenate(logs),
            mean_I=np.concatenate([model.mean_I for model in models]),
            models=tuple(models),
            seeds=tuple(seeds),
            sd=math.sqrt(squares / df) if df else math.nan,
            df=df,
            level_squares=sum(within[r] - models[r].squares for r in pairs),
            level_df=sum(free[r] - models[r].df for r in pairs),
            level_runs=sum(_between(mechanism_N[rung_N == r], seeds_N[rung_N == r]) for r in pairs),
        )

    def level_variance(self, sd_B: Array, squares_B: Array) -> Array:
        """Variance of a seed's effect on a whole rung -> [B]."""
        return np.maximum((squares_B - self.level_df * sd_B**2) / max(self.level_runs, 1e-300), 0.0)

    @property
    def level_sd(self) -> float:
        """Standard deviation of a seed's effect on a whole rung."""
        return float(np.sqrt(self.level_variance(np.array([self.sd]), np.array([self.level_squares]))[0]))

    @cached_property
    def covariance_II(self) -> Array:
        """Of the means, from both kinds of noise; in units of one run where none is measured."""
        sd = self.sd if self.sd > 0 else 1.0
        level = self.level_sd if self.sd > 0 else 0.0
        found = np.zeros((len(self.mean_I),) * 2)
        for rung, model in enumerate(self.models):
            own = np.ix_(self.rung_I == rung, self.rung_I == rung)
            found[own] = sd**2 * model.covariance_II + level**2 / self.seeds[rung]
        return found

    @cached_property
    def weigh_II(self) -> Array:
        """Makes the noise of the means independent and of size 1."""
        return np.linalg.inv(np.linalg.cholesky(self.covariance_II))

    def noise(self, count: int, rng: np.random.Generator) -> Array:
        """What the means of repeated studies differ by -> [B, I].

        Gaussian, of the measured sizes, each drawn from its own uncertainty (scaled inverse chi-square).
        """
        sd_B = self.sd * np.sqrt(self.df / rng.chisquare(self.df, count))
        level_B = np.zeros(count)
        if self.level_df:
            squares_B = self.level_squares * self.level_df / rng.chisquare(self.level_df, count)
            level_B = np.sqrt(self.level_variance(sd_B, squares_B))
        found_BI = np.zeros((count, len(self.mean_I)))
        for rung, model in enumerate(self.models):
            own_BN = rng.standard_normal((count, model.map_IN.shape[1])) @ model.map_IN.T
            level_B1 = (level_B * rng.standard_normal(count) / math.sqrt(self.seeds[rung]))[:, None]
            found_BI[:, self.rung_I == rung] = sd_B[:, None] * own_BN + level_B1
        return found_BI

    def part(self, rungs: int) -> RungMeans:
        """The first so many rungs, under the noise of all."""
        own_I = self.rung_I < rungs
        own = {name: getattr(self, name)[own_I] for name in ("mechanism_I", "rung_I", "log_c_I", "mean_I")}
        return replace(self, models=self.models[:rungs], seeds=self.seeds[:rungs], **own)


def _between(mechanism_N: Array, seeds_N: Array) -> float:
    """Trace of Z' (1 - P) Z, Z the runs of each seed and P the means of the mechanisms: so many times the variance of a
    seed's effect is in the sum of squares of the seeds (Henderson's third method, Biometrics 9, 1953).
    """
    pairs = [np.equal.outer(each, each) for each in (seeds_N, mechanism_N)]
    return float(len(seeds_N) - (pairs[0] * pairs[1] / pairs[1].sum(1)).sum())


@dataclass(frozen=True)
class Curves:
    """A law of all mechanisms: which floor each has."""

    floor_M: tuple[int, ...]
    """Number of the floor of each mechanism; -1: none, a pure power law."""

    @property
    def floors(self) -> int:
        return max(self.floor_M) + 1

    @property
    def size(self) -> int:
        """Parameters."""
        return self.floors + 2 * len(self.floor_M)

    def split(self, theta_RK: Array) -> tuple[Array, Array, Array]:
        """Floor, log A and alpha of each mechanism -> [R, M] each."""
        f, m = self.floors, len(self.floor_M)
        floors_RF = np.hstack([theta_RK[:, :f], np.zeros((len(theta_RK), 1))])  # the last is that of none
        return floors_RF[:, list(self.floor_M)], theta_RK[:, f : f + m], theta_RK[:, f + m :]

    def value(self, theta_RK: Array, mechanism_X: Array, log_c_X: Array) -> Array:
        """Loss -> [R, X]."""
        floor_RM, log_a_RM, alpha_RM = self.split(theta_RK)
        return floor_RM[:, mechanism_X] + np.exp(log_a_RM[:, mechanism_X] - alpha_RM[:, mechanism_X] * log_c_X)

    def compute(self, theta_RK: Array, mechanism: int, loss_RX: Array) -> Array:
        """Logarithm of the C / C0 at which a mechanism has a loss -> [R, X]; infinite at its floor and below."""
        floor_RM, log_a_RM, alpha_RM = (each[:, [mechanism]] for each in self.split(theta_RK))
        above_RX = loss_RX - floor_RM
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(above_RX > 0, (log_a_RM - np.log(above_RX)) / alpha_RM, np.inf)


@dataclass(frozen=True)
class _Rows:
    """The fits of a law to all rows of means: half the squared deviations in units of the noise."""

    curves: Curves
    means: RungMeans
    y_BI: Array

    @cached_property
    def own_IM(self) -> Array:
        return np.eye(len(self.curves.floor_M))[self.means.mechanism_I]

    @cached_property
    def floor_IF(self) -> Array:
        floors, mechanism_I = np.array(self.curves.floor_M), self.means.mechanism_I
        return (floors[mechanism_I][:, None] == np.arange(self.curves.floors)).astype(float)

    def bounds(self) -> tuple[Array, Array]:
        f, m, y_I = self.curves.floors, len(self.curves.floor_M), self.y_BI[0]
        most = math.log(y_I.max())
        low = [np.zeros(f), np.full(m, most - 20), np.full(m, ALPHA[0])]
        return np.concatenate(low), np.concatenate([np.full(f, y_I.max()), np.full(m, most + 5), np.full(m, ALPHA[1])])

    def starts(self) -> Array:
        """For each of `STARTS` all mechanisms' lines in logs; and each mechanism's own best of them."""
        y_I, means, found, squares = self.y_BI[0], self.means, [], []
        for part in STARTS if self.curves.floors else STARTS[:1]:
            floor = part * y_I.min()
            lines = [
                np.polyfit(means.log_c_I[own_I], np.log(y_I[own_I] - floor), 1) for own_I in self.own_IM.T.astype(bool)
            ]
            alpha_M, log_a_M = -np.transpose(lines)
            found.append(np.r_[np.full(self.curves.floors, floor), -log_a_M, alpha_M])
            rest_I = self.curves.value(found[-1][None], means.mechanism_I, means.log_c_I)[0] - y_I
            squares.append(rest_I**2 @ self.own_IM)
        starts = np.array(found)
        if self.curves.floors > 1:
            best_M = np.argmin(squares, axis=0)
            starts = np.vstack([starts, starts[np.tile(best_M, 3), np.arange(starts.shape[1])]])
        return starts

    def objectives(self, theta_GK: Array, rows_R: Array) -> Array:
        weigh_II = self.means.weigh_II
        value_GI = self.curves.value(theta_GK, self.means.mechanism_I, self.means.log_c_I) @ weigh_II.T
        target_RI = self.y_BI[rows_R] @ weigh_II.T
        centre_I = target_RI[0]  # differences of near numbers, so that no digits are lost
        value_GI, target_RI = value_GI - centre_I, target_RI - centre_I
        crossed_RG = target_RI @ value_GI.T
        return np.asarray(((target_RI**2).sum(1)[:, None] - 2 * crossed_RG + (value_GI**2).sum(1)) / 2)

    def derivatives(self, theta_RK: Array, rows_R: Array) -> tuple[Array, Array, Array]:
        means, f, m = self.means, self.curves.floors, len(self.curves.floor_M)
        value_RI = self.curves.value(theta_RK, means.mechanism_I, means.log_c_I)
        above_RI = value_RI - self.curves.split(theta_RK)[0][:, means.mechanism_I]
        rest_RI = (self.y_BI[rows_R] - value_RI) @ means.weigh_II.T
        pull_RI = rest_RI @ means.weigh_II
        # Derivatives by log A and alpha are those of a mechanism's own means alone.
        moment = [above_RI * (-means.log_c_I) ** power for power in range(3)]
        floors_RFI = np.broadcast_to(self.floor_IF.T, (len(theta_RK), f, len(means.mean_I)))
        slope_RKI = np.concatenate([floors_RFI, *(each[:, None] * self.own_IM.T for each in moment[:2])], axis=1)
        white_RKI = slope_RKI @ means.weigh_II.T
        h_RKK = white_RKI @ white_RKI.swapaxes(1, 2)
        bend = [(pull_RI * each) @ self.own_IM for each in moment]
        a, alpha = np.arange(f, f + m), np.arange(f + m, f + 2 * m)
        for first, last, power in ((a, a, 0), (a, alpha, 1), (alpha, a, 1), (alpha, alpha, 2)):
            h_RKK[:, first, last] -= bend[power]
        f_R = (rest_RI**2).sum(1) / 2
        return np.where(np.isfinite(f_R), f_R, np.inf), -(slope_RKI @ pull_RI[:, :, None])[:, :, 0], h_RKK


def fit_curves(curves: Curves, means: RungMeans, noise_BI: Array) -> Minimum:
    """Parameters for the means, in row 0, and for the means with each row of noise -> [1 + B, K]."""
    y_BI = means.mean_I + np.vstack([np.zeros(len(means.mean_I)), noise_BI])
    with np.errstate(over="ignore", invalid="ignore"):  # a step too far is not lower, and so not taken
        return fit_rows(_Rows(curves, means, y_BI), len(y_BI), EXACT)


def choices(counts: Sequence[int]) -> list[Curves]:
    """The laws that so many rungs of each mechanism allow, each nested in the next: no floor, one floor for all, a
    floor for each.

    One floor for all takes a mechanism of three rungs and a mean more than its parameters; own ones take four rungs in
    each, so that each could also be refuted.
    """
    mechanisms = len(counts)
    none, one = Curves((-1,) * mechanisms), Curves((0,) * mechanisms)
    found = [none]
    if max(counts) >= 3 and sum(counts) > one.size:
        found.append(one)
        if mechanisms > 1 and min(counts) >= 4:
            found.append(Curves(tuple(range(mechanisms))))
    return found
