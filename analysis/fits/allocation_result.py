"""An allocation curve as it was fitted: its numbers, what it says in sentences, and what is drawn of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.laws import Akima, Law
from analysis.fits.runs import Runs
from analysis.fits.types import Estimate, Fit, banded, noise_of_a_run, with_doubt
from analysis.interval import ends, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Candidate:
    """One law as fitted to the same runs, reported whether or not it was chosen."""

    law: str
    left_out_error: float | None
    """Root mean square error of the loss predicted for each inner share when it is left out, nats per token."""
    cp: float | None
    """Mallows' Cp up to a constant (`noise.cps`); None where nothing is repeated or the law interpolates."""
    aicc: float | None
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where it is not
    defined: too few runs, or as many parameters as shares.
    """
    lack_of_fit_p: float | None
    """Chance of so poor a fit of the share means if the law were true (F test against the paired noise)."""
    argmin: float | None
    left_out: tuple[float, ...] = ()
    """Loss predicted for each inner share by the law fitted to all others."""
    note: str = ""


@dataclass(frozen=True)
class Curves:
    """The fitted curves: row 0 is that of the data, the others those of the resamples. Every row chose a law of its
    own.
    """

    laws: tuple[Law, ...]
    theta: tuple[Array, ...]
    """Parameters under each law -> [B, K]."""
    chosen_B: Array
    """Index of the law of each row."""

    def at(self, x_X: Array) -> Array:
        """Loss of each row's curve -> [B, X]."""
        return self._own([law.value(x_X, theta) for law, theta in zip(self.laws, self.theta, strict=True)])

    def best(self, low: float, high: float) -> tuple[Array, Array]:
        """Share of the least loss of each row, an end of the range where none is inside -> [B]; and whether it is
        inside -> bool [B].
        """
        vertex_B = self._own([law.vertex(theta, low, high) for law, theta in zip(self.laws, self.theta, strict=True)])
        ends_B2 = self.at(np.array([low, high]))
        return np.where(np.isnan(vertex_B), np.where(ends_B2[:, 0] <= ends_B2[:, 1], low, high), vertex_B), ~np.isnan(
            vertex_B
        )

    def _own(self, values: list[Array]) -> Array:
        return np.stack(values)[self.chosen_B, np.arange(len(self.chosen_B))]


