"""The ladder study: a memory becomes another, one change at a time. Which changes pay, and do they pay as they did in
print?

Source of the published steps: the cumulative ablation of UltraMem (arXiv 2411.12364), from PKM-151M.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import pandas as pd

from analysis.cells import MEMORY, ON_TOP, Cell, split_cells
from analysis.figures.ladder import ladder_figure
from analysis.fits.ladder import LadderFit, Rung, fit_ladder
from analysis.fits.linear import LEVEL
from analysis.studies.tables import facts, interval, led, noise_fact, numbered, status_facts
from analysis.studies.types import CellAnalysis, Drawing, Reading, Section, Table
from analysis.table import fixed, shown, si
from sparsemem.mechanisms import label
from sparsemem.mechanisms.product_key.fields import PKM


@dataclass(frozen=True)
class Published:
    """One line of the published ablation, by the fields that make it."""

    change: str
    loss: float
    """Change of the validation loss, nats per token."""
    fields: tuple[str, ...]
    """Fields of `config.ProductKey` that leave PKM's value."""
    beside: tuple[str, ...] = ()
    """Fields that may change with them."""


PUBLISHED = (
    Published("no softmax", -0.006, ("softmax",)),
    Published("half-width values with a projection", -0.022, ("projection", "value_dim")),
    Published("shared query", 0.003, ("shared_query",)),
    Published("split into layers with skip connections", -0.015, ("skip",), ("layers", "placement")),
    Published("layer norm of query and keys", 0.0, ("norm",)),
    Published("implicit value expansion", -0.017, ("virtual_tables",)),
    Published(
        "Tucker-decomposed retrieval", -0.008, ("tucker_rank",), ("tucker_penalty", "tucker_threshold", "key_dim")
    ),
    Published("multi-core scoring", -0.003, ("cores",)),
    Published("initialisation", -0.003, ("init",)),
    Published("decay of the value learning rate", -0.022, ("value_rate",)),
    Published("convolution before the query", 0.0, ("query_conv",)),
)
"""UltraMem (arXiv 2411.12364), cumulative ablation on PKM-151M, in its order. UltraMemV2's own changes have no such
numbers.
"""

_CAPTION = (
    "Left: loss of each rung less that of the rung before, for the average seed, with 95% intervals (paired by seed, "
    "pooled noise). Filled: steps told from noise after Holm's correction for their number. Right: loss less that of "
    "the first rung. A label names what its rung changes. Diamonds: the same changes in UltraMem's ablation (arXiv "
    "2411.12364) of a far larger model on other data."
)
_NOTE = (
    "Step: loss less that of the rung before; total: less that of the first rung; both for the average seed with 95% "
    f"intervals. p: two-sided t test with Holm's correction over all steps; below {LEVEL:g} the step is told from "
    "noise. Published: UltraMem's ablation on PKM-151M (arXiv 2411.12364); steps without a number have none in print."
)


