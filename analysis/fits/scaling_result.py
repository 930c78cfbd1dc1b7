"""Loss against compute in several mechanisms as it was fitted: numbers, sentences, and what is drawn of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.scaling_law import Curves
from analysis.fits.types import Estimate, Fit, banded, with_doubt
from analysis.interval import percent
from analysis.table import si
from sparsemem.config.nearest import nearest_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
FLOORS = ("none", "shared", "own")
"""Of the laws, from the smallest."""
MOST = 1e6
"""Multipliers are told up to it: at and below the reference's floor there is none."""
EDGE = 1 + 1e-9
"""By which a place may miss a range by rounding."""


@dataclass(frozen=True)
class ScalingLaw:
    """Fitted curves: row 0 is the fit of the data, the others those of the resamples."""

    curves: Curves
    theta_BK: Array
    centre: float
    """Natural logarithm of C0."""
    names: tuple[str, ...]
    """Of the mechanisms by their number in `curves`."""

    def losses(self, name: str, log_c: Array | float) -> Array:
        """Of the data alone, at logarithms of compute -> [X]."""
        return self.draws(name, log_c)[0]

    def draws(self, name: str, log_c: Array | float) -> Array:
        """-> [B, X]."""
        log_c_X = np.atleast_1d(np.asarray(log_c, float)) - self.centre
        return self.curves.value(self.theta_BK, np.full(len(log_c_X), self.names.index(name)), log_c_X)

    def exponents(self, name: str) -> Array:
        """-> [B]."""
        return self.curves.split(self.theta_BK)[2][:, self.names.index(name)]

    def multipliers(self, name: str, reference: str, log_c: Array) -> Array:
        """Compute that the reference needs for the same loss, over that of the mechanism -> [B, X]."""
        needed_BX = self.curves.compute(self.theta_BK, self.names.index(reference), self.draws(name, log_c))
        most = np.log(MOST)
        return np.exp(np.clip(needed_BX + self.centre - np.asarray(log_c, float), -most, most))

    def comparable(self, name: str, reference: str, own: Array, known: Array) -> tuple[float, float] | None:
        """Compute of a mechanism, inside what was measured, whose loss the reference reaches inside what was measured
        of it; None where there is none.

        Args:
            own, known: logarithms of the compute that the mechanism and the reference were measured at.
        """
        place, first = self.names.index(name), self.theta_BK[:1]
        most, least = (self.losses(reference, log_c) for log_c in (known.min(), known.max()))
        ends = [float(self.curves.compute(first, place, loss[None])[0, 0]) + self.centre for loss in (most, least)]
        low, high = max(own.min(), ends[0]), min(own.max(), ends[1])
        return (float(np.exp(low)), float(np.exp(high))) if low <= high else None

    def table(self, order: list[str]) -> dict[str, Array]:
        """The parameters as published, by name -> [B]."""
        floor_BM, log_a_BM, alpha_BM = self.curves.split(self.theta_BK)
        found = {"E": self.theta_BK[:, 0]} if self.curves.floors == 1 else {}
        for name in order:
            place = self.names.index(name)
            if self.curves.floors > 1:
                found[f"E of {name}"] = floor_BM[:, place]
            found[f"A of {name}"] = np.exp(log_a_BM[:, place])
            found[f"alpha of {name}"] = alpha_BM[:, place]
        return found


@dataclass(frozen=True)
class Mechanism:
    """One mechanism. Compute is in FLOPs of the whole training, losses in nats per token."""

    name: str
    rows: tuple[str, ...]
    """Trial ids (or index labels) used."""
    flops: tuple[float, ...]
    """Of its rungs, rising."""
    means: tuple[float, ...]
    """Loss at each for the average seed."""
    errors: tuple[float, ...]
    """Standard error of each mean, what moves all mechanisms of a rung alike left out."""
    exponent: Estimate
    exponent_less: Estimate | None = None
    """Exponent less that of the reference; None for the reference itself."""
    span: tuple[float, float] | None = None
    """Compute between which the multiplier is told: there the reference was measured on both sides of the loss."""
    multipliers: tuple[Estimate, Estimate] | None = None
    """Compute multiplier at the ends of `span`."""
    growth: Estimate | None = None
    """The latter over the former."""
    withheld: str = ""
    """Why no multiplier is told at other compute that was measured; '' where it is told at all."""

    def summary(self, reference: str) -> str:
        """What there is to say beside the exponent of the reference."""
        lines = [f"{self.name}: exponent {_range(self.exponent)}."]
        if self.exponent_less and not self.exponent_less.low <= 0 <= self.exponent_less.high:
            faster = "faster" if self.exponent_less.value > 0 else "more slowly"
            lines.append(f"Its loss falls {faster} with compute than that of {reference}.")
        if self.span and self.multipliers and self.growth:
            low, high = self.multipliers
            saves = high.low > 1 or high.high < 1
            doubt = "" if saves else ", which may be no difference"
            lines.append(
                f"At {flops(self.span[1])} its loss takes {reference} {_range(high, 2)} times the compute{doubt}; at "
                f"{flops(self.span[0])} {_range(low, 2)}."
            )
            if self.span[1] > self.span[0] * EDGE:
                told = not self.growth.low <= 1 <= self.growth.high
                way = ("grows" if self.growth.value > 1 else "falls") if told else "is not told to change"
                lines.append(f"Between them the multiplier {way} (by {_range(self.growth, 2)}).")
            if self.withheld:
                lines.append(f"Elsewhere it is withheld: {self.withheld}.")
        elif self.withheld:
            lines.append(f"No compute multiplier: {self.withheld}, and a curve is not drawn out to them.")
        return " ".join(lines)


