"""Scheffe's polynomials over the sampled region of a triangle of three shares: what a mix loses, which is best, which
may be the best.

Knows neither runs nor seeds; `simplex` fits them.

Letters: A directions, B resamples, K parameters, S sides of the sampled region, X any mixes, 3 pools.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri, stdtrit

Array = np.ndarray
LAWS = {"linear": 3, "quadratic": 6, "special-cubic": 7}
"""Law -> its parameters."""
LAW = "quadratic"


@dataclass(frozen=True)
class Quadratics:
    """Fitted surfaces over the region that was sampled: row 0 is that of the data, the others those of the
    resamples.
    """

    beta_BK: Array
    corners_S3: Array
    """Corners of the sampled region in turn."""
    covariance_KK: Array
    """Of the parameters, in nats^2 per token^2."""
    df: int
    """Degrees of freedom of its level."""

    def at(self, x_X3: Array) -> Array:
        """Loss of each row's surface -> [B, X]."""
        return self.beta_BK @ terms(x_X3, LAW).T

    def sides(self) -> tuple[Array, Array]:
        """The best mix on each side of the region -> [B, S, 3], and its loss -> [B, S]. A side is a parabola: three
        losses give it.
        """
        first_S3, last_S3 = self.corners_S3, np.roll(self.corners_S3, -1, axis=0)
        start_BS, middle_BS, end_BS = self.at(first_S3), self.at((first_S3 + last_S3) / 2), self.at(last_S3)
        bend_BS, slope_BS = 2 * start_BS - 4 * middle_BS + 2 * end_BS, 4 * middle_BS - 3 * start_BS - end_BS
        with np.errstate(divide="ignore", invalid="ignore"):
            t_BS = np.where(bend_BS > 0, np.clip(-slope_BS / (2 * bend_BS), 0, 1), end_BS < start_BS)
        x_BS3 = first_S3 + t_BS[:, :, None] * (last_S3 - first_S3)
        return x_BS3, start_BS + slope_BS * t_BS + bend_BS * t_BS**2

    def best(self) -> Array:
        """Mix of the least loss of each row -> [B, 3]: where the surface is level, if that is a minimum and inside,
        else on a side.
        """
        x_BS3, loss_BS = self.sides()
        x_B3 = x_BS3[np.arange(len(x_BS3)), loss_BS.argmin(1)]
        b1, b2, b3, b12, b13, b23 = self.beta_BK.T
        # With x3 = 1 - x1 - x2 the surface is b3 + g.u + u.H.u / 2 in u = (x1, x2).
        slope_B2 = np.stack([b1 - b3 + b13, b2 - b3 + b23], axis=1)
        h11, h12, h22 = -2 * b13, b12 - b13 - b23, -2 * b23
        determinant = h11 * h22 - h12**2
        with np.errstate(divide="ignore", invalid="ignore"):
            u_B = (
                np.stack([h12 * slope_B2[:, 1] - h22 * slope_B2[:, 0], h12 * slope_B2[:, 0] - h11 * slope_B2[:, 1]])
                / determinant
            )
            level_B3 = np.stack([u_B[0], u_B[1], 1 - u_B.sum(0)], axis=1)
            minimum_B = (h11 > 0) & (determinant > 0) & within(self.corners_S3, level_B3)
        return np.where(minimum_B[:, None], level_B3, x_B3)

    def tie(self, x_X3: Array) -> Array:
        """How far each mix is from being the best, in units of what 95% confidence allows -> [X]; up to 1 it may be.

        The larger of two tests. The loss there is above that of the fitted best mix (t test of the difference). A
        direction that stays in the region leads downhill (Box and Hunter, Biometrics 10, 1954: F test of the slope,
        here over the feasible directions).
        """
        best_13 = self.best()[:1]
        above_X = (self.at(x_X3) - self.at(best_13))[0]
        higher_X = _over(above_X, stdtrit(self.df, 0.975) * self._error(terms(x_X3, LAW) - terms(best_13, LAW)))
        angle_A = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        towards_A3 = np.stack([np.cos(angle_A), np.sin(angle_A), -np.cos(angle_A) - np.sin(angle_A)], axis=1)
        slope_XAK = np.einsum("xik,ai->xak", _slopes(x_X3), towards_A3)
        downhill_XA = _over(-slope_XAK @ self.beta_BK[0], np.sqrt(2 * fdtri(2, self.df, 0.95)) * self._error(slope_XAK))
        inward_AS = distances(self.corners_S3, self.corners_S3[:1] + towards_A3) - distances(
            self.corners_S3, self.corners_S3[:1]
        )
        leaves_XA = np.any((distances(self.corners_S3, x_X3) < 1e-9)[:, None] & (inward_AS < -1e-9), axis=2)
        return np.maximum(higher_X, np.where(leaves_XA, 0, downhill_XA).max(1))

    def _error(self, terms_K: Array) -> Array:
        return np.sqrt(np.einsum("...k,kl,...l->...", terms_K, self.covariance_KK, terms_K))


def _over(value: Array, size: Array) -> Array:
    """Their quotient; where the size is nothing, 0 or infinity."""
    return np.divide(value, size, out=np.where(value > 1e-9, np.inf, 0.0), where=size > 1e-12)


def terms(x_X3: Array, law: str) -> Array:
    """The law's terms at each mix -> [X, K]."""
    x1, x2, x3 = x_X3.T
    return np.stack([x1, x2, x3, x1 * x2, x1 * x3, x2 * x3, x1 * x2 * x3][: LAWS[law]], axis=1)


def _slopes(x_X3: Array) -> Array:
    """Derivatives of the quadratic law's terms by each share -> [X, 3, K]."""
    x1, x2, x3 = x_X3.T
    none, one = np.zeros_like(x1), np.ones_like(x1)
    by_share = [[one, none, none, x2, x3, none], [none, one, none, x1, none, x3], [none, none, one, none, x1, x2]]
    return np.moveaxis(np.array(by_share), 2, 0)


def distances(corners_S3: Array, x_X3: Array) -> Array:
    """How far inside each side of the region with these corners, given counter-clockwise in (x1, x2), each mix lies ->
    [X, S].
    """
    side_S2 = np.roll(corners_S3, -1, axis=0)[:, :2] - corners_S3[:, :2]
    off_XS2 = x_X3[:, None, :2] - corners_S3[:, :2]
    return (side_S2[:, 0] * off_XS2[:, :, 1] - side_S2[:, 1] * off_XS2[:, :, 0]) / np.linalg.norm(side_S2, axis=1)


def within(corners_S3: Array, x_X3: Array) -> Array:
    """Whether each mix lies in the region -> bool [X]."""
    return np.asarray(np.all(distances(corners_S3, x_X3) >= -1e-9, axis=1))


def lattice(steps: int) -> Array:
    """All mixes whose shares are multiples of 1/steps -> [X, 3]."""
    i, j = (axis.ravel() for axis in np.meshgrid(np.arange(steps + 1), np.arange(steps + 1), indexing="ij"))
    i, j = i[i + j <= steps], j[i + j <= steps]
    return np.stack([i, j, steps - i - j], axis=1) / steps


def grid(corners_S3: Array, steps: int) -> Array:
    """The mixes of the lattice in the region with these corners, and the corners -> [X, 3]."""
    mixes_X3 = lattice(steps)
    return np.unique(np.vstack([mixes_X3[within(corners_S3, mixes_X3)], corners_S3]), axis=0)