@dataclass(frozen=True)
class Ladder(CellAnalysis[LadderFit]):
    """Rungs are the distinct settings of the model that the study varies, in the order of the plan."""

    point: ClassVar[str] = "rung"
    terms: ClassVar[str] = (
        "A rung is one change on top of all before it. A step is told from noise where Holm's correction for the "
        "number of steps leaves it."
    )

    @property
    def axis(self) -> tuple[str, ...]:
        return tuple(self.fields)

    @cached_property
    def fields(self) -> list[str]:
        """Columns in which rungs differ; an empty value is one too."""
        trials = self.results.trials
        found = [
            str(name) for name in trials.columns if name.startswith("model.") and trials[name].nunique(dropna=False) > 1
        ]
        remedy = (
            "vary `model.POOL` over a list of settings, each the one before and a change, or give study.yaml another "
            "`analysis`"
        )
        self.require(bool(found), "all trials have the same `model`, so there is no ladder", remedy)
        return found

    @cached_property
    def trials(self) -> pd.DataFrame:
        """All trials with their `rung`, from 0."""
        return self.results.trials.assign(
            rung=self.results.trials.groupby(self.fields, sort=False, dropna=False).ngroup()
        )

    @cached_property
    def settings(self) -> list[dict[str, str]]:
        """For each rung the value of every column in which rungs differ, as text."""
        rungs = self.trials.drop_duplicates("rung").sort_values("rung")[self.fields]
        return [{name: written(name, value) for name, value in row.items()} for row in rungs.to_dict("records")]

    @cached_property
    def labels(self) -> list[str]:
        """What each rung changes; for the first, the memory that it is."""
        return [_pools(self.settings[0]) or "start", *(_change(*pair) for pair in pairwise(self.settings))]

    @cached_property
    def published(self) -> list[float | None]:
        """Change of the loss that each rung's step made in print."""
        return [None, *(published_change(*pair) for pair in pairwise(self.settings))]

    @cached_property
    def cells(self) -> list[Cell]:
        return split_cells(self.trials, ("rung",), lambda name: name in (MEMORY, ON_TOP) or name.startswith("model."))

    def fit(self, cell: Cell) -> LadderFit:
        return fit_ladder(pd.concat([cell.trials, cell.dense]))

    def fits(self) -> list[dict[str, Any]]:
        rungs = enumerate(zip(self.labels, self.settings, self.published, strict=True))
        ladder = [
            {"rung": place, "label": label, "settings": settings, "published": published}
            for place, (label, settings, published) in rungs
        ]
        return [self.record(cell, {**fit.to_dict(), "ladder": ladder}) for cell, fit in self.fitted]

    def readings(self) -> list[Reading]:
        return [Reading.of(cell.label, fit, self.labels) for cell, fit in self.fitted]

    def remarks(self) -> list[str]:
        lines = []
        for cell, fit in self.fitted:
            beside = [
                (rung.step, loss) for rung in fit.rungs if rung.step and (loss := self.published[rung.rung]) is not None
            ]
            if beside:
                held = sum(step.low <= loss <= step.high for step, loss in beside)
                sentence = (
                    f"Of {len(beside)} steps that are in print {held} have the printed value inside the interval "
                    "measured here."
                )
                lines.append(led(cell.label, sentence))
        return lines

    def drawings(self) -> list[Drawing]:
        drawn = []
        for name, (cell, fit) in zip(numbered("ladder", len(self.fitted)), self.fitted, strict=True):
            if any(rung.step for rung in fit.rungs):
                caption = f"{cell.label}. {_CAPTION}" if len(self.fitted) > 1 else _CAPTION
                drawn.append(Drawing(name, caption, ladder_figure, fit.table(self.labels, self.published)))
        return drawn

    def sections(self) -> list[Section]:
        tables = []
        for cell, fit in self.fitted:
            found = {rung.rung: rung for rung in fit.rungs}
            rows = [self._row(place, found.get(place)) for place in range(len(self.labels))]
            noise = [*status_facts(fit, "runs, seeds", fit.seeds), *noise_fact(fit)]
            tables += [Table(pd.DataFrame(rows), cell.label, wide=True), facts(noise)]
        return [Section("Rungs", tuple(tables), _NOTE)]

    def caveats(self) -> list[str]:
        lines = ["One order of the changes: what a step does may depend on the steps before it."]
        if any(change is not None for change in self.published):
            lines.append(
                "The published steps are those of a 151M model on other data: their signs and order can be compared, "
                "not their sizes."
            )
        planned = self.trials.drop_duplicates("rung")
        moved = []
        for column, words, write in (
            ("shared_width", "the feed-forward width", si),
            ("memory_rows_read", "the rows that a token reads", si),
            ("memory_flops_share", "the memory's share of the blocks' FLOPs", lambda value: f"{value:.0%}"),
            ("flops_per_token", "the FLOPs per token", si),
        ):
            if column in planned and (low := planned[column].min()) * 1.02 < (high := planned[column].max()):
                moved.append(f"{words} ({write(low)} to {write(high)})")
        if moved:
            lines.append(
                "P_tot and P_act are held, so a step also moves what pays for it. Along the ladder there change "
                f"{', '.join(moved)}."
            )
        return lines

    def _row(self, place: int, rung: Rung | None) -> dict[str, str]:
        return {
            "rung": str(place),
            "change": self.labels[place],
            "runs": str(rung.runs) if rung else "0",
            "val loss (nats/token)": fixed(rung.loss if rung else None),
            "step (nats/token)": interval(rung.step if rung else None),
            "p": fixed(rung.step_p if rung else None, ".2g"),
            "total (nats/token)": interval(rung.total if rung else None),
            "published step": fixed(self.published[place], "+.3f"),
        }


# --- what a rung changes ----------------------------------------------------------------------------------------------


def written(path: str, value: Any) -> str:
    """The value of a field as a study writes it; an empty one is the default.

    >>> written("model.pkm.softmax", "False"), written("model.pkm.value_rate", "[10.0, 1.0]")
    ('false', '[10, 1]')
    >>> written("model.pkm.layers", None)
    'every block'
    """
    if not isinstance(value, list | bool) and pd.isna(value):
        return _default(path)
    if isinstance(value, str) and value.startswith("["):
        return f"[{', '.join(f'{item:g}' if isinstance(item, float) else str(item) for item in json.loads(value))}]"
    return str(value).lower() if str(value) in ("True", "False") else shown(value)


def published_change(before: dict[str, str], after: dict[str, str]) -> float | None:
    """Change of the loss in print that the step from one rung's settings to the next makes; None where it is not one of
    `PUBLISHED`.

    A step that makes several published changes at once has their sum; one that also changes a field of no published
    line has none.
    """
    changed = {path for path in after if before[path] != after[path]}
    departing = {_leaf(path) for path in changed if not _departed(path, before[path]) and _departed(path, after[path])}
    lines = [line for line in PUBLISHED if departing.issuperset(line.fields)]
    known = {name for line in lines for name in (*line.fields, *line.beside)}
    return sum(line.loss for line in lines) if lines and known.issuperset(map(_leaf, changed)) else None


def _departed(path: str, value: str) -> bool:
    """Whether a field has another value than PKM's; the learning rate of the values, whether it falls."""
    name = _leaf(path)
    if name == "value_rate":
        return value.startswith("[") and (rates := json.loads(value))[0] > rates[1]
    field = PKM.model_fields.get(name)
    return field is not None and not field.is_required() and value != written(path, field.default)


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _pools(settings: dict[str, str]) -> str:
    """The memories that a rung has, as readers call them."""
    used = dict.fromkeys(path.split(".")[1] for path, value in settings.items() if value != _default(path))
    return " and ".join(map(label, used))


def _default(path: str) -> str:
    return "every block" if _leaf(path) == "layers" else "default"


def _change(before: dict[str, str], after: dict[str, str]) -> str:
    """The fields that a rung changes, or its memory where that is another one."""
    if _pools(before) != _pools(after):
        return _pools(after) or "no memory"
    return ", ".join(f"{_leaf(path)}: {value}" for path, value in after.items() if before[path] != value)
