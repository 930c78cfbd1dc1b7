"""The sparsity study: an allocation curve at each P_tot over one P_act. Where does memory begin to pay, and does the
best share move?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.cells import Cell, split_cells
from analysis.figures.sparsity import ENGRAM_SPARSITY, LONGCAT, sparsity_figure
from analysis.fits.allocation_result import AllocationFit
from analysis.studies.allocation import Allocation
from analysis.studies.tables import led
from analysis.studies.types import Drawing, Section, Table
from analysis.table import RHO, fixed

TOTAL, RATIO = "budget.total_params", "P_tot/P_act"
MOST = 0.05  # largest spread of P_act


@dataclass(frozen=True)
class Sparsity(Allocation):
    """Allocation curves in the order of their sparsity; along it the best share and its gain over pure experts."""

    @cached_property
    def cells(self) -> list[Cell]:
        trials = self.results.trials
        holds = TOTAL in trials and trials[TOTAL].nunique() > 1
        remedy = f"vary `{TOTAL}`, or give study.yaml another `analysis`"
        self.require(holds, f"`{TOTAL}` is the same in all trials, so there is no sparsity to compare", remedy)
        spread = trials["active_params"].max() / trials["active_params"].min() - 1
        problem = f"P_act differs by {spread:.1%} between the trials, but a sparsity study holds it within {MOST:.0%}"
        self.require(
            spread <= MOST, problem, "give all trials one `budget.active_params`, or study.yaml another `analysis`"
        )
        return sorted(map(self._named, split_cells(trials, self.axis)), key=lambda cell: cell.fields[RATIO])

    def _named(self, cell: Cell) -> Cell:
        """The cell under its sparsity in place of its P_tot."""
        others = {name: value for name, value in cell.fields.items() if name != TOTAL}
        return replace(cell, fields={RATIO: self._ratios[cell.fields[TOTAL]], **others})

    @cached_property
    def _ratios(self) -> dict[float, float]:
        """P_tot of the budget -> P_tot/P_act as planned."""
        planned = self.results.trials[self.results.trials["rho"].notna()]
        ratio = planned["total_params"] / planned["active_params"]
        ratios = ratio.groupby(planned[TOTAL]).median()
        short = ratios.map("{:.2g}".format).astype(float)
        return dict((short if short.is_unique else ratios).items())

    @cached_property
    def series(self) -> dict[str, list[tuple[Cell, AllocationFit]]]:
        """The curves along the sparsity, apart for every other field that the study varies."""
        found: dict[str, list[tuple[Cell, AllocationFit]]] = {}
        for cell, fit in self.fitted:
            others = {path: value for path, value in cell.fields.items() if path != RATIO}
            found.setdefault(replace(cell, fields=others).label, []).append((cell, fit))
        return found

    @cached_property
    def points(self) -> pd.DataFrame:
        """`sparsity_data`."""
        return sparsity_data(
            [(name, cell.fields[RATIO], fit) for name, fitted in self.series.items() for cell, fit in fitted]
        )

    @property
    def along(self) -> tuple[str, ...]:
        return (RATIO, *super().along)

    def remarks(self) -> list[str]:
        pays = [led(name, _pays(group)) for name, group in self.points.dropna().groupby("series", sort=False)]
        return [*pays, *(each.summary() for each in self.foretold)]

    def drawings(self) -> list[Drawing]:
        if self.points.empty:
            return super().drawings()
        return [Drawing("sparsity", _CAPTION, sparsity_figure, self.points), *super().drawings()]

    def sections(self) -> list[Section]:
        rows = [
            {
                **({"series": point["series"]} if point["series"] else {}),
                RATIO: f"{point['sparsity']:.3g}",
                "status": point["status"].replace("_", " "),
                f"best {RHO}": _interval(point, "optimum", 3),
                f"gain over {RHO} = 1 (nats/token)": _interval(point, "gain", 4),
            }
            for point in self.points.to_dict("records")
        ]
        return [
            *([Section("Along the sparsity", (Table(pd.DataFrame(rows), wide=True),))] if rows else []),
            *super().sections(),
        ]

    def caveats(self) -> list[str]:
        return [
            "P_tot grows with the sparsity, so a step along it also adds parameters: compare gains, not losses, "
            "between sparsities.",
            *super().caveats(),
        ]


def _pays(points: pd.DataFrame) -> str:
    """Where memory begins to pay: the smallest sparsity from which the interval of the gain excludes 0."""
    rows = points.to_dict("records")
    paying = [row["gain_low"] > 0 for row in rows]

    def at(row: dict[str, Any]) -> str:
        if row["gain_low"] == row["gain_high"]:
            return f"{RATIO} {row['sparsity']:.3g} (pure experts are best)"
        gain, low, high = (fixed(row[name]) for name in ("gain", "gain_low", "gain_high"))
        return f"{RATIO} {row['sparsity']:.3g} (gain {gain} nats/token, 95% interval {low} to {high})"

    if not any(paying):
        return f"At no sampled sparsity is memory shown to pay; at the highest, {at(rows[-1])}."
    first = paying.index(True)
    if first == 0:
        sentence = f"Memory pays from the lowest sampled sparsity on, {at(rows[0])}"
    else:
        sentence = f"Memory begins to pay between {at(rows[first - 1])} and {at(rows[first])}"
    failing = [f"{row['sparsity']:.3g}" for row, pays in zip(rows[first:], paying[first:], strict=True) if not pays]
    return sentence + (f", but is not shown to at {', '.join(failing)}." if failing else ".")


def _interval(row: dict[str, Any], quantity: str, digits: int) -> str:
    value, low, high = (fixed(row[f"{quantity}{end}"], f".{digits}f") for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})" if value else ""


_CAPTION = (
    "Top: the best share of routed experts against the sparsity P_tot/P_act at fixed P_act, with its 95% interval. "
    f"Bottom: what it gains over pure experts ({RHO} = 1). Open markers: the optimum is in doubt or at an end of the "
    f"sampled shares. Grey bar: the published optimum at a sparsity of about {ENGRAM_SPARSITY} (Engram, arXiv "
    f"2601.07372); dotted: the sparsity of about {LONGCAT} beyond which n-gram memory was found to beat experts "
    "(LongCat-Flash-Lite, arXiv 2601.21204); both at far larger scale."
)


def sparsity_data(points: Sequence[tuple[str, float, AllocationFit]]) -> pd.DataFrame:
    """What `sparsity_figure` draws -> series, sparsity, status, optimum, optimum_low, optimum_high, gain, gain_low,
    gain_high.

    The optimum is the sampled end that wins where no minimum inside is established; the gain is in nats per token over
    share 1, empty where that was not sampled.

    Args:
        points: series, P_tot/P_act and fit of each curve; one without a curve is left out.
    """
    rows = []
    for series, sparsity, fit in points:
        draws = fit.argmin_draws()
        if not len(draws):
            continue
        low, high = np.quantile(draws, (0.025, 0.975))
        optimum = fit.argmin.value if fit.argmin else fit.best_end
        gain = (fit.depth.value, fit.depth.low, fit.depth.high) if fit.depth else (None, None, None)
        rows.append((series, sparsity, str(fit.status), optimum, low, high, *gain))
    names = ["optimum", "optimum_low", "optimum_high", "gain", "gain_low", "gain_high"]
    return pd.DataFrame(rows, columns=["series", "sparsity", "status", *names]).astype(dict.fromkeys(names, float))
