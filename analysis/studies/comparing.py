"""Cells of one budget beside each other: memories, or values of any field that a study varies. Fits, readings, figure
and tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import pandas as pd

from analysis.cells import MEMORY, Cell, named_fields
from analysis.figures.comparison import comparison_figure
from analysis.fits.comparison import ComparisonFit, Difference, fit_comparison
from analysis.results import Results
from analysis.studies.tables import facts, interval, led, noise_fact, numbered
from analysis.studies.types import Drawing, Reading, Section, Table
from analysis.table import RHO, fixed, si, uses
from sparsemem import mechanisms
from sparsemem.mechanisms import MEMORY_POOLS

EXPERTS, DENSE = "routed experts alone", "the dense baseline"
MOST = 12
"""Cells at one budget beyond which their pairs are too many to be read, or told from noise."""
NARROW = 0.75
"""Part of the shared experts' width that a memory must leave, else the report warns."""
NOTE = (
    "Differences of loss for the average seed, nats per token, each interval at 95% on its own. p: chance of so large "
    "a difference if there were none, after Holm's correction; below 0.05 it is told from noise. Pairs at all shares "
    "are corrected together, and so are the means over shares, and the differences to the routed experts alone."
)
CAPTION = (
    "Left: validation loss for the average seed with its paired standard error, alternatives at one share set side by "
    "side. Right: paired differences, each with the 95% interval that it has alone; filled: told from noise after "
    "Holm's correction for their number. Negative: the first named is better."
)


@dataclass(frozen=True)
class Comparison:
    """Cells whose losses may be held against each other: they differ in neither budget nor text."""

    label: str
    """Names the budget and the text among the study's; '' for the only ones."""
    runs: pd.DataFrame
    """All planned trials, finished or not, with their `alternative`; pure experts and the dense baseline once."""
    fit: ComparisonFit

    @property
    def has_pairs(self) -> bool:
        """Whether two alternatives are planned at one share."""
        return bool(self.runs.groupby("rho")["alternative"].nunique().max() > 1)

    @property
    def widths(self) -> pd.DataFrame:
        """alternative, share (NaN for none), shared_width and `left`: the width as a part of the widest at the share,
        or of that of pure experts -> one row a point; empty without the column.
        """
        if "shared_width" not in self.runs:
            return pd.DataFrame(columns=["alternative", "rho", "shared_width", "left"])
        points = self.runs.drop_duplicates(["alternative", "rho"])[["alternative", "rho", "shared_width"]]
        mixed = points["rho"] > 0  # without routed experts all of their activated parameters are the shared one's
        widest = points[mixed]["shared_width"].max(), points[points["rho"] == 0]["shared_width"].max()
        reference = mixed.map({True: widest[0], False: widest[1]}).where(points["rho"].notna())
        return points.assign(left=points["shared_width"] / reference)

    def warnings(self, model: Mapping[str, Any]) -> list[str]:
        """Where a memory, or a residual, takes over a quarter of what the shared experts would have, and what to try.

        Args:
            model: the section of the study, for the values that it gives all trials.
        """
        lines = []
        for name, rows in self.widths[self.widths["left"] < NARROW].groupby("alternative", sort=False):
            each = ", ".join(
                f"{row.shared_width:.0f} of {row.shared_width / row.left:.0f} at share {row.rho:.4g}"
                for row in rows.itertuples()
            )
            sentences = (
                f"Warning: {name} leaves the shared experts a width of {each}. What it activates itself (keys, "
                f"projections, streams) takes the rest, so its loss is also that of a smaller shared part. "
                f"{_smaller(name, model)}"
            )
            lines.append(led(self.label, sentences))
        return lines

    def section(self) -> Section:
        """All numbers of the comparison."""
        widths = {(row["alternative"], fixed(row["rho"], ".4g")): row for row in self.widths.to_dict("records")}
        rows = []
        for level in self.fit.levels:
            share = fixed(level.share, ".4g")
            width = widths.get((level.name, share), {"shared_width": None, "left": None})
            rows.append(
                {
                    "alternative": level.name,
                    RHO: share,
                    "runs": str(level.runs),
                    "val loss (nats/token)": fixed(level.loss),
                    "paired s.e.": fixed(level.se),
                    "shared width": si(width["shared_width"]),
                    "of the widest": fixed(width["left"], ".0%"),
                }
            )
        tables = [Table(pd.DataFrame(rows), self.label, wide=True)] if rows else []
        for title, differences in (
            ("Pairs at each share.", self.fit.differences),
            ("Means over the shares that both have.", self.fit.means),
            (f"Less {self.fit.reference}.", self.fit.gains),
        ):
            if differences:
                tables.append(Table(pd.DataFrame(map(_row, differences)), title, wide=True))
        tables += [facts(pairs) for pairs in [noise_fact(self.fit)] if pairs]
        return Section("Differences between alternatives", tuple(tables), NOTE)

    def reading(self) -> Reading:
        return Reading.of(", ".join(filter(None, ("Compared", self.label))), self.fit)


