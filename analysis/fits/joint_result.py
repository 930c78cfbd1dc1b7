"""What a law over several budgets (`joint`) gives back: its numbers, its words, and the curve at other budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.joint_budgets import FACTORS, UNIT_WORDS, UNITS, VARIES, WORDS, together
from analysis.fits.joint_law import Law
from analysis.fits.types import Estimate, Fit, banded, with_doubt
from analysis.interval import ends, percent
from analysis.status import Status
from analysis.table import si
from sparsemem.config.nearest import nearest_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Model:
    """One of the nested models, as fitted to the same means."""

    moves_with: tuple[str, ...]
    """Factors that move the optimum; none: it is the same everywhere."""
    parameters: int
    """Levels of the budgets counted."""
    df: int
    """Means less parameters."""
    squares: float
    """Sum of squared deviations of the means from the law, in units of their noise."""
    aicc: float | None
    """Over runs; seed effects and the noise level of each budget counted."""
    lack_of_fit_p: float
    """Chance of so poor a fit if the model were true (F test against the paired noise)."""
    same_optimum_p: float | None
    """Chance of so much better a fit than with the same optimum everywhere if that were true (F test); None for that
    model itself.
    """
    left_out_error: float | None
    """Root mean square error of the differences between shares at the largest budget, predicted from all others, nats
    per token.
    """


@dataclass(frozen=True)
class LeftOut:
    """The largest budget predicted from all others, by the model that they choose."""

    budget: dict[str, float]
    moves_with: tuple[str, ...]
    predicted: Estimate
    """Best share."""
    measured: Estimate
    """Best share of a curve of the same shape, fitted to this budget alone."""
    error: Estimate
    """Predicted less measured."""
    rms: float
    """Of the predicted less the measured differences between shares, nats per token."""
    inside: float
    """Part of these whose 95% prediction interval holds the measured one."""
    note: str = ""


@dataclass(frozen=True)
class Extrapolation:
    """What the law says of a budget that the user names, with every factor free to move the optimum."""

    status: Status
    message: str
    at: dict[str, float]
    """Value of every factor that was studied."""
    optimum: Estimate
    """Best share."""
    depth: Estimate | None
    """Loss at share 1 less that at the best share, nats per token; None where share 1 was not sampled."""
    tied: tuple[Estimate, Estimate]
    """First and last share that a study like these could not tell from the best: less than `tie_width` behind it."""
    tie_width: float
    """Nats per token, by the seeds and the noise of the nearest budget (`noise.tie_width`)."""
    differences: dict[float, Estimate]
    """Sampled share, to two digits -> its loss less that of the largest one, nats per token."""
    distance: float
    """How far beyond the sampled range, in units of that range's length on a logarithmic axis; 0 inside."""


