"""From any table of runs to the arrays of a law over sizes: positive columns, a loss, and which rows are one run.

`runs.py` does the same for studies whose seeds are paired. Refuses what cannot be meant; poor data are the fit's
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.columns import floats
from analysis.errors import AnalysisError, require_columns
from analysis.fits.runs import distinct, finished, places, same_losses, unfinished
from analysis.status import Status
from sparsemem.values import listed

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
    at: tuple[str, ...] = ()
    """Where each stands, in words."""
    left_out: str = ""
    """Says which rows of the table are none of these; '' where all are."""

    @property
    def level(self) -> float:
        """Geometric mean of the losses: laws are fitted to losses over it, so that their unit does not matter."""
        return float(np.exp(np.log(self.y_N).mean()))

    def with_left_out(self, message: str) -> str:
        """The message of a fit of these, with `left_out` behind it."""
        return f"{message} {self.left_out}".strip()

    def refusal(self) -> tuple[Status, str] | None:
        """Why no law can be fitted to these losses, whichever it is; None where one can be."""
        bad = listed(
            [place for place, value in zip(self.at, self.y_N, strict=True) if not (np.isfinite(value) and value > 0)]
        )
        if bad:
            return (
                Status.NOT_FINITE,
                f"the loss of {bad} is not a positive number: leave such runs out and say so, or repeat them.",
            )
        equal = same_losses(self.y_N)
        return (Status.TOO_FEW_POINTS, equal) if equal else None

    def too_few(
        self,
        columns: Sequence[str],
        parameters: str,
        runs: int,
        sizes: Sequence[int],
        law: str = "the law",
        more: str = "train more",
    ) -> tuple[Status, str] | None:
        """`refusal`, or that there are fewer runs, or distinct values of a column, than a law needs.

        Args:
            columns: of the sizes, in their order.
            parameters: how many the law has, in a word.
            sizes: distinct values that each column needs; of the columns beyond them any number will do.
        """
        if refusal := self.refusal():
            return refusal
        if len(self.y_N) < runs:
            return Status.TOO_FEW_POINTS, f"{len(self.y_N)} rows; {parameters} parameters need at least {runs}: {more}."
        for column, x_N, least in zip(columns, self.x_TN, sizes, strict=False):
            if distinct(x_N) < least:
                return (
                    Status.TOO_FEW_POINTS,
                    f"`{column}` has {distinct(x_N)} distinct value(s); {law} needs at least {least}.",
                )
        return None


def read_points(frame: pd.DataFrame, x: Sequence[str], loss: str, run: str | None, caller: str) -> Points:
    """The rows in an order of their own, so that the table's makes no difference to what is drawn at random. Of a
    column `status` only what says finished is used; `Points.left_out` tells of the others.

    Args:
        x: columns of sizes.
        run: column that says which rows are checkpoints of one run; None: every row is a run of its own.
        caller: begins the messages.

    Raises:
        AnalysisError: a column is missing, holds text, a date, a truth value or a size that is not positive, or a trial
            id is repeated.
    """
    require_columns(frame.columns, (*x, loss, *([run] if run else [])), caller)
    left_out, frame = unfinished(frame), finished(frame)
    at, rows = places(frame), tuple(map(str, frame.get("trial_id", frame.index)))
    if "trial_id" in frame and run is None:
        repeated = sorted(set(frame["trial_id"][frame["trial_id"].duplicated()].astype(str)))
        if repeated:
            raise AnalysisError(
                f"{caller}: trial id {listed(repeated)} stands in several rows; keep one of each, or say which rows "
                "are one run"
            )
    numbers = {name: floats(frame[name], lambda row: f"{caller}: {at[row]}") for name in (*x, loss)}
    for name in x:
        wrong = np.flatnonzero(~((numbers[name] > 0) & np.isfinite(numbers[name])))
        if len(wrong):
            raise AnalysisError(
                f"{caller}: column `{name}` holds {numbers[name][wrong[0]]:g} in {at[wrong[0]]}; a positive number "
                "belongs there"
            )
    runs_N = frame[run].to_numpy(object) if run else np.arange(len(frame))
    unnamed = np.flatnonzero(pd.isna(runs_N))
    if len(unnamed):
        raise AnalysisError(f"{caller}: column `{run}` is empty in {at[unnamed[0]]}; name the run")
    x_TN, y_N = np.array([numbers[name] for name in x]).reshape(len(x), len(frame)), numbers[loss]
    order = np.lexsort((rows, y_N, *x_TN[::-1]))
    clusters_N = pd.factorize(runs_N[order])[0]
    return Points(
        x_TN[:, order], y_N[order], clusters_N, tuple(rows[i] for i in order), tuple(at[i] for i in order), left_out
    )
