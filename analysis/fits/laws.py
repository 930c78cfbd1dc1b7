"""The curves that may describe loss against share, each fitted to many resamples at once.

A law knows nothing of seeds or studies: it gets the shares `x_I`, their weights `w_I` and losses `y_BI`.

- `Quadratic` is right only near the optimum: on a wide, uncentred or asymmetric grid it is biased even without noise
  (arXiv 2603.22339). It is kept because it needs the fewest shares and because it is what most readers know.
- `Cubic` is the parabola that may lean to one side.
- `TwoPower` is the asymmetric curve `c + a (1 - rho)^p + b (rho + 0.1)^-q` with a <= 0 <= b: what the first memory rows gain,
  against what the last routed experts are worth.
- `Akima` assumes no form: it passes through every mean, noise and all.

Letters: B resamples, I shares, K parameters, G points of the grid over (p, q), S stretches between neighbouring shares.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import Akima1DInterpolator

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
        """Weighted least squares of every row of `y_BI` -> parameters [B, K]; without `polish` only as near as a grid comes."""

    @abstractmethod
    def value(self, x_X: Array, theta_BK: Array) -> Array:
        """Loss of every resample at every x -> [B, X]."""

    @abstractmethod
    def vertex(self, theta_BK: Array, low: float, high: float) -> Array:
        """Where the loss is least -> [B]; NaN where that is not inside (low, high)."""

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


def _lowest(cubics_BS4: Array, start_S: Array, length_S: Array, end_B: Array, low: float, high: float) -> Array:
    """Where piecewise cubics, rising powers of the distance from each stretch's start, are least -> [B]; NaN where an end is lower.

    Args:
        end_B: loss of the lower end.
    """
    c, s, k, m = np.moveaxis(cubics_BS4, 2, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(k**2 - 3 * m * s)
        t_BS = np.where(k > 0, -s / (k + root), (root - k) / (3 * m))  # the root of the slope where it rises, free of cancellation
        t_BS = np.where((start_S + t_BS >= low) & (t_BS >= 0) & (t_BS <= length_S) & (start_S + t_BS <= high), t_BS, np.nan)
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

    With g scaled so, c is the loss at x = 1, a and b are nats at x = 0, and b rho^-q of the literature is the same curve in other units.
    The offset keeps x = 0 finite, as it is in truth: at rho = 0 no expert is idle, but those that a token activates remain, and at the
    sparsity of these studies they amount to about a tenth of the sparse parameters. q adapts to what the offset leaves over.

    Admissible: a <= 0, b >= 0, 0.25 <= p <= 1 and 0 <= q <= 8 (q = 0: the logarithm). For these the curve is convex, so it has one
    minimum. p = 1, a steady gain, and q = 0 are ordinary members of the family; p = 0.25 and q = 8, a cusp at either end which
    no sampled share resolves, count as `bound_hit`.
    """

    name: str = "two-power"
    parameters: tuple[str, ...] = ("c", "a", "b", "p", "q")
    least_shares = 6
    OFFSET = 0.1
    SIGNS = (0, -1, 1)  # of c (free), a and b
    P = (0.25, 1.0)
    Q = (1e-6, 8.0)

    def fit(self, x_I: Array, w_I: Array, y_BI: Array, *, polish: bool = True) -> Array:
        level_B1, root_I = y_BI.mean(1, keepdims=True), np.sqrt(w_I)
        target_BI = (y_BI - level_B1) * root_I
        theta_BK = self._search(x_I, root_I, target_BI)
        if polish:
            both_B = (theta_BK[:, 1] < 0) & (theta_BK[:, 2] > 0)
            theta_BK[both_B] = self._polish(x_I, root_I, target_BI[both_B], theta_BK[both_B])
        theta_BK[:, 0] += level_B1[:, 0]
        return theta_BK

    def _search(self, x_I: Array, root_I: Array, target_BI: Array) -> Array:
        """Best point of a grid over (p, q). For given (p, q) the rest is linear, and the best sign-constrained fit is an unconstrained one
        with both terms, with one of them or with none."""
        theta_BK = np.zeros((len(target_BI), 5))
        least_B = np.full(len(target_BI), np.inf)
        p_axis, q_axis, unused = np.linspace(*self.P, 9), np.linspace(*self.Q, 11), np.ones(1)
        for columns, p_values, q_values in (
            ([0], unused, unused),
            ([0, 1], p_axis, unused),
            ([0, 2], unused, q_axis),
            ([0, 1, 2], p_axis, q_axis),
        ):
            p_G, q_G = (axis.ravel() for axis in np.meshgrid(p_values, q_values, indexing="ij"))
            q_GIK, r_GKK = np.linalg.qr(self._basis(x_I, p_G, q_G)[:, :, columns] * root_I[:, None])
            along_GKB = q_GIK.swapaxes(1, 2) @ target_BI.T
            linear_GKB = np.linalg.solve(r_GKK, along_GKB)
            excess_GB = (target_BI**2).sum(1) - (along_GKB**2).sum(1)
            for k, column in enumerate(columns):
                if column:
                    excess_GB[linear_GKB[:, k] * self.SIGNS[column] <= 0] = np.inf
            g_B = excess_GB.argmin(0)
            rows = np.flatnonzero(excess_GB[g_B, np.arange(len(g_B))] < least_B)
            g_R = g_B[rows]
            least_B[rows] = excess_GB[g_R, rows]
            theta_BK[rows] = 0
            theta_BK[rows[:, None], columns] = linear_GKB[g_R, :, rows]
            theta_BK[rows, 3], theta_BK[rows, 4] = p_G[g_R], q_G[g_R]
        return theta_BK

    def _polish(self, x_I: Array, root_I: Array, target_BI: Array, theta_BK: Array) -> Array:
        """Levenberg-Marquardt over (p, q), all rows at once, the linear part solved inside (variable projection, Kaufman's Jacobian)."""
        limits = np.array([self.P, self.Q])
        log_I = np.log(np.maximum(1 - x_I, 1e-300))
        damping_B11 = np.full((len(theta_BK), 1, 1), 1e-3)

        def project(pq_B2: Array) -> tuple[Array, Array, Array]:
            q_BIK, r_BKK = np.linalg.qr(self._basis(x_I, *pq_B2.T) * root_I[:, None])
            along_BK1 = q_BIK.swapaxes(1, 2) @ target_BI[:, :, None]
            return q_BIK, np.linalg.solve(r_BKK, along_BK1)[:, :, 0], target_BI - (q_BIK @ along_BK1)[:, :, 0]

        pq_B2 = theta_BK[:, 3:]
        q_BIK, linear_BK, rest_BI = project(pq_B2)
        for _ in range(30):
            p_B1, q_B1 = pq_B2[:, :1], pq_B2[:, 1:]
            step = 1e-6
            along_q = (self.fall(x_I, q_B1 + step) - self.fall(x_I, np.maximum(q_B1 - step, 1e-9))) / (
                q_B1 + step - np.maximum(q_B1 - step, 1e-9)
            )
            slope_BI2 = -np.stack([linear_BK[:, [1]] * (1 - x_I) ** p_B1 * log_I, linear_BK[:, [2]] * along_q], axis=2) * root_I[:, None]
            slope_BI2 -= q_BIK @ (q_BIK.swapaxes(1, 2) @ slope_BI2)
            downhill_B2 = -(slope_BI2 * rest_BI[:, :, None]).sum(1)
            held_B2 = ((pq_B2 <= limits[:, 0]) & (downhill_B2 < 0)) | ((pq_B2 >= limits[:, 1]) & (downhill_B2 > 0))
            slope_BI2 = np.where(held_B2[:, None], 0, slope_BI2)
            normal_B22 = slope_BI2.swapaxes(1, 2) @ slope_BI2
            scale_B22 = normal_B22 * np.eye(2) + np.eye(2) * (1e-30 + held_B2[:, None])
            move_B21 = np.linalg.solve(
                normal_B22 + damping_B11 * scale_B22 + np.eye(2) * 1e-30, np.where(held_B2, 0, downhill_B2)[:, :, None]
            )
            trial_B2 = np.clip(pq_B2 + move_B21[:, :, 0], limits[:, 0], limits[:, 1])
            q_new, linear_new, rest_new = project(trial_B2)
            better_B = ((rest_new**2).sum(1) < (rest_BI**2).sum(1)) & (linear_new[:, 1] < 0) & (linear_new[:, 2] > 0)
            damping_B11 = np.clip(np.where(better_B[:, None, None], damping_B11 / 10, damping_B11 * 10), 1e-12, 1e6)
            pq_B2, linear_BK = np.where(better_B[:, None], trial_B2, pq_B2), np.where(better_B[:, None], linear_new, linear_BK)
            rest_BI, q_BIK = np.where(better_B[:, None], rest_new, rest_BI), np.where(better_B[:, None, None], q_new, q_BIK)
        return np.hstack([linear_BK, pq_B2])

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
        hits = (["p at 0.25"] if a and p <= self.P[0] + 1e-3 else []) + (["q at 8"] if b and q >= self.Q[1] - 1e-3 else [])
        return " and ".join(hits)

    def _basis(self, x_I: Array, p_G: Array, q_G: Array) -> Array:
        """Columns 1, (1 - x)^p and g_q(x) for every (p, q) -> [G, I, 3]."""
        gain_GI = (1 - x_I) ** p_G[:, None]
        return np.stack([np.ones_like(gain_GI), gain_GI, self.fall(x_I, q_G[:, None])], axis=2)

    def fall(self, x: Array, q: Array) -> Array:
        """g_q(x)."""
        power, first, last = (np.expm1(-q * np.log(u)) for u in (x + self.OFFSET, self.OFFSET, 1 + self.OFFSET))
        return (power - last) / (first - last)


@dataclass(frozen=True)
class Akima(Law):
    """Akima's piecewise cubic through the share means (J. ACM 17, 1970), which overshoots little; its parameters are those means.

    It interpolates, so nothing is left over: it has neither AICc nor lack of fit, and only its left-out error can be compared.
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
