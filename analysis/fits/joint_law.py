"""The arithmetic of the law over several budgets (`joint`) and its nested models: what they say of loss, their fit, and their score.

Letters: B resamples, C budgets, F factors, I means over all budgets, K parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from analysis.fits.laws import Cubic, TwoPower
from analysis.fits.noise import SeedModel

Array = np.ndarray
SHAPES = {"cubic": ("g",), "two-power": ("p", "q")}
"""Shape -> its parameters, common to all budgets."""
POSITION = {"cubic": (-1.0, 2.0), "two-power": (-15.0, 15.0)}
BOUNDS = {"g": (-3.0, 3.0), "p": TwoPower.P, "q": TwoPower.Q}
AMPLITUDE = (-25.0, 10.0)  # of its logarithm
SLOPE = (-30.0, 30.0)


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
    sd_C: Array
    df_C: Array
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
            sd_C=self.sd_C[own],
            df_C=self.df_C[own],
            weigh_II=self.weigh_II[np.ix_(own_I, own_I)],
            seeds_C=self.seeds_C[own],
        )


@dataclass(frozen=True)
class Curve:
    """A shape, the factors that there are and those that move its optimum: how parameters become losses."""

    shape: str
    factors: tuple[str, ...]
    moves_with: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        position = ("position", *(f"position by {name}" for name in self.moves_with))
        return (*position, "log amplitude", *(f"log amplitude by {name}" for name in self.factors), *SHAPES[self.shape])

    @property
    def bounds(self) -> Array:
        """[K, 2]."""
        slopes = [SLOPE] * len(self.moves_with), [SLOPE] * len(self.factors)
        return np.array([POSITION[self.shape], *slopes[0], AMPLITUDE, *slopes[1], *(BOUNDS[name] for name in SHAPES[self.shape])])

    def position(self, theta_BK: Array, z_F: Array) -> Array:
        """At one budget, z less its mean -> [B]."""
        moving = [self.factors.index(name) for name in self.moves_with]
        return np.asarray(theta_BK[:, 0] + theta_BK[:, 1 : 1 + len(moving)] @ z_F[moving])

    def value(self, theta_BK: Array, x_I: Array, z_IF: Array) -> Array:
        """Loss less the level -> [B, I]."""
        moving = [self.factors.index(name) for name in self.moves_with]
        split, count = 1 + len(moving), len(self.factors)
        m_BI = theta_BK[:, :1] + theta_BK[:, 1:split] @ z_IF[:, moving].T
        s_BI = theta_BK[:, [split]] + theta_BK[:, split + 1 : split + 1 + count] @ z_IF.T
        rest = theta_BK[:, split + 1 + count :]
        if self.shape == "cubic":
            u_BI = x_I - m_BI
            curve_BI = u_BI**2 * (1 + rest[:, :1] * u_BI)
        else:
            curve_BI = np.exp(m_BI) * TwoPower().fall(x_I, rest[:, 1:]) - (1 - x_I) ** rest[:, :1]
        return np.exp(s_BI) * curve_BI

    def optimum(self, theta_BK: Array, z_F: Array, low: float, high: float) -> Array:
        """Best share at one budget, an end where none is inside -> [B]."""
        m_B = self.position(theta_BK, z_F)
        one_B = np.ones_like(m_B)
        if self.shape == "cubic":
            g_B = theta_BK[:, -1]
            law: Cubic | TwoPower = Cubic()
            own_BK = np.stack([m_B**2 - g_B * m_B**3, 3 * g_B * m_B**2 - 2 * m_B, 1 - 3 * g_B * m_B, g_B], axis=1)
        else:
            law = TwoPower()
            own_BK = np.stack([0 * m_B, -one_B, np.exp(m_B), theta_BK[:, -2], theta_BK[:, -1]], axis=1)
        ends_B2 = law.value(np.array([low, high]), own_BK)
        vertex_B = law.vertex(own_BK, low, high)
        return np.where(np.isnan(vertex_B), np.where(ends_B2[:, 0] <= ends_B2[:, 1], low, high), vertex_B)


@dataclass(frozen=True)
class Law:
    """The fitted models: row 0 is that of the data, the others those of the resamples. Every row chose a model of its own."""

    curves: tuple[Curve, ...]
    theta: tuple[Array, ...]
    chosen_B: Array
    centre_F: Array
    low: float
    high: float

    def optimum(self, log_F: Array) -> Array:
        """Best share at one budget in each row -> [B]."""
        z_F = log_F - self.centre_F
        each = [curve.optimum(theta, z_F, self.low, self.high) for curve, theta in zip(self.curves, self.theta, strict=True)]
        return np.stack(each)[self.chosen_B, np.arange(len(self.chosen_B))]


def nested(factors: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Which factors move the optimum: none, each alone, all."""
    return [(), *((name,) for name in factors), *([factors] if len(factors) > 1 else [])]


