"""The density study: a grid of a memory's rows by the rows that one token reads. Does density beat size?

Published: two points. UltraMemV2 (arXiv 2508.18756) with 60B parameters and top-768 beats 120B and top-256 downstream
(Hard 30.0 against 27.9), although its pre-training loss is higher (1.855 against 1.835).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pandas as pd

from analysis.cells import Cell, split_cells
from analysis.errors import require_columns
from analysis.figures.density import density_figure
from analysis.fits.density import DensityFit, fit_density
from analysis.studies.tables import facts, interval, led, noise_fact, of_cells, status_facts
from analysis.studies.types import CellAnalysis, Drawing, Section, Table
from analysis.table import fixed, si
from sparsemem.mechanisms import MEMORY_POOLS

PUBLISHED = 1.855 - 1.835
"""Nats per token by which half the table with three times the rows read changed the loss (UltraMemV2, arXiv
2508.18756).
"""

_CAPTION = (
    "Left: the fitted surface of the validation loss over the rows of a memory and the rows that one token reads; "
    "circles: measured means in the colour of their own loss, so a circle that stands out is a point that the surface "
    "misses. Right: the surface along the rows at each count of rows read, with pointwise 95% band, and the means with "
    "their paired standard error, set side by side."
)
_NOTE = (
    "Gains: nats per token by which a doubling lowers the loss, mean over the grid (the plane's slopes). Exponents: of "
    "the whole loss, no floor taken off, so comparable with each other only. plane: linear in both logarithms; "
    "twisted: and in their product; quadratic: and in their squares. The simplest surface within 2 of the least AICc "
    "is drawn."
)


def _of_the_grid(field: str) -> bool:
    """Whether a field sets the rows or the rows read."""
    return field in {f"model.{pool}.{name}" for pool in MEMORY_POOLS for name in ("rows", "top_m", "heads", "layers")}


@dataclass(frozen=True)
class Density(CellAnalysis[DensityFit]):
    """One surface a cell. What sets rows and rows read (`rows`, `top_m`, `heads`, `layers`) makes the grid, and cells
    only where two of its values come to the same rows and rows read.
    """

    point: ClassVar[str] = "grid point"
    terms: ClassVar[str] = "Density: rows that a token reads, over all layers and heads. Size: rows in all tables."

    @property
    def axis(self) -> tuple[str, ...]:
        return "memory_rows", "memory_rows_read"

    @cached_property
    def trials(self) -> pd.DataFrame:
        """All trials with a memory."""
        trials = self.results.trials
        require_columns(trials.columns, self.axis, str(self.results.folder / "trials.csv"))
        trials = trials[(trials["memory_rows"] > 0) & (trials["memory_rows_read"] > 0)]
        for column, field in zip(self.axis, ("rows", "top_m"), strict=True):
            remedy = f"vary `model.POOL.{field}`, or give study.yaml another `analysis`"
            problem = f"column `{column}` has one value in all trials, so there is no grid"
            self.require(trials[column].nunique() > 1, problem, remedy)
        return trials

    @cached_property
    def cells(self) -> list[Cell]:
        return split_cells(self.trials, self.axis, _of_the_grid)

    def fit(self, cell: Cell) -> DensityFit:
        return fit_density(pd.concat([cell.trials, cell.dense]))

    def remarks(self) -> list[str]:
        lines = []
        for cell, fit in self.fitted:
            if fit.exchange:
                beside = "holds" if fit.exchange.low <= PUBLISHED <= fit.exchange.high else "does not hold"
                sentence = (
                    "In print, half the table with three times the rows read raised the pre-training loss by "
                    f"{PUBLISHED:.3f} and yet won downstream (UltraMemV2 60B top-768 against 120B top-256); the "
                    f"interval measured here {beside} that rise. Nothing here measures downstream tasks."
                )
                lines.append(led(cell.label, sentence))
        return lines

    def drawings(self) -> list[Drawing]:
        data = of_cells([(cell.label, fit.table()) for cell, fit in self.fitted if fit.surfaces])
        return Drawing.of_any("density", _CAPTION, density_figure, data)

    def sections(self) -> list[Section]:
        tables = []
        for cell, fit in self.fitted:
            pairs = [
                *status_facts(fit, "runs, grid points, seeds", len(fit.points), fit.seeds),
                ("gain of a doubling of the rows read (nats/token)", interval(fit.density_gain)),
                ("gain of a doubling of the table (nats/token)", interval(fit.size_gain)),
                ("density less size (nats/token)", interval(fit.advantage)),
                ("half the table, three times the rows read (nats/token)", interval(fit.exchange)),
                *((f"exponent {name}", interval(value)) for name, value in fit.exponents.items()),
                *noise_fact(fit),
            ]
            tables.append(facts(pairs, cell.label))
            surfaces = [
                {
                    "surface": each.surface + (" (drawn)" if each.surface == fit.law else ""),
                    "AICc": fixed(each.aicc, ".1f"),
                    "left-out error (nats/token)": fixed(each.left_out_error, ".5f"),
                    "lack of fit, p": fixed(each.lack_of_fit_p, ".2g"),
                }
                for each in fit.surfaces
            ]
            if surfaces:
                tables.append(Table(pd.DataFrame(surfaces), "Surfaces tried."))
        return [Section("", tuple(tables), _NOTE)]

    def caveats(self) -> list[str]:
        planned, lines = self.trials, []
        least = planned[planned["memory_rows_read"] == planned["memory_rows_read"].min()]
        same = planned[planned["memory_rows"] == planned["memory_rows"].min()]
        if "memory_flops_share" in planned:
            size, reading = (
                f"{own['memory_flops_share'].min():.0%} to {own['memory_flops_share'].max():.0%}"
                for own in (least, same)
            )
            lines.append(
                "Neither is free: at the fewest rows read, more rows take the memory's share of the blocks' FLOPs from "
                f"{size} (keys), at the fewest rows, reading more takes it from {reading}. Gains are not corrected for "
                "that."
            )
        low, high = planned["active_params"].min(), planned["active_params"].max()
        if high > 1.02 * low:
            lines.append(
                f"The memory comes on top of the backbone: P_act goes from {si(low)} to {si(high)} over the grid."
            )
        return lines
