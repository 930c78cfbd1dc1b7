"""Which trials may be compared: those of one cell. A cell is everything that a study varies but point (share), seed and
learning rate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.table import holds, memories, shown, uses, varied_fields
from sparsemem.mechanisms import label
from sparsemem.results import TrialStatus

RATE = "train.lr"
NAMES = dict.fromkeys(("budget.tokens", "tokens"), "training tokens")
NAMES |= {"budget.total_params": "P_tot", "budget.active_params": "P_act"}
FIRST_NAMED = ("budget.active_params", "budget.total_params", "budget.tokens", "tokens")
MEMORY, ON_TOP, SHARE = "memory", "on top", "rho"
"""What sets trials apart that no varied field names: memories that hold a share, memories of given rows, the share of
routed experts.
"""


@dataclass(frozen=True)
class Cell:
    """Finished trials that differ in nothing but point and seed."""

    fields: dict[str, Any]
    """Dotted path, or `MEMORY`, `ON_TOP`, `SHARE` -> value of what sets this cell apart from the others of its study;
    None is one too.
    """
    trials: pd.DataFrame
    """Finished trials with sparse parameters, one learning rate a point."""
    dense: pd.DataFrame
    """Finished trials of the dense baseline, at its best learning rate."""
    rates: pd.DataFrame
    """The check of the learning rate -> the point's columns, train.lr, seeds, val_loss, chosen; empty where one rate
    was used.
    """
    planned: pd.DataFrame
    """All trials of the cell but those of the dense baseline, finished or not, at every learning rate."""
    implied: frozenset[str] = frozenset()
    """Fields whose value follows from the others, such as a width from P_act: the label leaves them out."""

    @property
    def label(self) -> str:
        """Names the cell among its study's, such as `2M training tokens`; '' where it is the only one."""
        return named_fields({path: value for path, value in self.fields.items() if path not in self.implied})


def named_fields(fields: dict[str, Any]) -> str:
    """Values of a cell's fields in words.

    >>> named_fields({"budget.tokens": 2_000_000, "memory": "Engram", "model.kv_heads": None})
    '2M training tokens, Engram, model.kv_heads none'
    """
    parts = []
    for path, value in fields.items():
        name, words = NAMES.get(path, path), shown(value) or "none"
        parts.append(f"{words} {name}" if name == "training tokens" else words if path == MEMORY else f"{name} {words}")
    return ", ".join(parts)


def split_cells(
    trials: pd.DataFrame, axis: Sequence[str] = ("rho",), along: Callable[[str], bool] = lambda name: False
) -> list[Cell]:
    """Split a study's finished trials into cells, in the order of the plan.

    A trial that does not use a varied field (pure experts have no memory, and no settings of one) stands in every cell
    that it fits.

    Args:
        axis: columns whose values tell the points of one cell apart; each point keeps its own best learning rate.
        along: says of a field (or `MEMORY`, `ON_TOP`, `SHARE`) that its values make up the axis, so that it sets no
            cells apart; it does nevertheless where two of its values fall on one point.
    """
    values = _varied_values(trials, axis)
    fields, rest = ([name for name in values if along(name) is made] for made in (False, True))
    while True:
        keys: list[dict[str, Any]] = []
        distinct: dict[str, list[int]] = {}
        for row in range(len(trials)):
            keys.append({name: value for name in fields if (value := values[name][row]) is not _UNUSED})
            distinct.setdefault(json.dumps(keys[-1], sort_keys=True), []).append(row)
        cells, inside = [], []
        for rows in distinct.values():
            key = keys[rows[0]]
            others = [(keys[other[0]], other) for other in distinct.values() if len(keys[other[0]]) != len(key)]
            if not any(key.items() <= other.items() for other, _ in others):
                fitting = [row for other, held in others if other.items() <= key.items() for row in held]
                cells.append(key)
                inside.append(sorted([*rows, *fitting]))
        clash = _pooled(trials, axis, inside, {name: values[name] for name in rest})
        if clash is None:
            implied = _implied(cells)
            return [_cell(key, trials.iloc[rows], axis, implied) for key, rows in zip(cells, inside, strict=True)]
        fields.append(clash)
        rest.remove(clash)


_UNUSED = object()


def _implied(cells: Sequence[dict[str, Any]]) -> frozenset[str]:
    """Fields whose value the others settle: P_act is named before P_tot, both before tokens, these before the rest.

    >>> sorted(_implied([{"width": 32, "budget.active_params": 1}, {"width": 64, "budget.active_params": 2}]))
    ['width']
    """
    names = list(dict.fromkeys(name for key in cells for name in key))
    names.sort(key=lambda name: FIRST_NAMED.index(name) if name in FIRST_NAMED else len(FIRST_NAMED))

    def told(named: Sequence[str]) -> int:
        return len({tuple(str(key.get(name, _UNUSED)) for name in named) for key in cells})

    kept: list[str] = []
    for name in names:
        if told([*kept, name]) > told(kept):
            kept.append(name)
    return frozenset(names) - set(kept)


