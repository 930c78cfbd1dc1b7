"""What a law over several budgets (`joint`) reads of a table: its budgets, and the factors in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.fits.runs import MIXED

BUDGET = ("tokens", "budget.total_params", "budget.active_params")
"""Columns that set budgets apart, as a study's `trials.csv` has them where they vary."""
FACTORS = ("active_params", "tokens_per_active_param", "sparsity")
UNITS = {
    "active_params": "P_act: activated parameters, as trained",
    "tokens_per_active_param": "training tokens / P_act",
    "sparsity": "P_tot / P_act",
}
WORDS = {
    "active_params": "size (P_act)",
    "tokens_per_active_param": "tokens per activated parameter",
    "sparsity": "sparsity",
}
"""Factor -> what readers call it."""
UNIT_WORDS = {
    "active_params": "activated parameters",
    "tokens_per_active_param": "tokens per activated parameter",
    "sparsity": "of sparsity",
}
"""Factor -> what follows its number."""
VARIES = 1.1
"""A factor whose budgets are within this ratio is held."""


def together(factors: Sequence[str]) -> str:
    """Factors in words."""
    return " and ".join(WORDS[name] for name in factors)


def named(key: Mapping[str, float]) -> str:
    """A budget by the columns that set it apart."""
    return ", ".join(f"{name} {value:g}" for name, value in key.items())


def with_budgets(frame: pd.DataFrame) -> pd.DataFrame:
    """With the sizes of the budgets where they differ and the table does not name them: medians of the runs' own, which
    are integers.
    """
    for size in ("total_params", "active_params"):
        sizes = np.sort(frame[size].unique())
        firsts = sizes[1:][sizes[1:] > MIXED * sizes[:-1]]
        if f"budget.{size}" not in frame and len(firsts):
            budget = np.searchsorted(firsts, frame[size], side="right")
            frame = frame.assign(**{f"budget.{size}": frame.groupby(budget)[size].transform("median")})
    return frame


def factors_of(group: pd.DataFrame) -> dict[str, float]:
    """Size, tokens per activated parameter and sparsity of the runs of one budget: medians over the runs' own sizes,
    which are integers.
    """
    active = group["active_params"]
    values = (active, group["tokens"] / active, group["total_params"] / active)
    return {name: float(each.median()) for name, each in zip(FACTORS, values, strict=True)}


def tell_apart(budgets: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Factors whose effects the budgets can tell apart; and why the others are left out."""
    kept: list[str] = []
    dropped = {}
    for name in FACTORS:
        values = [budget[name] for budget in budgets]
        design = (
            np.log10([[10.0, *(budget[each] for each in [*kept, name])] for budget in budgets])
            if budgets
            else np.zeros((0, 1))
        )
        if not values or max(values) <= VARIES * min(values):
            dropped[name] = "does not vary between the budgets"
        elif (
            np.linalg.matrix_rank(design - design.mean(0) * (np.arange(design.shape[1]) > 0), tol=1e-2) < len(kept) + 2
        ):
            dropped[name] = f"varies only together with {together(kept)}, so their effects cannot be told apart"
        else:
            kept.append(name)
    return tuple(kept), dropped
