"""The slots study: a fixed backbone, and on top of it ever more rows of one kind of memory. How far does a tenfold
lower the loss?

Published: OverEncoding on OLMoE-1.3B, L = 2.6754 - 0.0256 log10 m over the m rows of its 2-gram table (arXiv
2501.16975). Engram's loss is linear in the logarithm of its slots from 2.6e5 to 1.0e7, without coefficients in print
(arXiv 2601.07372).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import pandas as pd

from analysis.cells import ON_TOP, Cell, split_cells
from analysis.errors import require_columns
from analysis.figures.slots import slots_figure
from analysis.fits.slots import fit_slots
from analysis.fits.slots_result import MechanismFit, SlotsFit
from analysis.studies.tables import facts, interval, led, noise_fact, of_cells, status_facts
from analysis.studies.types import CellAnalysis, Drawing, Reading, Section, Table
from analysis.table import fixed, shown, si, varied_fields
from sparsemem.mechanisms import MEMORY_POOLS, label

NEEDED = ("memory_rows", "memory_rows_read", "memory_params")
PUBLISHED = next(each.published_slope for each in MEMORY_POOLS.values() if each.published_slope)
"""Nats per token for every tenfold of rows: OverEncoding's 2-gram table on OLMoE-1.3B (arXiv 2501.16975)."""

_CAPTION = (
    "Validation loss against the rows of a memory (left) and the parameters in them (right), on top of one backbone. "
    "Filled markers: means for the average seed, with paired standard error; open markers: single runs with the effect "
    "of their seed taken off; kinds of memory are set side by side. Lines: loss linear in the logarithm of the rows, "
    "with pointwise 95% band; where a power law with a floor describes the means better, it is drawn beside, and the "
    "band left out. Grey: the slope published for OverEncoding at far larger scale (arXiv 2501.16975); only its slope "
    "can be compared."
)
_NOTE = (
    "log-linear: L = a + b log10(rows). Power with floor: L = E + A rows^-alpha; E and A are given where noise does "
    "not allow alpha = 0, the line. Left-out error: of the inner row counts, each predicted from all others. Beyond: "
    "loss at the most rows less what the law predicts for it from all others. Lack of fit: chance of so poor a fit if "
    "the law were true. Differences of slope: nats per token and tenfold, each at 95% on its own."
)


