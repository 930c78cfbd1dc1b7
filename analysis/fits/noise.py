"""How much a loss moves from seed to seed, and which shares that noise cannot tell from the best.

Seeds are paired: a seed fixes the data order and the shared initial weights of all shares, so it moves all of them
together. The model is `loss = mean of the share + effect of the seed + noise`; only the noise blurs a comparison
between shares.

Letters: I shares, J seeds, N runs, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc, stdtrit  # scipy.stats would take a second to import

from analysis.interval import ends

Array = np.ndarray


def unrepeated(instead: str) -> str:
    """What there is to doubt where no seed is repeated.

    Args:
        instead: what follows from it.
    """
    return f"no repeats, so seed noise is not measured and {instead}: train a second seed."


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run once the effect of its seed is off, and the degrees of freedom behind it."""

    sd: float
    df: int

    @property
    def t(self) -> float:
        """Half width of a 95% interval in standard errors."""
        return float(stdtrit(self.df, ends()[1]))


@dataclass(frozen=True)
class SeedModel:
    """Share means with the seed effects taken off, and the noise left over."""

    x_I: Array
    """Distinct shares, rising."""
    mean_I: Array
    """Loss of each share for the average seed, nats per token."""
    counts_I: Array
    """Runs of each share."""
    map_IN: Array
    """Linear map from the losses of the runs to `mean_I`."""
    sd: float
    """Standard deviation of the noise once seed effects are off (paired); NaN when nothing is repeated."""
    df: int
    """Degrees of freedom of `sd`."""
    spread: float
    """Standard deviation between the seeds of one share, seed effects included, pooled over shares; NaN when nothing is
    repeated.
    """
    squares: float
    """Sum of squares behind `sd`."""

    @property
    def covariance_II(self) -> Array:
        """Covariance of `mean_I` in units of sd^2."""
        return self.map_IN @ self.map_IN.T

    @property
    def paired_sd(self) -> float | None:
        """`sd`, None where nothing is repeated."""
        return self.sd if self.df else None

    def noise(self, leftover: Callable[[], Noise]) -> Noise:
        """Of a run; where nothing is repeated, what a law leaves over stands in for it."""
        return Noise(self.sd, self.df) if self.df else leftover()


def seed_model(x_N: Array, y_N: Array, seed_N: Array) -> SeedModel:
    """Separate shares, seeds and noise by least squares; shares may have different seeds (unbalanced is fine).

    Where no share links two seeds their effects cannot be told from those of the shares; then none are taken off.
    """
    x_I, counts_I = np.unique(x_N, return_counts=True)
    n, i = len(y_N), len(x_I)
    design = _design(x_N, seed_N)
    shares_NI = design[:, :i]
    inverse = np.linalg.pinv(design)
    squares = float(np.sum((y_N - design @ (inverse @ y_N)) ** 2))
    df = n - design.shape[1]
    within = float(np.sum((y_N - shares_NI @ (shares_NI.T @ y_N / counts_I)) ** 2))
    return SeedModel(
        x_I=x_I,
        mean_I=inverse[:i] @ y_N,
        counts_I=counts_I,
        map_IN=inverse[:i],
        sd=float(np.sqrt(squares / df)) if df > 0 else float("nan"),
        df=df,
        spread=float(np.sqrt(within / (n - i))) if n > i else float("nan"),
        squares=squares,
    )


def _design(x_N: Array, seed_N: Array) -> Array:
    """Columns of the shares, then of the seeds where these can be told apart."""
    share_NI, seed_NJ = (
        np.eye(len(found))[at] for found, at in (np.unique(each, return_inverse=True) for each in (x_N, seed_N))
    )
    contrasts_NJ = seed_NJ[:, :-1] - seed_NJ[:, -1:]  # effects sum to zero: the means are those of the average seed
    design = np.hstack([share_NI, contrasts_NJ])
    return design if np.linalg.matrix_rank(design) == design.shape[1] else share_NI


def noisier(x_N: Array, y_N: Array, seed_N: Array, rng: np.random.Generator) -> Array:
    """Shares whose residuals are larger than noise that is alike at all of them explains -> bool [I]; wrongly so in 5%
    of studies.

    Cochran's test (Annals of Eugenics 11, 1941): the largest part of the sum of squares that one share has, its
    distribution simulated for the design at hand. With two seeds a share has less than one degree of freedom, so only a
    gross difference is seen.
    """
    design = _design(x_N, seed_N)
    rest_NN = np.eye(len(y_N)) - design @ np.linalg.pinv(design)
    own_NI = np.eye(len(np.unique(x_N)))[np.unique(x_N, return_inverse=True)[1]]
    free_I = np.diag(rest_NN) @ own_NI

    def parts(y_BN: Array) -> Array:
        squares_BI = (y_BN @ rest_NN) ** 2 @ own_NI
        return np.asarray(squares_BI / np.maximum(free_I, 1e-9) / squares_BI.sum(1, keepdims=True) * (free_I > 1e-9))

    if free_I.sum() < 2:  # one degree of freedom has nothing to be compared with
        return np.zeros(own_NI.shape[1], bool)
    return np.asarray(parts(y_N[None])[0] > np.quantile(parts(rng.standard_normal((4000, len(y_N)))).max(1), 0.95))


