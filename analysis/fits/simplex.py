"""Which mix of three pools has the least loss, how sure that is, and whether a third pool helps at all.

From a table of runs to a frozen `SimplexFit`. Scheffe's polynomials are those of a mixture: the shares sum to one, so there is neither a
constant nor a square (Scheffe, J. R. Stat. Soc. B 20, 1958). The quadratic one is the fit; the linear and the special cubic one are fitted
beside it and reported.

    linear         b1 x1 + b2 x2 + b3 x3
    quadratic      ... + b12 x1 x2 + b13 x1 x3 + b23 x2 x3
    special cubic  ... + b123 x1 x2 x3

b_i is the loss of pool i alone, b_ij four times what an even mix of i and j adds to the mean of both (less than 0: the mix is better).

Letters: B resamples, I points, K parameters, S sides of the sampled region, X any points, 3 pools.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import ConvexHull
from scipy.special import fdtri, stdtrit

from analysis.errors import AnalysisError
from analysis.fits.noise import SeedModel, aicc, lack_of_fit, resample, seed_model, tied_with_best
from analysis.fits.runs import Runs, listed, read_shares, require_one_budget
from analysis.fits.types import Estimate, Fit, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
LAWS = {"linear": 3, "quadratic": 6, "special-cubic": 7}
LAW = "quadratic"
NONE = 0.01  # a smaller share counts as none
JOIN, TIMES = " + ", " x "
BORDER = "border of the sampled region"
MUCH = 1.1  # a law that predicts left-out mixes so many times better is named
LEAST_POINTS = LAWS[LAW] + 1


@dataclass(frozen=True)
class Surface:
    """One law as fitted to the same runs, reported whether or not it is the one used."""

    law: str
    left_out_error: float | None
    """Root mean square error of the loss predicted for each point when it is left out, nats per token; corners of the region are kept."""
    aicc: float | None
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where too few runs allow it."""
    lack_of_fit_p: float | None
    argmin: tuple[float, ...]
    """Mix of the least loss, on a grid of hundredths of the sampled region."""


@dataclass(frozen=True)
class _Quadratics:
    """Fitted surfaces over the region that was sampled: row 0 is that of the data, the others those of the resamples."""

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
        """The best mix on each side of the region -> [B, S, 3], and its loss -> [B, S]. A side is a parabola: three losses give it."""
        first_S3, last_S3 = self.corners_S3, np.roll(self.corners_S3, -1, axis=0)
        start_BS, middle_BS, end_BS = self.at(first_S3), self.at((first_S3 + last_S3) / 2), self.at(last_S3)
        bend_BS, slope_BS = 2 * start_BS - 4 * middle_BS + 2 * end_BS, 4 * middle_BS - 3 * start_BS - end_BS
        with np.errstate(divide="ignore", invalid="ignore"):
            t_BS = np.where(bend_BS > 0, np.clip(-slope_BS / (2 * bend_BS), 0, 1), end_BS < start_BS)
        x_BS3 = first_S3 + t_BS[:, :, None] * (last_S3 - first_S3)
        return x_BS3, start_BS + slope_BS * t_BS + bend_BS * t_BS**2

    def best(self) -> Array:
        """Mix of the least loss of each row -> [B, 3]: where the surface is level, if that is a minimum and inside, else on a side."""
        x_BS3, loss_BS = self.sides()
        x_B3 = x_BS3[np.arange(len(x_BS3)), loss_BS.argmin(1)]
        b1, b2, b3, b12, b13, b23 = self.beta_BK.T
        # With x3 = 1 - x1 - x2 the surface is b3 + g.u + u.H.u / 2 in u = (x1, x2).
        slope_B2 = np.stack([b1 - b3 + b13, b2 - b3 + b23], axis=1)
        h11, h12, h22 = -2 * b13, b12 - b13 - b23, -2 * b23
        determinant = h11 * h22 - h12**2
        with np.errstate(divide="ignore", invalid="ignore"):
            u_B = np.stack([h12 * slope_B2[:, 1] - h22 * slope_B2[:, 0], h12 * slope_B2[:, 0] - h11 * slope_B2[:, 1]]) / determinant
            level_B3 = np.stack([u_B[0], u_B[1], 1 - u_B.sum(0)], axis=1)
            minimum_B = (h11 > 0) & (determinant > 0) & within(self.corners_S3, level_B3)
        return np.where(minimum_B[:, None], level_B3, x_B3)

    def tie(self, x_X3: Array) -> Array:
        """How far each mix is from being the best, in units of what 95% confidence allows -> [X]; up to 1 it may be.

        The larger of two tests. The loss there is above that of the fitted best mix (t test of the difference). A direction that stays in
        the region leads downhill (Box and Hunter, Biometrics 10, 1954: F test of the slope, here over the feasible directions).
        """
        best_13 = self.best()[:1]
        above_X = (self.at(x_X3) - self.at(best_13))[0]
        higher_X = _over(above_X, stdtrit(self.df, 0.975) * self._error(terms(x_X3, LAW) - terms(best_13, LAW)))
        angle_A = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        towards_A3 = np.stack([np.cos(angle_A), np.sin(angle_A), -np.cos(angle_A) - np.sin(angle_A)], axis=1)
        slope_XAK = np.einsum("xik,ai->xak", _slopes(x_X3), towards_A3)
        downhill_XA = _over(-slope_XAK @ self.beta_BK[0], np.sqrt(2 * fdtri(2, self.df, 0.95)) * self._error(slope_XAK))
        inward_AS = distances(self.corners_S3, self.corners_S3[:1] + towards_A3) - distances(self.corners_S3, self.corners_S3[:1])
        leaves_XA = np.any((distances(self.corners_S3, x_X3) < 1e-9)[:, None] & (inward_AS < -1e-9), axis=2)
        return np.maximum(higher_X, np.where(leaves_XA, 0, downhill_XA).max(1))

    def _error(self, terms_K: Array) -> Array:
        return np.sqrt(np.einsum("...k,kl,...l->...", terms_K, self.covariance_KK, terms_K))


