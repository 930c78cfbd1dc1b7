"""The one error of this package: input that cannot be analysed. Its message says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnalysisError(ValueError):
    """Refused input: names the file or table, the column or value, and the remedy."""


def require_columns(present: Iterable[str], required: Iterable[str], where: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        AnalysisError: naming every missing column and the nearest name that the table has.
    """
    present = [str(name) for name in present]
    missing = [name for name in required if name not in present]
    if missing:
        near = {name: difflib.get_close_matches(name, present, n=1) for name in missing}
        words = [f"`{name}`" + (f" (is it `{near[name][0]}`?)" if near[name] else "") for name in missing]
        raise AnalysisError(
            f"{where}: column {', '.join(words)} is missing; it has {', '.join(present) or 'no column'}"
        )
