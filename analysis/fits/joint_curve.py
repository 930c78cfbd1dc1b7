"""One curve of the law over several budgets (`joint`): its shape, what its parameters may be, and how they follow from
a budget's factors.

Letters: B resamples, C budgets, F factors, I means over all budgets, K parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from analysis.fits.exponential import growth
from analysis.fits.laws import Cubic, TwoPower, inside

Array = np.ndarray
SHAPES = {"cubic": ("g",), "two-power": ("p", "q")}
"""Shape -> its parameters."""
POSITION = {"cubic": (-1.0, 2.0), "two-power": (-15.0, 15.0)}
BOUNDS = {"g": (-3.0, 3.0), "p": TwoPower.P, "q": TwoPower.Q, "log amplitude": (-25.0, 10.0)}
SLOPE = (-30.0, 30.0)
SOFT = 0.02
"""A parameter of the shape nears its bounds smoothly, within about this part of its range."""
CENTRES = {
    "cubic": {"position": 0.5, "log amplitude": -2.0, "g": 0.0},
    "two-power": {"position": 0.0, "log amplitude": -2.0, "p": 0.6, "q": 2.0},
}


@dataclass(frozen=True)
class Curve:
    """A shape, the factors that there are, those that move its optimum and those that change it: how parameters become
    losses.
    """

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
        for name in SHAPES[self.shape]:  # as far as its value still changes
            low, high = BOUNDS[name]
            ranges[name] = (low - 40 * SOFT * (high - low), high + 40 * SOFT * (high - low))
        return np.array([limits for name, by in self.terms for limits in (ranges[name], *[SLOPE] * len(by))])

    @property
    def centre_K(self) -> Array:
        """Middle of the prior."""
        return np.array([value for name, by in self.terms for value in (CENTRES[self.shape][name], *[0.0] * len(by))])

    def raw(self, theta_BK: Array, z_XF: Array) -> dict[str, Array]:
        """The terms at budgets, z less its mean, before those of the shape stop at their bounds -> name -> [B, X]."""
        found, first = {}, 0
        for name, by in self.terms:
            slope_XS = z_XF[:, [self.factors.index(factor) for factor in by]]
            found[name] = theta_BK[:, [first]] + theta_BK[:, first + 1 : first + 1 + len(by)] @ slope_XS.T
            first += 1 + len(by)
        return found

    def at(self, theta_BK: Array, z_XF: Array) -> dict[str, Array]:
        """The terms at budgets, z less its mean -> name -> [B, X]; those of the shape stop at their bounds."""
        return {
            name: _bounded(raw_BX, *BOUNDS[name])[0] if name in SHAPES[self.shape] else raw_BX
            for name, raw_BX in self.raw(theta_BK, z_XF).items()
        }

    def stated(self, theta_BK: Array) -> Array:
        """Parameters as they are reported: those of the shape at the mean of the budgets stop at their bounds -> [B,
        K].
        """
        stated_BK = theta_BK.copy()
        for name in SHAPES[self.shape]:
            k = self.names.index(name)
            stated_BK[:, k] = _bounded(theta_BK[:, k], *BOUNDS[name])[0]
        return stated_BK

    def value(self, theta_BK: Array, x_I: Array, z_IF: Array) -> Array:
        """Loss less the level -> [B, I]."""
        return self.derivatives(theta_BK, x_I, z_IF)[0]

    def derivatives(self, theta_BK: Array, x_I: Array, z_IF: Array) -> tuple[Array, Array, Array]:
        """Loss less the level, and its derivatives by the terms (before they stop at a bound) -> [B, I], [B, I, T], [B,
        I, T, T].
        """
        raw = self.raw(theta_BK, z_IF)
        shape = {name: _bounded(raw[name], *BOUNDS[name]) for name in SHAPES[self.shape]}
        own = [raw["position"], *(each[0] for each in shape.values())]
        h_BI, first, second = (_cubic if self.shape == "cubic" else _two_power)(x_I, *own)
        for t, (_, slope, bend) in enumerate(shape.values(), 1):  # from the bounded term to the raw one
            for other in range(len(own)):
                key = (min(t, other), max(t, other))
                second[key] = second[key] * slope
            second[t, t] = second[t, t] * slope + first[t] * bend
            first[t] = first[t] * slope
        size_BI, order = (
            np.exp(raw["log amplitude"]),
            [0, *range(2, len(own) + 1)],
        )  # the amplitude stands second among the terms
        slope_BIT = np.empty((*h_BI.shape, len(own) + 1))
        bend_BITT = np.empty((*slope_BIT.shape, len(own) + 1))
        slope_BIT[..., 1], bend_BITT[..., 1, 1] = h_BI, h_BI
        for t, place in enumerate(order):
            slope_BIT[..., place] = bend_BITT[..., 1, place] = bend_BITT[..., place, 1] = first[t]
            for u, beside in enumerate(order):
                bend_BITT[..., place, beside] = second[min(t, u), max(t, u)]
        return size_BI * h_BI, size_BI[..., None] * slope_BIT, size_BI[..., None, None] * bend_BITT

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


def _bounded(raw: Array, low: float, high: float) -> tuple[Array, Array, Array]:
    """The number itself well inside its bounds, and nearing them smoothly outside; with both derivatives -> each as
    raw.
    """
    width = SOFT * (high - low)
    above, below = (raw - low) / width, (high - raw) / width
    value = raw + width * (np.logaddexp(0, -above) - np.logaddexp(0, -below))
    rise, fall = expit(-above), expit(-below)
    return np.clip(value, low, high), 1 - rise - fall, (rise * (1 - rise) - fall * (1 - fall)) / width


Parts = tuple[Array, dict[int, Array], dict[tuple[int, int], Array]]


def _cubic(x_I: Array, m: Array, g: Array) -> Parts:
    """H, its first and its second derivatives by m and g."""
    u = x_I - m
    first = {0: -u * (2 + 3 * g * u), 1: u**3}
    return u**2 * (1 + g * u), first, {(0, 0): 2 + 6 * g * u, (0, 1): -3 * u**2, (1, 1): np.zeros_like(u)}


def _two_power(x_I: Array, m: Array, p: Array, q: Array) -> Parts:
    """H, its first and its second derivatives by m, p and q.

    The falling term is `e^l G`, G the rise of `-((x + o)^-q - 1) / q` from x to 1 and l such that the slopes of both
    terms cancel at the best share (1 + o) / (1 + e^-m) - o, o = `TwoPower.OFFSET`.
    """
    o, part = TwoPower.OFFSET, expit(m)
    gap, gap_at_best = (
        np.log(1 + o) - np.logaddexp(0, m),
        np.log(1 + o) - np.logaddexp(0, -m),
    )  # logs of 1 - x and of x + o there
    log_l = {0: -(p - 1) * part + (q + 1) * (1 - part), 1: 1 / p + gap, 2: gap_at_best}
    bends = {
        (0, 0): -(p + q) * part * (1 - part),
        (0, 1): -part,
        (0, 2): 1 - part,
        (1, 1): -1 / p**2,
        (1, 2): 0.0,
        (2, 2): 0.0,
    }
    scale = np.exp(np.log(p) + (p - 1) * gap + (q + 1) * gap_at_best)
    log_x, log_1 = np.log(x_I + o), np.log(1 + o)
    here, last = growth(-q * log_x), growth(-q * log_1)
    g0 = log_1 * last[0] - log_x * here[0]
    g1 = log_x**2 * here[1] - log_1**2 * last[1]
    g2 = log_1**3 * last[2] - log_x**3 * here[2]
    falling, by_q = scale * g0, scale * g1
    left = np.maximum(1 - x_I, 1e-300)
    gain, log_left = (1 - x_I) ** p, np.log(left)
    first = {0: falling * log_l[0], 1: falling * log_l[1] - gain * log_left, 2: falling * log_l[2] + by_q}
    second = {(t, u): falling * (log_l[t] * log_l[u] + bend) for (t, u), bend in bends.items()}
    second[1, 1] = second[1, 1] - gain * log_left**2
    for t in range(3):
        second[t, 2] = second[t, 2] + by_q * log_l[t] * (2 if t == 2 else 1)
    second[2, 2] = second[2, 2] + scale * g2
    return falling - gain, first, second
