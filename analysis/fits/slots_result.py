"""The fall of the loss with a memory's rows as it was fitted: numbers, sentences, and what is drawn of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.linear import LinearFit
from analysis.fits.power import box_cox
from analysis.fits.runs import seed_codes
from analysis.fits.types import Estimate, Fit, with_doubt
from analysis.fits.words import signed
from analysis.interval import percent
from analysis.status import Status
from analysis.table import si
from sparsemem.config.nearest import nearest_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
LINE, POWER = "log-linear", "power with floor"


@dataclass(frozen=True)
class Law:
    """One law as fitted to the same runs, reported whether or not it is preferred."""

    law: str
    parameters: dict[str, Estimate]
    aicc: float | None
    """Akaike's criterion with the small-sample correction over the mechanism's runs; None where too few
    runs allow it.
    """
    left_out_error: float
    """Root mean square error of the loss predicted for each inner row count when it is left out, nats per token."""
    beyond: float
    """Loss at the most rows less what the law predicts for it from all other row counts."""
    lack_of_fit_p: float | None
    """Chance of so poor a fit of the means if the law were true (F test against the noise)."""
    objective: float
    """Weighted sum of squares of the means around the law; a weight is the number of runs that a mean is worth."""
    note: str = ""


@dataclass(frozen=True)
class MechanismFit:
    """Loss against rows in one kind of memory. Losses are in nats per token."""

    mechanism: str
    status: Status
    message: str
    """What the status means here and what there is to doubt; '' when there is nothing."""
    rows: tuple[str, ...]
    """Trial ids (or index labels) used."""
    sizes: tuple[float, ...]
    """Distinct row counts, rising."""
    means: tuple[float, ...]
    """Loss at each for the average seed."""
    errors: tuple[float, ...]
    """Standard error of each mean, what moves all points of a seed alike left out; empty where nothing is repeated."""
    slope: Estimate | None = None
    """Change of the loss with every tenfold of the rows: b of the line."""
    beyond: Estimate | None = None
    """Loss at the most rows less what the line through all others predicts for it; above zero, the fall slows."""
    gain: Estimate | None = None
    """Loss of the backbone alone less that at the most rows; None without a backbone or without repeats."""
    laws: tuple[Law, ...] = ()
    preferred: str = ""
    """The law with the lesser AICc; '' where only one was fitted or the two are within `TIE`."""
    _line: LinearFit | None = field(default=None, repr=False, compare=False)
    _power: Array | None = field(default=None, repr=False, compare=False)
    """c, s and alpha of `power.box_cox`."""

    def predict(self, x_X: Array) -> dict[str, Array]:
        """The line with its pointwise band, and the power law, NaN where none was fitted -> loss, low, high, power.

        Raises:
            AnalysisError: no line was fitted, or an x lies outside the sampled rows.
        """
        if self._line is None:
            raise AnalysisError(f"{self.mechanism} has no line: {self.status}. {self.message}")
        low, high = self.sizes[0], self.sizes[-1]
        if not ((x_X >= low * (1 - 1e-9)) & (x_X <= high * (1 + 1e-9))).all():
            raise AnalysisError(
                f"rows {x_X.tolist()} lie outside the sampled {low:g} to {high:g}; train trials there to say more"
            )
        power_X = np.full(len(x_X), np.nan)
        if self._power is not None:
            c, s, alpha = self._power
            power_X = c + s * box_cox(np.log(x_X / math.sqrt(low * high)), np.array([alpha]))[0]
        return self._line.predict(line_design(x_X)) | {"power": power_X}

    def summary(self) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them."""
        lines = []
        if self.slope:
            verb, size = signed(self.slope, "raises", "lowers", "it may change nothing")
            lines.append(
                f"Every tenfold of the rows {verb} the loss by {size}, over {len(self.sizes)} row counts from "
                f"{si(self.sizes[0])} to {si(self.sizes[-1])}."
            )
        if self.gain:
            place, size = signed(self.gain, "below", "above")
            lines.append(f"With the most rows it is {place} the backbone alone by {size}.")
        if len(self.laws) > 1 and self.laws[0].aicc is not None and self.laws[1].aicc is not None:
            gap = f"{abs(self.laws[1].aicc - self.laws[0].aicc):.1f}"
            lines.append(
                {
                    LINE: "A straight line in log rows describes it better than a power law with a floor (AICc lower "
                    f"by {gap}).",
                    POWER: "The fall slows: a power law with a floor describes it better than a straight line (AICc "
                    f"lower by {gap}).",
                    "": f"A straight line in log rows and a power law with a floor cannot be told apart (AICc {gap} "
                    "apart).",
                }[self.preferred]
            )
        return with_doubt(self.status, self.message, lines)


@dataclass(frozen=True)
class SlopeDifference:
    """Slope of one kind of memory less that of another, nats per token and tenfold of the rows; below zero, the first
    falls faster.
    """

    first: str
    second: str
    difference: Estimate

    def summary(self) -> str:
        """One sentence."""
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        if low <= 0 <= high:
            return (
                f"{self.first} and {self.second}: no difference of slope can be told from noise "
                f"({value:+.4f} nats/token a tenfold, {percent()} interval {low:+.4f} to {high:+.4f})."
            )
        faster, slower = (self.first, self.second) if value < 0 else (self.second, self.first)
        _, size = signed(self.difference, "", "")
        return f"With rows the loss falls faster in {faster} than in {slower}: a tenfold differs by {size}."


