"""A table of runs from a file: CSV, Parquet or JSON, by suffix, with its numbers checked. Knows no law and no study."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.columns import floats, number, refuse_lost_units, says_states
from analysis.errors import AnalysisError, require_columns
from sparsemem.config import nearest_path

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does, so it is looked for first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""First bytes of a text -> its encoding."""
SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t", ",", ";")}
"""The first that divides the heading is used."""
DECIMAL_COMMA = re.compile(
    r"[+-]?(0,\d{3}|\d+,(\d{1,2}|\d{4,})|(\d{1,3}(\.\d{3})+),\d+|\d{1,3}(\.\d{3}){2,})(e[+-]?\d+)?\s*[a-z%]*", re.I
)
DECIMAL_POINT = re.compile(
    r"[+-]?(0?\.\d{3}|\d*\.(\d{1,2}|\d{4,})|(\d{1,3}(,\d{3})+)\.\d+|\d{1,3}(,\d{3}){2,})(e[+-]?\d+)?\s*[a-z%]*", re.I
)
"""What can only be read in one way; 1,000 and 1.000 can be read in both."""


def read_table(path: Path | str, numbers: Iterable[str] = (), others: Iterable[str] = ()) -> pd.DataFrame:
    """The table, with `numbers` as floats; what is empty there becomes NaN.

    Args:
        path: `.csv` (separated by commas, semicolons or tabs), `.tsv`, `.json` (an array of objects), `.jsonl`,
            `.ndjson`, each also with `.gz`, or `.parquet`. Text is UTF-8, or what its byte order mark says.
        numbers: columns that must be there and hold numbers, also as 10M, 1.5B, 1,000 or 45%. A heading that differs
            only in case and in blanks is taken for the column, and gets its name.
        others: columns that must be there.

    Returns:
        The table. Its index says where each row stands, counted from 1: `line 7` of a text, heading and comments
        counted, `row 7` of an array or Parquet.

    Raises:
        AnalysisError: the file is missing, empty, of another kind or cannot be read; a heading that is asked for stands
            twice or a row has more or fewer fields than there are headings; a column is missing (the nearest name is
            given) or holds text, a date or a truth value where a number belongs (its line is given); an id of the
            column `trial_id` stands in several rows, though `trial_id` is not among `others`, as it is where rows are
            checkpoints.
    """
    path, numbers, others = Path(path), tuple(dict.fromkeys(numbers)), tuple(others)
    frame, twice = _read(path, numbers)
    asked = tuple(dict.fromkeys((*numbers, *others)))
    for name in (*asked, "trial_id", "status"):
        if name in twice:
            raise AnalysisError(f"{path}: heading `{name}` stands twice; keep one of them")
    frame = frame.rename(columns=_as_asked(frame.columns, (*asked, "status")))
    for name in frame.columns.difference(asked):  # as W&B calls it
        if "status" not in frame and str(name).strip().lower() == "state" and says_states(frame[name]):
            frame = frame.rename(columns={name: "status"})
    require_columns(frame.columns, asked, str(path))
    if frame.empty:
        raise AnalysisError(f"{path}: holds no row")

    def place(row: int) -> str:
        return f"{path}: {frame.index[row]}"

    for name in numbers:
        typed = floats(frame[name], place)
        refuse_lost_units(frame[name], typed, place)
        frame[name] = typed
    # Such as `tokens`, by which some fits look whether runs compare.
    for name in frame.columns.difference([*asked, "trial_id"]):
        values = frame[name].dropna()
        if len(values) and all(isinstance(value, str) and _reads(value) for value in values):
            frame[name] = floats(frame[name], place)
    if "trial_id" in frame and "trial_id" not in others:
        again = frame["trial_id"].duplicated()
        if again.any():
            raise AnalysisError(
                f"{place(int(again.argmax()))}: trial id {frame['trial_id'][again].iloc[0]} stands in "
                "several rows; keep one of each, or name the column that says which rows are one run"
            )
    return frame


