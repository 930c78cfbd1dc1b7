"""The compute-ratio study: loss against the memory layers' share of the compute, at fixed P_tot, P_act and FLOPs.

Source of the question: UltraMemV2 (arXiv 2508.18756), which finds 17% best for its 500M/6B model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pandas as pd

from analysis.cells import Cell, split_cells
from analysis.errors import require_columns
from analysis.figures.compute_ratio import PUBLISHED, compute_ratio_figure
from analysis.studies.allocation import Allocation
from analysis.studies.allocation_figures import allocation_data, curve_caption
from analysis.studies.comparing import Comparison
from analysis.studies.types import Drawing, Section, Table
from analysis.table import si, varied_fields
from sparsemem.mechanisms import MEMORY_POOLS

HELD = {"total_params": "P_tot", "active_params": "P_act", "flops_per_token": "FLOPs/token of a training step"}  # nosec B105
MOST = 0.02  # largest spread of what is held: beyond it the loss moves by as much as the shares are meant to move it

_WHAT = (
    "Validation loss against the memory layers' share of the blocks' forward FLOPs, at fixed total and activated "
    "parameters and fixed FLOPs per token."
)
_DASHED = f"Dashed: the published optimum, {PUBLISHED:.0%} (UltraMemV2, arXiv 2508.18756), at far larger scale."


@dataclass(frozen=True)
class ComputeRatio(Allocation):
    """One curve a budget. Whatever the study varies in a memory makes up the share, so it sets no cells apart but where
    two of its values come to one share.
    """

    point: ClassVar[str] = "compute share"
    share: ClassVar[str] = "memory_flops_share"
    terms: ClassVar[str] = "A compute share is the memory layers' part of the blocks' forward FLOPs per token."

    @property
    def axis(self) -> tuple[str, ...]:
        return (self.share,)

    @cached_property
    def cells(self) -> list[Cell]:
        require_columns(self.results.trials.columns, (self.share, *HELD), str(self.results.folder / "trials.csv"))
        shares = self.planned[self.share]
        remedy = "vary the memory's `key_dim` and `top_m`, or give study.yaml another `analysis`"
        problem = "column `memory_flops_share` is the same in all trials, so there is no curve over it"
        self.require(shares.nunique() > 1, problem, remedy)
        cells = split_cells(self.results.trials, self.axis, _makes_up_the_share)
        for cell in cells:
            for column, words in HELD.items():
                spread = cell.planned[column].max() / cell.planned[column].min() - 1
                where = f" at {cell.label}" if cell.label else ""
                remedy = "hold it (`budget.flops_per_token` refuses such a plan), or give study.yaml another `analysis`"
                problem = (
                    f"{words} differs by {spread:.1%} between the points{where}, but a compute-ratio study holds it "
                    f"within {MOST:.0%}"
                )
                self.require(spread <= MOST, problem, remedy)
        return cells

    @property
    def compared(self) -> list[Comparison]:
        """None: the shares of two curves are not the same ones."""
        return []

    @property
    def planned(self) -> pd.DataFrame:
        """All trials but those of a dense baseline."""
        return self.results.trials[self.results.trials["rho"].notna() | (self.results.trials[self.share] > 0)]

    def remarks(self) -> list[str]:
        sentences = []
        for cell, fit in self.fitted:
            if fit.argmin:
                lies = "inside" if fit.argmin.low <= PUBLISHED <= fit.argmin.high else "outside"
                tied = lies == "outside" and any(low <= PUBLISHED <= high for low, high in fit.tied_spans)
                sentences.append(
                    f"{f'{cell.label}: the' if cell.label else 'The'} published optimum, {PUBLISHED:.2f} (UltraMemV2), "
                    f"lies {lies} the interval of the one found{' but among the tied shares' if tied else ''}."
                )
        return [*super().remarks(), *sentences]

    def drawings(self) -> list[Drawing]:
        if not self.drawable:
            return []
        data = allocation_data(self.drawable)
        return [Drawing("compute-ratio", curve_caption(_WHAT, data, _DASHED), compute_ratio_figure, data)]

    def sections(self) -> list[Section]:
        return [*self._laws(), self._held()]

    def caveats(self) -> list[str]:
        path = [name for name in varied_fields(self.results.trials) if name.startswith("model.")]
        moved = (
            f"The compute share was moved by {', '.join(path)} and the feed-forward width: another path may have "
            "another optimum."
        )
        return [*super().caveats(), *([moved] if path else [])]

    def _held(self) -> Section:
        rows = []
        for cell in self.cells:
            for column, words in HELD.items():
                least, most = cell.planned[column].min(), cell.planned[column].max()
                row = {"held": words, "least": si(least), "most": si(most), "spread": f"{most / least - 1:.3%}"}
                rows.append(({"cell": cell.label} if cell.label else {}) | row)
        return Section("Held fixed over the points", (Table(pd.DataFrame(rows), wide=True),))


def _makes_up_the_share(field: str) -> bool:
    return field.startswith(tuple(f"model.{pool}." for pool in MEMORY_POOLS))