def _over(value: Array, size: Array) -> Array:
    """Their quotient; where the size is nothing, 0 or infinity."""
    return np.divide(value, size, out=np.where(value > 1e-9, np.inf, 0.0), where=size > 1e-12)


@dataclass(frozen=True, kw_only=True)
class SimplexFit(Fit):
    """A fitted surface with its status. Intervals are 95% percentile intervals over resamples; losses are in nats per token.

    `converged` means that the best mix holds all three pools; where it lies on an edge or in a corner the status is `no_interior_minimum`
    and the mix is still given: two pools, or one, are then as good as three.
    """

    pools: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    """Distinct mixes, shares in the order of `pools`."""
    seeds: int
    argmin: dict[str, Estimate] = field(default_factory=dict)
    """Pool -> its share at the least loss of the surface over the sampled region; empty without a surface."""
    places: dict[str, float] = field(default_factory=dict)
    """Which pools the best mix holds, joined by ` + ` -> part of the resamples."""
    loss_at_best: Estimate | None = None
    tied_part: float | None = None
    """Part of the sampled region that is tied with the best mix: neither its loss nor the slope there rules out that it is the best itself.
    The true best is tied with 95% confidence."""
    tied_shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Pool -> least and largest share among the tied mixes."""
    tied: tuple[tuple[float, ...], ...] = ()
    """Points that may be the best: Gupta's subset at 95% joint confidence, on paired differences with pooled noise."""
    corner_gains: dict[str, Estimate] = field(default_factory=dict)
    """Pool -> its loss alone less the least loss; only for corners that were sampled."""
    edge_gains: dict[str, Estimate] = field(default_factory=dict)
    """Two pools, joined by ` + ` -> the loss of their best mix less the least loss; only for edges that were sampled."""
    edge_bests: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Two pools -> their best mix."""
    third_pool_gain: Estimate | None = None
    """Least loss of any two pools less that of three. Its interval has the least of the edges' bounds, so it excludes 0 only where that of
    every edge does."""
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    seed_sd: float | None = None
    """Standard deviation between the seeds of one point, pooled over points, nats per token."""
    lack_of_fit_p: float | None = None
    """Chance of so poor a fit of the point means if the law were true (F test against the paired noise)."""
    candidates: tuple[Surface, ...] = ()
    means: tuple[float, ...] = ()
    """Loss of each point for the average seed; empty without a surface."""
    _runs: Runs = field(repr=False, compare=False)
    _surfaces: _Quadratics | None = field(default=None, repr=False, compare=False)

    def runs(self) -> pd.DataFrame:
        """The runs used -> share_POOL of each pool, loss, seed, trial_id."""
        each = self._runs
        shares = pd.DataFrame(each.x_NK, columns=[f"share_{pool}" for pool in self.pools])
        return shares.assign(loss=each.y_N, seed=each.seeds_N, trial_id=each.rows)

    def predict(self, mixes: Any) -> pd.DataFrame:
        """The surface with its pointwise 95% band -> the pools, loss, low, high, tie. What moves all points of a seed alike is not in the
        band; up to a tie of 1 the mix is tied with the best (`tied_part`).

        Args:
            mixes: shares in the order of `pools`, shape [X, 3].

        Raises:
            AnalysisError: no surface was fitted, or a mix lies outside the sampled region.
        """
        x_X3 = np.atleast_2d(np.asarray(mixes, float))
        if self._surfaces is None:
            raise AnalysisError(f"this fit has no surface: {self.status}. {self.message}")
        if not (within(self._surfaces.corners_S3, x_X3) & (np.abs(x_X3.sum(1) - 1) < 1e-6)).all():
            raise AnalysisError("a mix lies outside the sampled region or its shares do not sum to 1; train trials there to say more")
        loss_BX = self._surfaces.at(x_X3)
        low_X, high_X = np.quantile(loss_BX[1:], (0.025, 0.975), axis=0)
        shares = dict(zip(self.pools, x_X3.T, strict=True))
        return pd.DataFrame({**shares, "loss": loss_BX[0], "low": low_X, "high": high_X, "tie": self._surfaces.tie(x_X3)})

    def region(self, steps: int = 50) -> pd.DataFrame:
        """The mixes of the sampled region that are multiples of 1/steps, and its corners -> the pools, loss, tie; empty without a surface.

        tie: up to 1 the mix is tied with the best (`tied_part`).
        """
        if self._surfaces is None:
            return pd.DataFrame(columns=[*self.pools, "loss", "tie"])
        x_X3 = _grid(self._surfaces.corners_S3, steps)
        shares = dict(zip(self.pools, x_X3.T, strict=True))
        return pd.DataFrame({**shares, "loss": self._surfaces.at(x_X3)[0], "tie": self._surfaces.tie(x_X3)})

    def summary(self, names: Mapping[str, str] | None = None) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them.

        Args:
            names: pool -> what readers call it; default: as it is.
        """
        names = {pool: (names or {}).get(pool, pool) for pool in self.pools}

        def called(pools: str) -> str:
            return JOIN.join(names[pool] for pool in pools.split(JOIN))

        lines = []
        if self.argmin:
            mix = [f"{best.value:.2f} {names[pool]} ({best.low:.2f} to {best.high:.2f})" for pool, best in self.argmin.items()]
            lines.append(f"The loss is least at {', '.join(mix[:-1])} and {mix[-1]} (95% intervals; {self.law} surface).")
        if self.third_pool_gain:
            gain, edge = self.third_pool_gain, min(self.edge_gains, key=lambda edge: self.edge_gains[edge].value)
            size = f"{gain.value:.4f} nats/token (95% interval {gain.low:.4f} to {gain.high:.4f})"
            verdict = "a third pool helps" if gain.low > 0 else "a third pool is not shown to help"
            lines.append(f"It gains {size} on the best mix of two, {called(edge)}: {verdict}.")
        if self.corner_gains:
            alone = [f"{gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f}) over {names[pool]}" for pool, gain in self.corner_gains.items()]
            lines.append(f"Against one pool alone the best mix gains {', '.join(alone)}.")
        if self.tied_part is not None:
            spans = [f"{names[pool]} {low:.2f} to {high:.2f}" for pool, (low, high) in self.tied_shares.items()]
            part = f"{self.tied_part:.0%}" if self.tied_part >= 0.01 else "under 1%"
            lines.append(f"Statistically tied with it: {part} of the sampled mixes, {', '.join(spans)}.")
        if self.paired_sd is not None:
            lines.append(f"Noise of one run once its seed's common effect is off: {self.paired_sd:.4f} nats/token (sd).")
        if self.message:
            lines.append(f"{'Caution' if self.status is Status.CONVERGED else f'Status {self.status}'}: {self.message}")
        return " ".join(lines)

    def plot(self, ax: Axes) -> None:
        from analysis.figures.simplex import draw_fit

        draw_fit(ax, self)


