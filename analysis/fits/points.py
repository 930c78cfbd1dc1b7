"""From any table of runs to the arrays of a law over sizes: positive columns, a loss, and which rows are one run.

`runs.py` does the same for studies whose seeds are paired. Refuses what cannot be meant; poor data are the fit's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError, require_columns
from analysis.fits.runs import listed

Array = np.ndarray


@dataclass(frozen=True)
class Points:
    """Measurements, one an entry."""

    x_TN: Array
    """Positive sizes, one row a column asked for."""
    y_N: Array
    """Loss; may hold what is not a number."""
    clusters_N: Array
    """Number of the run of each entry: 0, 1, ..."""
    rows: tuple[str, ...]
    """Trial ids, or the table's index where it has none."""

    def unusable(self) -> str:
        """What is wrong with the losses, and the remedy; '' when nothing is."""
        bad = listed([row for row, value in zip(self.rows, self.y_N, strict=True) if not (np.isfinite(value) and value > 0)])
        return f"the loss of {bad} is not a positive number: leave such runs out and say so, or repeat them." if bad else ""


def read_points(frame: pd.DataFrame, x: Sequence[str], loss: str, run: str | None, caller: str) -> Points:
    """Of a column `status` only `finished` is used.

    Args:
        x: columns of sizes.
        run: column that says which rows are checkpoints of one run; None: every row is a run of its own.
        caller: begins the messages.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, or a trial id is repeated.
    """
    require_columns(frame.columns, (*x, loss, *([run] if run else [])), caller)
    if "status" in frame:
        frame = frame[frame["status"] == "finished"]
    rows = tuple(map(str, frame.get("trial_id", frame.index)))
    if "trial_id" in frame and run is None:
        repeated = sorted(set(frame["trial_id"][frame["trial_id"].duplicated()].astype(str)))
        if repeated:
            raise AnalysisError(
                f"{caller}: trial id {listed(repeated)} stands in several rows; keep one of each, or say which rows are one run"
            )
    numbers = {name: _numbers(frame[name], rows, caller) for name in (*x, loss)}
    for name in x:
        wrong = np.flatnonzero(~((numbers[name] > 0) & np.isfinite(numbers[name])))
        if len(wrong):
            raise AnalysisError(
                f"{caller}: column `{name}` holds {numbers[name][wrong[0]]:g} in row {rows[wrong[0]]}; a positive number belongs there"
            )
    clusters_N = pd.factorize(frame[run])[0] if run else np.arange(len(frame))
    if (clusters_N < 0).any():
        raise AnalysisError(f"{caller}: column `{run}` is empty in row {rows[int(np.argmin(clusters_N))]}; name the run")
    return Points(np.array([numbers[name] for name in x]).reshape(len(x), len(frame)), numbers[loss], clusters_N, rows)


def _numbers(column: pd.Series, rows: Sequence[str], caller: str) -> Array:
    typed = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero((typed.isna() & column.notna()).to_numpy())
    if len(wrong):
        raise AnalysisError(
            f"{caller}: column `{column.name}` holds {column.iloc[wrong[0]]!r} in row {rows[wrong[0]]}; a number belongs there"
        )
    return typed.to_numpy(float, na_value=np.nan)
