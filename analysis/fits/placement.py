"""Which share to train next: the one that is expected to shorten the 95% interval of the best share most.

The runs so far give a posterior over curves, by a Gaussian process: a parabola of nearly free coefficients, and a deviation from it with
Matern's covariance (5/2). Its length, its size and the noise of a run are averaged over a grid by their likelihood, in which the scatter
between paired seeds counts, so that three shares suffice. Draws of curves stand in for the posterior; for each share that could be trained,
the losses that it may give are drawn from them, and by Bayes' rule each would give the draws other weights and the best share another
interval. The mean length of that interval is what is minimised (a knowledge gradient, Frazier et al. 2009, of the interval's length).

Without the parabola the process knows nothing between the shares: at the noise of the recorded curves its interval spans half of the range
or all of it, where that of `fit_allocation` and of this one agree. A process in one dimension is a few lines of linear algebra; BoTorch
would bring PyTorch, GPyTorch and fitted point values of the covariance's parameters into a package that knows neither, for
acquisition functions of the least loss, where the interval of its place is asked for.

Letters: D draws, H settings of the covariance, I shares, X places of the axis, C candidates, Y losses that a candidate may give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.noise import SeedModel, seed_model
from analysis.fits.runs import read_shares

Array = np.ndarray
LENGTHS = (0.2, 0.35, 0.6, 1.0, 1.7)  # of the deviation's covariance, in shares
SIZES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # standard deviation of the deviation, in units of the range of the means
NOISES = np.exp(np.linspace(-0.9, 0.9, 7))  # in units of the measured noise
FREE = np.array([10.0, 1.0, 1.0])  # standard deviations of level, slope and curvature over [-1, 1], in the same units
DRAWS, IMAGINED = 1000, 120
LEAST_SHARES = 3


@dataclass(frozen=True)
class Draws:
    """Curves of the posterior."""

    curves_DX: Array
    """Loss of each curve at each place, without the level common to all runs."""
    best_D: Array
    """Share at which each is least."""
    noise_D: Array
    """Standard deviation of a run's noise that each was drawn with."""


def next_shares(
    frame: pd.DataFrame,
    candidates: Sequence[float],
    count: int,
    seeds: int,
    x: str = "share_moe",
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    random_seed: int = 0,
) -> list[float]:
    """The shares to train next, the most telling one first; each is chosen as if those before it had been trained.

    Args:
        frame: runs so far, as for `fit_allocation`, with repeated seeds.
        candidates: shares that could be trained.
        count: shares wanted; fewer where there are no more candidates.
        seeds: runs of each.
        random_seed: of the draws; the same input gives the same shares.

    Raises:
        AnalysisError: fewer than three shares, or no seed is repeated.
    """
    runs = read_shares(frame, (x,), loss, seed, "next_shares")
    model = seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N)
    if len(model.x_I) < LEAST_SHARES or not model.df or not model.sd:
        raise AnalysisError(f"next_shares: {len(model.x_I)} shares, {model.df} repeats; three shares with two seeds are the least")
    rng = np.random.default_rng(random_seed)
    candidate_C = np.array(candidates, float)
    places_X = np.unique(np.concatenate([np.linspace(model.x_I[0], model.x_I[-1], 101), candidate_C]))
    drawn = posterior(model, places_X, DRAWS, rng)
    order = np.argsort(drawn.best_D, kind="stable")
    drawn = Draws(drawn.curves_DX[order], drawn.best_D[order], drawn.noise_D[order])
    imagined_Y = rng.permutation(DRAWS)[:IMAGINED]
    log_weight_YD = np.zeros((IMAGINED, DRAWS))
    chosen: list[int] = []
    for _ in range(min(count, len(candidate_C))):
        noise_Y = rng.standard_normal(IMAGINED)
        at_C = np.searchsorted(places_X, candidate_C)
        lengths = [
            np.inf if c in chosen else _length(_told(drawn, at, imagined_Y, noise_Y, seeds) + log_weight_YD, drawn.best_D)
            for c, at in enumerate(at_C)
        ]
        chosen.append(int(np.argmin(lengths)))
        log_weight_YD += _told(drawn, at_C[chosen[-1]], imagined_Y, noise_Y, seeds)
    return [float(candidate_C[c]) for c in chosen]


