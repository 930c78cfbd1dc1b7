"""The arithmetic of the law over several budgets (`joint`) and its nested models: what they say of loss, their fit, and their score.

Letters: B resamples, R those still moving, C budgets, F factors, I means over all budgets, K parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from analysis.fits.laws import Cubic, TwoPower, inside
from analysis.fits.noise import SeedModel

Array = np.ndarray
SHAPES = {"cubic": ("g",), "two-power": ("p", "q")}
"""Shape -> its parameters."""
POSITION = {"cubic": (-1.0, 2.0), "two-power": (-15.0, 15.0)}
BOUNDS = {"g": (-3.0, 3.0), "p": TwoPower.P, "q": TwoPower.Q, "log amplitude": (-25.0, 10.0)}
SLOPE = (-30.0, 30.0)
IDLE = 8


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
    """A shape, the factors that there are, those that move its optimum and those that change it: how parameters become losses."""

    shape: str
    factors: tuple[str, ...]
    moves_with: tuple[str, ...]
    bends_with: tuple[str, ...]

    @property
    def terms(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What makes up a budget's curve, and the factors that each is linear in."""
        shape = tuple((name, self.bends_with) for name in SHAPES[self.shape])
        return (("position", self.moves_with), ("log amplitude", self.factors), *shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(word for name, by in self.terms for word in (name, *(f"{name} by {factor}" for factor in by)))

    @property
    def bounds(self) -> Array:
        """[K, 2]."""
        ranges = {**BOUNDS, "position": POSITION[self.shape]}
        return np.array([limits for name, by in self.terms for limits in (ranges[name], *[SLOPE] * len(by))])

    def at(self, theta_BK: Array, z_XF: Array) -> dict[str, Array]:
        """The terms at budgets, z less its mean -> name -> [B, X]; those of the shape stop at their bounds."""
        found, first = {}, 0
        for name, by in self.terms:
            slope_XS = z_XF[:, [self.factors.index(factor) for factor in by]]
            value_BX = theta_BK[:, [first]] + theta_BK[:, first + 1 : first + 1 + len(by)] @ slope_XS.T
            found[name] = np.clip(value_BX, *BOUNDS[name]) if name in SHAPES[self.shape] else value_BX
            first += 1 + len(by)
        return found

    def value(self, theta_BK: Array, x_I: Array, z_IF: Array) -> Array:
        """Loss less the level -> [B, I]."""
        own = self.at(theta_BK, z_IF)
        if self.shape == "cubic":
            u_BI = x_I - own["position"]
            curve_BI = u_BI**2 * (1 + own["g"] * u_BI)
        else:
            curve_BI = _weight(own) * TwoPower().fall(x_I, own["q"]) - (1 - x_I) ** own["p"]
        return np.asarray(np.exp(own["log amplitude"]) * curve_BI)

    def optimum(self, theta_BK: Array, z_F: Array, low: float, high: float) -> Array:
        """Best share at one budget, an end where none is inside -> [B]."""
        own = {name: value_B1[:, 0] for name, value_B1 in self.at(theta_BK, z_F[None]).items()}
        m_B = own["position"]
        if self.shape == "two-power":  # convex
            best_B = (1 + TwoPower.OFFSET) * expit(m_B) - TwoPower.OFFSET
            return np.where(np.isnan(inside(best_B, low, high)), np.where(best_B < (low + high) / 2, low, high), best_B)
        g_B = own["g"]
        own_BK = np.stack([m_B**2 - g_B * m_B**3, 3 * g_B * m_B**2 - 2 * m_B, 1 - 3 * g_B * m_B, g_B], axis=1)
        ends_B2 = Cubic().value(np.array([low, high]), own_BK)
        vertex_B = Cubic().vertex(own_BK, low, high)
        return np.where(np.isnan(vertex_B), np.where(ends_B2[:, 0] <= ends_B2[:, 1], low, high), vertex_B)


def _weight(own: dict[str, Array]) -> Array:
    """Of the falling term, such that the two slopes cancel at the best share (1 + o) / (1 + e^-m) - o, o = `TwoPower.OFFSET`."""
    m, p, q, o = own["position"], own["p"], own["q"], TwoPower.OFFSET
    scale = np.expm1(-q * np.log(o)) - np.expm1(-q * np.log(1 + o))
    rising = np.log(p) + (p - 1) * (np.log(1 + o) - np.logaddexp(0, m))
    falling = np.log(q / scale) - (q + 1) * (np.log(1 + o) - np.logaddexp(0, -m))
    return np.asarray(np.exp(rising - falling))


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
    firsts = np.linspace(0, 1, 6) if curve.shape == "cubic" else np.linspace(-3, 3, 6)
    shapes = [(g,) for g in (-0.7, 0.0, 0.7)] if curve.shape == "cubic" else [(p, q) for p in (0.4, 0.9) for q in (0.5, 3.0)]
    places = [curve.names.index(name) for name, _ in curve.terms]
    starts = np.zeros((len(firsts) * len(shapes) * 2, len(curve.names)))
    starts[:, places] = [(first, amplitude, *rest) for first in firsts for rest in shapes for amplitude in (-3.0, -1.0)]
    tried, squares = _descend(curve, starts, np.repeat(target_BI[:1], len(starts), axis=0), means, z_IF, 60)
    best = tried[squares.argmin()]
    theta_BK = _descend(curve, np.repeat(best[None], len(target_BI), axis=0), target_BI, means, z_IF, 25)[0]
    theta_BK[0] = best
    return theta_BK


def _descend(curve: Curve, theta_BK: Array, target_BI: Array, means: Means, z_IF: Array, steps: int) -> tuple[Array, Array]:
    """Levenberg-Marquardt within the bounds, all rows that still move at once -> parameters [B, K], squares [B]."""
    limits = curve.bounds
    theta_BK = np.clip(theta_BK, limits[:, 0], limits[:, 1])
    count = theta_BK.shape[1]

    def rest(theta_RK: Array, target_RI: Array) -> Array:
        return target_RI - curve.value(theta_RK, means.x_I, z_IF) @ means.weigh_II.T

    rest_BI = rest(theta_BK, target_BI)
    squares_B, damping_B = (rest_BI**2).sum(1), np.full(len(theta_BK), 1e-2)
    idle_B = np.zeros(len(theta_BK), int)  # steps in a row that gained next to nothing; after IDLE of them a row rests
    for _ in range(steps):
        live_R = np.flatnonzero(idle_B < IDLE)
        if not len(live_R):
            break
        at_RK, target_RI, rest_RI = theta_BK[live_R], target_BI[live_R], rest_BI[live_R]
        slope_RIK = np.empty((*rest_RI.shape, count))
        for k in range(count):
            moved_RK = at_RK.copy()
            moved_RK[:, k] += np.where(at_RK[:, k] + 1e-6 > limits[k, 1], -1e-6, 1e-6)
            slope_RIK[:, :, k] = (rest_RI - rest(moved_RK, target_RI)) / (moved_RK - at_RK)[:, [k]]
        downhill_RK = (slope_RIK * rest_RI[:, :, None]).sum(1)
        held_RK = ((at_RK <= limits[:, 0]) & (downhill_RK < 0)) | ((at_RK >= limits[:, 1]) & (downhill_RK > 0))
        slope_RIK = np.where(held_RK[:, None], 0, slope_RIK)
        normal_RKK = slope_RIK.swapaxes(1, 2) @ slope_RIK
        size_RK = np.einsum("rkk->rk", normal_RKK) + 1e-9 + held_RK
        normal_RKK = normal_RKK + (damping_B[live_R, None] * size_RK + 1e-12 + held_RK)[:, :, None] * np.eye(count)
        move_RK = np.linalg.solve(normal_RKK, np.where(held_RK, 0, downhill_RK)[:, :, None])[:, :, 0]
        trial_RK = np.clip(at_RK + np.clip(move_RK, -2, 2), limits[:, 0], limits[:, 1])
        new_RI = rest(trial_RK, target_RI)
        new_R = (new_RI**2).sum(1)
        gain_R = squares_B[live_R] - new_R
        idle_B[live_R] = np.where(gain_R > 1e-6, 0, idle_B[live_R] + 1)
        better_R = gain_R > 0
        better = live_R[better_R]
        theta_BK[better], rest_BI[better], squares_B[better] = trial_RK[better_R], new_RI[better_R], new_R[better_R]
        damping_B[live_R] = np.clip(np.where(better_R, damping_B[live_R] / 5, damping_B[live_R] * 5), 1e-10, 1e8)
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