def fit_simplex(
    frame: pd.DataFrame,
    pools: Sequence[str],
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    resamples: int = 2000,
    random_seed: int = 0,
) -> SimplexFit:
    """Fit loss over the mixes of three pools.

    Args:
        frame: one run a row, all with the same budget; columns `share_POOL`. A column `trial_id` names the rows used; of a column
            `status` only `finished` is. Rows without shares are left out.
        pools: the three pools.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across points.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, shares do not sum to 1, a trial id is repeated, one seed stands twice at one
            point, or the runs are of several budgets.
    """
    pools = tuple(pools)
    runs = read_shares(frame, [f"share_{pool}" for pool in pools], loss, seed, "fit_simplex")
    require_one_budget(frame, f"share_{pools[0]}", "fit_simplex")
    off = [row for row, total in zip(runs.rows, runs.x_NK.sum(1), strict=True) if abs(total - 1) > 1e-6]
    if off:
        raise AnalysisError(
            f"fit_simplex: the shares of {', '.join(pools)} do not sum to 1 in {listed(off)}; name every pool that has a share"
        )
    points_I3, point_N = np.unique(runs.x_NK, axis=0, return_inverse=True)
    conventions = {
        "x": [f"share_{pool}" for pool in pools],
        "loss": loss,
        "loss_unit": "nats per token",
        "objective": "weighted sum of squares of the point means around the surface; a weight is the number of runs that a mean is worth",
        "interval": "95% percentile; the best mixes are found anew in every resample",
        "noise": "residuals of runs after point and seed effects",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed effects taken off again",
        "resamples": resamples,
        "random_seed": random_seed,
        "region": "convex hull of the points",
        "tied": "neither loss (t test) nor slope (F test) rules out at 95% that the mix is the best",
        "band": "pointwise, without what moves all points of a seed alike",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }
    common: dict[str, Any] = {
        "pools": pools,
        "points": tuple(tuple(map(float, point)) for point in points_I3),
        "seeds": len(np.unique(runs.seeds_N)),
        "rows": runs.rows,
        "conventions": conventions,
        "law": LAW,
        "_runs": runs,
    }
    refusal = _refusal(points_I3, runs)
    if refusal is not None:
        return SimplexFit(status=refusal[0], message=refusal[1], **common)

    rng = np.random.default_rng(random_seed)
    model = seed_model(point_N.ravel(), runs.y_N, runs.seeds_N)
    weights_I = 1 / np.diag(model.covariance_II)
    sd, df = model.sd, model.df
    if df == 0:  # nothing repeated: take the residuals around the surface as noise, and say so
        rest_I = model.mean_I - terms(points_I3, LAW) @ _solve(points_I3, weights_I, model.mean_I[None], LAW)[0]
        df = len(points_I3) - LAWS[LAW]
        sd = float(np.sqrt(np.sum(weights_I * rest_I**2) / df))
        conventions["noise"] = f"nothing is repeated: residuals around the {LAW} surface stand in for it"
    y_BI = np.vstack([model.mean_I, resample(model, sd, df, resamples, rng)])
    corners_S3 = points_I3[ConvexHull(points_I3[:, :2]).vertices]
    to_beta_KI = _solve(points_I3, weights_I, np.eye(len(points_I3)), LAW).T
    covariance_KK = sd**2 * to_beta_KI @ model.covariance_II @ to_beta_KI.T
    surfaces = _Quadratics(y_BI @ to_beta_KI.T, corners_S3, covariance_KK, df)
    candidates = tuple(
        _surface(law, points_I3, weights_I, model, corners_S3, common["seeds"]) for law in LAWS if len(points_I3) > LAWS[law]
    )

    best_B3 = surfaces.best()
    least_B = np.einsum("bk,bk->b", surfaces.beta_BK, terms(best_B3, LAW))
    place_B = _places(surfaces, best_B3, pools)
    places = {place: count / resamples for place, count in Counter(place_B[1:]).most_common()}
    grid_X3 = _grid(corners_S3, 100)
    near_X = surfaces.tie(grid_X3) <= 1
    near_X3 = np.vstack([grid_X3[near_X], best_B3[:1]])
    tied_I = tied_with_best(model, sd, df, rng)
    gains = _gains(surfaces, least_B, pools)
    own = next(each for each in candidates if each.law == LAW)
    status, message = _verdict(place_B[0], places, pools, tied_I, own, candidates, model, common["seeds"])
    return SimplexFit(
        status=status,
        message=message,
        parameters={name: Estimate.of(own_B[0], own_B[1:]) for name, own_B in zip(_names(pools), surfaces.beta_BK.T, strict=True)},
        covariance=tuple(map(tuple, covariance_KK.tolist())),
        argmin={pool: Estimate.of(share_B[0], share_B[1:]) for pool, share_B in zip(pools, best_B3.T, strict=True)},
        places=places,
        loss_at_best=Estimate.of(least_B[0], least_B[1:]),
        tied_part=float(near_X.mean()),
        tied_shares={pool: (float(low), float(high)) for pool, low, high in zip(pools, near_X3.min(0), near_X3.max(0), strict=True)},
        tied=tuple(point for point, tied in zip(common["points"], tied_I, strict=True) if tied),
        **gains,
        third_pool_gain=_third_pool(gains["edge_gains"]),
        paired_sd=model.sd if model.df else None,
        seed_sd=model.spread if math.isfinite(model.spread) else None,
        lack_of_fit_p=own.lack_of_fit_p,
        objective=_squares(points_I3, weights_I, model, LAW),
        candidates=candidates,
        means=tuple(map(float, model.mean_I)),
        _surfaces=surfaces,
        **common,
    )


