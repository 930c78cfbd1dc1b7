"""The allocation study: loss against the share of the sparse parameters in routed experts, one curve a cell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import pandas as pd

from analysis import prose
from analysis.cells import MEMORY, ON_TOP, SHARE, Cell
from analysis.figures.allocation import allocation_figure, differences_figure
from analysis.figures.curves import curves_data, curves_figure
from analysis.figures.diagnostics import diagnostics_figure
from analysis.figures.joint import optimum_figure
from analysis.fits.allocation import LEAST_SHARES, fit_allocation
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.joint import fit_joint
from analysis.fits.joint_budgets import BUDGET, factors_of
from analysis.fits.joint_result import JointFit
from analysis.studies.allocation_figures import (
    CURVES_CAPTION,
    DIAGNOSTICS_CAPTION,
    DIFFERENCES_CAPTION,
    HATCHED,
    OPTIMUM_CAPTION,
    allocation_data,
    curve_caption,
    diagnostics_data,
    differences_data,
)
from analysis.studies.allocation_tables import JOINT, LAWS, curve_tables, joint_tables
from analysis.studies.comparing import MOST, Comparison, compare, comparison_drawings, comparison_warnings
from analysis.studies.foretold import Foretold, foretold, foretold_sections
from analysis.studies.types import CellAnalysis, Drawing, Reading, Section, Table
from analysis.table import RHO, average_differences, fixed, paired_differences, varied_fields


@dataclass(frozen=True)
class Allocation(CellAnalysis[AllocationFit]):
    """One allocation curve a cell, one law over the cells that differ in their budget, and the paired differences to
    pure experts.
    """

    share: ClassVar[str] = "share_moe"
    """Column of the share that the curve runs over."""
    terms: ClassVar[str] = "A share is the part of the sparse parameters held by routed experts; the rest is memory."

    def fit(self, cell: Cell) -> AllocationFit:
        return fit_allocation(cell.trials, self.share)

    @cached_property
    def drawable(self) -> list[tuple[Cell, AllocationFit]]:
        """Of `fitted` what holds a finished trial."""
        return [(cell, fit) for cell, fit in self.fitted if len(cell.trials)]

    @cached_property
    def over(self) -> dict[str, list[int]]:
        """Which of the cells that hold a finished trial differ in their budget alone, by the label of what else the
        study varies.
        """
        groups: dict[str, list[int]] = {}
        for place, cell in enumerate(self.cells):
            others = {path: value for path, value in cell.fields.items() if path not in (*self.along, *self.carried)}
            if len(cell.trials):
                groups.setdefault(replace(cell, fields=others).label, []).append(place)
        return groups

    @cached_property
    def joint(self) -> list[tuple[str, list[tuple[Cell, AllocationFit]], JointFit]]:
        """The law over all budgets, apart for every other field that the study varies: label, the budgets' own fits,
        the law.
        """
        found = []
        for label, places in self.over.items():
            if len(places) > 1:
                fitted = [self.fitted[place] for place in places]
                law = fit_joint(pd.concat([cell.trials for cell, _ in fitted]), self.share)
                found.append((", ".join(filter(None, ("All budgets", label))), fitted, law))
        return found

    @cached_property
    def foretold(self) -> list[Foretold]:
        """What had been predicted of the study's budgets."""
        return foretold(self.results, self.drawable)

    @cached_property
    def carried(self) -> list[str]:
        """Other fields that have one value at each budget, such as a batch that grows with the tokens: they belong to
        the budget.
        """
        values: dict[str, dict[str, set[str]]] = {}
        for cell in self.cells:
            budget = str({path: value for path, value in cell.fields.items() if path in self.along})
            for path, value in cell.fields.items():
                if path not in (*self.along, MEMORY, ON_TOP, SHARE):
                    values.setdefault(path, {}).setdefault(budget, set()).add(str(value))
        return [path for path, held in values.items() if len(held) > 1 and all(len(own) == 1 for own in held.values())]

    @cached_property
    def compared(self) -> list[Comparison]:
        """Curves of one budget beside each other."""
        return compare(self.cells, self.along)

    @property
    def along(self) -> tuple[str, ...]:
        """Fields of the cells that make up a budget."""
        return (*BUDGET, "budget.tokens")

    def foresee(self) -> list[str]:
        lines = comparison_warnings(self.compared, self.results)
        shares = [cell.planned[self.share].dropna().round(9).nunique() for cell in self.cells]
        if min(shares) < LEAST_SHARES:
            few = sum(count < LEAST_SHARES for count in shares)
            beside = any(each.has_pairs for each in self.compared)
            differences = "`analysis: memories` reports their differences alone"
            lines.insert(
                0,
                f"{few} of {len(shares)} curves have fewer than {LEAST_SHARES} {self.point}s, so no optimum will be "
                f"fitted to them; {differences if beside else f'plan {LEAST_SHARES} {self.point}s or more'}.",
            )
        return lines

    def fits(self) -> list[dict[str, Any]]:
        over = [*((label, law) for label, _, law in self.joint), *((each.label, each.fit) for each in self.compared)]
        return [*super().fits(), *({"over": label, **fit.to_dict()} for label, fit in over)]

    def readings(self) -> list[Reading]:
        fits = [*((cell.label, fit) for cell, fit in self.fitted), *((label, law) for label, _, law in self.joint)]
        own = [Reading.of(label, fit, self.point) for label, fit in fits]
        return [*own, *(each.reading() for each in self.compared)]

    def remarks(self) -> list[str]:
        return [*comparison_warnings(self.compared, self.results), *(each.summary() for each in self.foretold)]

    def drawings(self) -> list[Drawing]:
        if not self.drawable:
            return []
        data = allocation_data(self.drawable)
        what = (
            "Validation loss against the share of the sparse parameters held by routed experts, at fixed total and "
            "activated parameters."
        )
        differences = differences_data(self.drawable, self.results.sequence_losses)
        curves = curves_data([cell for cell, _ in self.drawable], self.results.curves)
        errors = partial(diagnostics_figure, noun=self.point)
        return [
            Drawing("allocation", curve_caption(what, data, HATCHED), allocation_figure, data),
            *self._optima(),
            *comparison_drawings(self.compared, "comparison"),
            *Drawing.of_any("differences", DIFFERENCES_CAPTION, differences_figure, differences),
            *Drawing.of_any("curves", CURVES_CAPTION, curves_figure, curves),
            *Drawing.of_any("diagnostics", DIAGNOSTICS_CAPTION, errors, diagnostics_data(self.drawable)),
        ]

    def _optima(self) -> list[Drawing]:
        """The best share along everything that varies between the budgets."""
        drawn, several = [], len(self.joint) > 1
        for place, (label, fitted, law) in enumerate(self.joint, 1):
            for factor in law.factors if law.models else ():
                data = law.table(factor, [(factors_of(cell.trials)[factor], fit) for cell, fit in fitted])
                name = f"optimum-{factor}" + (f"-{place}" if several else "")
                caption = OPTIMUM_CAPTION + (f" {label}." if several else "")
                drawn.append(Drawing(name, caption, partial(optimum_figure, factor=factor), data))
        return drawn

    def sections(self) -> list[Section]:
        return [
            *foretold_sections(self.foretold),
            *self._laws(),
            *(each.section() for each in self.compared),
            *self._differences(),
        ]

    def caveats(self) -> list[str]:
        lines = []
        if not {"budget.total_params", "budget.active_params"} & set(varied_fields(self.results.trials)):
            lines.append(
                "One total and one activated parameter count: whether the optimum moves with sparsity or with size "
                "cannot be told."
            )
        if self.carried:
            lines.append(
                f"{', '.join(self.carried)}: another value at each budget, so what it does cannot be told from what "
                "the budget does."
            )
        if len(self.cells) > MOST and not self.compared:
            lines.append(f"More than {MOST} curves: the differences between them are not tested.")
        return [*lines, *prose.designs(self.results)]

    def _laws(self) -> list[Section]:
        curves = [Section(cell.label, curve_tables(fit, self.point)) for cell, fit in self.fitted]
        joint = [Section(label, joint_tables(law, self.point)) for label, _, law in self.joint if law.models]
        return [*curves, Section("", (), LAWS), *joint, *([Section("", (), JOINT)] if joint else [])]

    def _differences(self) -> list[Section]:
        """Mean difference to rho = 1 of each share with both standard errors, then every seed's own; a table a cell."""
        tables = []
        for cell in self.cells:
            differences = paired_differences(pd.concat([cell.trials, cell.dense]), self.results.sequence_losses)
            seeds, rows = sorted(differences["seed"].unique()), []
            shares = differences.sort_values("rho", ascending=False).groupby("rho", sort=False, dropna=False)
            for rho, own in shares:
                (mean,) = average_differences(own).to_dict("records")
                by_seed = own.set_index("seed")["difference"]
                rows.append(
                    {
                        RHO: fixed(rho, ".4g") or "dense",
                        "mean difference": fixed(mean["difference"], "+.4f"),
                        "s.e. between seeds": fixed(mean["se_seeds"]),
                        "s.e. over sequences": fixed(mean["se_sequences"]),
                        **{f"seed {seed}": fixed(by_seed.get(seed), "+.4f") for seed in seeds},
                    }
                )
            if rows:
                tables.append(Table(pd.DataFrame(rows), cell.label, wide=True))
        note = (
            "Loss less that of the pure mixture of experts with the same seed, nats per token; negative is better. The "
            "error over sequences is that of the paired differences on the held-out set."
        )
        return [Section(f"Differences to {RHO} = 1", tuple(tables), note)] if tables else []
