"""The allocation study: loss against the share of the sparse parameters in routed experts, one curve a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from analysis import prose
from analysis.cells import MEMORY, ON_TOP, SHARE, Cell, split_cells
from analysis.figures.allocation import allocation_figure, differences_figure
from analysis.figures.curves import curves_data, curves_figure
from analysis.figures.diagnostics import diagnostics_figure
from analysis.figures.joint import optimum_figure
from analysis.fits.allocation import LEAST_SHARES, fit_allocation
from analysis.fits.allocation_result import AllocationFit, called
from analysis.fits.joint import fit_joint
from analysis.fits.joint_budgets import BUDGET, FACTORS, WORDS, factors_of, together
from analysis.fits.joint_result import JointFit
from analysis.status import Status
from analysis.studies.comparing import MOST, Comparison, compare
from analysis.studies.foretold import Foretold, foretold, foretold_sections
from analysis.studies.records import record
from analysis.studies.tables import facts, interval, number, rates_sections
from analysis.studies.types import Analysis, Drawing, Reading, Section, Table
from analysis.table import RHO, average_differences, paired_differences, si, varied_fields

_LAWS = (
    "quadratic: c + s x + k x^2, over all shares x; biased where the curve is wide or asymmetric. cubic: with m x^3 "
    "more. two-power: c + a (1 - x)^p + b g(x), a <= 0 <= b, where g falls as (x + 0.1)^-q from 1 at x = 0 to 0 at x = "
    "1. akima: piecewise cubic through the share means. Used is the law with the least Cp (Mallows: squares in units "
    "of the noise, and two for each parameter) among those that the noise does not refute (lack of fit, p > 0.01), or, "
    "where all are refuted, the law with the least left-out error. Noise is what is left of a run's loss once the mean "
    "of its share and the effect of its seed are off. Tied shares: Gupta's subset selection, which holds the true best "
    "with 95% confidence."
)
_JOINT = (
    "One law for the curves of all budgets, each with a level of its own and a depth that follows size, tokens per "
    "activated parameter and sparsity where these vary: level + exp(s + s' z) H(x; m + m' z), z the logarithms of what "
    "varies, H a cubic or a two-power curve whose form may follow them too. The models differ in what moves the "
    "optimum (m'). F test: chance of so much better a fit than with the same optimum everywhere if that were true. "
    "Left-out error: rms of the differences between shares at the largest budget, predicted from the others, where "
    "those determine the model."
)


@dataclass(frozen=True)
class Allocation(Analysis):
    """One allocation curve a cell, one law over the cells that differ in their budget, and the paired differences to
    pure experts.
    """

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

    def check(self) -> None:
        _ = self.cells

    def foresee(self) -> list[str]:
        lines = [line for each in self.compared for line in each.warnings(self.results.described.get("model") or {})]
        shares = [cell.planned[self.share].dropna().round(9).nunique() for cell in self.cells]
        if min(shares) < LEAST_SHARES:
            few = (
                f"{sum(count < LEAST_SHARES for count in shares)} of {len(shares)} curves have fewer than "
                f"{LEAST_SHARES} {self.point}s"
            )
            beside = any(each.has_pairs for each in self.compared)
            remedy = (
                "`analysis: memories` reports their differences alone"
                if beside
                else f"plan {LEAST_SHARES} {self.point}s or more"
            )
            lines.insert(0, f"{few}, so no optimum will be fitted to them; {remedy}.")
        return lines

    def fits(self) -> list[dict[str, Any]]:
        over_all = [{"over": label, **law.to_dict()} for label, _, law in self.joint]
        beside = [{"over": each.label, **each.fit.to_dict()} for each in self.compared]
        return [*(record(cell, fit.to_dict(), self.point) for cell, fit in self.fitted), *over_all, *beside]

    def readings(self) -> list[Reading]:
        own = [
            Reading(cell.label, fit.summary(self.point), fit.status is Status.CONVERGED) for cell, fit in self.fitted
        ]
        over_all = [
            Reading(label, law.summary(self.point), law.status is Status.CONVERGED) for label, _, law in self.joint
        ]
        return [*own, *over_all, *(each.reading() for each in self.compared)]

    def remarks(self) -> list[str]:
        beside = [line for each in self.compared for line in each.warnings(self.results.described.get("model") or {})]
        return [*beside, *(each.summary() for each in self.foretold)]

    def drawings(self) -> list[Drawing]:
        if not self.drawable:
            return []
        data = allocation_data(self.drawable)
        drawn = [
            Drawing("allocation", prose.allocation_caption(set(data["series"])), allocation_figure, data),
            *self._optima(),
        ]
        drawn += self._beside()
        differences = differences_data(self.drawable, self.results.sequence_losses)
        if len(differences):
            drawn.append(Drawing("differences", prose.DIFFERENCES_CAPTION, differences_figure, differences))
        lines = curves_data([cell for cell, _ in self.drawable], self.results.curves)
        if len(lines):
            drawn.append(Drawing("curves", prose.CURVES_CAPTION, curves_figure, lines))
        errors = diagnostics_data(self.drawable)
        if len(errors):
            drawn.append(
                Drawing("diagnostics", prose.DIAGNOSTICS_CAPTION, partial(diagnostics_figure, noun=self.point), errors)
            )
        return drawn

    def _beside(self) -> list[Drawing]:
        """The curves of each budget on one axis."""
        names = [
            f"comparison-{place}" if len(self.compared) > 1 else "comparison"
            for place in range(1, len(self.compared) + 1)
        ]
        return [drawn for each, name in zip(self.compared, names, strict=True) if (drawn := each.drawing(name))]

    def _optima(self) -> list[Drawing]:
        """The best share along everything that varies between the budgets."""
        drawn = []
        for place, (label, fitted, law) in enumerate(self.joint):
            for factor in law.factors if law.models else ():
                data = law.table(factor, [(factors_of(cell.trials)[factor], fit) for cell, fit in fitted])
                name = f"optimum-{factor}" + (f"-{place + 1}" if len(self.joint) > 1 else "")
                caption = prose.OPTIMUM_CAPTION + (f" {label}." if len(self.joint) > 1 else "")
                drawn.append(Drawing(name, caption, partial(optimum_figure, factor=factor), data))
        return drawn

    def sections(self) -> list[Section]:
        return [
            *foretold_sections(self.foretold),
            *self._laws(),
            *(each.section() for each in self.compared),
            *self._differences(),
            *rates_sections(self.cells, self.point),
        ]

    def caveats(self) -> list[str]:
        fixed = not {"budget.total_params", "budget.active_params"} & set(varied_fields(self.results.trials))
        alone = (
            "One total and one activated parameter count: whether the optimum moves with sparsity or with size cannot "
            "be told."
        )
        beside = (
            f"{', '.join(self.carried)}: another value at each budget, so what it does cannot be told from what the "
            "budget does."
        )
        many = f"More than {MOST} curves: the differences between them are not tested."
        return [
            *([alone] if fixed else []),
            *([beside] if self.carried else []),
            *([many] if len(self.cells) > MOST and not self.compared else []),
            *prose.designs(self.results),
        ]

    def _laws(self) -> list[Section]:
        sections = [Section(cell.label, fit_tables(fit, self.point)) for cell, fit in self.fitted]
        over_all = [Section(label, joint_tables(law, self.point)) for label, _, law in self.joint if law.models]
        return [*sections, Section("", (), _LAWS), *over_all, *([Section("", (), _JOINT)] if over_all else [])]

    def _differences(self) -> list[Section]:
        """For each cell the mean difference to rho = 1 of each share with both standard errors, then every
        seed's own.
        """
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
                        **{
                            f"seed {seed}": number(own.get(seed), sign=True)
                            for seed in sorted(differences["seed"].unique())
                        },
                    }
                )
            tables.append(Table(pd.DataFrame(rows), cell.label, wide=True))
        note = (
            "Loss less that of the pure mixture of experts with the same seed, nats per token; negative is better. The "
            "error over sequences is that of the paired differences on the held-out set."
        )
        return [Section(f"Differences to {RHO} = 1", tuple(tables), note)] if tables else []


def fit_tables(fit: AllocationFit, noun: str = "share") -> tuple[Table, ...]:
    """Facts, laws tried and parameters of one curve, for the page."""
    pairs = [
        ("status", str(fit.status).replace("_", " ")),
        ("law", called(fit.law)),
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
            "law": f"{called(law.law)} (used)" if law.law == fit.law else called(law.law),
            "left-out error": number(law.left_out_error, 5),
            "Cp": number(law.cp, 1),
            "AICc": number(law.aicc, 1),
            f"best {noun}": ("none inside" if law.argmin is None else number(law.argmin, 3))
            + (f" ({law.note})" if law.note else ""),
        }
        for law in fit.candidates
    ]
    tables = [facts(pairs)]
    if laws:
        tables.append(Table(pd.DataFrame(laws), "Laws tried, errors in nats/token."))
        parameters = [(name, interval(value)) for name, value in fit.parameters.items()]
        tables.append(facts(parameters, "Parameters of the law used, with 95% intervals."))
    return tuple(tables)


def joint_tables(law: JointFit, noun: str = "share") -> tuple[Table, ...]:
    """Facts, models and parameters of the law over all budgets, for the page."""
    pairs = [
        ("status", str(law.status).replace("_", " ")),
        ("shape", law.law),
        ("runs, budgets", f"{len(law.rows)}, {len(law.budgets)}"),
    ]
    pairs += [
        (f"best {noun} at {_budget(budget)}", interval(best, 3))
        for budget, best in zip(law.budgets, law.optima, strict=True)
    ]
    pairs += [
        (f"shift with {WORDS[factor]}, in the fullest model", interval(shift, 3))
        for factor, shift in law.shifts.items()
    ]
    pairs += [
        (f"no shift with {WORDS[factor]}, p (Holm)", f"{p:.2g}")
        for factor, p in law.movement_p.items()
        if len(law.factors) > 1
    ]
    pairs += [(f"{WORDS[factor]}, not studied", why) for factor, why in law.conventions["dropped"].items()]
    if law.left_out:
        pairs += [
            (f"largest budget left out, best {noun} predicted", interval(law.left_out.predicted, 3)),
            ("measured there", interval(law.left_out.measured, 3)),
            ("error", interval(law.left_out.error, 3)),
            (f"{noun}s whose 95% prediction interval holds the mean", f"{law.left_out.inside:.0%}"),
        ]
    models = [
        {
            "optimum moves with": (together(model.moves_with) or "nothing")
            + (" (used)" if model.moves_with == law.moves_with else ""),
            "parameters": str(model.parameters),
            "degrees of freedom": str(model.df),
            "AICc": number(model.aicc, 1),
            "F test, p": "" if model.same_optimum_p is None else f"{model.same_optimum_p:.2g}",
            "lack of fit, p": f"{model.lack_of_fit_p:.2g}",
            "left-out error": number(model.left_out_error, 5),
        }
        for model in law.models
    ]
    parameters = [(name, interval(value)) for name, value in law.parameters.items()]
    return (
        facts(pairs),
        Table(pd.DataFrame(models), "Models, errors in nats/token."),
        facts(parameters, "Parameters of the model used, with 95% intervals."),
    )


def _budget(budget: dict[str, float]) -> str:
    active, tokens, sparsity = (budget[name] for name in FACTORS)
    return f"P_act {si(active)}, {tokens:.3g} tokens for each, sparsity {sparsity:.3g}"


def allocation_data(fitted: Sequence[tuple[Cell, AllocationFit]]) -> pd.DataFrame:
    """Everything that `share_figure` draws -> cell, status, series, share, loss, low, high, seed, trial_id (losses in
    nats per token).

    Series: those of `AllocationFit.drawn`, and `dense` (mean of the baseline).
    """
    tables = []
    for cell, fit in fitted:
        dense = [pd.DataFrame([{"series": "dense", "loss": cell.dense["val_loss"].mean()}])] if len(cell.dense) else []
        tables.append(pd.concat([fit.drawn(), *dense]).assign(cell=cell.label, status=str(fit.status)))
    return pd.concat(tables, ignore_index=True).reindex(
        columns=["cell", "status", "series", "share", "loss", "low", "high", "seed", "trial_id"]
    )


def differences_data(
    fitted: Sequence[tuple[Cell, AllocationFit]], sequence_losses: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What `differences_figure` draws: `average_differences` of every cell, with its label; share 1 is 0
    by definition.
    """
    tables = []
    for cell, _ in fitted:
        averages = average_differences(paired_differences(cell.trials, sequence_losses))
        if len(averages):
            tables.append(
                pd.concat([averages, pd.DataFrame([{"rho": 1.0, "share_moe": 1.0, "difference": 0.0}])])
                .sort_values("share_moe")
                .assign(cell=cell.label)
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def diagnostics_data(fitted: Sequence[tuple[Cell, AllocationFit]]) -> pd.DataFrame:
    """What `diagnostics_figure` draws -> cell, series, law, share, error, se (nats per token). Fits without a curve are
    left out.

    Series: `residual` (mean of a share less the law used, with the paired standard error of the mean), `left out` (mean
    of an inner share less what each law predicts for it from all others).
    """
    tables = []
    for cell, fit in fitted:
        if not fit.means:
            continue
        counts = fit.runs()["share"].value_counts()
        means = pd.DataFrame({"share": fit.shares, "mean": fit.means})
        se = (fit.paired_sd or np.nan) / np.sqrt(means["share"].map(counts))
        residual = means["mean"] - fit.predict(fit.shares)["loss"]
        parts = [
            pd.DataFrame({"series": "residual", "law": fit.law, "share": means["share"], "error": residual, "se": se})
        ]
        inner = means.iloc[1:-1]
        for law in fit.candidates:
            off = inner["mean"] - np.array(law.left_out)
            parts.append(pd.DataFrame({"series": "left out", "law": law.law, "share": inner["share"], "error": off}))
        tables.append(pd.concat(parts).assign(cell=cell.label))
    columns = ["cell", "series", "law", "share", "error", "se"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
