"""Which mix of three pools has the least loss, how sure that is, and whether a third pool helps at all.

From a table of runs to a frozen `SimplexFit`. Scheffe's polynomials are those of a mixture: the shares sum to one, so
there is neither a constant nor a square (Scheffe, J. R. Stat. Soc. B 20, 1958). The quadratic one is the fit; the
linear and the special cubic one are fitted beside it and reported.

    linear         b1 x1 + b2 x2 + b3 x3
    quadratic      ... + b12 x1 x2 + b13 x1 x3 + b23 x2 x3
    special cubic  ... + b123 x1 x2 x3

b_i is the loss of pool i alone, b_ij four times what an even mix of i and j adds to the mean of both (less than 0: the
mix is better).

Letters: B resamples, I points, K parameters, S sides of the sampled region, X any points, 3 pools.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import ConvexHull

from analysis.errors import AnalysisError
from analysis.fits.mixture import LAW, LAWS, Quadratics, distances, grid, terms
from analysis.fits.noise import Noise, SeedModel, aicc, lack_of_fit, resample, seed_model, tied_with_best, unrepeated
from analysis.fits.runs import (
    APART,
    Runs,
    read_shares,
    refused_losses,
    require_one_budget,
    require_resamples,
    same_losses,
    same_seeds,
)
from analysis.fits.simplex_result import JOIN, SimplexFit, Surface
from analysis.fits.types import REFUTED, Estimate
from analysis.status import Status
from sparsemem.values import listed

Array = np.ndarray
NONE = 0.01  # a smaller share counts as none
TIMES = " x "
BORDER = "border of the sampled region"
MUCH = 1.1  # a law that predicts left-out mixes so many times better is named
LEAST_POINTS = LAWS[LAW] + 1


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
        frame: one run a row, all with the same budget; columns `share_POOL`. A column `trial_id` names the rows used;
            of a column `status` only `finished` is. Rows without shares are left out.
        pools: the three pools.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across points.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, shares do not sum to 1, a trial id is repeated, one seed
            stands twice at one point, or the runs are of several budgets.
    """
    pools = tuple(pools)
    runs = read_shares(frame, [f"share_{pool}" for pool in pools], loss, seed, "fit_simplex")
    require_one_budget(frame, f"share_{pools[0]}", "fit_simplex")
    off = [row for row, total in zip(runs.rows, runs.x_NK.sum(1), strict=True) if abs(total - 1) > 1e-6]
    if off:
        raise AnalysisError(
            f"fit_simplex: the shares of {', '.join(pools)} do not sum to 1 in {listed(off)}; name every pool that has "
            "a share"
        )
    points_I3 = np.unique(runs.x_NK, axis=0)
    common: dict[str, Any] = {
        "pools": pools,
        "points": tuple(tuple(map(float, point)) for point in points_I3),
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": _conventions(pools, loss, resamples, random_seed),
        "law": LAW,
        "_runs": runs,
    }
    require_resamples(resamples, "fit_simplex")
    refusal = _refusal(points_I3, runs)
    if refusal is not None:
        return SimplexFit(status=refusal[0], message=refusal[1], **common)

    return _estimate(runs, common, resamples, np.random.default_rng(random_seed))


# --- the steps --------------------------------------------------------------------------------------------------------


def _conventions(pools: tuple[str, ...], loss: str, resamples: int, random_seed: int) -> dict[str, Any]:
    return {
        "x": [f"share_{pool}" for pool in pools],
        "loss": loss,
        "loss_unit": "nats per token",
        "objective": "weighted sum of squares of the point means around the surface; a weight is the number of runs "
        "that a mean is worth",
        "interval": "95% percentile; the best mixes are found anew in every resample",
        "noise": "residuals of runs after point and seed effects",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed "
        "effects taken off again",
        "resamples": resamples,
        "random_seed": random_seed,
        "region": "convex hull of the points",
        "tied": "neither loss (t test) nor slope (F test) rules out at 95% that the mix is the best",
        "band": "pointwise, without what moves all points of a seed alike",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }


def _estimate(runs: Runs, common: dict[str, Any], resamples: int, rng: np.random.Generator) -> SimplexFit:
    pools, points_I3, point_N = common["pools"], *np.unique(runs.x_NK, axis=0, return_inverse=True)
    model = seed_model(point_N.ravel(), runs.y_N, runs.seeds_N)
    weights_I = 1 / np.diag(model.covariance_II)
    noise = model.noise(lambda: _leftover(model, points_I3, weights_I, common["conventions"]))
    y_BI = np.vstack([model.mean_I, resample(model, noise, resamples, rng)])
    corners_S3 = points_I3[ConvexHull(points_I3[:, :2]).vertices]
    to_beta_KI = _solve(points_I3, weights_I, np.eye(len(points_I3)), LAW).T
    covariance_KK = noise.sd**2 * to_beta_KI @ model.covariance_II @ to_beta_KI.T
    surfaces = Quadratics(y_BI @ to_beta_KI.T, corners_S3, covariance_KK, noise.df)
    candidates = tuple(
        _surface(law, points_I3, weights_I, model, corners_S3, common["seeds"])
        for law in LAWS
        if len(points_I3) > LAWS[law]
    )

    best_B3 = surfaces.best()
    least_B = np.einsum("bk,bk->b", surfaces.beta_BK, terms(best_B3, LAW))
    place_B = _places(surfaces, best_B3, pools)
    places = {place: count / resamples for place, count in Counter(place_B[1:]).most_common()}
    grid_X3 = grid(corners_S3, 100)
    near_X = surfaces.tie(grid_X3) <= 1
    near_X3 = np.vstack([grid_X3[near_X], best_B3[:1]])
    tied_I = tied_with_best(model, noise, rng)
    gains = _gains(surfaces, least_B, pools)
    own = next(each for each in candidates if each.law == LAW)
    status, message = _verdict(place_B[0], places, pools, tied_I, own, candidates, model, common["seeds"])
    return SimplexFit(
        status=status,
        message=message,
        parameters={name: Estimate.of(own_B) for name, own_B in zip(_names(pools), surfaces.beta_BK.T, strict=True)},
        covariance=tuple(map(tuple, covariance_KK.tolist())),
        argmin={pool: Estimate.of(share_B) for pool, share_B in zip(pools, best_B3.T, strict=True)},
        places=places,
        loss_at_best=Estimate.of(least_B),
        tied_part=float(near_X.mean()),
        tied_shares={
            pool: (float(low), float(high))
            for pool, low, high in zip(pools, near_X3.min(0), near_X3.max(0), strict=True)
        },
        tied=tuple(point for point, tied in zip(common["points"], tied_I, strict=True) if tied),
        **gains,
        third_pool_gain=_third_pool(gains["edge_gains"]),
        paired_sd=model.paired_sd,
        seed_sd=model.spread if math.isfinite(model.spread) else None,
        lack_of_fit_p=own.lack_of_fit_p,
        objective=_squares(points_I3, weights_I, model, LAW),
        candidates=candidates,
        means=tuple(map(float, model.mean_I)),
        _surfaces=surfaces,
        **common,
    )


def _leftover(model: SeedModel, points_I3: Array, weights_I: Array, conventions: dict[str, Any]) -> Noise:
    """The residuals around the surface, in place of noise; `conventions` then say so."""
    df = len(points_I3) - LAWS[LAW]
    conventions["noise"] = f"nothing is repeated: residuals around the {LAW} surface stand in for it"
    return Noise(float(np.sqrt(_squares(points_I3, weights_I, model, LAW) / df)), df)