def fit_curve(curve: Curve, means: Means) -> Array:
    """Parameters of every row of means -> [B, K]. The data from a grid of starts, the resamples from the best of those."""
    z_IF = (means.z_CF - means.z_CF.mean(0))[means.budget_I]
    target_BI = means.y_BI @ means.weigh_II.T
    firsts = np.linspace(0, 1, 6) if curve.shape == "cubic" else np.linspace(-6, 4, 6)
    shapes = [(g,) for g in (-0.7, 0.0, 0.7)] if curve.shape == "cubic" else [(p, q) for p in (0.4, 0.9) for q in (0.5, 3.0)]
    starts = np.zeros((len(firsts) * len(shapes) * 2, len(curve.names)))
    place = 0
    for first in firsts:
        for rest in shapes:
            for amplitude in (-3.0, -1.0):
                starts[place, 0], starts[place, 1 + len(curve.moves_with)] = first, amplitude
                starts[place, -len(rest) :] = rest
                place += 1
    tried, squares = _descend(curve, starts, np.repeat(target_BI[:1], len(starts), axis=0), means, z_IF, 60)
    best = tried[squares.argmin()]
    theta_BK = _descend(curve, np.repeat(best[None], len(target_BI), axis=0), target_BI, means, z_IF, 25)[0]
    theta_BK[0] = best
    return theta_BK


def _descend(curve: Curve, theta_BK: Array, target_BI: Array, means: Means, z_IF: Array, steps: int) -> tuple[Array, Array]:
    """Levenberg-Marquardt within the bounds, all rows at once -> parameters [B, K], squares [B]."""
    limits = curve.bounds
    theta_BK = np.clip(theta_BK, limits[:, 0], limits[:, 1])
    count, damping_B = theta_BK.shape[1], np.full(len(theta_BK), 1e-2)

    def rest(theta_BK: Array) -> Array:
        return target_BI - curve.value(theta_BK, means.x_I, z_IF) @ means.weigh_II.T

    rest_BI = rest(theta_BK)
    squares_B, idle = (rest_BI**2).sum(1), 0
    for _ in range(steps):
        slope_BIK = np.empty((*rest_BI.shape, count))
        for k in range(count):
            moved = theta_BK.copy()
            moved[:, k] += np.where(theta_BK[:, k] + 1e-6 > limits[k, 1], -1e-6, 1e-6)
            slope_BIK[:, :, k] = (rest_BI - rest(moved)) / (moved - theta_BK)[:, [k]]
        downhill_BK = (slope_BIK * rest_BI[:, :, None]).sum(1)
        held_BK = ((theta_BK <= limits[:, 0]) & (downhill_BK < 0)) | ((theta_BK >= limits[:, 1]) & (downhill_BK > 0))
        slope_BIK = np.where(held_BK[:, None], 0, slope_BIK)
        normal_BKK = slope_BIK.swapaxes(1, 2) @ slope_BIK
        size_BK = np.einsum("bkk->bk", normal_BKK) + 1e-9 + held_BK
        normal_BKK = normal_BKK + (damping_B[:, None] * size_BK + 1e-12)[:, :, None] * np.eye(count) + held_BK[:, :, None] * np.eye(count)
        move_BK = np.linalg.solve(normal_BKK, np.where(held_BK, 0, downhill_BK)[:, :, None])[:, :, 0]
        trial_BK = np.clip(theta_BK + np.clip(move_BK, -2, 2), limits[:, 0], limits[:, 1])
        new_BI = rest(trial_BK)
        new_B = (new_BI**2).sum(1)
        better_B = new_B < squares_B
        idle = 0 if (squares_B - new_B > 1e-6).any() else idle + 1
        theta_BK, rest_BI = np.where(better_B[:, None], trial_BK, theta_BK), np.where(better_B[:, None], new_BI, rest_BI)
        squares_B = np.where(better_B, new_B, squares_B)
        if idle == 4:
            break
        damping_B = np.clip(np.where(better_B, damping_B / 5, damping_B * 5), 1e-10, 1e8)
    return theta_BK, squares_B


def deviations(curve: Curve, theta_BK: Array, means: Means) -> Array:
    """Deviations of the means from the law, in units of their noise -> [B, I]."""
    z_IF = (means.z_CF - means.z_CF.mean(0))[means.budget_I]
    return np.asarray((means.y_BI - curve.value(theta_BK, means.x_I, z_IF)) @ means.weigh_II.T)


def aiccs(curve: Curve, theta_BK: Array, means: Means) -> Array:
    """Akaike's criterion over runs, each budget with a noise level of its own -> [B]; infinite where too few runs allow it.

    A resample has the noise of the study and its own, so half of its squares count.
    """
    budgets = len(means.models)
    runs_C = np.array([model.counts_I.sum() for model in means.models])
    rest_BI = deviations(curve, theta_BK, means)
    squares_BC = np.stack([(rest_BI[:, means.budget_I == c] ** 2).sum(1) for c in range(budgets)], axis=1) * means.sd_C**2
    squares_BC[1:] /= 2
    free, runs = len(curve.names) + budgets + int((means.seeds_C - 1).sum()) + budgets, int(runs_C.sum())
    if runs - free <= 1:
        return np.full(len(squares_BC), np.inf)
    pure_C = np.array([model.squares for model in means.models])
    return np.asarray(np.log((pure_C + squares_BC) / runs_C) @ runs_C + 2 * free + 2 * free * (free + 1) / (runs - free - 1))
