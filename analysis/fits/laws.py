"""The curves that may describe loss against share, each fitted to many resamples at once.

A law knows nothing of seeds or studies: it gets the shares `x_I`, their weights `w_I` and losses `y_BI`.

- `Quadratic` is right only near the optimum: on a wide, uncentred or asymmetric grid it is biased even without noise
  (arXiv 2603.22339). It is kept because it needs the fewest shares and because it is what most readers know.
- `Cubic` is the parabola that may lean to one side.
- `TwoPower` is the asymmetric curve `c + a (1 - rho)^p + b (rho + 0.1)^-q` with a <= 0 <= b: what the first memory rows
  gain, against what the last routed experts are worth.
- `Akima` assumes no form: it passes through every mean, noise and all.

Letters: B resamples, I shares, K parameters, G points of the grid over (p, q), S stretches between neighbouring shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from analysis.fits.exponential import growth
from analysis.fits.newton import SAME, SETTLED, full_step, minimise

Array = np.ndarray
EDGE = 0.01  # an argmin within this part of the sampled range from an end counts as that end


class Law(ABC):
    """What `fit_allocation` asks of a curve."""

    name: str
    parameters: tuple[str, ...]
    least_shares: int
    """Fewest shares that leave one over when another is left out."""

    def on(self, x_I: Array) -> Law:
        """The law for these shares; only one with knots depends on them."""
        return self

    @abstractmethod
    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        """Weighted least squares of every row of `y_BI` -> parameters [B, K]; without `polish` only as near as a grid
        comes.
        """

    @abstractmethod
    def value(self, x_X: Array, theta_BK: Array) -> Array:
        """Loss of every resample at every x -> [B, X]."""

    @abstractmethod
    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        """Where the loss is least -> [B]; NaN where that is not inside (low, high)."""

    def settled(self, x_I: Array, w_I: Array, y_BI: Array, theta_BK: Array) -> Array:
        """Whether a further full Newton step would gain next to nothing -> bool [B]; always so where the fit is in
        closed form.
        """
        return np.ones(len(theta_BK), bool)

    def at_bound(self, theta_K: Array) -> str:
        """Names of the parameters that stopped at the end of their admissible range, or ''."""
        return ""


def inside(vertex_B: Array, low: float, high: float) -> Array:
    """NaN in place of what lies outside the sampled range or within `EDGE` of its ends."""
    edge = EDGE * (high - low)
    return np.where((vertex_B > low + edge) & (vertex_B < high - edge), vertex_B, np.nan)


def _polynomial(x_I: Array, w_I: Array, y_BI: Array, terms: int) -> Array:
    root_I = np.sqrt(w_I)
    return np.linalg.lstsq(np.vander(x_I, terms, increasing=True) * root_I[:, None], (y_BI * root_I).T, rcond=None)[0].T


def _exact(target_BI: Array) -> float:
    """Half a sum of squares so small beside that of the losses that a fit is exact."""
    return 1e-26 * float((target_BI**2).sum(1).max(initial=0))


def _lowest(cubics_BS4: Array, start_S: Array, length_S: Array, end_B: Array, low: float, high: float) -> Array:
    """Where piecewise cubics, rising powers of the distance from each stretch's start, are least -> [B]; NaN where an
    end is lower.

    Args:
        end_B: loss of the lower end.
    """
    c, s, k, m = np.moveaxis(cubics_BS4, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(k**2 - 3 * m * s)
        t_BS = np.where(
            k > 0, -s / (k + root), (root - k) / (3 * m)
        )  # the root of the slope where it rises, free of cancellation
        t_BS = np.where(
            (start_S + t_BS >= low) & (t_BS >= 0) & (t_BS <= length_S) & (start_S + t_BS <= high), t_BS, np.nan
        )
        loss_BS = np.nan_to_num(c + t_BS * (s + t_BS * (k + t_BS * m)), nan=np.inf)
    rows, best_B = np.arange(len(c)), loss_BS.argmin(1)
    vertex_B = np.where(loss_BS[rows, best_B] < end_B, (start_S + t_BS)[rows, best_B], np.nan)
    return inside(vertex_B, low, high)


class Quadratic(Law):
    """`c + s x + k x^2` over all shares; a minimum needs k > 0."""

    name: str = "quadratic"
    parameters: tuple[str, ...] = ("c", "s", "k")
    least_shares = 4

    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        return _polynomial(x_I, w_I, y_BI, 3)

    def value(self, x_X: Array, theta_BK: Array) -> Array:
        return theta_BK @ np.vander(x_X, 3, increasing=True).T

    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        _, s, k = theta_BK.T
        with np.errstate(divide="ignore", invalid="ignore"):
            return inside(np.where(k > 0, -s / (2 * k), np.nan), low, high)


class Cubic(Law):
    """`c + s x + k x^2 + m x^3` over all shares; an end of the range may lie below its minimum, and then wins."""

    name: str = "cubic"
    parameters: tuple[str, ...] = ("c", "s", "k", "m")
    least_shares = 5

    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        return _polynomial(x_I, w_I, y_BI, 4)

    def value(self, x_X: Array, theta_BK: Array) -> Array:
        return theta_BK @ np.vander(x_X, 4, increasing=True).T

    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        ends_B2 = self.value(np.array([low, high]), theta_BK)
        return _lowest(theta_BK[:, None], np.zeros(1), np.full(1, np.inf), ends_B2.min(1), low, high)


class TwoPower(Law):
    """`c + a (1 - x)^p + b g_q(x)`, where g_q falls from 1 at x = 0 to 0 at x = 1 as `(x + OFFSET)^-q`.

    With g scaled so, c is the loss at x = 1, a and b are nats at x = 0, and b rho^-q of the literature is the same
    curve in other units. The offset keeps x = 0 finite, as it is in truth: at rho = 0 no expert is idle, but those that
    a token activates remain, and at the sparsity of these studies they amount to about a tenth of the sparse
    parameters. q adapts to what the offset leaves over.

    Admissible: a <= 0, b >= 0, 0.25 <= p <= 1 and 0 <= q <= 8 (q = 0: the logarithm). For these the curve is convex, so
    it has one minimum. p = 1, a steady gain, and q = 0 are ordinary members of the family; p = 0.25 and q = 8, a cusp
    at either end which no sampled share resolves, count as `bound_hit`.
    """

    name: str = "two-power"
    parameters: tuple[str, ...] = ("c", "a", "b", "p", "q")
    least_shares = 6
    OFFSET = 0.1
    SIGNS = (0, -1, 1)  # of c (free), a and b
    P = (0.25, 1.0)
    Q = (1e-6, 8.0)
    BANDS, STEPS = 3, 60
    """Bands of q from each of which a resample descends, and for how many steps at most."""

    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        level_B1, root_I = y_BI.mean(1, keepdims=True), np.sqrt(w_I)
        target_BI = (y_BI - level_B1) * root_I
        theta_BK, others_NBK = self._search(x_I, root_I, target_BI)
        if polish:
            lone_B1 = ((theta_BK[:, 1] == 0) | (theta_BK[:, 2] == 0))[:, None]
            for start_BK in (np.where(lone_B1, theta_BK, np.nan), *others_NBK):
                rows = np.flatnonzero(np.isfinite(start_BK[:, 0]))

                def derivatives(at_RK: Array, own_R: Array, rows: Array = rows) -> tuple[Array, Array, Array]:
                    return self._derivatives(x_I, root_I, target_BI[rows[own_R]], at_RK)

                found = minimise(derivatives, start_BK[rows], *self.box, _exact(target_BI), self.STEPS)
                before_R = self._derivatives(x_I, root_I, target_BI[rows], theta_BK[rows])[0]
                lower_R = found.objective_B < before_R * (1 - SAME)
                theta_BK[rows[lower_R]] = found.theta_BK[lower_R]
            for k, other in ((1, 3), (2, 4)):
                theta_BK[theta_BK[:, k] == 0, other] = 1.0
        theta_BK[:, 0] += level_B1[:, 0]
        return theta_BK

    def _search(self, x_I: Array, root_I: Array, target_BI: Array) -> tuple[Array, list[Array]]:
        """Best point of a grid over (p, q) -> [B, K], and the best with both terms in each band of q -> [B, K] each,
        NaN where none is.

        For given (p, q) the rest is linear, and the best sign-constrained fit is an unconstrained one with both terms,
        with one of them or with none.
        """
        theta_BK = np.zeros((len(target_BI), 5))
        least_B = np.full(len(target_BI), np.inf)
        p_axis, q_axis, unused = np.linspace(*self.P, 9), np.linspace(*self.Q, 11), np.ones(1)
        bands = []
        for columns, p_values, q_values in (
            ([0], unused, unused),
            ([0, 1], p_axis, unused),
            ([0, 2], unused, q_axis),
            *(([0, 1, 2], p_axis, band) for band in np.array_split(q_axis, self.BANDS)),
        ):
            p_G, q_G = (axis.ravel() for axis in np.meshgrid(p_values, q_values, indexing="ij"))
            q_GIK, r_GKK = np.linalg.qr(self._basis(x_I, p_G, q_G)[:, :, columns] * root_I[:, None])
            along_GKB = q_GIK.swapaxes(1, 2) @ target_BI.T
            linear_GKB = np.linalg.solve(r_GKK, along_GKB)
            excess_GB = (target_BI**2).sum(1) - (along_GKB**2).sum(1)
            for k, column in enumerate(columns):
                if column:
                    excess_GB[linear_GKB[:, k] * self.SIGNS[column] <= 0] = np.inf
            g_B, rows = excess_GB.argmin(0), np.arange(len(target_BI))
            found_BK = np.zeros_like(theta_BK)
            found_BK[rows[:, None], columns] = linear_GKB[g_B, :, rows]
            found_BK[:, 3], found_BK[:, 4] = p_G[g_B], q_G[g_B]
            excess_B = excess_GB[g_B, rows]
            theta_BK[excess_B < least_B] = found_BK[excess_B < least_B]
            least_B = np.minimum(least_B, excess_B)
            if len(columns) == 3:
                bands.append(np.where(np.isfinite(excess_B)[:, None], found_BK, np.nan))
        return theta_BK, bands

    @property
    def box(self) -> tuple[Array, Array]:
        """Ends of the admissible range of each parameter -> [K], [K]."""
        low_K, high_K = np.array([(-np.inf, np.inf), (-np.inf, 0), (0, np.inf), self.P, self.Q]).T
        return low_K, high_K

    def settled(self, x_I: Array, w_I: Array, y_BI: Array, theta_BK: Array) -> Array:
        root_I = np.sqrt(w_I)
        f_B, g_BK, h_BKK = self._derivatives(x_I, root_I, y_BI * root_I, theta_BK)
        gain_B = full_step(theta_BK, g_BK, h_BKK, *self.box)[1]
        return np.asarray((gain_B <= SETTLED * f_B) | (f_B <= _exact((y_BI - y_BI.mean(1, keepdims=True)) * root_I)))

    def _derivatives(self, x_I: Array, root_I: Array, target_RI: Array, theta_RK: Array) -> tuple[Array, Array, Array]:
        """Half the weighted squares, gradient and Hessian -> [R], [R, K], [R, K, K]."""
        c, a, b, p, q = theta_RK.T[:, :, None]
        log_I = np.log(np.maximum(1 - x_I, 1e-300))
        gain_RI = (1 - x_I) ** p
        fall_RI, slope_RI, bend_RI = self.falls(x_I, q)
        rest_RI = target_RI - root_I * (c + a * gain_RI + b * fall_RI)
        each = [np.ones_like(gain_RI), gain_RI, fall_RI, a * gain_RI * log_I, b * slope_RI]
        slope_RIK = np.stack(each, axis=2) * root_I[:, None]
        h_RKK = slope_RIK.swapaxes(1, 2) @ slope_RIK
        bends = {(1, 3): gain_RI * log_I, (2, 4): slope_RI, (3, 3): a * gain_RI * log_I**2, (4, 4): b * bend_RI}
        for (k, other), bend in bends.items():
            h_RKK[:, k, other] -= (rest_RI * root_I * bend).sum(1)
            h_RKK[:, other, k] = h_RKK[:, k, other]
        for k, other in ((1, 3), (2, 4)):  # a power whose term is nothing has no say
            none_R = theta_RK[:, k] == 0
            h_RKK[none_R, k, other] = h_RKK[none_R, other, k] = 0
            h_RKK[none_R, other, other] = 1
        return (rest_RI**2).sum(1) / 2, -(slope_RIK * rest_RI[:, :, None]).sum(1), h_RKK

    def value(self, x_X: Array, theta_BK: Array) -> Array:
        c, a, b, p, q = theta_BK.T[:, :, None]
        return c + a * (1 - x_X) ** p + b * self.fall(x_X, q)

    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        _, a, b, p, q = theta_BK.T
        scale = np.expm1(-q * np.log(self.OFFSET)) - np.expm1(-q * np.log(1 + self.OFFSET))

        def slope(x: Array) -> Array:
            return -a * p * (1 - x) ** (p - 1) - b * q * (x + self.OFFSET) ** (-q - 1) / scale

        left, right = np.full(len(a), low), np.full(len(a), min(high, 1 - 1e-12))
        bracketed = (slope(left) < 0) & (slope(right) > 0)
        for _ in range(60):  # the slope rises throughout, so bisection cannot miss its zero
            middle = (left + right) / 2
            falls = slope(middle) < 0
            left, right = np.where(falls, middle, left), np.where(falls, right, middle)
        return inside(np.where(bracketed, (left + right) / 2, np.nan), low, high)

    def at_bound(self, theta_K: Array) -> str:
        _, a, b, p, q = theta_K
        hits = (["p at 0.25"] if a and p <= self.P[0] + 1e-3 else []) + (
            ["q at 8"] if b and q >= self.Q[1] - 1e-3 else []
        )
        return " and ".join(hits)

    def _basis(self, x_I: Array, p_G: Array, q_G: Array) -> Array:
        """Columns 1, (1 - x)^p and g_q(x) for every (p, q) -> [G, I, 3]."""
        gain_GI = (1 - x_I) ** p_G[:, None]
        return np.stack([np.ones_like(gain_GI), gain_GI, self.fall(x_I, q_G[:, None])], axis=2)

    def fall(self, x: Array, q: Array) -> Array:
        """g_q(x)."""
        return self.falls(x, q)[0]

    def falls(self, x: Array, q: Array) -> tuple[Array, Array, Array]:
        """g_q(x) and its first two derivatives by q."""
        logs = [np.log(u) for u in (x + self.OFFSET, np.asarray(self.OFFSET), np.asarray(1 + self.OFFSET))]
        # of -(u^-q - 1) / q, for each u
        here, first, last = ((v * g, -(v**2) * g1, v**3 * g2) for v in logs for g, g1, g2 in [growth(-q * v)])
        over, under = (
            [a - b for a, b in zip(here, last, strict=True)],
            [a - b for a, b in zip(first, last, strict=True)],
        )
        value = over[0] / under[0]
        slope = (over[1] - value * under[1]) / under[0]
        return value, slope, (over[2] - 2 * slope * under[1] - value * under[2]) / under[0]


@dataclass(frozen=True)
class Akima(Law):
    """Akima's piecewise cubic through the share means (J. ACM 17, 1970), which overshoots little; its parameters are
    those means.

    It interpolates, so nothing is left over: it has neither AICc nor lack of fit, and only its left-out error can be
    compared.
    """

    knots: tuple[float, ...] = ()
    name: str = "akima"
    least_shares = 5

    @property
    def parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"loss at {knot:.4g}" for knot in self.knots)

    def on(self, x_I: Array) -> Akima:
        return Akima(tuple(map(float, x_I)))

    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        return y_BI

    def value(self, x_X: Array, theta_BK: Array) -> Array:
        return np.asarray(self._through(theta_BK)(x_X))

    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        knots_I = np.array(self.knots)
        cubics_BS4 = self._through(theta_BK).c[::-1].transpose(2, 1, 0)
        return _lowest(cubics_BS4, knots_I[:-1], np.diff(knots_I), theta_BK[:, [0, -1]].min(1), low, high)

    def _through(self, theta_BK: Array) -> Akima1DInterpolator:
        return Akima1DInterpolator(np.array(self.knots), theta_BK, axis=1)