# --- the steps --------------------------------------------------------------------------------------------------------------


def _refusal(points_I3: Array, runs: Runs) -> tuple[Status, str] | None:
    """Why no surface can be fitted, or None."""
    bad = runs.unusable()
    if bad:
        return Status.NOT_FINITE, f"the loss of {bad} is not a number or is negative: leave such runs out and say so, or repeat them."
    if len(points_I3) < LEAST_POINTS:
        return Status.TOO_FEW_POINTS, f"{len(points_I3)} distinct mixes; a surface needs at least {LEAST_POINTS}: train more mixes."
    if np.linalg.matrix_rank(terms(points_I3, LAW), tol=1e-6) < LAWS[LAW]:
        return Status.TOO_FEW_POINTS, "the mixes leave the surface undetermined: train the three corners and a mix on each edge."
    if np.ptp(runs.y_N) == 0:
        return Status.NO_INTERIOR_MINIMUM, "all losses are equal, so no mix is better than another: check that the runs differ."
    return None


def _solve(x_I3: Array, w_I: Array, y_BI: Array, law: str) -> Array:
    """Weighted least squares of every row -> [B, K]."""
    root_I = np.sqrt(w_I)
    return np.linalg.lstsq(terms(x_I3, law) * root_I[:, None], (y_BI * root_I).T, rcond=None)[0].T


