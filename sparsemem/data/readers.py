"""Documents of one file, by its suffix: plain text, JSON, Parquet; compressed or not; UTF-8, or what a byte-order mark
names.

It must not know which files a study names.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from sparsemem.config import ConfigError, Data
from sparsemem.config.data import BLANK_LINES, separating_pattern
from sparsemem.data.corpus import refused

CHUNK_BYTES = 1 << 20
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_MARKS = {  # UTF-32 before UTF-16, whose mark it begins with
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True)
class Row:
    """One document of a file.

    Attributes:
        name: where it stands in the file, "" where it is the whole file.
        text: in UTF-8; None where the row has none.
    """

    name: str
    text: bytes | None


Reader = Callable[[Path, int, Data], Iterator[Row]]
"""Of a file: its documents, of which the caller takes no more than about so many bytes."""


def kind_of(path: Path) -> str:
    """The suffix in lower case, of a compressed file the one before."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, decompressed and decoded piece by piece.

    Raises:
        ConfigError: naming the byte that is not in the file's encoding.
        OSError: the file is no whole compressed file.
    """
    with opened(path) as stream:
        chunk = stream.read(CHUNK_BYTES)
        mark = next((mark for mark in _MARKS if chunk.startswith(mark)), b"")
        encoding = _MARKS.get(mark, "utf-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        at, chunk = len(mark), chunk[len(mark) :]
        while True:
            pending = len(decoder.getstate()[0])
            wide = "" if mark else _wide(chunk, at)
            try:
                text = decoder.decode(chunk, final=not chunk)
                if wide:  # whose ASCII is UTF-8 too, with zeros between the letters
                    raise UnicodeDecodeError("utf-8", chunk, chunk.index(0), len(chunk), "zero")
            except UnicodeDecodeError as error:
                wrong = f"byte {at - pending + error.start} is not {encoding.upper()}"
                raise refused("files", path.name, f"{wrong}; {_remedy(path.name, chunk, wide, bool(mark))}") from None
            yield text
            if not chunk:
                return
            at += len(chunk)
            chunk = stream.read(CHUNK_BYTES)


def _wide(chunk: bytes, at: int) -> str:
    """The UTF-16 that bytes from place `at` of a file look like, "" for none: one of two holds many zeros, the other
    hardly any.
    """
    first, second = (chunk[start::2].count(0) for start in (at % 2, 1 - at % 2))
    few, many = sorted((first, second))
    return "" if many <= max(10 * few, 8 + len(chunk) // 100) else "UTF-16BE" if first > second else "UTF-16LE"


def _remedy(name: str, chunk: bytes, wide: str, marked: bool) -> str:
    """What to do about bytes that cannot be decoded."""
    if marked:
        return "the file is damaged there, though its byte-order mark names that encoding; write it again, as UTF-8"
    if not wide and b"\0" in chunk:
        return "it holds zero bytes, so it is no text; name a text file (a compressed one ends in .gz or .zst)"
    guess = "it looks like UTF-16 without a byte-order mark; " * bool(wide)
    return f"{guess}convert the file to UTF-8 (such as `iconv -f {wide or 'LATIN1'} -t UTF-8 {name}`)"


def opened(path: Path) -> BinaryIO:
    import pyarrow  # 0.2 s that other corpora need not wait for

    codec = COMPRESSED.get(path.suffix.lower())
    return cast(BinaryIO, pyarrow.CompressedInputStream(path.open("rb"), codec) if codec else path.open("rb"))


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends."""
    rest: list[str] = []
    for piece in _pieces(path):
        *whole, last = piece.split("\n")
        for line in whole:
            yield "".join([*rest, line, "\n"])
            rest.clear()
        rest.append(last)
    if last := "".join(rest):
        yield last


# --- plain text -------------------------------------------------------------------------------------------------------


