"""A table of runs from a file: CSV, Parquet or JSON lines, by suffix, with its numbers checked. Knows no law and no study."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from analysis.columns import floats
from analysis.errors import AnalysisError, require_columns

SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson")


def read_table(path: Path | str, numbers: Iterable[str] = (), others: Iterable[str] = ()) -> pd.DataFrame:
    """The table, with `numbers` as floats; what is empty there becomes NaN.

    Args:
        path: `.csv` (UTF-8, separated by commas), `.parquet`, `.jsonl` or `.ndjson`.
        numbers: columns that must be there and hold numbers.
        others: columns that must be there.

    Raises:
        AnalysisError: the file is missing, empty, of another kind or cannot be read; a heading stands twice or a row has more or fewer
            fields than there are headings; a column is missing (the nearest name is given) or holds text, a date or a truth value where a
            number belongs (its line is given); an id of the column `trial_id` stands in several rows, though `trial_id` is not among
            `others`, as it is where rows are checkpoints.
    """
    path, numbers, others = Path(path), tuple(dict.fromkeys(numbers)), tuple(others)
    frame, places = _read(path)
    require_columns(frame.columns, dict.fromkeys((*numbers, *others)), str(path))
    if frame.empty:
        raise AnalysisError(f"{path}: holds no row")
    for name in numbers:
        frame[name] = floats(frame[name], lambda row: f"{path}: {places[row]}")
    if "trial_id" in frame and "trial_id" not in others:
        again = frame["trial_id"].duplicated()
        if again.any():
            raise AnalysisError(
                f"{path}: {places[int(again.argmax())]}: trial id {frame['trial_id'][again].iloc[0]} stands in several rows; "
                "keep one of each, or name the column that says which rows are one run"
            )
    return frame


def _read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The table, and where each of its rows stands in the file."""
    kind = path.suffix.lower()
    if path.is_dir():
        raise AnalysisError(f"{path}: is a folder; name the table in it")
    if kind not in SUFFIXES:
        raise AnalysisError(f"{path}: give a table as {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise AnalysisError(f"{path}: no such file")
    try:
        if kind == ".parquet":
            frame = pd.read_parquet(path).reset_index(drop=True)
            return frame, [f"row {row}" for row in range(len(frame))]
        text = path.read_text(encoding="utf-8-sig")
        return _csv(text, path) if kind == ".csv" else _json_lines(text)
    except AnalysisError:
        raise
    except (ValueError, TypeError, OSError, csv.Error) as error:  # parsers of all three raise kinds of ValueError
        raise AnalysisError(f"{path}: cannot be read as {kind[1:]}: {' '.join(str(error).split())}") from None


def _csv(text: str, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """pandas shifts all columns where rows have more fields than there are headings, so the fields are counted first."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines, line = [], [], 1
    for row in reader:
        if any(field.strip() for field in row):
            rows.append(row)
            lines.append(line)
        line = reader.line_num + 1
    if not rows:
        raise AnalysisError(f"{path}: is empty")
    heading = [name.strip() for name in rows[0]]
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(heading) == 1 and mark in heading[0]:
            raise AnalysisError(f"{path}: its fields are separated by {name}; write it with commas, and numbers with a decimal point")
    twice = [name for name in dict.fromkeys(heading) if name and heading.count(name) > 1]
    if twice:
        raise AnalysisError(f"{path}: heading `{twice[0]}` stands twice; keep one of them")
    for place, row in zip(lines, rows, strict=True):
        if len(row) != len(heading):
            raise AnalysisError(
                f"{path}: line {place} has {len(row)} fields, but there are {len(heading)} headings; mend the line, and quote text that "
                "holds a comma"
            )
    again = io.StringIO()
    csv.writer(again).writerows([heading, *rows[1:]])
    again.seek(0)
    return pd.read_csv(again, dtype={"trial_id": str}, index_col=False), [f"line {place}" for place in lines[1:]]


def _json_lines(text: str) -> tuple[pd.DataFrame, list[str]]:
    records, places = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is no object of names and values")
            records.append(record)
            places.append(f"line {number}")
    frame = pd.DataFrame(records)
    if "trial_id" in frame:
        frame["trial_id"] = frame["trial_id"].map(str, na_action="ignore")
    return frame, places
