"""A table of runs from a file: CSV, Parquet or JSON lines, by suffix, with its numbers checked. Knows no law and no study."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis.errors import AnalysisError, require_columns

SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson")


def read_table(path: Path | str, numbers: Iterable[str] = (), others: Iterable[str] = ()) -> pd.DataFrame:
    """The table, with `numbers` as floats; what is empty there becomes NaN.

    Args:
        path: `.csv`, `.parquet`, `.jsonl` or `.ndjson`.
        numbers: columns that must be there and hold numbers.
        others: columns that must be there.

    Raises:
        AnalysisError: the file is missing, empty, of another kind or cannot be read; a column is missing (the nearest name is given) or
            holds text where a number belongs (its line is given); an id of the column `trial_id` stands in several rows, though `trial_id`
            is not among `others`, as it is where rows are checkpoints.
    """
    path, numbers, others = Path(path), tuple(dict.fromkeys(numbers)), tuple(others)
    frame = _read(path)
    require_columns(frame.columns, dict.fromkeys((*numbers, *others)), str(path))
    if frame.empty:
        raise AnalysisError(f"{path}: holds no row")
    counted = "row" if path.suffix == ".parquet" else "line"
    first = {".csv": 2, ".parquet": 0}.get(path.suffix, 1)
    for name in numbers:
        typed = pd.to_numeric(frame[name], errors="coerce")
        wrong = frame.index[typed.isna() & frame[name].notna()]
        if len(wrong):
            raise AnalysisError(
                f"{path}: {counted} {wrong[0] + first}, column `{name}` holds {frame[name][wrong[0]]!r}; a number belongs there"
            )
        frame[name] = typed.astype(float)
    if "trial_id" in frame and "trial_id" not in others:
        again = frame["trial_id"].duplicated()
        if again.any():
            raise AnalysisError(
                f"{path}: {counted} {frame.index[again][0] + first}: trial id {frame['trial_id'][again].iloc[0]} stands in several rows; "
                "keep one of each, or name the column that says which rows are one run"
            )
    return frame


def _read(path: Path) -> pd.DataFrame:
    if path.suffix not in SUFFIXES:
        raise AnalysisError(f"{path}: give a table as {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype={"trial_id": str}, skip_blank_lines=False)
        if path.suffix == ".parquet":
            return pd.read_parquet(path).reset_index(drop=True)
        return pd.read_json(path, lines=True, dtype={"trial_id": str})
    except pd.errors.EmptyDataError:
        raise AnalysisError(f"{path}: is empty") from None
    except (ValueError, TypeError, OSError) as error:  # parsers of all three raise kinds of ValueError
        raise AnalysisError(f"{path}: cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from None