def _as_asked(present: Iterable[Any], asked: Iterable[str]) -> dict[str, str]:
    """Heading -> the name that it was asked for by, where only case and blanks differ and only one heading will do."""

    def same(name: str) -> str:
        return " ".join(name.split()).casefold()

    present, found = [str(name) for name in present], {}
    for name in (name for name in asked if name not in present):
        likes = [heading for heading in present if same(heading) == same(name)]
        if len(likes) == 1 and likes[0] not in asked:
            found[likes[0]] = name
    return found


def require_file(path: Path) -> None:
    """Refuse a table that is not there, with the nearest name beside it; a folder has words of its own in `read_table`.

    Raises:
        AnalysisError: there is nothing of this name.
    """
    if not (path.is_file() or path.is_dir()):
        near = nearest_path(path)
        raise AnalysisError(f"{path}: no such file" + (f"; did you mean {near}?" if near else ""))


def _read(path: Path, numbers: Sequence[str]) -> tuple[pd.DataFrame, set[str]]:
    """The table, its index the place of each row in the file, and the headings that stand twice in it."""
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    if path.is_dir():
        raise AnalysisError(f"{path}: is a folder; name the table in it")
    if kind not in SUFFIXES or (packed and kind == ".parquet"):
        raise AnalysisError(f"{path}: give a table as {', '.join(SUFFIXES)}; all but the last may be packed as .gz")
    require_file(path)
    try:
        if kind == ".parquet":
            frame = pd.read_parquet(path)
            return frame.set_axis([f"row {row}" for row in range(1, len(frame) + 1)]), set()
        raw = path.read_bytes()
        text = _text(gzip.decompress(raw) if packed else raw)
        return _csv(text, path, SEPARATORS[kind], numbers) if kind in SEPARATORS else _json(text, path)
    except AnalysisError:
        raise
    except (ValueError, TypeError, OSError, EOFError, zlib.error, csv.Error) as error:
        raise AnalysisError(f"{path}: cannot be read as {kind[1:]}: {' '.join(str(error).split())}") from None