@dataclass(frozen=True)
class Slots(CellAnalysis[SlotsFit]):
    """One line a kind of memory; kinds that the study varies in themselves (row width, heads) count as several."""

    point: ClassVar[str] = "row count"
    terms: ClassVar[str] = (
        "A tenfold is a tenfold of the rows. A mean is that of the average seed; differences are paired by seed."
    )

    @property
    def axis(self) -> tuple[str, ...]:
        return tuple(self.columns)

    @cached_property
    def columns(self) -> dict[str, str]:
        """Column of given rows -> its pool."""
        trials = self.results.trials
        require_columns(trials.columns, NEEDED, str(self.results.folder / "trials.csv"))
        matches = (re.fullmatch(r"model\.(\w+)\.rows", str(name)) for name in trials.columns)
        found = {match[0]: match[1] for match in matches if match}
        given = bool(found) and trials[list(found)].notna().any(axis=None)
        remedy = "vary `model.POOL.rows` of one or more memories, or give study.yaml another `analysis`"
        self.require(given, "no trial varies the `rows` of a memory", remedy)
        several = trials["trial_id"][trials[list(found)].notna().sum(axis=1) > 1]
        problem = (
            f"trial {', '.join(several[:3])} gives `rows` to several memories, so their effects cannot be told apart"
        )
        self.require(several.empty, problem, "put each memory into a grid of its own under `vary`")
        return found

    @cached_property
    def trials(self) -> pd.DataFrame:
        """All trials with their `mechanism`; empty for the backbone alone."""
        trials, varied = self.results.trials, varied_fields(self.results.trials)
        names = pd.Series(None, index=trials.index, dtype=object)
        for column, pool in self.columns.items():
            designs = [name for name in varied if name.startswith(f"model.{pool}.") and name != column]
            for index, trial in trials[trials[column].notna()].iterrows():
                design = ", ".join(f"{name.rpartition('.')[2]} {shown(trial[name]) or 'none'}" for name in designs)
                names[index] = label(pool) + (f" ({design})" if design else "")
        return trials.assign(mechanism=names)

    @cached_property
    def cells(self) -> list[Cell]:
        return split_cells(self.trials, ("mechanism", "memory_rows"), self._names_a_mechanism)

    def fit(self, cell: Cell) -> SlotsFit:
        return fit_slots(_runs(cell))

    def _names_a_mechanism(self, field: str) -> bool:
        return field == ON_TOP or field.startswith(tuple(f"model.{pool}." for pool in self.columns.values()))

    def readings(self) -> list[Reading]:
        found = []
        for cell, fit in self.fitted:
            if fit.message:
                found.append(Reading(cell.label, f"Status {fit.status}: {fit.message}", False))
            for each in fit.mechanisms:
                found.append(Reading.of(", ".join(filter(None, (cell.label, each.mechanism))), each))
        return found

    def remarks(self) -> list[str]:
        alike = tuple(each.label for each in MEMORY_POOLS.values() if each.published_slope)
        lines = []
        for cell, fit in self.fitted:
            own = [difference.summary() for difference in fit.differences]
            own += [_beside_print(each) for each in fit.mechanisms if each.slope and each.mechanism.startswith(alike)]
            if fit.paired_sd is not None:
                own.append(
                    f"Noise of one run once its seed's common effect is off: {fit.paired_sd:.4f} nats/token (sd)."
                )
            lines += [led(cell.label, line) for line in own]
        return lines

    def drawings(self) -> list[Drawing]:
        published = "OverEncoding, published", PUBLISHED
        tables = [
            (cell.label, fit.table(_runs(cell)[lambda runs: runs["mechanism"].notna()], published))
            for cell, fit in self.fitted
            if fit.mechanisms
        ]
        return Drawing.of_any("slots", _CAPTION, slots_figure, of_cells(tables))

    def sections(self) -> list[Section]:
        tables = []
        for cell, fit in self.fitted:
            pairs = [
                *status_facts(fit, "runs, seeds", fit.seeds),
                *((f"slope, {each.mechanism} (nats/token)", interval(each.slope)) for each in fit.mechanisms),
                *(
                    (f"difference of slope, {each.first} less {each.second}", interval(each.difference))
                    for each in fit.differences
                ),
                *(
                    (f"gain over the backbone, {each.mechanism} (nats/token)", interval(each.gain))
                    for each in fit.mechanisms
                ),
                ("loss of the backbone alone (nats/token)", fixed(fit.backbone)),
                *noise_fact(fit),
            ]
            tables.append(facts(pairs, cell.label))
            laws = [_law_row(each, place) for each in fit.mechanisms for place in range(len(each.laws))]
            if laws:
                tables.append(Table(pd.DataFrame(laws), "Laws tried.", wide=True))
        return [Section("", tuple(tables), _NOTE)]

    def caveats(self) -> list[str]:
        lines = [
            "The memories come on top of the backbone: P_tot grows with the rows. Whether experts would use it better "
            "is not asked."
        ]
        planned = self.trials[self.trials["mechanism"].notna()]
        widths = (planned["memory_params"] / planned["memory_rows"]).groupby(planned["mechanism"], sort=False).median()
        if widths.nunique() > 1:
            words = ", ".join(f"{name} {width:.4g}" for name, width in widths.items())
            lines.append(
                f"A row is not the same in every memory (parameters a row: {words}): compare levels at equal "
                "parameters."
            )
        for name, own in planned.groupby("mechanism", sort=False):
            low, high = own["active_params"].min(), own["active_params"].max()
            if high > 1.02 * low:
                lines.append(
                    f"{name}: P_act grows from {si(low)} to {si(high)} with the rows (keys), so part of its slope is "
                    "compute."
                )
            reads = own["memory_rows_read"] * own["tokens"]
            if (short := own["memory_rows"] > reads).any():
                worst = (reads / own["memory_rows"])[short].min()
                lines.append(
                    f"{name}: the training reads too few rows to touch all of the largest tables ({worst:.0%} of them "
                    "at most)."
                )
        return lines


def _runs(cell: Cell) -> pd.DataFrame:
    """Finished runs of a cell, the backbone's too, in the order of the plan."""
    return pd.concat([cell.trials, cell.dense]).sort_index()


def _beside_print(fit: MechanismFit) -> str:
    assert fit.slope
    inside = "holds" if fit.slope.low <= PUBLISHED <= fit.slope.high else "does not hold"
    return (
        f"{fit.mechanism}: its interval {inside} the slope published for OverEncoding's 2-gram table on OLMoE-1.3B, "
        f"{PUBLISHED:+.4f} nats/token a tenfold (arXiv 2501.16975)."
    )


def _law_row(fit: MechanismFit, place: int) -> dict[str, str]:
    law = fit.laws[place]
    return {
        "memory": fit.mechanism if place == 0 else "",
        "law": law.law + (" (preferred)" if law.law == fit.preferred else ""),
        "AICc": fixed(law.aicc, ".1f"),
        "left-out error (nats/token)": fixed(law.left_out_error, ".5f"),
        "beyond (nats/token)": fixed(law.beyond, "+.4f"),
        "lack of fit, p": fixed(law.lack_of_fit_p, ".2g"),
        "parameters": "; ".join(f"{name} {interval(value)}" for name, value in law.parameters.items())
        + (f"; {law.note}" if law.note else ""),
    }