def _squares(x_I3: Array, w_I: Array, model: SeedModel, law: str) -> float:
    beta_K = _solve(x_I3, w_I, model.mean_I[None], law)[0]
    return float(np.sum(w_I * (model.mean_I - terms(x_I3, law) @ beta_K) ** 2))


def _surface(law: str, x_I3: Array, w_I: Array, model: SeedModel, corners_S3: Array, seeds: int) -> Surface:
    squares, left_out = _squares(x_I3, w_I, model, law), []
    for i, point in enumerate(x_I3):
        if not (corners_S3 == point).all(1).any():  # a corner left out would ask for extrapolation
            kept = np.arange(len(x_I3)) != i
            beta_K = _solve(x_I3[kept], w_I[kept], model.mean_I[None, kept], law)[0]
            left_out.append(float((terms(point[None], law) @ beta_K)[0] - model.mean_I[i]))
    grid_X3 = _grid(corners_S3, 100)
    best_3 = grid_X3[(terms(grid_X3, law) @ _solve(x_I3, w_I, model.mean_I[None], law)[0]).argmin()]
    return Surface(
        law,
        float(np.sqrt(np.mean(np.square(left_out)))) if left_out else None,
        aicc(model, squares, LAWS[law], seeds),
        lack_of_fit(model, squares, LAWS[law]),
        tuple(map(float, best_3)),
    )


