"""IsoFLOP profiles as they were fitted: numbers, sentences, and what is drawn of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.fits.log_log import LogLogFit
from analysis.fits.types import Estimate, Fit, banded, with_doubt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Budget:
    """The runs of one budget and their optimum."""

    flops: float
    """Geometric mean, in FLOPs where `conventions` knows the unit of its column, otherwise in that unit."""
    runs: int
    optimum: Estimate | None
    """Size at the least loss of the parabola; None where the budget is left out."""
    log_se: float | None
    """Standard deviation of log optimum over the resamples."""
    loss: Estimate | None
    """At the optimum."""
    p_interior: float | None
    """Part of the resamples whose optimum is inside the sampled sizes; None where no parabola was fitted."""
    note: str = ""
    """Why it is left out; '' where it is kept."""

    @property
    def is_profile(self) -> bool:
        """Whether a parabola was fitted."""
        return self.p_interior is not None


@dataclass(frozen=True)
class Profile:
    """One budget's runs and curves."""

    log_n_I: Array
    y_I: Array
    center: float
    theta_B3: Array
    """Parabolas in log size less `center`; row 0 is that of the data."""
    level: float
    """What `y_I` and the parabolas are in units of."""


@dataclass(frozen=True, kw_only=True)
class IsoflopFit(Fit):
    """Optimal size against budget. The optima have 95% percentile intervals over resampled noise, the exponent one of
    Student's t.
    """

    columns: tuple[str, str]
    """Of the budget and of the size."""
    budgets: tuple[Budget, ...]
    """All, those left out too."""
    noise_sd: float | None = None
    """Standard deviation of one run's loss; None where every run has its own."""
    lack_of_fit_p: float | None = None
    """Chance of so poor a fit if the profiles were parabolas; None where the noise was not measured."""
    line: LogLogFit | None = None
    """Through the optima that are kept."""
    _profiles: tuple[Profile | None, ...] = field(default=(), repr=False, compare=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        """The column of the budget, in its unit; what is predicted is the best size."""
        return self.columns[:1]

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        assert self.line
        return {name: values.to_numpy() for name, values in self.line.predict(places).iloc[:, 1:].items()}

    def summary(self) -> str:
        lines = [self.line.sentence()] if self.line and self.line.parameters else []
        kept, profiles = sum(not each.note for each in self.budgets), sum(each.is_profile for each in self.budgets)
        if profiles:
            lines.append(f"{kept} of {profiles} profiles have an optimum inside their sizes.")
        return with_doubt(self.status, self.message, lines)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> series (run, curve, optimum), group (FLOPs), x (size), loss, low, high (of an optimum:
        its size).
        """
        from analysis.figures.law import curves_of, runs_of

        tables = []
        for budget, profile in zip(self.budgets, self._profiles, strict=True):
            if profile is None:
                continue
            tables.append(runs_of(np.exp(profile.log_n_I), profile.level * profile.y_I, budget.flops))
            log_n_X = np.linspace(profile.log_n_I.min(), profile.log_n_I.max(), 61)
            loss_BX = profile.level * profile.theta_B3 @ np.vander(log_n_X - profile.center, 3, increasing=True).T
            curve = pd.DataFrame({self.columns[1]: np.exp(log_n_X), **banded(loss_BX)})
            tables.append(curves_of(curve, self.columns[1], budget.flops))
            if budget.optimum and budget.loss:
                best = {
                    "x": budget.optimum.value,
                    "loss": budget.loss.value,
                    "low": budget.optimum.low,
                    "high": budget.optimum.high,
                }
                tables.append(pd.DataFrame([{"series": "optimum", "group": budget.flops, **best}]))
        return (
            pd.concat(tables, ignore_index=True)
            if tables
            else pd.DataFrame(columns=["series", "group", "x", "loss", "low", "high"])
        )

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.law import draw_law

        label = self.columns[0] if self.conventions["unit_of_C"] in (None, 1.0) else "FLOPs"
        draw_law(ax, data, self.columns[1], self.conventions["loss"], label)