@dataclass(frozen=True, kw_only=True)
class AllocationFit(Fit):
    """An allocation curve with its status. Intervals are 95% percentile intervals over resamples; losses are in nats
    per token.
    """

    shares: tuple[float, ...]
    seeds: int
    argmin: Estimate | None = None
    """Share at the least loss of the curve; None unless an interior minimum was found."""
    best_end: float | None = None
    """The sampled end that wins, when there is no interior minimum."""
    loss_at_best: Estimate | None = None
    depth: Estimate | None = None
    """Loss of the curve at share 1 less that at the argmin (or at the end that wins); None when share 1 was not
    sampled.
    """
    p_interior: float | None = None
    """Part of the resamples whose minimum is inside the sampled range, more than 1% of it away from the ends."""
    tied: tuple[float, ...] = ()
    """Sampled shares that may be the best: Gupta's subset at 95% joint confidence, on paired differences with pooled
    noise.
    """
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    seed_sd: float | None = None
    """Standard deviation between the seeds of one share, pooled over shares, nats per token."""
    depth_over_noise: float | None = None
    """depth / paired_sd."""
    lack_of_fit_p: float | None = None
    """That of the law used; None where it interpolates or nothing is repeated."""
    candidates: tuple[Candidate, ...] = ()
    unsettled: int = 0
    """Resamples in which the descent of a law did not come to rest: a further full Newton step would gain more than
    rounding.
    """
    means: tuple[float, ...] = ()
    """Loss of each share for the average seed; empty without a curve."""
    _runs: Runs = field(repr=False, compare=False)
    _curves: Curves | None = field(default=None, repr=False, compare=False)

    def runs(self) -> pd.DataFrame:
        """The runs used -> share, loss, seed, trial_id."""
        each = self._runs
        return pd.DataFrame({"share": each.x_NK[:, 0], "loss": each.y_N, "seed": each.seeds_N, "trial_id": each.rows})

    @property
    def predictors(self) -> tuple[str, ...]:
        """The column of the share, inside the sampled range."""
        return (self.conventions["x"],)

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        assert self._curves
        x_X, (low, *_, high) = places.iloc[:, 0].to_numpy(float), self.shares
        if not ((x_X >= low) & (x_X <= high)).all():
            raise AnalysisError(
                f"a share in {x_X.tolist()} lies outside the sampled range {low:g} to {high:g}; train trials there to "
                "say more"
            )
        return banded(self._curves.at(x_X))

    def argmin_draws(self) -> Array:
        """Share at the least loss in every resample, the winning end where none is inside -> [resamples]. Empty without
        a fit.
        """
        return self._curves.best(self.shares[0], self.shares[-1])[0][1:] if self._curves else np.zeros(0)

    def curve_draws(self, x: Sequence[float]) -> Array:
        """Loss of the curve of every resample at these shares, without what moves all shares of a seed alike ->
        [resamples, X].
        """
        return self._curves.at(np.asarray(x, float))[1:] if self._curves else np.zeros((0, len(x)))

    @property
    def interval_of_best(self) -> tuple[float, float]:
        """95% interval of the best share, an end of the sampled range counting as such; NaN without a fit."""
        draws = self.argmin_draws()
        low, high = np.quantile(draws, ends()) if len(draws) else (math.nan, math.nan)
        return float(low), float(high)

    @property
    def tied_spans(self) -> list[tuple[float, float]]:
        """First and last of every stretch of neighbouring sampled shares that are tied with the best: between two
        stretches lie others.
        """
        stretches = itertools.groupby(self.shares, key=lambda share: share in self.tied)
        found = [list(shares) for tied, shares in stretches if tied]
        return [(shares[0], shares[-1]) for shares in found]

    def summary(self, noun: str = "share") -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them.

        Args:
            noun: what the shares are called.
        """
        lines = []
        outer = {*self.shares[:1], *self.shares[-1:]}
        open_ended = bool(outer) and outer <= set(self.tied)
        if self.tied and len(self.tied) == len(self.shares):
            lines.append(f"All sampled {noun}s are statistically tied.")
        elif self.best_end is not None and open_ended:
            lines.append(
                f"The ends {self.shares[0]:.2f} and {self.shares[-1]:.2f} are both statistically tied with the best "
                f"{noun}."
            )
        if self.argmin:
            value, low, high = (f"{share:.2f}" for share in (self.argmin.value, self.argmin.low, self.argmin.high))
            what = "The fitted curve" if len(self.tied) == len(self.shares) else "The loss"
            lines.append(
                f"{what} is least at a {noun} of {value} ({percent()} interval {low} to {high}; {called(self.law)} "
                "curve)."
            )
        elif self.best_end is not None and (self.p_interior or 0) < 0.5 and open_ended:
            lines.append(
                f"Which {noun} is best cannot be told; of the fitted curve's ends {self.best_end:.2f} has the lower "
                "loss."
            )
        elif self.best_end is not None and (self.p_interior or 0) < 0.5:
            lines.append(f"No minimum inside the sampled {noun}s: the loss is least at the end {self.best_end:.2f}.")
        elif self.best_end is not None:
            lines.append(
                f"A minimum inside the sampled {noun}s is not established; of their ends, {self.best_end:.2f} has the "
                "lower loss."
            )
        if self.depth and self.best_end != self.shares[-1]:
            there = "That is" if self.argmin else "That end is"
            size = (
                f"{abs(self.depth.value):.4f} nats/token {'lower' if self.depth.value >= 0 else 'higher'} than at "
                f"{noun} 1"
            )
            unsure = " and may be no difference" if self.depth.low <= 0 <= self.depth.high else ""
            lines.append(
                f"{there} {size} ({percent()} interval of the gain {self.depth.low:.4f} to "
                f"{self.depth.high:.4f}{unsure})."
            )
        if 1 < len(self.tied) < len(self.shares):
            which = ", ".join(
                f"{low:.2f} to {high:.2f}" if low < high else f"{low:.2f}" for low, high in self.tied_spans
            )
            lines.append(f"Statistically tied with the best: {which}.")
        return with_doubt(self.status, self.message, [*lines, *noise_of_a_run(self.paired_sd)])

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> series, share, loss, low, high, seed, trial_id, status.

        Series: `run` (one trained model), `mean` (for the average seed, with its paired standard error), `curve` (with
        the 95% band), `optimum` (share with its interval in low and high), `tied` (a stretch of tied shares, low to
        high; one of them alone has both alike).
        """
        runs = self.runs()
        parts = [runs.assign(series="run")]
        if self.means:
            counts = runs["share"].value_counts()
            error = [(self.paired_sd or np.nan) / np.sqrt(counts[share]) for share in self.shares]
            means = pd.DataFrame({"series": "mean", "share": self.shares, "loss": self.means})
            ends = self.shares[0], self.shares[-1]
            x = (
                ends[0] + (ends[1] - ends[0]) * (1 - np.cos(np.linspace(0, np.pi, 201))) / 2
            )  # closest where a curve may be steepest
            curve = self.predict(np.clip(x, *ends)).rename(columns={self.conventions["x"]: "share"})
            parts += [curve.assign(series="curve"), means.assign(low=means["loss"] - error, high=means["loss"] + error)]
            if len(self.tied) > 1:
                parts.append(pd.DataFrame(self.tied_spans, columns=["low", "high"]).assign(series="tied"))
        if self.argmin and self.loss_at_best:
            best = {
                "share": self.argmin.value,
                "loss": self.loss_at_best.value,
                "low": self.argmin.low,
                "high": self.argmin.high,
            }
            parts.append(pd.DataFrame([{"series": "optimum", **best}]))
        return pd.concat(parts).assign(status=str(self.status))

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.allocation import draw_fit

        draw_fit(ax, data, self.conventions["x"], self.conventions["loss"])


def called(law: str) -> str:
    """A law as readers call it."""
    return "Akima" if law == Akima.name else law