def comparison_warnings(compared: Sequence[Comparison], results: Results) -> list[str]:
    """`Comparison.warnings` of each."""
    return [line for each in compared for line in each.warnings(results.described.get("model") or {})]


def comparison_drawings(compared: Sequence[Comparison], name: str) -> list[Drawing]:
    """The figure of each that has a difference to draw."""
    return [
        Drawing(own, f"{each.label}. {CAPTION}" if each.label else CAPTION, comparison_figure, each.fit.compared())
        for own, each in zip(numbered(name, len(compared)), compared, strict=True)
        if each.fit.differences
    ]


def compare(cells: Sequence[Cell], apart: Sequence[str] = ()) -> list[Comparison]:
    """The cells beside each other, apart for each budget and text. One that is alone at its budget has nothing beside
    it, and more than `MOST` are not compared.

    Args:
        apart: fields beside those of `budget` and `data` whose values are not held against each other.
    """

    def is_apart(path: str) -> bool:
        return path == "tokens" or path in apart or path.startswith(("budget.", "data."))

    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        label = named_fields({path: value for path, value in cell.fields.items() if is_apart(path)})
        own = {path: value for path, value in cell.fields.items() if not is_apart(path)}
        groups.setdefault(label, []).append(replace(cell, fields=own))
    return [_compared(label, own) for label, own in groups.items() if 1 < len(own) <= MOST]


def _compared(label: str, cells: Sequence[Cell]) -> Comparison:
    holders: dict[str, list[Cell]] = {}
    for cell in cells:
        for trial in pd.concat([cell.planned, cell.dense])["trial_id"]:
            holders.setdefault(trial, []).append(cell)
    alternatives: dict[str, dict[str, Any]] = {}

    def named(trials: pd.DataFrame, alone: str) -> pd.DataFrame:
        """The trials, each once, with their `alternative`: what the cells that hold one have in common, but for fields
        that it has no use for; `alone` leads where that is less than what a cell holds.
        """
        trials, names = trials.drop_duplicates("trial_id"), []
        paths = {path for cell in cells for path in cell.fields}
        used = {path: dict(zip(trials["trial_id"], uses(trials, path), strict=True)) for path in paths}
        for trial in trials["trial_id"]:
            first, *others = holders[trial]
            held = [other.fields.items() for other in others]
            common = {
                path: value
                for path, value in first.fields.items()
                if all((path, value) in own for own in held) and used[path][trial]
            }
            leads = others or alone == DENSE or len(common) < len(first.fields)
            name = ", ".join(filter(None, (alone if leads else "", named_fields(common))))
            alternatives[name] = common
            names.append(name)
        return trials.assign(alternative=names)

    planned = named(pd.concat([cell.planned for cell in cells]), EXPERTS)
    runs = named(pd.concat([cell.trials for cell in cells]), EXPERTS)
    dense = named(pd.concat([cell.dense for cell in cells]), DENSE)
    pairs = [pair for pair in combinations(alternatives, 2) if _differ_in_one(*(alternatives[name] for name in pair))]
    used = pd.concat([runs, dense]) if len(dense) else runs
    return Comparison(label, planned, fit_comparison(used, "alternative", reference=EXPERTS, pairs=pairs))


def _differ_in_one(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two alternatives differ in one thing: their memory with all its settings, or one field."""

    def outside(fields: dict[str, Any]) -> dict[str, Any]:
        return {path: value for path, value in fields.items() if path != MEMORY and not _of_a_memory(path)}

    paths = first.keys() | second.keys()
    missing = object()
    differing = [path for path in paths if first.get(path, missing) != second.get(path, missing)]
    return len(differing) == 1 or (MEMORY in differing and outside(first) == outside(second))


def _of_a_memory(path: str) -> bool:
    """Whether it is a field of a memory, also of one that is not installed here."""
    return path.startswith("model.") and path.count(".") > 1 and not path.startswith(mechanisms.EXPERTS.field(""))


def _smaller(name: str, model: Mapping[str, Any]) -> str:
    """How to make a memory activate less, from the settings that it has."""
    tried, held = [], re.split(r" \+ | \(|, ", name)
    for pool in (pool for pool, memory in MEMORY_POOLS.items() if memory.label in held):
        settings = model.get(pool) or {}
        if (width := settings.get("key_dim") or 0) > 1:
            tried.append(f"`model.{pool}.key_dim={width // 2}`")
        if len(layers := settings.get("layers") or ()) > 1:
            tried.append(f"`model.{pool}.layers=[{', '.join(map(str, layers[: len(layers) // 2]))}]`")
    if "model.residual" in name:
        tried.append("`model.streams=2`")
    if tried:
        return f"To lessen it, try {' or '.join(tried)}; `plan` says where the budget must follow."
    return "To lessen it, give it fewer layers, heads or a smaller `key_dim`."


def _row(each: Difference) -> dict[str, str]:
    return {
        "first": each.first,
        "less": each.second,
        RHO: fixed(each.share, ".4g"),
        "difference (nats/token)": interval(each.difference),
        "p": f"{each.p:.2g}",
        "told from noise": "yes" if each.told else "",
    }