@dataclass(frozen=True, kw_only=True)
class SlotsFit(Fit):
    """All mechanisms of one cell, on one backbone and with one measure of the noise.

    The status is `converged` where that of every mechanism is, otherwise the first other one. The parameters are `a`
    and `b` of every line; the rows used include the backbone's.
    """

    mechanisms: tuple[MechanismFit, ...] = ()
    differences: tuple[SlopeDifference, ...] = ()
    """Of every pair that has slopes; empty where nothing is repeated."""
    backbone: float | None = None
    """Loss of the backbone alone for the average seed; None where it was not trained."""
    seeds: int
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, pooled over all points,
    nats per token.
    """
    noise_df: int = 0
    """Degrees of freedom of `paired_sd`."""
    seed_effects: dict[str, float] = field(default_factory=dict)
    """What each seed adds to the loss of every point, next to the average seed, nats per token."""

    _mechanism: str = field(default="mechanism", repr=False, compare=False)
    """Its column."""
    _runs: pd.DataFrame | None = field(default=None, repr=False, compare=False)
    """mechanism, memory_rows, val_loss, seed, trial_id of the runs with a memory."""

    @property
    def predictors(self) -> tuple[str, ...]:
        """The columns of the mechanism and of its rows; `predict` adds `power`, what the power law says."""
        return self._mechanism, self.conventions["x"]

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        fits = {each.mechanism: each for each in self.mechanisms}
        names_X, x_X = places.iloc[:, 0], places.iloc[:, 1].to_numpy(float)
        unknown = sorted(set(names_X) - set(fits))
        if unknown:
            known = nearest_name(str(unknown[0]), list(fits))
            raise AnalysisError(f"`{unknown[0]}` is no mechanism of this fit; {known}")
        found = [fits[name].predict(x_X[[place]]) for place, name in enumerate(names_X)]
        return {name: np.concatenate([each[name] for each in found]) for name in ("loss", "low", "high", "power")}

    def summary(self) -> str:
        """A line for each mechanism and each pair of them."""
        if not self.mechanisms:
            return with_doubt(self.status, self.message, ())
        lines = [f"{each.mechanism}: {each.summary()}" for each in self.mechanisms]
        return "\n".join([*lines, *(each.summary() for each in self.differences)])

    def table(self, runs: pd.DataFrame, published: tuple[str, float] | None = None) -> pd.DataFrame:
        """What a figure draws -> mechanism, series, rows, params, loss, low, high, seed, trial_id.

        Series: `run` (one trained model, the effect of its seed taken off), `mean` (for the average seed, with its
        paired standard error), `line` (with its 95% band), `power` (the power law with a floor, where it is preferred),
        `slope` (nats per token for every tenfold, with its interval), `backbone` (the model without memory),
        `published` (a slope from elsewhere, in `loss`, its name in `mechanism`).

        Args:
            runs: those of the fit, with their memory_params.
            published: name and slope.
        """
        parts = []
        for each in self.mechanisms:
            own = runs[(runs["mechanism"] == each.mechanism) & runs["trial_id"].isin(each.rows)]
            params = own.groupby("memory_rows")["memory_params"].mean()
            paired = own["val_loss"] - [
                self.seed_effects[code] for code in seed_codes(own["seed"], own["trial_id"].tolist(), "slots")
            ]
            found = [
                pd.DataFrame(
                    {
                        "series": "run",
                        "rows": own["memory_rows"],
                        "loss": paired,
                        "seed": own["seed"],
                        "trial_id": own["trial_id"],
                    }
                )
            ]
            means = pd.DataFrame({"series": "mean", "rows": each.sizes, "loss": each.means})
            if each.errors:
                means = means.assign(low=np.subtract(each.means, each.errors), high=np.add(each.means, each.errors))
            found.append(means)
            if each.slope:
                x_X = np.geomspace(each.sizes[0], each.sizes[-1], 61)
                line = pd.DataFrame({"rows": x_X, **each.predict(x_X)})
                found.append(line.drop(columns="power").assign(series="line"))
                if each.preferred == POWER:
                    found.append(line[["rows"]].assign(series="power", loss=line["power"]))
                slope = {"series": "slope", "loss": each.slope.value, "low": each.slope.low, "high": each.slope.high}
                found.append(pd.DataFrame([slope]))
            table = pd.concat(found)
            table["params"] = np.exp(
                np.interp(np.log(table["rows"].astype(float)), np.log(params.index), np.log(params))
            )
            parts.append(table.assign(mechanism=each.mechanism))
        if self.backbone is not None:
            parts.append(pd.DataFrame([{"series": "backbone", "loss": self.backbone}]))
        if published:
            parts.append(pd.DataFrame([{"series": "published", "mechanism": published[0], "loss": published[1]}]))
        columns = ["mechanism", "series", "rows", "params", "loss", "low", "high", "seed", "trial_id"]
        return pd.concat(parts, ignore_index=True).reindex(columns=columns)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: what of `table` stands against the rows."""
        if self._runs is None:
            return pd.DataFrame()
        return self.table(self._runs.assign(memory_params=np.nan)).drop(columns="params")

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.slots import draw_fit

        draw_fit(ax, data)


def line_design(x_X: Array) -> Array:
    return np.stack([np.ones(len(x_X)), np.log10(x_X)], axis=1)