@dataclass(frozen=True)
class Foretold:
    """The largest rung of a mechanism as the others foretell it."""

    mechanism: str
    flops: float
    predicted: Estimate
    """Of the mean loss there, its own noise in the interval."""
    measured: float
    floors: str
    """Of the law that predicted, one of `FLOORS`."""

    @property
    def hit(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, kw_only=True)
class ScalingFit(Fit):
    """All mechanisms at one number of tokens for each activated parameter, under one law.

    The parameters are E (one for all, or of each mechanism, or none for pure power laws), and A and alpha of each.
    """

    mechanisms: tuple[Mechanism, ...] = ()
    foretold: tuple[Foretold, ...] = ()
    """Empty with fewer than three rungs."""
    reference: str
    floors: str = ""
    """One of `FLOORS`."""
    compute_unit: float | None = None
    """C0, FLOPs: A is the loss above the floor there."""
    floor_p: float | None = None
    """Chance of such means if there were no floor, F test, one-sided; None where a floor cannot be told."""
    own_floors_p: float | None = None
    """Chance of such means if all mechanisms had one floor, F test; None with fewer than four rungs."""
    own_floors_df: tuple[int, int] | None = None
    """Degrees of freedom of that test: floors more than one, and of the noise."""
    lack_of_fit_p: float | None = None
    """Chance of so poor a fit of the means if the law were true; None where it has as many parameters."""
    seeds: int
    paired_sd: float | None = None
    """Standard deviation of one run once the effect of its seed at its rung is off, nats per token."""
    noise_df: int = 0
    """Degrees of freedom of `paired_sd`."""
    level_sd: float | None = None
    """Standard deviation of a seed's effect on a whole rung, nats per token."""
    level_df: int = 0
    """Degrees of freedom of `level_sd`."""
    _law: ScalingLaw | None = field(default=None, repr=False, compare=False)
    _runs: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """mechanism, rung, flops, loss, seed, trial_id, paired (the effect of its seed at its rung taken off)."""
    _columns: tuple[str, str] = field(default=("mechanism", "flops"), repr=False, compare=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        """The columns of the mechanism and of its compute; pure power laws are refused outside what was measured."""
        return self._columns

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        found = [self._at(name, float(c)) for name, c in zip(places.iloc[:, 0], places.iloc[:, 1], strict=True)]
        return banded(np.concatenate(found, axis=1)) if found else {}

    def _at(self, name: str, c: float) -> Array:
        """Loss of one mechanism in each row -> [B, 1]."""
        law, own = self._fitted(), self._own(name)
        if not c > 0:
            raise AnalysisError("predict: compute must be positive")
        if not law.curves.floors and not own.flops[0] / EDGE <= c <= own.flops[-1] * EDGE:
            raise AnalysisError(
                f"{c:.4g} FLOPs lie outside the {own.flops[0]:.4g} to {own.flops[-1]:.4g} measured of {name}, and a "
                "pure power law says nothing there: train a third size"
            )
        return law.draws(name, np.log(c))

    def multipliers(self, mechanism: str, at: Array | None = None) -> pd.DataFrame:
        """Compute multiplier of a mechanism against the reference -> flops, loss, multiplier, low, high.

        Args:
            at: compute in FLOPs, shape [X]; None: 61 places over the span in which it is told.

        Raises:
            AnalysisError: the mechanism has none, or a place lies outside of its span.
        """
        law, own = self._fitted(), self._own(mechanism)
        if own.span is None:
            raise AnalysisError(
                f"{mechanism} has no compute multiplier: {own.withheld or 'it is the reference, or that has no law'}"
            )
        low, high = own.span
        c_X = np.geomspace(low, high, 61) if at is None else np.atleast_1d(np.asarray(at, float))
        if not ((c_X >= low / EDGE) & (c_X <= high * EDGE)).all():
            raise AnalysisError(
                f"the multiplier of {mechanism} is told from {low:.4g} to {high:.4g} FLOPs, where {self.reference} was "
                "measured on both sides of its loss; train more rungs to say more"
            )
        band = banded(law.multipliers(mechanism, self.reference, np.log(c_X)), "multiplier")
        return pd.DataFrame({"flops": c_X, "loss": law.losses(mechanism, np.log(c_X)), **band})

    def residuals(self) -> pd.DataFrame:
        """Every run against the law -> mechanism, rung, flops, loss, seed, trial_id, paired, predicted, low, high.

        Raises:
            AnalysisError: no law was fitted.
        """
        law = self._fitted()
        assert self._runs is not None
        draws = [
            law.draws(name, np.log(c)) for name, c in zip(self._runs["mechanism"], self._runs["flops"], strict=True)
        ]
        return self._runs.assign(**banded(np.concatenate(draws, axis=1), "predicted"))

    def summary(self) -> str:
        """A line on the law, one for each mechanism, and one on what was foretold."""
        if self._law is None:
            return with_doubt(self.status, self.message, ())
        lines = [with_doubt(self.status, self.message, self._law_words())]
        lines += [each.summary(self.reference) for each in self.mechanisms]
        if self.foretold:
            hits = [each.mechanism for each in self.foretold if each.hit]
            missed = "; ".join(
                f"{each.mechanism} measured {each.measured:.4f}, predicted {each.predicted.value:.4f} "
                f"({each.predicted.low:.4f} to {each.predicted.high:.4f})"
                for each in self.foretold
                if not each.hit
            )
            by = (
                "pure power laws, which two rungs allow (a miss above them says that the curves flatten)"
                if self.foretold[0].floors == "none"
                else "laws with a floor"
            )
            lines.append(
                f"The largest rung, predicted from the others by {by}: {len(hits)} of {len(self.foretold)} inside "
                f"their {percent()} interval{f'; missed: {missed}' if missed else ''}."
            )
        return "\n".join(lines)

    def _law_words(self) -> list[str]:
        lines = []
        if self.floors == "shared":
            lines.append(f"Loss falls towards one floor for all, E = {_range(self.parameters['E'])} nats/token.")
        elif self.floors == "own":
            each = ", ".join(f"{name} {_range(self.parameters[f'E of {name}'])}" for name in self._names())
            lines.append(f"Loss falls towards a floor of each, nats/token: {each}.")
        if self.own_floors_p is not None and self.own_floors_df:
            verdict = "is refuted" if self.floors == "own" else "is not refuted"
            first, second = self.own_floors_df
            lines.append(
                f"One floor for all {verdict} against a floor of each (F test, {first} and {second} degrees of "
                f"freedom, p = {self.own_floors_p:.2g})."
            )
        return lines

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: the runs and the laws of `table`."""
        data = self.table()
        return data[data["series"].isin(("run", "mean", "curve"))] if len(data) else data

    def table(self) -> pd.DataFrame:
        """What a figure draws -> mechanism, series, flops, value, low, high, seed, trial_id.

        Series: `run` (one trained model, the effect of its seed at its rung taken off), `mean` (for the average seed,
        with its paired standard error), `curve` (the law with its pointwise band), `residual` (mean less the law, with
        that error), `run_residual`, `multiplier` (with its band). Values are nats per token, multipliers without unit.
        """
        if self._law is None or self._runs is None:
            return pd.DataFrame()
        parts = []
        for own in self.mechanisms:
            runs = self._runs[self._runs["mechanism"] == own.name]
            at = {"flops": runs["flops"], "seed": runs["seed"], "trial_id": runs["trial_id"]}
            law = self._law.losses(own.name, np.log(runs["flops"]))
            found = [
                pd.DataFrame({"series": "run", "value": runs["paired"], **at}),
                pd.DataFrame({"series": "run_residual", "value": runs["paired"] - law, **at}),
            ]
            error, c_I = np.array(own.errors), np.array(own.flops)
            laws: dict[str, Any] = {"mean": 0.0, "residual": self._law.losses(own.name, np.log(c_I))}
            for series, less in laws.items():
                value = np.array(own.means) - less
                ends = {"low": value - error, "high": value + error}
                found.append(pd.DataFrame({"series": series, "flops": c_I, "value": value, **ends}))
            c_X = np.geomspace(c_I[0], c_I[-1], 61)
            band = banded(self._law.draws(own.name, np.log(c_X)), "value")
            found.append(pd.DataFrame({"series": "curve", "flops": c_X, **band}))
            if own.span:
                band = self.multipliers(own.name).rename(columns={"multiplier": "value"}).drop(columns="loss")
                found.append(band.assign(series="multiplier"))
            parts.append(pd.concat(found).assign(mechanism=own.name))
        columns = ["mechanism", "series", "flops", "value", "low", "high", "seed", "trial_id"]
        return pd.concat(parts, ignore_index=True).reindex(columns=columns)

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.scaling import draw_fit

        draw_fit(ax, data)

    def _names(self) -> list[str]:
        return [each.name for each in self.mechanisms]

    def _own(self, name: str) -> Mechanism:
        found = {each.name: each for each in self.mechanisms}
        if name not in found:
            raise AnalysisError(f"`{name}` is no mechanism of this fit; {nearest_name(str(name), list(found))}")
        return found[name]

    def _fitted(self) -> ScalingLaw:
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        return self._law


def flops(value: float) -> str:
    """Compute in words.

    >>> flops(1.234e12)
    '1.234T FLOPs'
    """
    return f"{si(value)} FLOPs" if value < 1e15 else f"{value:.3g} FLOPs"


def _range(estimate: Estimate, digits: int = 3) -> str:
    return f"{estimate.value:.{digits}f} ({percent()} interval {estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
