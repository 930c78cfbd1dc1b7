"""The allocation study: loss against the share of the sparse parameters in routed experts, one curve a cell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from analysis import prose
from analysis.cells import Cell, split_cells
from analysis.figures.allocation import allocation_data, allocation_figure, differences_data, differences_figure
from analysis.figures.curves import curves_data, curves_figure
from analysis.fits.allocation import AllocationFit, fit_allocation
from analysis.fits.types import Status
from analysis.studies.records import record
from analysis.studies.tables import facts, interval, number, rates_sections
from analysis.studies.types import Analysis, Drawing, Reading, Section, Table
from analysis.table import RHO, average_differences, paired_differences, varied_fields

_LAWS = (
    "quadratic: c + s x + k x^2, over all shares x; biased where the curve is wide or asymmetric. two-power: c + a (1 - x)^p + b g(x), "
    "a <= 0 <= b, where g falls as (x + 0.1)^-q from 1 at x = 0 to 0 at x = 1. The law with the least left-out error is used. Noise is "
    "what is left of a run's loss once the mean of its share and the effect of its seed are off. Tied shares: Gupta's subset selection, "
    "which holds the true best with 95% confidence."
)


@dataclass(frozen=True)
class Allocation(Analysis):
    """One allocation curve a cell, whether the optimum moves between cells, and the paired differences to pure experts."""

    share: ClassVar[str] = "share_moe"
    """Column of the share that the curve runs over."""
    terms: ClassVar[str] = "A share is the part of the sparse parameters held by routed experts; the rest is memory."

    @cached_property
    def cells(self) -> list[Cell]:
        return split_cells(self.results.trials, self.axis)

    @cached_property
    def fitted(self) -> list[tuple[Cell, AllocationFit]]:
        return [(cell, fit_allocation(cell.trials, self.share)) for cell in self.cells]

    @cached_property
    def drawable(self) -> list[tuple[Cell, AllocationFit]]:
        """Of `fitted` what holds a finished trial."""
        return [(cell, fit) for cell, fit in self.fitted if len(cell.trials)]

    def fits(self) -> list[dict[str, Any]]:
        return [record(cell, fit.to_dict(), self.point) for cell, fit in self.fitted]

    def readings(self) -> list[Reading]:
        return [Reading(cell.label, fit.summary(self.point), fit.status is Status.CONVERGED) for cell, fit in self.fitted]

    def remarks(self) -> list[str]:
        return prose.shifts(self.fitted)

    def drawings(self) -> list[Drawing]:
        if not self.drawable:
            return []
        data = allocation_data(self.drawable)
        drawn = [Drawing("allocation", prose.allocation_caption(set(data["series"])), allocation_figure(data), data)]
        differences = differences_data(self.drawable, self.results.sequence_losses)
        if len(differences):
            drawn.append(Drawing("differences", prose.DIFFERENCES_CAPTION, differences_figure(differences), differences))
        lines = curves_data([cell for cell, _ in self.drawable], self.results.curves)
        if len(lines):
            drawn.append(Drawing("curves", prose.CURVES_CAPTION, curves_figure(lines), lines))
        return drawn

    def sections(self) -> list[Section]:
        return [*self._laws(), *self._differences(), *rates_sections(self.cells, self.point)]

    def caveats(self) -> list[str]:
        fixed = not {"budget.total_params", "budget.active_params"} & set(varied_fields(self.results.trials))
        alone = "One total and one activated parameter count: whether the optimum moves with sparsity or with size cannot be told."
        return [*([alone] if fixed else []), *prose.designs(self.results)]

    def _laws(self) -> list[Section]:
        sections = [Section(cell.label, fit_tables(fit, self.point)) for cell, fit in self.fitted]
        return [*sections, Section("", (), _LAWS)]

    def _differences(self) -> list[Section]:
        """For each cell the mean difference to rho = 1 of each share with both standard errors, then every seed's own."""
        tables = []
        for cell in self.cells:
            differences = paired_differences(pd.concat([cell.trials, cell.dense]), self.results.sequence_losses)
            if differences.empty:
                continue
            rows = []
            for average in average_differences(differences.sort_values("rho", ascending=False)).to_dict("records"):
                same = differences["rho"].isna() if pd.isna(average["rho"]) else differences["rho"] == average["rho"]
                own = differences[same].set_index("seed")["difference"]
                rows.append(
                    {
                        RHO: "dense" if pd.isna(average["rho"]) else f"{average['rho']:.4g}",
                        "mean difference": number(average["difference"], sign=True),
                        "s.e. between seeds": number(average["se_seeds"]),
                        "s.e. over sequences": number(average["se_sequences"]),
                        **{f"seed {seed}": number(own.get(seed), sign=True) for seed in sorted(differences["seed"].unique())},
                    }
                )
            tables.append(Table(pd.DataFrame(rows), cell.label, wide=True))
        note = (
            "Loss less that of the pure mixture of experts with the same seed, nats per token; negative is better. The error over "
            "sequences is that of the paired differences on the held-out set."
        )
        return [Section(f"Differences to {RHO} = 1", tuple(tables), note)] if tables else []


def fit_tables(fit: AllocationFit, noun: str = "share") -> tuple[Table, ...]:
    """Facts, laws tried and parameters of one curve, for the page."""
    pairs = [
        ("status", str(fit.status).replace("_", " ")),
        ("law", fit.law),
        (f"runs, {noun}s, seeds", f"{len(fit.rows)}, {len(fit.shares)}, {fit.seeds}"),
    ]
    if fit.best_end is not None:
        pairs.append((f"winning end ({noun})", f"{fit.best_end:.4g}"))
    if fit.argmin:
        pairs.append((f"best {noun}", interval(fit.argmin, 3)))
    for name, estimate in (("loss there", fit.loss_at_best), (f"depth against {noun} 1", fit.depth)):
        if estimate:
            pairs.append((f"{name} (nats/token)", interval(estimate)))
    for name, value, form in (
        ("minimum inside, part of resamples", fit.p_interior, ".1%"),
        ("paired noise, sd (nats/token)", fit.paired_sd, ".4f"),
        ("spread between seeds, sd (nats/token)", fit.seed_sd, ".4f"),
        ("depth over paired noise", fit.depth_over_noise, ".1f"),
        ("lack of fit, p", fit.lack_of_fit_p, ".2g"),
    ):
        if value is not None:
            pairs.append((name, format(value, form)))
    if fit.tied:
        pairs.append((f"{noun}s tied with the best", ", ".join(f"{share:.3g}" for share in fit.tied)))
    laws = [
        {
            "law": f"{law.law} (used)" if law.law == fit.law else law.law,
            "left-out error": number(law.left_out_error, 5),
            "AICc": number(law.aicc, 1),
            f"best {noun}": ("none inside" if law.argmin is None else number(law.argmin, 3)) + (f" ({law.note})" if law.note else ""),
        }
        for law in fit.candidates
    ]
    tables = [facts(pairs)]
    if laws:
        tables.append(Table(pd.DataFrame(laws), "Laws tried, errors in nats/token."))
        parameters = [(name, interval(value)) for name, value in fit.parameters.items()]
        tables.append(facts(parameters, "Parameters of the law used, with 95% intervals."))
    return tuple(tables)
