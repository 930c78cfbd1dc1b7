"""The numbers and words of a column: the one place where what a table holds becomes floats, and where it is read who
finished.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from decimal import Decimal

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError

UNITS = {"": 0, "%": -2, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
UNITS |= {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""What may follow a number, in any case, and its power of ten: 10M, 1.5 B, 30 billion, 45%."""
NO_NUMBER = {"nan", "na", "n/a", "#n/a", "null", "none", "missing", "unknown", "-", "--", "?", "diverged", "divergent"}
NO_NUMBER |= {"failed", "failure", "crashed", "error", "oom", "timeout", "killed", "running", "pending"}
"""Words, in any case, that stand where a run has no number."""
FINISHED = ("finished", "done", "complete", "completed", "success", "succeeded", "terminated", "ok")
"""What a column `status` says, in any case, of a run that counts: here, in W&B, MLflow, Slurm, Ray Tune (`TERMINATED`)
and by hand.
"""
UNFINISHED = {"fail", "failed", "failure", "crashed", "error", "killed", "running", "pending", "pruned", "waiting"}
UNFINISHED |= {"queued", "scheduled", "preempted", "preempting", "stopped", "diverged", "oom", "timeout"}
"""Words, in any case, by which a column `state` is known to say how a run ended, though no run finished."""
LOST_UNIT = 1e4
"""A plain number smaller by this factor than all numbers with a unit has lost its own."""
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:([,_' \u00a0\u202f])\d{3})(?:\1\d{3})*(?!\d)")
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)")


def number(text: str) -> float | None:
    """A number as people write it; NaN for a word that stands for none, None for anything else.

    >>> [number(text) for text in ("1e9", "10M", "1.5 b", "1,000,000", "45%", "NaN", "low")]
    [1000000000.0, 10000000.0, 1500000000.0, 1000000.0, 0.45, nan, None]
    """
    word = text.strip().lower()
    if not word or word in NO_NUMBER:
        return float("nan")
    grouped = _GROUPED.match(word)
    if grouped:
        word = word[: grouped.end()].replace(grouped[1], "") + word[grouped.end() :]
    found = _NUMBER.fullmatch(word)
    if found and found[2] in UNITS:
        return float(Decimal(found[1]).scaleb(UNITS[found[2]]))
    return float(word) if word.lstrip("+-") in ("inf", "infinity") else None


def _states(status: pd.Series) -> pd.Series:
    """The words in lower case, without the class that Python writes before them: `TrialState.COMPLETE`."""
    return status.astype(str).str.strip().str.lower().str.replace(r"^.*\.", "", regex=True)


def is_finished(status: pd.Series) -> pd.Series:
    """Which rows say that they finished."""
    return _states(status).isin(FINISHED)


def says_states(column: pd.Series) -> bool:
    """Whether the column tells how runs ended; a column `state` may hold something else."""
    return bool(_states(column.dropna()).isin({*FINISHED, *UNFINISHED}).any())


def floats(column: pd.Series, place: Callable[[int], str]) -> np.ndarray:
    """The column as floats, NaN where it is empty or has a word of `NO_NUMBER`; text may be what `number` knows.

    Args:
        place: position in the column -> words for the file and the line, or the row, which begin the message.

    Raises:
        AnalysisError: it holds other text, a date, a duration, a truth value or a complex number: pandas would turn
            most of these into numbers.
    """
    times = (np.datetime64, np.timedelta64, datetime.date, datetime.time, datetime.timedelta)
    others = (bool, np.bool_, complex, *times, list, dict)
    held = column.astype(object)
    plain = held.where(~held.map(lambda value: isinstance(value, others)))
    typed = np.array(pd.to_numeric(plain, errors="coerce"), float)
    odd = np.flatnonzero(np.isnan(typed) & column.notna().to_numpy())
    read = {place: number(value) if isinstance(value := held.iloc[place], str) else None for place in odd}
    wrong = [place for place, value in read.items() if value is None]
    if wrong:
        value = held.iloc[wrong[0]]
        said = repr(value) if isinstance(value, str) else str(value)
        raise AnalysisError(f"{place(int(wrong[0]))}, column `{column.name}` holds {said}; a number belongs there")
    typed[odd] = [read[place] for place in odd]
    return typed


def refuse_lost_units(column: pd.Series, typed: np.ndarray, place: Callable[[int], str]) -> None:
    """Refuse 20 beside 10M: a plain number so much smaller than every number with a unit has most likely lost its own.

    Args:
        column: as written.
        typed: its `floats`.
        place: as for `floats`.

    Raises:
        AnalysisError: it holds one.
    """
    written = [_NUMBER.fullmatch(value.strip().lower()) if isinstance(value, str) else None for value in column]
    large = np.array([found is not None and UNITS.get(found[2], 0) > 0 for found in written], bool)
    if not large.any():
        return
    lost = np.flatnonzero(~large & (typed > 0) & (typed * LOST_UNIT <= typed[large].min()))
    if len(lost):
        row, known = int(lost[0]), column[large].iloc[0]
        raise AnalysisError(
            f"{place(row)}, column `{column.name}` holds {column.iloc[row]} beside {known}; "
            "write its unit too, or write every number of the column without one"
        )
