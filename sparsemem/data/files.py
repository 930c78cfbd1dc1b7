"""The corpus `files`: the user's own text. It must not know tokens."""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Data
from sparsemem.data.corpus import Corpus, Document, refused, stable_order

UNITS_OF_FILES = 8  # from so many files on, whole files are held out; below, documents
READ_AHEAD = 1.5  # text read of the user's files over what is kept: room for what de-duplication drops


def open_files(config: Data, base: Path) -> Corpus:
    paths: dict[str, Path] = {}
    for pattern in config.files:
        matches = [Path(match) for match in glob.glob(str(base / pattern), recursive=True) if os.path.isfile(match)]
        if not matches:
            remedy = f"no file matches it in {base}; write globs relative to the study's file, such as 'corpus/*.txt'"
            raise refused("files", pattern, remedy)
        paths |= {Path(os.path.relpath(match, base)).as_posix(): match for match in matches}
    for name in paths:
        if Path(name).suffix not in _READERS:
            raise refused("files", name, f"the suffix is none of {', '.join(_READERS)}; convert the file or narrow the glob")
    try:
        versions = {name: _file_digest(path) for name, path in sorted(paths.items())}
    except OSError as error:
        raise refused("files", error.filename, f"the file cannot be read ({error.strerror}); allow it or narrow the glob") from None

    def documents() -> list[Document]:
        limit = round(config.max_bytes * READ_AHEAD)
        rows: list[tuple[str, str, bytes]] = []
        for name in sorted(paths, key=stable_order):
            if limit <= 0:
                break
            reader = _READERS[Path(name).suffix]
            try:
                for row, text in reader(paths[name], limit, config.text_field):
                    rows.append((name, row, text))
                    limit -= len(text)
                    if limit <= 0:
                        break
            except OSError as error:
                raise refused("files", name, f"the file cannot be read ({error.strerror or error}); repair it or narrow the glob") from None
        by_file = len({name for name, _, _ in rows}) >= UNITS_OF_FILES
        return [Document(name, name if by_file else name + row, row, len(text), text) for name, row, text in rows if text.strip()]

    return Corpus(versions, {name: digest[:12] for name, digest in versions.items()}, documents)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# A reader yields (row, text): row is "" where the file is one document.
Reader = Callable[[Path, int, str], Iterator[tuple[str, bytes]]]


def _read_text(path: Path, limit: int, text_field: str) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        data = file.read(limit)
    try:
        yield "", codecs.getincrementaldecoder("utf-8")().decode(data).encode()  # without a character that `limit` cut in two
    except UnicodeDecodeError as error:
        raise refused("files", path.name, f"byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def _read_jsonl(path: Path, limit: int, text_field: str) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise refused("files", path.name, f"line {number} is not JSON ({error}); a .jsonl file holds one object a line") from None
            yield f":{number}", text_of(row, text_field, f"line {number} of {path.name}")


def _read_parquet(path: Path, limit: int, text_field: str) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet  # 0.3 s that other corpora need not wait for

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise _no_text_field(text_field, path.name, file.schema_arrow.names)
            numbers = itertools.count(1)
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for row in batch.to_pylist():
                    number = next(numbers)
                    yield f":{number}", text_of(row, text_field, f"row {number} of {path.name}")
    except pyarrow.ArrowInvalid as error:
        raise refused("files", path.name, f"not a Parquet file ({error}); write it again or narrow the glob") from None


_READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".py": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def text_of(row: Any, text_field: str, place: str) -> bytes:
    if not isinstance(row, dict) or text_field not in row:
        raise _no_text_field(text_field, place, list(row) if isinstance(row, dict) else [])
    text = row[text_field]
    if not isinstance(text, str):
        raise refused("text_field", text_field, f"{place} holds {type(text).__name__} there; name a column of text")
    return text.encode("utf-8", errors="replace")  # a lone surrogate, which JSON can spell, has no UTF-8


def _no_text_field(text_field: str, place: str, known: list[str]) -> ConfigError:
    return refused("text_field", text_field, f"{place} has no such column; it has {', '.join(map(str, known)) or 'none'}")
