"""Which share to train next: the one that is expected to shorten the 95% interval of the best share most.

The resampled curves of `fit_allocation`, each with the law that it chose, say what the runs so far allow, so they stand
in for a posterior. For each share that could be trained, losses that it may give are drawn from them with the measured
noise; by Bayes' rule each would give the curves other weights, and the best share another interval. The mean length of
that interval is what is minimised: a knowledge gradient (Frazier et al., INFORMS Journal on Computing 21, 2009) of the
length of an interval.

A Gaussian process in place of the resampled curves was tried (a parabola with nearly free coefficients and a Matern
deviation, noise and covariance averaged by their likelihood). It knows no law, so it trains other shares than those
that decide between the laws, and the interval of the fit, which is the one reported, came out 1.4 to 1.7 times as long
after 16 trials (docs/LOG.md).

Letters: D resampled curves, C candidates, Y losses that a candidate may give.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.errors import AnalysisError
from analysis.fits.allocation_result import AllocationFit

Array = np.ndarray
CURVES, IMAGINED = 1000, 120


def next_shares(
    fit: AllocationFit, candidates: Sequence[float], count: int, seeds: int, *, random_seed: int = 0
) -> list[float]:
    """The shares to train next, the most telling one first; each is chosen as if those before it had been trained.

    Args:
        fit: of the runs so far, with repeated seeds.
        candidates: shares that could be trained, inside the sampled range.
        count: shares wanted; fewer where there are no more candidates.
        seeds: runs of each.
        random_seed: of the imagined losses; the same input gives the same shares.

    Raises:
        AnalysisError: there is no curve, or no noise to imagine losses with.
    """
    if not len(fit.argmin_draws()) or not fit.paired_sd:
        raise AnalysisError(f"no share can be placed by this fit: {fit.message or 'its noise is not measured'}")
    rng = np.random.default_rng(random_seed)
    noise = fit.paired_sd / np.sqrt(seeds)
    order_D = np.argsort(fit.argmin_draws()[:CURVES], kind="stable")
    best_D = fit.argmin_draws()[order_D]
    loss_DC = fit.curve_draws(candidates)[order_D] / noise
    imagined_Y = rng.integers(len(best_D), size=IMAGINED)
    weight_YD = np.zeros((IMAGINED, len(best_D)))  # logarithms
    chosen: list[int] = []
    for _ in range(min(count, len(candidates))):
        noise_Y = rng.standard_normal(IMAGINED)
        told = [-0.5 * ((loss_D[imagined_Y] + noise_Y)[:, None] - loss_D) ** 2 for loss_D in loss_DC.T]
        length_C = [np.inf if c in chosen else _length(weight_YD + told[c], best_D) for c in range(len(candidates))]
        chosen.append(int(np.argmin(length_C)))
        weight_YD += told[chosen[-1]]
    return [float(candidates[c]) for c in chosen]


def _length(log_weight_YD: Array, best_D: Array) -> float:
    """Mean length of the 95% interval of the best share, whose draws are in order."""
    below_YD = np.exp(log_weight_YD - log_weight_YD.max(1, keepdims=True)).cumsum(1)
    below_YD /= below_YD[:, -1:]
    return float(np.mean(best_D[(below_YD >= 0.975).argmax(1)] - best_D[(below_YD >= 0.025).argmax(1)]))