def _read_text(path: Path, limit: int, data: Data) -> Iterator[Row]:
    if data.document_separator:
        yield from (Row(f":{number}", text.encode()) for number, text in _divided(path, data.document_separator))
        return
    pieces, left = [], limit
    for piece in _pieces(path):
        text = piece.encode()
        pieces.append(
            text if len(text) <= left else codecs.getincrementaldecoder("utf-8")().decode(text[:left]).encode()
        )
        left -= len(text)
        if left <= 0:
            break
    yield Row("", b"".join(pieces))


def _divided(path: Path, separator: str) -> Iterator[tuple[int, str]]:
    """Documents between separating lines, each with the number of its first line. A line that matches a pattern begins
    the next one.
    """
    given = separating_pattern(separator)
    pattern = re.compile(given) if given else None
    first, document = 1, list[str]()
    for number, line in enumerate(_lines(path), 1):
        content = line.strip()
        ends = (
            not content
            if separator == BLANK_LINES
            else bool(pattern.search(content))
            if pattern
            else content == separator
        )
        if ends:
            if any(map(str.strip, document)):
                yield first, "".join(document)
            first, document = number, []
        if not ends or pattern:
            document.append(line)
    if any(map(str.strip, document)):
        yield first, "".join(document)


# --- rows -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, limit: int, data: Data) -> Iterator[Row]:
    """An object a line, or one array of objects, whatever the suffix: both are called `.json`."""
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("["):
        try:
            rows = json.loads("".join([first, *lines]))
        except ValueError as error:
            raise refused(
                "files", path.name, f"not a JSON array ({error}); write it again, or an object a line"
            ) from None
        for number, row in enumerate(rows, 1):
            yield Row(f":{number}", text_of(row, data.text_field, f"element {number} of {path.name}"))
        return
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise refused(
                "files", path.name, f"line {number} is not JSON ({error}); write one object a line, or an array"
            ) from None
        yield Row(f":{number}", text_of(row, data.text_field, f"line {number} of {path.name}"))


def _read_parquet(path: Path, limit: int, data: Data) -> Iterator[Row]:
    import pyarrow.parquet  # 0.3 s that other corpora need not wait for

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = data.text_field if data.text_field in names else data.text_field.partition(".")[0]
            if column not in names:
                raise no_text_field(data.text_field, path.name, names)
            numbers = itertools.count(1)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    number = next(numbers)
                    yield Row(f":{number}", text_of(row, data.text_field, f"row {number} of {path.name}"))
    except pyarrow.ArrowInvalid as error:
        raise refused("files", path.name, f"not a Parquet file ({error}); write it again or narrow the glob") from None


READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".py", ".md"), _read_text),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json),
    ".parquet": _read_parquet,
}


def text_of(row: Any, text_field: str, place: str) -> bytes | None:
    """The text of a row in UTF-8; None where it is null.

    Args:
        text_field: a column, or its dotted path in nested ones.

    Raises:
        ConfigError: there is no such column, or it holds something else.
    """
    value = row
    if isinstance(row, dict) and text_field in row:
        value = row[text_field]
    else:
        for name in text_field.split("."):
            if value is None and row is not None:
                return None  # a group that is null has no text either
            if not isinstance(value, dict) or name not in value:
                raise no_text_field(text_field, place, list(_columns(row)))
            value = value[name]
    if value is None:
        return None
    if not isinstance(value, str):
        raise refused("text_field", text_field, f"{place} holds {type(value).__name__} there; name a column of text")
    return value.encode("utf-8", errors="replace")  # a lone surrogate, which JSON can spell, has no UTF-8


def _columns(row: Any, path: str = "") -> Iterator[str]:
    """Names as `text_field` takes them."""
    for name, value in row.items() if isinstance(row, dict) else ():
        yield from _columns(value, f"{path}{name}.") if isinstance(value, dict) and value else [f"{path}{name}"]


def no_text_field(text_field: str, place: str, known: list[str]) -> ConfigError:
    """The error for a column that is not there."""
    return refused(
        "text_field", text_field, f"{place} has no such column; it has {', '.join(map(str, known)) or 'none'}"
    )
