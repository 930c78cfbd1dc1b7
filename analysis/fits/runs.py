"""From a table of runs to the arrays that a fit works on. Refuses what cannot be meant; poor data are the fit's
business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import floats, is_finished
from analysis.errors import AnalysisError, require_columns
from analysis.status import Status
from sparsemem.values import listed

Array = np.ndarray


HUGE = 1e100
"""Losses beyond it have squares that no number holds."""
APART = 1e-4
"""Shares nearer to each other cannot be meant as two."""


@dataclass(frozen=True)
class Runs:
    """Finished runs, one an entry."""

    x_NK: Array
    """What sets the points apart, one column each."""
    y_N: Array
    """Loss, nats per token."""
    seeds_N: Array
    """Their codes, which are text: 1, 1.0 and "1" are one seed."""
    rows: tuple[str, ...]
    """Trial ids, or the table's index where it has none."""

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(np.unique(self.seeds_N))


def refused_losses(*cells: Runs) -> tuple[Status, str] | None:
    """Why nothing can be fitted to such losses; None where they are losses."""
    held = [(row, loss) for runs in cells for row, loss in zip(runs.rows, runs.y_N, strict=True)]
    wrong = [row for row, loss in held if not (np.isfinite(loss) and loss >= 0)]
    if wrong:
        remedy = "leave such runs out and say so, or repeat them."
        return Status.NOT_FINITE, f"the loss of {listed(wrong)} is not a number or is negative: {remedy}"
    most = max((loss for _, loss in held), default=0.0)
    if most > HUGE:
        return Status.NOT_FINITE, f"the loss reaches {most:.3g}: check the column, or give it in other units."
    return None


def read_shares(frame: pd.DataFrame, x: Sequence[str], loss: str, seed: str, caller: str) -> Runs:
    """`read_runs` of shares; rows without one (the dense baseline) are left out.

    Raises:
        AnalysisError: also where a share is outside [0, 1].
    """
    runs = read_runs(frame, x, loss, seed, caller)
    if not ((runs.x_NK >= 0) & (runs.x_NK <= 1)).all():
        names = ", ".join(f"`{name}`" for name in x)
        raise AnalysisError(f"{caller}: column {names} must hold shares between 0 and 1")
    return runs


def require_apart(shares: Array, caller: str) -> None:
    """Refuse shares that differ by rounding alone.

    Raises:
        AnalysisError: naming two of them.
    """
    near = np.flatnonzero(np.diff(shares) < APART)
    if len(near):
        pair = " and ".join(f"{share:.9g}" for share in shares[near[0] : near[0] + 2])
        raise AnalysisError(f"{caller}: the shares {pair} are nearer than {APART:g}: give what is one share one value")