def posterior(model: SeedModel, places_X: Array, draws: int, rng: np.random.Generator) -> Draws:
    """Curves that the runs allow."""
    level, unit = model.mean_I.mean(), max(float(np.ptp(model.mean_I)), model.sd)
    all_x = np.concatenate([model.x_I, places_X])
    count = len(model.x_I)
    parabola_A3 = np.vander(2 * all_x - 1, 3, increasing=True) * FREE * unit
    roots_LAA = np.stack([np.linalg.cholesky(_matern(all_x, length) + 1e-8 * np.eye(len(all_x))) for length in LENGTHS])
    length_H, size_H, noise_H = (each.ravel() for each in np.meshgrid(np.arange(len(LENGTHS)), unit * np.array(SIZES), model.sd * NOISES))
    own_LII = roots_LAA[:, :count] @ roots_LAA[:, :count].swapaxes(1, 2)
    known_HII = size_H[:, None, None] ** 2 * own_LII[length_H] + parabola_A3[:count] @ parabola_A3[:count].T
    total_HII = known_HII + noise_H[:, None, None] ** 2 * model.covariance_II
    inverse_HII = np.linalg.inv(total_HII)
    rest_I = model.mean_I - level
    log_H = -0.5 * (rest_I @ inverse_HII @ rest_I + np.linalg.slogdet(total_HII)[1])
    log_H -= model.df * np.log(noise_H) + model.squares / 2 / noise_H**2  # the scatter between paired seeds
    chance_H = np.exp(log_H - log_H.max())
    at_D = np.repeat(np.arange(len(chance_H)), rng.multinomial(draws, chance_H / chance_H.sum()))
    # A draw of the prior is moved onto the means by its own residuals (Matheron's rule): no covariance of the posterior is formed.
    prior_DA = rng.standard_normal((draws, 3)) @ parabola_A3.T
    noise_DI = rng.standard_normal((draws, model.map_IN.shape[1])) @ model.map_IN.T * noise_H[at_D, None]
    weight_DI = np.empty((draws, count))
    for which, root_AA in enumerate(roots_LAA):
        own_D = length_H[at_D] == which
        prior_DA[own_D] += rng.standard_normal((own_D.sum(), len(all_x))) @ root_AA.T * size_H[at_D[own_D], None]
    weight_DI = np.einsum("dij,dj->di", inverse_HII[at_D], rest_I - prior_DA[:, :count] - noise_DI)
    curves_DX = level + prior_DA[:, count:] + (weight_DI @ parabola_A3[:count]) @ parabola_A3[count:].T
    for which, root_AA in enumerate(roots_LAA):
        own_D = length_H[at_D] == which
        curves_DX[own_D] += (weight_DI[own_D] @ root_AA[:count] @ root_AA[count:].T) * size_H[at_D[own_D], None] ** 2
    return Draws(curves_DX, places_X[curves_DX.argmin(1)], noise_H[at_D])


def _matern(x: Array, length: float) -> Array:
    """Matern's correlation with smoothness 5/2."""
    far = np.sqrt(5) * np.abs(x[:, None] - x) / length
    return np.asarray((1 + far + far**2 / 3) * np.exp(-far))


def _told(drawn: Draws, at: int, imagined_Y: Array, noise_Y: Array, seeds: int) -> Array:
    """Log-likelihood of each curve, for each of the mean losses that this place may give -> [Y, D]."""
    noise_D, loss_D = drawn.noise_D / np.sqrt(seeds), drawn.curves_DX[:, at]
    loss_Y = loss_D[imagined_Y] + noise_D[imagined_Y] * noise_Y
    return np.asarray(-0.5 * ((loss_Y[:, None] - loss_D) / noise_D) ** 2 - np.log(noise_D))


def _length(log_weight_YD: Array, best_D: Array) -> float:
    """Mean length of the 95% interval of the best share; draws are ordered by it."""
    weight_YD = np.exp(log_weight_YD - log_weight_YD.max(1, keepdims=True))
    below_YD = weight_YD.cumsum(1)
    below_YD /= below_YD[:, -1:]
    return float(np.mean(best_D[(below_YD >= 0.975).argmax(1)] - best_D[(below_YD >= 0.025).argmax(1)]))