def _varied_values(trials: pd.DataFrame, axis: Sequence[str]) -> dict[str, list[Any]]:
    """Everything in which the trials differ, other than the axis -> its value in each: `_UNUSED` where the trial has no
    use for it, None where it is empty.
    """
    found: dict[str, list[Any]] = {}
    for name in cell_fields(trials):
        if name not in axis:
            pairs = zip(uses(trials, name), trials[name].isna(), trials[name].tolist(), strict=True)
            found[name] = [_UNUSED if not used else None if empty else value for used, empty, value in pairs]
    own: dict[str, list[Any]] = {ON_TOP: _on_top(trials)}
    if not any(name.startswith("share_") and name != "share_moe" for name in axis):
        own[MEMORY] = [mix or _UNUSED for mix in mixes(trials)]
    if not {"rho", "share_moe"} & set(axis):
        pairs = zip(is_dense(trials), trials["rho"].isna(), trials["rho"].round(9).tolist(), strict=True)
        own[SHARE] = [_UNUSED if dense else None if empty else share for dense, empty, share in pairs]
    return found | {name: values for name, values in own.items() if len(set(values) - {_UNUSED}) > 1}


def mixes(trials: pd.DataFrame) -> list[str]:
    """The memories that hold a share, and in what proportion where they are several; '' for none."""
    rho, written_out = trials["rho"].to_numpy(float), trials.get("shares", [None] * len(trials))
    held = {pool: each & ~_given(trials, pool) for pool in memories(trials) if (each := holds(trials, pool)).any()}
    # A memory that trials without a share for it have too has its rows given in the base, and is on top of all.
    held = {pool: each for pool, each in held.items() if not (each & ~(rho < 1)).any()}
    found = []
    for row, written in enumerate(written_out):
        parts = {pool: 1.0 for pool, each in held.items() if each[row]}
        if isinstance(written, str):
            parts = {pool: share for pool in memories(trials) if (share := json.loads(written).get(pool, 0)) > 0}
        proportion = " : ".join(f"{share / sum(parts.values()):.3g}" for share in parts.values())
        found.append(" + ".join(map(label, parts)) + (f" ({proportion})" if len(parts) > 1 else ""))
    return found


def _on_top(trials: pd.DataFrame) -> list[str]:
    """The memories whose rows the study varies, on top of the budget; `nothing` for none."""
    given = {label(pool): _given(trials, pool) for pool in memories(trials)}
    return [" + ".join(name for name, each in given.items() if each[row]) or "nothing" for row in range(len(trials))]


def _given(trials: pd.DataFrame, pool: str) -> np.ndarray:
    """Whether the study gives this memory's rows in each trial -> bool."""
    column = f"model.{pool}.rows"
    return trials[column].notna().to_numpy() if column in trials else np.zeros(len(trials), bool)


def _pooled(
    trials: pd.DataFrame, axis: Sequence[str], inside: list[list[int]], values: dict[str, list[Any]]
) -> str | None:
    """Of the fields that make up the axis, one whose values fall on one point of a cell; None where every point has one
    value of each.
    """
    clashing: dict[str, set[str]] = {}
    for rows in inside if values else ():
        points = trials.iloc[rows].reset_index(drop=True)
        for _, group in points.groupby(list(axis), sort=False, dropna=False):
            for name, column in values.items():
                found = {str(column[rows[place]]) for place in group.index}
                if len(found) > 1:
                    clashing.setdefault(name, set()).update(found)
    return min(clashing, key=lambda name: len(clashing[name]), default=None)  # the one that makes the fewest cells


def _cell(key: dict[str, Any], trials: pd.DataFrame, axis: Sequence[str], implied: frozenset[str]) -> Cell:
    finished, rates = best_rates(trials[trials["status"] == TrialStatus.FINISHED], axis)
    dense, planned_dense = (is_dense(each) for each in (finished, trials))
    return Cell(key, finished[~dense], finished[dense], rates, trials[~planned_dense], implied)


def is_dense(trials: pd.DataFrame) -> pd.Series:
    """Of the dense baseline: memory on top of a dense backbone has no share, but is no baseline."""
    return trials["rho"].isna() & ~(trials["sparse_params"] > 0) if "sparse_params" in trials else trials["rho"].isna()


def cell_fields(trials: pd.DataFrame) -> list[str]:
    """Varied fields that set cells apart. What was tuned belongs to its point, as the learning rate does."""
    fields = [name for name in varied_fields(trials) if name not in (RATE, "shares") and not name.startswith("tuned.")]
    if trials["tokens"].nunique() > 1 and "budget.tokens" not in fields:
        fields.append("tokens")
    return fields


def best_rates(trials: pd.DataFrame, axis: Sequence[str] = ("rho",)) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep for each point the learning rate with the least mean validation loss over the seeds that all its rates have.

    Where the rates have no seed in common, each is judged by the seeds it has.

    Returns:
        The trials kept, and the check: one row a point and rate, for points with several.
    """
    names = [*axis, RATE, "seeds", "val_loss", "chosen"]
    if RATE not in trials or trials.empty:
        return trials, pd.DataFrame(columns=names)
    kept, checks = [], []
    for point, at_point in trials.groupby(list(axis), sort=False, dropna=False):
        seeds = [set(group["seed"]) for _, group in at_point.groupby(RATE)]
        shared = set.intersection(*seeds)
        judged = at_point[at_point["seed"].isin(shared)] if shared else at_point
        means = judged.groupby(RATE)["val_loss"].mean()
        kept.append(at_point[at_point[RATE] == means.idxmin()])
        if len(means) > 1:
            for rate, loss in means.items():
                tried = int(judged.loc[judged[RATE] == rate, "seed"].nunique())
                check = {RATE: rate, "seeds": tried, "val_loss": loss, "chosen": rate == means.idxmin()}
                checks.append(dict(zip(axis, point, strict=True)) | check)
    return pd.concat(kept).sort_index(), pd.DataFrame(checks, columns=names)