def quieter(x_N: Array, y_N: Array, rng: np.random.Generator) -> Array:
    """Points whose seeds differ by less than noise that is alike at all of them explains -> bool [I]; any at all in at
    most 5% of studies without such a point.

    The least variance within a point, as a part of their sum, against its distribution for equal normal noise. What
    seeds give to all points alike makes variances more alike, so it is not taken off. A point that did not train is
    such a one, and noise pooled with it makes every other interval too short.
    """
    own_NI = np.eye(len(np.unique(x_N)))[np.unique(x_N, return_inverse=True)[1]]
    count_I = own_NI.sum(0)
    if (count_I > 1).sum() < 2:
        return np.zeros(len(count_I), bool)

    def parts(y_BN: Array) -> Array:
        mean_BI = y_BN @ own_NI / count_I
        variance_BI = (y_BN - mean_BI @ own_NI.T) ** 2 @ own_NI / np.maximum(count_I - 1, 1)
        return np.where(count_I > 1, variance_BI / variance_BI.sum(1, keepdims=True), np.inf)

    return np.asarray(parts(y_N[None])[0] < np.quantile(parts(rng.standard_normal((4000, len(y_N)))).min(1), 0.05))


def resample(model: SeedModel, noise: Noise, count: int, rng: np.random.Generator) -> Array:
    """Share means of `count` repeated studies -> [B, I].

    With two or three seeds there is too little to draw from by resampling the runs themselves, so Gaussian noise of the
    pooled, measured size is added to every run and the seed effects are taken off again. Each resample also draws the
    noise level from its own uncertainty (scaled inverse chi-square), which widens the interval of a study with few
    seeds as Student's t would.
    """
    level_B = noise.sd * np.sqrt(noise.df / rng.chisquare(noise.df, count))
    noise_BN = rng.standard_normal((count, model.map_IN.shape[1])) * level_B[:, None]
    return model.mean_I + noise_BN @ model.map_IN.T


def tied_with_best(model: SeedModel, noise: Noise, rng: np.random.Generator) -> Array:
    """Which shares may be the best: bool [I]. The true best is among them with 95% confidence, jointly over all shares.

    Gupta's subset selection (Technometrics 7, 1965): share k stays if no share i beats it by more than d_k standard
    errors of their paired difference, d_k being the 95% quantile of the largest such ratio when all shares are equal
    (simulated, pooled noise).
    """
    error_II, most_I = _ties(model, noise.df, rng)
    return np.array(
        [((model.mean_I[k] - model.mean_I) / error_II[k]).max() <= noise.sd * most_I[k] for k in range(len(most_I))]
    )


def tie_width(model: SeedModel, noise: Noise, rng: np.random.Generator) -> float:
    """How much worse than the best a share may be and still be tied with it (`tied_with_best`), the median over shares:
    what a study of these seeds and this noise does not tell apart, nats per token.
    """
    error_II, most_I = _ties(model, noise.df, rng)
    return float(
        noise.sd
        * np.median(
            [
                most * np.median(np.delete(error_I, k))
                for k, (error_I, most) in enumerate(zip(error_II, most_I, strict=True))
            ]
        )
    )


def _ties(model: SeedModel, df: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Standard errors of the paired differences in units of the noise [I, I], and of them how many a tied share may be
    behind -> [I].
    """
    c = model.covariance_II
    error_II = np.sqrt(np.maximum(np.diag(c)[:, None] + np.diag(c)[None] - 2 * c, 0)) + np.eye(len(c))
    draws, size = (
        rng.standard_normal((10_000, model.map_IN.shape[1])) @ model.map_IN.T,
        np.sqrt(rng.chisquare(df, 10_000) / df),
    )
    most_I = [np.quantile(((draws[:, [k]] - draws) / error_II[k]).max(1) / size, 0.95) for k in range(len(c))]
    return error_II, np.array(most_I)


def lack_of_fit(model: SeedModel, squares: float, parameters: int) -> float | None:
    """Chance of so poor a fit of the share means if the law were true: F test against the paired noise; None where it
    cannot be made.

    Args:
        squares: weighted sum of squares of the share means around the law; a weight is the number of runs that a mean
            is worth.
        parameters: of the law.
    """
    if len(model.mean_I) - parameters < 1 or model.df < 1 or model.sd == 0:
        return None
    return float(lack_of_fits(model, np.array([squares]), parameters, model.sd)[0])


def lack_of_fits(model: SeedModel, squares_B: Array, parameters: int, sd: float) -> Array:
    """`lack_of_fit` of many resamples at once -> [B]; 1 where there is nothing to test."""
    df = len(model.mean_I) - parameters
    return (
        np.asarray(fdtrc(df, model.df, squares_B / df / sd**2)) if df > 0 and model.df > 0 else np.ones(len(squares_B))
    )


def aicc(model: SeedModel, squares: float, parameters: int, seeds: int) -> float | None:
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where it is not
    defined: too few runs, or nothing left over.

    Arguments as for `lack_of_fit`.
    """
    score = float(aiccs(model, np.array([squares]), parameters, seeds)[0])
    return score if math.isfinite(score) else None


def aiccs(model: SeedModel, squares_B: Array, parameters: int, seeds: int) -> Array:
    """`aicc` of many resamples at once -> [B]; infinite where it is not defined."""
    runs, free = int(model.counts_I.sum()), parameters + seeds  # seeds - 1 effects and the noise level
    squares_B = model.squares + squares_B
    if runs - free <= 1 or (squares_B <= 0).any():
        return np.full(len(squares_B), np.inf)
    return np.asarray(runs * np.log(squares_B / runs) + 2 * free + 2 * free * (free + 1) / (runs - free - 1))


def cps(squares_B: Array, parameters: int, sd: float) -> Array:
    """Mallows' Cp up to a constant (Technometrics 15, 1973) -> [B]: squares in units of the measured noise, and two for
    each parameter.

    Unlike AICc it does not measure the noise on the law itself, so with few shares it does not forbid a law that the
    data ask for.
    """
    return np.asarray(squares_B / sd**2 + 2 * parameters)