def _refusal(points_I3: Array, runs: Runs) -> tuple[Status, str] | None:
    """Why no surface can be fitted, or None."""
    if refused := refused_losses(runs):
        return refused
    if len(points_I3) < LEAST_POINTS:
        return (
            Status.TOO_FEW_POINTS,
            f"{len(points_I3)} distinct mixes; a surface needs at least {LEAST_POINTS}: train more mixes.",
        )
    if np.linalg.matrix_rank(terms(points_I3, LAW), tol=APART) < LAWS[LAW]:
        return (
            Status.TOO_FEW_POINTS,
            "the mixes leave the surface undetermined: train the three corners and a mix on each edge.",
        )
    if same_losses(runs.y_N):
        return (
            Status.NO_INTERIOR_MINIMUM,
            "all losses are equal, so no mix is better than another: check that the runs differ.",
        )
    copied = same_seeds(
        seed_model(np.unique(runs.x_NK, axis=0, return_inverse=True)[1].ravel(), runs.y_N, runs.seeds_N).sd, runs.y_N
    )
    return (Status.TOO_FEW_POINTS, copied) if copied else None


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
    grid_X3 = grid(corners_S3, 100)
    best_3 = grid_X3[(terms(grid_X3, law) @ _solve(x_I3, w_I, model.mean_I[None], law)[0]).argmin()]
    return Surface(
        law,
        float(np.sqrt(np.mean(np.square(left_out)))) if left_out else None,
        aicc(model, squares, LAWS[law], seeds),
        lack_of_fit(model, squares, LAWS[law]),
        tuple(map(float, best_3)),
    )


def _gains(surfaces: Quadratics, least_B: Array, pools: tuple[str, ...]) -> dict[str, Any]:
    """What the best mix gains over one pool alone and over the best mix of two, as far as the region reaches there."""
    corners_S3, (x_BS3, loss_BS) = surfaces.corners_S3, surfaces.sides()
    alone_BS = surfaces.at(corners_S3)

    def gain(loss_BS: Array) -> Estimate:
        lost_B = loss_BS.min(1) - least_B
        lost_B = np.where(lost_B < 1e-9, 0, lost_B)  # the same mix reached in two ways
        return Estimate.of(lost_B)

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
    return replace(
        nearest, low=min(gain.low for gain in edges.values()), high=min(gain.high for gain in edges.values())
    )


def _places(surfaces: Quadratics, best_B3: Array, pools: tuple[str, ...]) -> list[str]:
    """Where each row's best mix lies: the pools that it holds, or that it is at the border of what was sampled."""
    border_B = np.any(distances(surfaces.corners_S3, best_B3) < NONE / 2, axis=1)
    held = [JOIN.join(pool for pool, share in zip(pools, best_3, strict=True) if share > NONE) for best_3 in best_B3]
    return [
        BORDER if border and place == JOIN.join(pools) else place
        for border, place in zip(border_B.tolist(), held, strict=True)
    ]


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
    if own.lack_of_fit_p is not None and own.lack_of_fit_p < REFUTED:
        status = Status.POOR_FIT
        chance = f"p = {own.lack_of_fit_p:.1g}"
        doubts.append(
            f"the surface misses the means by more than noise explains ({chance}): trust the tied points before the "
            "best mix."
        )
    if place != everything or inside < (0.95 if tied_I.all() else 0.5):
        status = Status.NO_INTERIOR_MINIMUM
    if place == BORDER:
        doubts.append("the least loss lies at the border of the sampled region: sample beyond it.")
    elif place != everything:
        doubts.append(f"the best mix leaves a pool out, as it does in {1 - inside:.0%} of the resamples.")
    elif inside < 0.95:
        doubts.append(f"only {inside:.0%} of the resamples have their best mix inside the triangle.")
    if tied_I.all():
        doubts.insert(0, "no sampled mix can be told from the best: train more seeds.")
    errors = {each.law: each.left_out_error for each in candidates if each.left_out_error is not None}
    if errors and errors[LAW] > MUCH * min(errors.values()):
        better = next(each for each in candidates if each.left_out_error == min(errors.values()))
        against = f"{better.left_out_error:.4f} against {errors[LAW]:.4f} nats/token"
        doubts.append(
            f"the {better.law} law predicts left-out mixes better ({against}): see where it is least before trusting "
            "this surface."
        )
    if seeds < 2 or model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append(unrepeated("the residuals around the surface stand in for it"))
    return status, " ".join(doubts)


def _names(pools: tuple[str, ...]) -> list[str]:
    return [*pools, *(f"{one}{TIMES}{other}" for one, other in itertools.combinations(pools, 2))]