def read_runs(frame: pd.DataFrame, x: Sequence[str], loss: str, seed: str, caller: str) -> Runs:
    """Runs of one cell, in an order of their own, so that the table's makes no difference to what is drawn at random.
    Of a column `status` only what says finished is used; rows that lack an x are left out.

    Args:
        x: columns that set the points apart.
        caller: begins the messages.

    Raises:
        AnalysisError: a column is missing or holds text, a date or a truth value, a seed is empty, a trial id is
            repeated, or one seed stands twice at one point.
    """
    x = list(x)
    require_columns(frame.columns, (*x, loss, seed), caller)
    frame = finished(frame[frame[x].notna().all(axis=1)])
    rows = tuple(map(str, frame.get("trial_id", frame.index)))
    names = ", ".join(f"`{name}`" for name in x)
    repeated = sorted({row for row in rows if rows.count(row) > 1})
    if repeated:
        raise AnalysisError(f"{caller}: trial id {listed(repeated)} stands in several rows; keep one of each")
    at = places(frame)
    numbers = {name: floats(frame[name], lambda row: f"{caller}: {at[row]}") for name in (*x, loss)}
    # Integer sizes give one share the same value in every seed, up to the last digits of a text file.
    x_NK, y_N = np.round(np.stack([numbers[name] for name in x], axis=1), 9), numbers[loss]
    seeds_N = seed_codes(frame[seed], at, caller)
    twice = pd.DataFrame(x_NK).assign(seed=seeds_N).duplicated(keep=False).to_numpy()
    if twice.any():
        clash = listed([row for row, same in zip(rows, twice, strict=True) if same])
        raise AnalysisError(
            f"{caller}: {clash} agree in {names} and `{seed}`; fit one cell at a time, as `analysis.split_cells` gives "
            "them"
        )
    order = np.lexsort((rows, y_N, seeds_N, *x_NK.T[::-1]))
    return Runs(x_NK[order], y_N[order], seeds_N[order], tuple(rows[i] for i in order))


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: those whose column `status`, if there is one, says that they finished."""
    return frame[is_finished(frame["status"])] if "status" in frame else frame


def unfinished(frame: pd.DataFrame) -> str:
    """Says how many rows `finished` leaves out, and which; '' where it leaves out none."""
    left = frame[~is_finished(frame["status"])] if "status" in frame else frame[:0]
    if left.empty:
        return ""
    held = left["status"].fillna("nothing").astype(str).str.strip().value_counts().sort_index(kind="stable")
    says = listed([f"{status} ({number})" for status, number in held.items()])
    return f"Left out: {len(left)} of {len(frame)} rows, whose `status` says {says}: {listed(places(left))}."


def places(frame: pd.DataFrame) -> list[str]:
    """Where each row stands: its trial id, the place that `read_table` gave it, or else its label in the index of the
    table.
    """
    if "trial_id" in frame:
        return [f"trial {trial}" for trial in frame["trial_id"]]
    return [each if isinstance(each, str) else f"index {each}" for each in frame.index]


def seed_codes(column: pd.Series, at: Sequence[str], caller: str) -> Array:
    """Seeds of any type as text, so that they sort and compare -> [N].

    Args:
        at: `places` of the rows.

    Raises:
        AnalysisError: a seed is empty.
    """
    empty = np.flatnonzero(column.isna().to_numpy())
    if len(empty):
        raise AnalysisError(f"{caller}: column `{column.name}` is empty in {at[empty[0]]}; every run needs its seed")
    return np.array(
        [str(int(each)) if isinstance(each, float) and each.is_integer() else str(each) for each in column],
        dtype=object,
    )


def require_resamples(resamples: int, caller: str) -> None:
    """Refuse a bootstrap from which no interval follows.

    Raises:
        AnalysisError: there are fewer than two.
    """
    if resamples < 2:
        raise AnalysisError(
            f"{caller}: resamples is {resamples}; an interval needs at least 2, and is steady from about 1,000"
        )


MIXED = 1.15
"""Integer sizes miss a budget by a few percent; values farther apart than this factor are of several budgets."""


NEAR = 1.01
"""Sizes within this factor of each other are one: what rounding makes of one size is no second point of a curve."""


def distinct(x_N: Array) -> int:
    """How many sizes there are, those within a factor of `NEAR` of the least among them counted once.

    >>> distinct(np.array([1e9, 1.00003e9, 2e9, 1.9999e9]))
    2
    """
    sizes, count, place = np.unique(x_N), 0, 0
    while place < len(sizes):
        place, count = int(np.searchsorted(sizes, NEAR * sizes[place], side="right")), count + 1
    return count


LENGTH = ("tokens", "embedding_params")
SIZES = (*LENGTH, "total_params", "active_params")
"""Columns that are alike in the runs of one budget; only `LENGTH` where a point sets the sizes itself, which are then
alike at each point.
"""


def require_one_budget(frame: pd.DataFrame, x: str, caller: str, columns: Sequence[str] = SIZES) -> None:
    """Refuse runs of several budgets or vocabularies in one curve, as in two results put together.

    Args:
        x: column that sets the points apart; rows that lack it are left out.
        columns: that must be alike.

    Raises:
        AnalysisError: naming the column and its values.
    """
    used = finished(frame[frame[x].notna()])
    for column in columns:
        if column in used and used[column].notna().any():
            held = floats(used[column], lambda row: f"{caller}: {places(used)[row]}")
            least, most = np.nanmin(held), np.nanmax(held)
            if most > least * (MIXED if column not in LENGTH else 1 + 1e-6):
                raise AnalysisError(
                    f"{caller}: column `{column}` runs from {least:,.0f} to {most:,.0f}, so the losses cannot be "
                    "compared; fit one cell at a time, as `analysis.split_cells` gives them, or all budgets at once "
                    "with `analysis.fit_joint`"
                )


def require_one_size(frame: pd.DataFrame, point: Sequence[str], x: str, caller: str) -> None:
    """`require_one_budget` of the runs of each point, where a point sets the sizes itself.

    Args:
        point: columns that set the points apart; an empty value is one too.
    """
    if not {*SIZES}.isdisjoint(frame.columns):
        for _, own in frame.groupby(list(point), dropna=False):
            require_one_budget(own, x, caller)


ALIKE = 1e-7
"""Differences below this part of the loss are rounding (single precision has 6e-8); the noise of real runs is thousands
of times larger.
"""


def same_losses(y_N: Array) -> str:
    """Says so where all losses are one number, of which no law can be told from another; '' otherwise. Status
    `too_few_points`.
    """
    if len(y_N) < 2 or np.ptp(y_N) > ALIKE * np.abs(y_N).max():
        return ""
    return f"all losses are equal ({y_N[0]:.6g}), so there is nothing to fit: check the column."


def same_seeds(sd: float, y_N: Array) -> str:
    """Says so where seeds differ by nothing, or by the same at every point; '' otherwise. Status `too_few_points`.

    Args:
        sd: paired noise of one run (`SeedModel.sd`), NaN where nothing is repeated.
        y_N: losses.
    """
    if not sd <= ALIKE * np.abs(y_N).max():  # not so for NaN
        return ""
    return (
        "different seeds have the same losses, or differ by the same everywhere: copies say nothing of the noise; "
        "train each seed."
    )


def same_runs(names_N: Sequence[str], x_N: Iterable[Any], seeds_N: Array, y_N: Array) -> str:
    """Names those whose losses are the same numbers wherever both have runs; '' for none. Status `too_few_points`.

    Args:
        names_N: what each run is of.
        x_N: its point.
        seeds_N, y_N: its seed and loss.
    """
    held: dict[str, dict[Any, float]] = {}
    for name, x, seed, loss in zip(names_N, x_N, seeds_N, y_N, strict=True):
        held.setdefault(name, {})[x, seed] = float(loss)
    found = [
        f"{first} and {second}"
        for first, second in combinations(held, 2)
        if len(both := held[first].keys() & held[second].keys()) > 1
        and all(held[first][run] == held[second][run] for run in both)
    ]
    return (
        f"the losses of {listed(found)} are the same numbers in every run: copies, or what sets them apart changes "
        "nothing. They make the noise, and with it every interval, too small: leave one out."
        if found
        else ""
    )
