"""What a law over several budgets (`joint`) gives back: its numbers, its words, and the best share at other budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.joint_law import Law
from analysis.fits.types import Estimate, Fit, with_doubt
from analysis.interval import ends, percent
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
FACTORS = ("compute", "sparsity")
UNITS = {"compute": "FLOPs of a training run, LM head excluded", "sparsity": "P_tot / P_act"}
VARIES = 1.1  # a factor whose budgets are within this ratio is held


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
    """Chance of so much better a fit than with the same optimum everywhere if that were true (F test); None for that model itself."""
    left_out_error: float | None
    """Root mean square error of the differences between shares at the largest budget, predicted from all others, nats per token."""


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
    """The best share at a budget that the user names."""

    status: Status
    message: str
    optimum: Estimate | None
    """None where the budget is too far from the data for a number to mean anything."""
    distance: float
    """How far beyond the sampled range, in units of that range's length on a logarithmic axis; 0 inside."""


@dataclass(frozen=True, kw_only=True)
class JointFit(Fit):
    """A law of several budgets with its status. Intervals are 95% percentile intervals over resamples; losses are in nats per token."""

    budgets: tuple[dict[str, float], ...]
    """Compute and sparsity of each budget, and its columns."""
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
    """Factor -> best share at its largest sampled value less that at its least, the others at their mean; in the fullest model."""
    moved: tuple[str, ...] = ()
    """Factors along which the best share is shown to move; `conventions` says how."""
    models: tuple[Model, ...] = ()
    left_out: LeftOut | None = None
    unsettled: int = 0
    """Resamples in which the descent of a model did not come to rest (`conventions` says what that is)."""
    _law: Law | None = field(default=None, repr=False, compare=False)

    def extrapolate(self, compute: float | None = None, sparsity: float | None = None) -> Extrapolation:
        """The best share at another budget. The farther from the data, the graver the warning; beyond one sampled range, no number.

        Args:
            compute: FLOPs of the training run, without the LM head; needed where it varied.
            sparsity: P_tot / P_act; likewise.

        Raises:
            AnalysisError: no law was fitted, a factor is missing or not positive, or one that did not vary is given another value.
        """
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        given = {"compute": compute, "sparsity": sparsity}
        z_F, distance, where = [], 0.0, ""
        for name in FACTORS:
            value, sampled = given[name], [budget[name] for budget in self.budgets]
            if value is None:
                if name in self.factors:
                    raise AnalysisError(f"extrapolate: give `{name}` ({UNITS[name]}); it ran from {min(sampled):.3g} to {max(sampled):.3g}")
                continue
            if not value > 0:
                raise AnalysisError(f"extrapolate: `{name}` is {value!r}; it must be positive")
            if name not in self.factors:
                if not min(sampled) / VARIES <= value <= max(sampled) * VARIES:
                    raise AnalysisError(
                        f"extrapolate: the effect of `{name}` cannot be told from these budgets; leave it out, or train other values of it"
                    )
                continue
            low, high = np.log10(min(sampled)), np.log10(max(sampled))
            beyond = float(max(low - np.log10(value), np.log10(value) - high, 0) / (high - low))
            if beyond > distance:
                distance, where = beyond, f"{name} {value:.3g} against {min(sampled):.3g} to {max(sampled):.3g} sampled"
            z_F.append(np.log10(value))
        if distance > 1:
            message = f"{where} is {distance:.1f} times the sampled range beyond it: no number is given, train a budget nearer to it."
            return Extrapolation(Status.TOO_FEW_POINTS, message, None, distance)
        draws_B = self._law.optimum(np.array(z_F))
        warning = ""
        if distance > 0:
            grave = "barely more than a guess" if distance > 0.5 else "an extrapolation"
            warning = f"{where}: {distance:.2f} of the sampled range beyond the data, {grave}; the law may change there."
        return Extrapolation(self.status, " ".join(filter(None, (self.message, warning))), Estimate.of(draws_B[0], draws_B[1:]), distance)

    def band(self, factor: str, values: Array) -> pd.DataFrame:
        """The law's best share along a factor, the others at their mean -> value, optimum, low, high."""
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        rows = []
        for value in np.asarray(values, float):
            z_F = self._law.centre_F.copy()
            z_F[self.factors.index(factor)] = np.log10(value)
            draws_B = self._law.optimum(z_F)
            rows.append((value, draws_B[0], *np.quantile(draws_B[1:], ends())))
        return pd.DataFrame(rows, columns=["value", "optimum", "low", "high"])

    def summary(self, noun: str = "share") -> str:
        lines = []
        for factor, shift in self.shifts.items():
            sampled = [budget[factor] for budget in self.budgets]
            doubt = "no movement can be told from noise" if shift.low <= 0 <= shift.high else "a movement is not shown"
            moves = "it moves" if factor in self.moved else doubt
            unit = " FLOPs" if factor == "compute" else ""
            span = f"From {min(sampled):.3g} to {max(sampled):.3g}{unit} of {factor} the best {noun} shifts by {shift.value:+.2f}"
            lines.append(f"{span} ({percent()} interval {shift.low:+.2f} to {shift.high:+.2f}): {moves}.")
        if self.models:
            chosen = next(model for model in self.models if model.moves_with == self.moves_with)
            what = f"an optimum that moves with {' and '.join(self.moves_with)}" if self.moves_with else "the same optimum everywhere"
            best = f" ({self.optima[0].value:.2f}, {percent()} interval {self.optima[0].low:.2f} to {self.optima[0].high:.2f})"
            lines.append(f"AICc prefers {what}{'' if self.moves_with else best}; {self.law} curves, {chosen.df} degrees of freedom.")
            tests = [f"{' and '.join(model.moves_with)} p = {model.same_optimum_p:.2g}" for model in self.models if model.moves_with]
            lines.append(f"Against the same optimum everywhere: {', '.join(tests)} (F test).")
        if self.left_out:
            left, verdict = self.left_out, "holds" if self.left_out.error.low <= 0 <= self.left_out.error.high else "excludes"
            note = f" ({left.note})" if left.note else ""
            lines.append(
                f"The largest budget, predicted without it{note}: best {noun} {left.predicted.value:.2f}, "
                f"measured {left.measured.value:.2f}; the {percent()} interval of the error, "
                f"{left.error.low:+.2f} to {left.error.high:+.2f}, "
                f"{verdict} 0. Differences between {noun}s are off by {left.rms:.4f} nats/token (rms)."
            )
        return with_doubt(self.status, self.message, lines)

    def table(self, factor: str, points: Sequence[tuple[float, AllocationFit]] = ()) -> pd.DataFrame:
        """What a figure draws -> series, value (of the factor), status, optimum, low, high.

        Series: `curve` (the best share of one budget's own curve with its 95% interval, an end where none inside is established), `law`
        (that of the law over all budgets, with its band; other factors at their mean).

        Args:
            points: value of the factor and own fit of each budget; without them the law's own best share at each is shown.
        """
        rows: list[tuple[Any, ...]] = []
        for value, fit in points:
            draws = fit.argmin_draws()
            if len(draws):
                best = fit.argmin.value if fit.argmin else fit.best_end
                rows.append(("curve", value, str(fit.status), best, *np.quantile(draws, ends())))
        values = [budget[factor] for budget in self.budgets]
        if not points:
            rows = [("curve", value, str(self.status), at.value, at.low, at.high) for value, at in zip(values, self.optima, strict=True)]
        data = pd.DataFrame(rows, columns=["series", "value", "status", "optimum", "low", "high"])
        band = self.band(factor, np.geomspace(min(values), max(values), 61))
        return pd.concat([data, band.assign(series="law", status=str(self.status))], ignore_index=True)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: `table` along the first factor; empty without a law."""
        return self.table(self.factors[0]) if self._law else pd.DataFrame()

    def plot(self, ax: Axes) -> None:
        from analysis.figures.joint import draw_fit

        if self._law:
            draw_fit(ax, self.drawn(), self.factors[0])
