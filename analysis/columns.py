"""The numbers of a column: the one place where what a table holds becomes floats."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError


def floats(column: pd.Series, place: Callable[[int], str]) -> np.ndarray:
    """The column as floats, NaN where it is empty.

    Args:
        place: position in the column -> words for the file and the line, or the row, which begin the message.

    Raises:
        AnalysisError: it holds text, a date, a duration, a truth value or a complex number: pandas would turn most of these into numbers.
    """
    others = (bool, np.bool_, complex, np.datetime64, np.timedelta64, datetime.date, datetime.time, datetime.timedelta)
    held = column.astype(object)
    typed = pd.Series(pd.to_numeric(held.where(~held.map(lambda value: isinstance(value, others))), errors="coerce"))
    wrong = np.flatnonzero((typed.isna() & column.notna()).to_numpy())
    if len(wrong):
        value = held.iloc[wrong[0]]
        said = repr(value) if isinstance(value, str) else str(value)
        raise AnalysisError(f"{place(int(wrong[0]))}, column `{column.name}` holds {said}; a number belongs there")
    return typed.to_numpy(float, na_value=np.nan)
