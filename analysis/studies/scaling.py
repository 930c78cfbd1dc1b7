"""The scaling study: sizes of several mechanisms, each trained on as many tokens for each activated parameter. How does
the loss fall with compute, and how much compute does each mechanism save against the routed experts?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from analysis.cells import Cell, is_dense, mixes, split_cells
from analysis.figures.scaling import scaling_figure
from analysis.fits.runs import MIXED
from analysis.fits.scaling import fit_scaling
from analysis.fits.scaling_result import ScalingFit
from analysis.studies.tables import facts, interval, noise_fact, numbered, status_facts
from analysis.studies.types import CellAnalysis, Drawing, Reading, Section, Table
from analysis.table import TPP, fixed, si
from sparsemem.mechanisms import EXPERTS
from sparsemem.results import TrialStatus

REFERENCE, DENSE = EXPERTS.label, "dense"
HELD = "tokens/P_act"
"""The field that sets cells apart, where there are several."""

_CAPTION = (
    "Left, top: validation loss against the FLOPs of the training; filled markers: means for the average seed; open: "
    "single runs with the effect of their seed at their size taken off; lines: the laws with their 95% band. Below: "
    "what the law leaves over, with paired standard error; mechanisms of one size are set side by side. Right: compute "
    f"that {REFERENCE} need for the loss of a mechanism, over its own, with 95% band; drawn only where {REFERENCE} "
    "were measured on both sides of that loss. Above 1 the mechanism saves compute."
)
_NOTE = (
    "L = E + A (C / C0)^-alpha. Multiplier: compute that routed experts need for the loss that the mechanism has at C, "
    "over C, at both ends of the compute where it can be told. Lack of fit: chance of so poor a fit if the law were "
    "true. Each interval is at 95% on its own. Predicted: the mean at the largest size, from the smaller ones; "
    "its interval holds the noise of the runs there."
)


@dataclass(frozen=True)
class Scaling(CellAnalysis[ScalingFit]):
    """One fit for each number of tokens per activated parameter; a rung is one size there."""

    point: ClassVar[str] = "mechanism"
    terms: ClassVar[str] = (
        "Compute is the FLOPs of the whole training, without the output head. A rung is one size with its length. A "
        f"compute multiplier of 1.2 says that {REFERENCE} need 1.2 times the compute for the same loss."
    )

    @property
    def axis(self) -> tuple[str, ...]:
        return "rho", "tokens"

    @cached_property
    def trials(self) -> pd.DataFrame:
        """All trials with their `mechanism`, the `flops` of their training, and what `HELD` says."""
        trials = self.results.trials
        return trials.assign(
            mechanism=_mechanisms(trials), flops=trials["flops_per_token"] * trials["tokens"], **{HELD: _held(trials)}
        )

    @cached_property
    def cells(self) -> list[Cell]:
        trials = self.trials
        self.require(
            trials["mechanism"].nunique() > 1 and bool((trials["mechanism"] == REFERENCE).any()),
            f"there are no mechanisms to hold against {REFERENCE}",
            "vary `rho` or `shares` over 1.0 and others, or give study.yaml another `analysis`",
        )
        cells = split_cells(trials, ("mechanism", "tokens"), lambda name: name != HELD and not name.startswith("data."))
        sizes = [cell.planned["tokens"].nunique() for cell in cells]
        self.require(
            max(sizes, default=0) > 1,
            "no two trainings differ in size at one number of tokens for each activated parameter",
            "give `budget.active_params` several values and one `budget.tokens_per_active_param`, or study.yaml "
            "another `analysis`",
        )
        for cell in cells:
            self.require(
                bool((cell.planned["mechanism"] == REFERENCE).any()),
                f"no trial has {REFERENCE} alone{f' at {cell.label}' if cell.label else ''}",
                "add share 1.0 there, against which compute multipliers are told",
            )
        return cells

    def noise(self) -> list[dict[str, Any]]:
        return [
            {
                "label": cell.label,
                "tokens": float(cell.planned["tokens"].median()),
                "paired_sd": fit.paired_sd,
                "df": fit.noise_df,
            }
            for cell, fit in self.fitted
            if fit.paired_sd
        ]

    def foresee(self) -> list[str]:
        lines = []
        for cell in self.cells:
            rungs = cell.planned["tokens"].nunique()
            words = {
                1: "no power of the compute",
                2: "no floor, and no largest size from the others",
                3: "no floor of each mechanism apart from the others', and the largest size only by pure power laws",
            }
            if rungs in words:
                lines.append(
                    f"{f'{cell.label}: ' if cell.label else ''}{rungs} size{'s' * (rungs > 1)}: the report will tell "
                    f"{words[rungs]}."
                )
        return lines

    def fit(self, cell: Cell) -> ScalingFit:
        unfinished = cell.planned[cell.planned["status"] != TrialStatus.FINISHED]
        runs = pd.concat([cell.trials, cell.dense, unfinished]).sort_index()
        return fit_scaling(runs, reference=REFERENCE)

    def readings(self) -> list[Reading]:
        found = []
        for cell, fit in self.fitted:
            whole = Reading.of(cell.label, fit)
            found += [Reading(cell.label, line, whole.sure) for line in whole.sentences.splitlines() or [""]]
        return found

    def drawings(self) -> list[Drawing]:
        drawable = [(cell, table) for cell, fit in self.fitted if len(table := fit.table())]
        return [
            Drawing(name, f"{cell.label}. {_CAPTION}" if cell.label else _CAPTION, scaling_figure, table)
            for name, (cell, table) in zip(numbered("scaling", len(drawable)), drawable, strict=True)
        ]

    def sections(self) -> list[Section]:
        tables = []
        for cell, fit in self.fitted:
            tables.append(facts(_facts(fit), cell.label))
            if fit.mechanisms:
                tables.append(Table(pd.DataFrame(_laws(fit)), "Laws and compute multipliers.", wide=True))
                tables.append(Table(pd.DataFrame(_rungs(fit)), "Measured against the law.", wide=True))
            if fit.foretold:
                tables.append(Table(pd.DataFrame(_foretold(fit)), "The largest size from the others.", wide=True))
        return [Section("", tuple(tables), _NOTE)]

    def caveats(self) -> list[str]:
        trials = self.trials
        ratios = ", ".join(f"{value:.3g}" for value in sorted(trials[HELD].unique()))
        head = trials["flops_per_token_head"] / trials["flops_per_token"]
        lines = [
            f"Compute grows at a fixed {ratios} tokens for each activated parameter: along another path, such as the "
            "best size at each budget, exponents and multipliers may differ.",
            f"FLOPs leave out the output head, which would multiply them by {head.min():.2g} to {head.max():.2g}, most "
            "at the smallest size: with it exponents are larger and multipliers nearer to 1 there.",
            "Equal compute is not equal time: bytes read per token differ between mechanisms and are not counted.",
        ]
        if "train.lr" not in trials or trials["train.lr"].nunique() < 2:
            lines.append(
                "One learning rate for all sizes: exponents move with it, for each mechanism by its own amount."
            )
        return lines


# --- what a trial is --------------------------------------------------------------------------------------------------


def _mechanisms(trials: pd.DataFrame) -> list[str]:
    """The dense baseline, routed experts, a memory, or both at a share."""
    found = []
    for rho, dense, mix in zip(trials["rho"], is_dense(trials), mixes(trials), strict=True):
        if dense or not mix:
            found.append(DENSE if dense else REFERENCE)
        else:
            found.append(f"experts + {mix}, share {rho:.4g}" if rho > 0 else mix)
    return found


def _held(trials: pd.DataFrame) -> pd.Series:
    """Tokens for each activated parameter as the study meant them, whose sizes are integers."""
    ratio = trials[TPP]
    values = np.sort(ratio.unique())
    group = np.searchsorted(values[1:][values[1:] > MIXED * values[:-1]], ratio, side="right")
    median = ratio.groupby(group).transform("median")
    short = median.map("{:.2g}".format).astype(float)
    return short if short.nunique() == median.nunique() else median


# --- tables -----------------------------------------------------------------------------------------------------------


def _facts(fit: ScalingFit) -> list[tuple[str, str]]:
    own = ""
    if fit.own_floors_p is not None and fit.own_floors_df:
        own = f"p = {fit.own_floors_p:.2g} (F, {fit.own_floors_df[0]} and {fit.own_floors_df[1]} degrees of freedom)"
    return [
        *status_facts(fit, "runs, seeds", fit.seeds),
        (
            "floor",
            {"none": "none (pure power laws)", "shared": "one for all", "own": "one of each"}.get(fit.floors, ""),
        ),
        ("E (nats/token)", interval(fit.parameters.get("E"), 3)),
        ("C0 (FLOPs)", si(fit.compute_unit) if fit.compute_unit else ""),
        ("no floor against one", f"p = {fit.floor_p:.2g}" if fit.floor_p is not None else ""),
        ("one floor against one of each", own),
        ("lack of fit", f"p = {fit.lack_of_fit_p:.2g}" if fit.lack_of_fit_p is not None else ""),
        *noise_fact(fit),
        (
            "noise of a seed's level at a size, sd (nats/token)",
            f"{fit.level_sd:.4f} ({fit.level_df} degrees of freedom)" if fit.level_sd is not None else "",
        ),
    ]


def _laws(fit: ScalingFit) -> list[dict[str, str]]:
    rows = []
    for each in fit.mechanisms:
        low, high = each.multipliers or (None, None)
        from_, to = map(si, each.span or (np.nan, np.nan))
        rows.append(
            {
                "mechanism": each.name,
                "runs": str(len(each.rows)),
                "alpha": interval(each.exponent, 3),
                f"less that of {REFERENCE}": interval(each.exponent_less, 3),
                "A (nats/token)": interval(fit.parameters.get(f"A of {each.name}"), 3),
                **({"E (nats/token)": interval(fit.parameters[f"E of {each.name}"], 3)} if fit.floors == "own" else {}),
                "told from (FLOPs)": from_,
                "multiplier there": interval(low, 2),
                "to (FLOPs)": to,
                "multiplier at that end": interval(high, 2),
            }
        )
    return rows


def _rungs(fit: ScalingFit) -> list[dict[str, str]]:
    rows = []
    for each in fit.mechanisms:
        predicted = fit.predict({fit.predictors[0]: each.name, fit.predictors[1]: list(each.flops)})["loss"]
        for c, mean, error, law in zip(each.flops, each.means, each.errors, predicted, strict=True):
            rows.append(
                {
                    "mechanism": each.name,
                    "compute (FLOPs)": si(c),
                    "val loss (nats/token)": fixed(mean),
                    "paired s.e.": fixed(error),
                    "law": fixed(law),
                    "less the law": fixed(mean - law, "+.4f"),
                }
            )
    return rows


def _foretold(fit: ScalingFit) -> list[dict[str, str]]:
    return [
        {
            "mechanism": each.mechanism,
            "compute (FLOPs)": si(each.flops),
            "predicted (nats/token)": interval(each.predicted),
            "measured": fixed(each.measured),
            "": "hit" if each.hit else "miss",
        }
        for each in fit.foretold
    ]