def _text(raw: bytes) -> str:
    encoding = next((encoding for mark, encoding in MARKS.items() if raw.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in raw[:4]:  # UTF-16 without its mark, as no text begins with a zero
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{error}; write it as UTF-8") from None


def _csv(text: str, path: Path, separators: Sequence[str], numbers: Sequence[str]) -> tuple[pd.DataFrame, set[str]]:
    """pandas shifts all columns where rows have more fields than there are headings, so those are counted first."""
    declared = re.match(r'\s*"?sep=([,;\t|])"?[ \t,;]*(?=[\r\n])', text, re.I)  # Excel's own first line
    if declared:
        separators, text = (declared[1],), "\n" * declared[0].count("\n") + text[declared.end() :]
    text = _without_comments(text, separators)
    first = next((line for line in text.splitlines() if line.strip()), "")
    mark = next((mark for mark in separators if len(next(csv.reader([first], delimiter=mark), [])) > 1), separators[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True, skipinitialspace=True)
    rows, lines, line = [], [], 1
    for row in reader:
        if any(field.strip() for field in row):
            rows.append(row)
            lines.append(line)
        line = reader.line_num + 1
    if not rows:
        raise AnalysisError(f"{path}: is empty")
    heading = [name.strip() for name in rows[0]]
    for place, row in zip(lines, rows, strict=True):
        if len(row) != len(heading):
            raise AnalysisError(
                f"{path}: line {place} has {len(row)} fields, but there are {len(heading)} headings; mend the line, "
                f"quote text that holds a {'tab' if mark == chr(9) else mark}, and begin a comment above the headings "
                "with #"
            )
    wanted = {*numbers, *_as_asked(heading, numbers)}
    _write_points(rows[1:], [i for i, name in enumerate(heading) if name in wanted], path, mark)
    again = io.StringIO()
    csv.writer(again).writerows([heading, *rows[1:]])
    again.seek(0)
    frame = pd.read_csv(again, dtype={"trial_id": str}, index_col=False)
    twice = {name for name in heading if name and heading.count(name) > 1}
    return frame.set_axis([f"line {place}" for place in lines[1:]]), twice


def _without_comments(text: str, separators: Sequence[str]) -> str:
    """Comments above the headings made empty lines, so that lines keep their numbers; a `#` before the headings
    themselves is taken off.
    """
    lines = text.splitlines(keepends=True)
    written = [i for i, line in enumerate(lines) if line.strip()]
    comments = [i for i in written if lines[i].lstrip().startswith("#")]
    above = [i for i, j in zip(comments, written, strict=False) if i == j]
    if not above:
        return text
    for i in above:
        lines[i] = "\n"
    last = text.splitlines()[above[-1]].lstrip()[1:]
    following = lines[written[len(above)]] if len(written) > len(above) else ""
    for mark in separators:
        names, values = (next(csv.reader([each], delimiter=mark), []) for each in (last, following))
        if len(names) == len(values) > 1 and not any(map(_reads, names)) and any(map(_reads, values)):
            lines[above[-1]] = f"{last}\n"
            break
    return "".join(lines)


def _reads(text: str) -> bool:
    value = number(text)
    return value is not None and not math.isnan(value)


def _write_points(rows: list[list[str]], places: Sequence[int], path: Path, mark: str) -> None:
    """Where the numbers have decimal commas, as files with semicolons mostly do: writes them with points.

    Raises:
        AnalysisError: it cannot be told, or is not the same throughout.
    """
    fields = [row[place].strip() for row in rows for place in places]
    comma = next(filter(DECIMAL_COMMA.fullmatch, fields), None)
    point = next(filter(DECIMAL_POINT.fullmatch, fields), None)
    unsure = [each for each in fields if re.fullmatch(r"[+-]?\d{1,3}[,.]\d{3}", each)]
    if comma and point:
        raise AnalysisError(
            f"{path}: numbers have a decimal comma ({comma}) and a decimal point ({point}); write all with a point"
        )
    # 2.345 beside 1,000 is a decimal point.
    doubtful = mark == ";" or (mark == "\t" and all("," in each for each in unsure))
    if doubtful and unsure and not (comma or point):
        raise AnalysisError(
            f"{path}: whether {unsure[0]} has a decimal mark or groups of digits cannot be told; write it with neither"
        )
    if comma:
        for row in rows:
            for place in places:
                row[place] = row[place].replace(".", "").replace(",", ".")


def _json(text: str, path: Path) -> tuple[pd.DataFrame, set[str]]:
    """An array of objects, or one object a line."""
    twice: set[str] = set()

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice.update(name for name in names if names.count(name) > 1)
        return dict(pairs)

    if text.lstrip().startswith("["):
        records = json.loads(text, object_pairs_hook=named)
        places = [f"row {row}" for row in range(1, len(records) + 1)]
    else:
        records, places = [], []
        for line, each in enumerate(text.split("\n"), start=1):
            if each.strip():
                try:
                    records.append(json.loads(each, object_pairs_hook=named))
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}; give an array of objects, or one object a line") from None
                places.append(f"line {line}")
    if not records:
        raise AnalysisError(f"{path}: holds no row")
    for place, record in zip(places, records, strict=True):
        if not isinstance(record, dict):
            raise ValueError(f"{place} is no object of names and values")
    if len(records) == 1 and any(isinstance(value, dict | list) for value in records[0].values()):
        raise ValueError("it holds columns; write an array of objects, one a run (in pandas orient='records')")
    frame = pd.DataFrame(records, index=places)
    if "trial_id" in frame:
        frame["trial_id"] = frame["trial_id"].map(str, na_action="ignore")
    return frame, twice