def _gains(surfaces: _Quadratics, least_B: Array, pools: tuple[str, ...]) -> dict[str, Any]:
    """What the best mix gains over one pool alone and over the best mix of two, as far as the region reaches there."""
    corners_S3, (x_BS3, loss_BS) = surfaces.corners_S3, surfaces.sides()
    alone_BS = surfaces.at(corners_S3)

    def gain(loss_BS: Array) -> Estimate:
        lost_B = loss_BS.min(1) - least_B
        lost_B = np.where(lost_B < 1e-9, 0, lost_B)  # the same mix reached in two ways
        return Estimate.of(lost_B[0], lost_B[1:])

    gains: dict[str, Any] = {"corner_gains": {}, "edge_gains": {}, "edge_bests": {}}
    for k, pool in enumerate(pools):
        (corner,) = np.nonzero(corners_S3[:, k] > 1 - NONE)
        if len(corner):
            gains["corner_gains"][pool] = gain(alone_BS[:, corner])
        without_S = corners_S3[:, k] < NONE
        (sides,) = np.nonzero(without_S & np.roll(without_S, -1))
        if len(sides):
            edge = JOIN.join(other for other in pools if other != pool)
            gains["edge_gains"][edge] = gain(loss_BS[:, sides])
            gains["edge_bests"][edge] = tuple(map(float, x_BS3[0, sides[loss_BS[0, sides].argmin()]]))
    return gains


def _third_pool(edges: dict[str, Estimate]) -> Estimate | None:
    if len(edges) < 3:
        return None
    nearest = min(edges.values(), key=lambda gain: gain.value)
    return replace(nearest, low=min(gain.low for gain in edges.values()), high=min(gain.high for gain in edges.values()))


def _places(surfaces: _Quadratics, best_B3: Array, pools: tuple[str, ...]) -> list[str]:
    """Where each row's best mix lies: the pools that it holds, or that it is at the border of what was sampled."""
    border_B = np.any(distances(surfaces.corners_S3, best_B3) < NONE / 2, axis=1)
    held = [JOIN.join(pool for pool, share in zip(pools, best_3, strict=True) if share > NONE) for best_3 in best_B3]
    return [BORDER if border and place == JOIN.join(pools) else place for border, place in zip(border_B.tolist(), held, strict=True)]


def _verdict(
    place: str,
    places: dict[str, float],
    pools: tuple[str, ...],
    tied_I: Array,
    own: Surface,
    candidates: tuple[Surface, ...],
    model: SeedModel,
    seeds: int,
) -> tuple[Status, str]:
    """The status of a fitted surface and what there is to doubt about it; the last status set is the gravest."""
    status, doubts, everything = Status.CONVERGED, [], JOIN.join(pools)
    inside = places.get(everything, 0.0)
    if place != everything or inside < (0.95 if tied_I.all() else 0.5):
        status = Status.NO_INTERIOR_MINIMUM
    if place == BORDER:
        doubts.append("the least loss lies at the border of the sampled region: sample beyond it.")
    elif place != everything:
        doubts.append(f"the best mix leaves a pool out, as it does in {1 - inside:.0%} of the resamples.")
    elif inside < 0.95:
        doubts.append(f"only {inside:.0%} of the resamples have their best mix inside the triangle.")
    if tied_I.all():
        doubts.append("no sampled mix can be told from the best: train more seeds.")
    if own.lack_of_fit_p is not None and own.lack_of_fit_p < 0.01:
        chance = f"p = {own.lack_of_fit_p:.1g}"
        doubts.append(f"the surface misses the means by more than noise explains ({chance}): trust the tied points before the best mix.")
    errors = {each.law: each.left_out_error for each in candidates if each.left_out_error is not None}
    if errors and errors[LAW] > MUCH * min(errors.values()):
        better = next(each for each in candidates if each.left_out_error == min(errors.values()))
        against = f"{better.left_out_error:.4f} against {errors[LAW]:.4f} nats/token"
        doubts.append(
            f"the {better.law} law predicts left-out mixes better ({against}): see where it is least before trusting this surface."
        )
    if seeds < 2 or model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append("no repeats, so seed noise is not measured and the residuals around the surface stand in: train a second seed.")
    return status, " ".join(doubts)


def _names(pools: tuple[str, ...]) -> list[str]:
    return [*pools, *(f"{one}{TIMES}{other}" for one, other in itertools.combinations(pools, 2))]


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
    """How far inside each side of the region with these corners, given counter-clockwise in (x1, x2), each mix lies -> [X, S]."""
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


def _grid(corners_S3: Array, steps: int) -> Array:
    """The mixes of the lattice in the region with these corners, and the corners -> [X, 3]."""
    mixes_X3 = lattice(steps)
    return np.unique(np.vstack([mixes_X3[within(corners_S3, mixes_X3)], corners_S3]), axis=0)