@dataclass(frozen=True, kw_only=True)
class JointFit(Fit):
    """A law of several budgets with its status. Intervals are 95% percentile intervals over resamples; losses are in
    nats per token.
    """

    budgets: tuple[dict[str, float], ...]
    """Every factor of each budget (`joint_budgets.FACTORS`), and its columns."""
    factors: tuple[str, ...] = ()
    """Those that vary and can be told apart."""
    moves_with: tuple[str, ...] = ()
    """Factors that move the optimum in the model chosen."""
    optima: tuple[Estimate, ...] = ()
    """Best share at each budget under the law."""
    p_interior: tuple[float, ...] = ()
    """Part of the resamples whose best share is inside the sampled range, for each budget."""
    own_optima: tuple[Estimate, ...] = ()
    """Best share at each budget by a curve of the same kind fitted to it alone."""
    shifts: dict[str, Estimate] = field(default_factory=dict)
    """Factor -> best share at its largest sampled value less that at its least, the others at their mean; in the
    fullest model.
    """
    moved: tuple[str, ...] = ()
    """Factors along which the best share is shown to move; `conventions` says how."""
    movement_p: dict[str, float] = field(default_factory=dict)
    """Factor -> chance of so much worse a fit without its movement of the best share if there were none, corrected for
    their number.
    """
    models: tuple[Model, ...] = ()
    left_out: LeftOut | None = None
    tie_widths: tuple[float, ...] = ()
    """For each budget how far behind the best a share may be and still be tied with it, nats per token."""
    unsettled: int = 0
    """Resamples in which the descent of a model did not come to rest (`conventions` says what that is)."""
    _law: Law | None = field(default=None, repr=False, compare=False)

    def extrapolate(self, **at: float) -> Extrapolation:
        """The curve at another budget. The farther from the data, the wider its intervals and the graver the warning.

        Args:
            at: factor (`active_params`, `tokens_per_active_param`, `sparsity`) -> value; each that was studied is
                needed.

        Raises:
            AnalysisError: no law was fitted, a factor is unknown, missing or not positive, or one that did not vary is
                given another value.
        """
        law = self._require_law().fullest
        log_F, distance, where = self._place(at)
        grid_X = np.linspace(law.low, law.high, 401)
        shares = sorted({float(np.clip(round(share, 2), law.low, law.high)) for share in law.shares})
        value_BX = law.value(log_F, np.concatenate([grid_X, shares]))
        curve_BX, own_BX = value_BX[:, : len(grid_X)], value_BX[:, len(grid_X) :]
        optimum_B, least_B = law.optimum(log_F), value_BX.min(1)
        apart_CF = (
            np.log10([[budget[name] for name in self.factors] for budget in self.budgets]) - log_F
        ) / law.spread_F
        width = self.tie_widths[int((apart_CF**2).sum(1).argmin())]
        tied_BX = curve_BX <= least_B[:, None] + width
        ends_B2 = np.stack([grid_X[tied_BX.argmax(1)], grid_X[len(grid_X) - 1 - tied_BX[:, ::-1].argmax(1)]], axis=1)
        depth_B, behind_BX = own_BX[:, -1] - least_B, own_BX - own_BX[:, [-1]]
        warning = ""
        if distance > 0:
            grave = (
                "an extrapolation" if distance <= 0.5 else "barely more than a guess" if distance <= 1 else "a guess"
            )
            warning = (
                f"{where}: {distance:.2f} of the sampled range beyond the data, {grave}; the law may change there."
            )
        return Extrapolation(
            status=self.status,
            message=" ".join(filter(None, (warning, self.message))),
            at=dict(zip(self.factors, (float(10**each) for each in log_F), strict=True)),
            optimum=Estimate.of(optimum_B),
            depth=Estimate.of(depth_B) if shares[-1] == 1 else None,
            tied=(Estimate.of(ends_B2[:, 0]), Estimate.of(ends_B2[:, 1])),
            tie_width=width,
            differences={share: Estimate.of(each) for share, each in zip(shares[:-1], behind_BX.T, strict=False)},
            distance=distance,
        )

    def _require_law(self) -> Law:
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        return self._law

    def _place(self, at: Mapping[str, float]) -> tuple[Array, float, str]:
        """A budget on the law's axes, how far it is beyond the data, and in which factor -> [F], ranges, words."""
        log_F, distance, where = [], 0.0, ""
        for name in at:
            if name not in FACTORS:
                raise AnalysisError(f"extrapolate: `{name}` is no factor; {nearest_name(name, FACTORS)}")
        for name in FACTORS:
            value, sampled = at.get(name), [budget[name] for budget in self.budgets]
            if value is None:
                if name in self.factors:
                    raise AnalysisError(
                        f"extrapolate: give `{name}` ({UNITS[name]}); it ran from {min(sampled):.3g} to "
                        f"{max(sampled):.3g}"
                    )
                continue
            if not (math.isfinite(value) and value > 0):
                raise AnalysisError(f"extrapolate: `{name}` is {value!r}; it must be positive")
            if name not in self.factors:
                if not min(sampled) / VARIES <= value <= max(sampled) * VARIES:
                    raise AnalysisError(
                        f"extrapolate: the effect of `{name}` cannot be told from these budgets, whose values run from "
                        f"{min(sampled):.3g} to {max(sampled):.3g}; leave it out, or train other values of it"
                    )
                continue
            low, high = np.log10(min(sampled)), np.log10(max(sampled))
            beyond = float(max(low - np.log10(value), np.log10(value) - high, 0) / (high - low))
            if beyond > distance:
                distance, where = beyond, f"{name} {value:.3g} against {min(sampled):.3g} to {max(sampled):.3g} sampled"
            log_F.append(np.log10(value))
        return np.array(log_F), distance, where

    @property
    def predictors(self) -> tuple[str, ...]:
        """The column of the share, and every factor that was studied. What is predicted is `excess`: the loss less that
        of the best share there, for levels of budgets that were not trained are not known.
        """
        return self.conventions["x"], *self.factors

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        law = self._require_law().fullest
        x_X, found = places.iloc[:, 0].to_numpy(float), []
        if not ((x_X >= law.low) & (x_X <= law.high)).all():
            raise AnalysisError(f"a share lies outside the sampled range {law.low:g} to {law.high:g}")
        for x, (_, at) in zip(x_X, places[list(self.factors)].iterrows(), strict=True):
            log_F, _, _ = self._place(dict(at))
            loss_BX = law.value(log_F, np.r_[np.linspace(law.low, law.high, 401), x])
            found.append(loss_BX[:, -1] - loss_BX.min(1))
        return banded(np.stack(found, axis=1), "excess")

    def band(self, factor: str, values: Array) -> pd.DataFrame:
        """The law's best share along a factor, the others at their mean -> value, optimum, low, high."""
        law, rows = self._require_law(), []
        for value in np.asarray(values, float):
            z_F = law.centre_F.copy()
            z_F[self.factors.index(factor)] = np.log10(value)
            draws_B = law.optimum(z_F)
            rows.append((value, draws_B[0], *np.quantile(draws_B[1:], ends())))
        return pd.DataFrame(rows, columns=["value", "optimum", "low", "high"])

    def summary(self, noun: str = "share") -> str:
        lines = []
        for factor, shift in self.shifts.items():
            sampled = [budget[factor] for budget in self.budgets]
            doubt = "no movement can be told from noise" if shift.low <= 0 <= shift.high else "a movement is not shown"
            moves = "it moves" if factor in self.moved else doubt
            span = (
                f"From {_told(min(sampled))} to {_told(max(sampled))} {UNIT_WORDS[factor]} the best {noun} shifts by "
                f"{shift.value:+.2f}"
            )
            several = f"; p = {self.movement_p[factor]:.2g} after Holm's correction" if len(self.shifts) > 1 else ""
            lines.append(f"{span} ({percent()} interval {shift.low:+.2f} to {shift.high:+.2f}{several}): {moves}.")
        if self.models and (held := [WORDS[name] for name in FACTORS if name not in self.factors]):
            lines.append(f"Not studied, for want of values that can be told apart: {', '.join(held)}.")
        if self.models:
            chosen = next(model for model in self.models if model.moves_with == self.moves_with)
            what = (
                f"an optimum that moves with {together(self.moves_with)}"
                if self.moves_with
                else "the same optimum everywhere"
            )
            best = (
                f" ({self.optima[0].value:.2f}, {percent()} interval {self.optima[0].low:.2f} to "
                f"{self.optima[0].high:.2f})"
            )
            lines.append(
                f"AICc prefers {what}{'' if self.moves_with else best}; {self.law} curves, {chosen.df} degrees of "
                "freedom."
            )
            tests = [
                f"{together(model.moves_with)} p = {model.same_optimum_p:.2g}"
                for model in self.models
                if model.moves_with
            ]
            lines.append(f"Against the same optimum everywhere: {', '.join(tests)} (F test).")
        if self.left_out:
            left, verdict = (
                self.left_out,
                "holds" if self.left_out.error.low <= 0 <= self.left_out.error.high else "excludes",
            )
            note = f" ({left.note})" if left.note else ""
            lines.append(
                f"The largest budget, predicted without it{note}: best {noun} {left.predicted.value:.2f}, measured "
                f"{left.measured.value:.2f}; the {percent()} interval of the error, {left.error.low:+.2f} to "
                f"{left.error.high:+.2f}, {verdict} 0. Differences between {noun}s are off by {left.rms:.4f} "
                "nats/token (rms)."
            )
        return with_doubt(self.status, self.message, lines)

    def table(self, factor: str, points: Sequence[tuple[float, AllocationFit]] = ()) -> pd.DataFrame:
        """What a figure draws -> series, value (of the factor), status, optimum, low, high.

        Series: `curve` (the best share of one budget's own curve with its 95% interval, an end where none inside is
        established), `law` (that of the law over all budgets, with its band; other factors at their mean).

        Args:
            points: value of the factor and own fit of each budget; without them the law's own best share at each is
                shown.
        """
        rows: list[tuple[Any, ...]] = []
        for value, fit in points:
            draws = fit.argmin_draws()
            if len(draws):
                best = fit.argmin.value if fit.argmin else fit.best_end
                rows.append(("curve", value, str(fit.status), best, *np.quantile(draws, ends())))
        values = [budget[factor] for budget in self.budgets]
        if not points:
            rows = [
                ("curve", value, str(self.status), at.value, at.low, at.high)
                for value, at in zip(values, self.optima, strict=True)
            ]
        data = pd.DataFrame(rows, columns=["series", "value", "status", "optimum", "low", "high"])
        band = self.band(factor, np.geomspace(min(values), max(values), 61))
        return pd.concat([data, band.assign(series="law", status=str(self.status))], ignore_index=True)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: `table` along the first factor; empty without a law."""
        return self.table(self.factors[0]) if self._law else pd.DataFrame()

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.joint import draw_fit

        draw_fit(ax, data, self.factors[0])


def _told(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else si(value)
