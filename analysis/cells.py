"""Which trials may be compared: those of one cell. A cell is everything that a study varies but point (share), seed and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.table import shown, varied_fields

RATE = "train.lr"
NAMES = {"budget.tokens": "training tokens", "tokens": "training tokens", "budget.total_params": "P_tot", "budget.active_params": "P_act"}


@dataclass(frozen=True)
class Cell:
    """Finished trials that differ in nothing but point and seed."""

    fields: dict[str, Any]
    """Dotted path -> value of what sets this cell apart from the others of its study."""
    trials: pd.DataFrame
    """Finished trials with sparse parameters, one learning rate a point."""
    dense: pd.DataFrame
    """Finished trials of the dense baseline, at its best learning rate."""
    rates: pd.DataFrame
    """The check of the learning rate -> the point's columns, train.lr, seeds, val_loss, chosen; empty where one rate was used."""

    @property
    def label(self) -> str:
        """Names the cell among its study's, such as `2M training tokens`; '' where it is the only one."""
        parts = []
        for path, value in self.fields.items():
            name = NAMES.get(path, path)
            parts.append(f"{shown(value)} {name}" if name == "training tokens" else f"{name} {shown(value)}")
        return ", ".join(parts)


def split_cells(trials: pd.DataFrame, axis: Sequence[str] = ("rho",), fields: Sequence[str] | None = None) -> list[Cell]:
    """Split a study's finished trials into cells, in the order of the plan.

    A trial that does not use a varied field (pure experts have no memory settings) leaves it empty, and stands in every cell that it fits.

    Args:
        axis: columns whose values tell the points of one cell apart; each point keeps its own best learning rate.
        fields: columns that set cells apart; default: `cell_fields`.
    """
    fields = cell_fields(trials) if fields is None else list(fields)
    finished = trials[trials["status"] == "finished"]
    keys = trials[fields].dropna().drop_duplicates().to_dict("records") if fields else [{}]
    found = []
    for key in keys:
        fits = pd.Series(True, index=finished.index)
        for name, value in key.items():
            fits &= (finished[name] == value) | finished[name].isna()
        inside, rates = best_rates(finished[fits], axis)
        dense = inside["rho"].isna()
        if "sparse_params" in inside:  # memory on top of a dense backbone has no share, but is no baseline
            dense &= ~(inside["sparse_params"] > 0)
        found.append(Cell({str(name): value for name, value in key.items()}, inside[~dense], inside[dense], rates))
    return found


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
