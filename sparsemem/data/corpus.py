"""Where text comes from: installed Python source, the user's files, a Hugging Face data set.

- `open_corpus` says what the text is (`Corpus.identity`, cheap: nothing is read but the digests of the user's own files) and
  lists its documents when asked. What is kept of them, and on which side of the split, is for `selection`.
- A document belongs to a `unit`, the thing that is held out whole: a package, a file, or the document itself.

It must not know tokens.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sparsemem.config import ConfigError, Data

MIN_SOURCE_BYTES = 256  # shorter modules are licence headers and re-exports
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # tests: tables of near-repeated cases
OWN_DISTRIBUTION = "sparsemem"  # its text would change with every commit
UNITS_OF_FILES = 8  # from so many files on, whole files are held out; below, documents
READ_AHEAD = 1.5  # text read of the user's files over what is kept: room for what de-duplication drops


@dataclass(frozen=True)
class Document:
    """One text, read when asked for.

    Attributes:
        package: what the manifest counts it under (a package, a file, a data set).
        unit: what is held out whole; names a part of the package or the package itself.
        name: distinguishes the documents of a unit, the same on every machine.
        size: bytes, known before reading.
        source: the text in UTF-8, or the file that holds it.
    """

    package: str
    unit: str
    name: str
    size: int
    source: Path | bytes

    def read(self) -> bytes | None:
        """The text in UTF-8; None where a file is unreadable or holds another encoding (a few old modules do)."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            text = self.source.read_bytes()
            text.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        return text


@dataclass(frozen=True)
class Corpus:
    """A corpus that is named but not yet read.

    Attributes:
        identity: JSON value that differs where the text differs.
        versions: package -> version, for the manifest.
        documents: lists the documents. Raises ConfigError as `open_corpus` does.
    """

    identity: Any
    versions: dict[str, str]
    documents: Callable[[], list[Document]]


def refused(field: str, value: Any, remedy: str) -> ConfigError:
    """The error for one field of `data`."""
    return ConfigError(f"field `data.{field}` has the value {value!r}: {remedy}")


def open_corpus(config: Data, base: Path) -> Corpus:
    """Name the corpus of a study.

    Args:
        config: the study's data.
        base: the folder that relative globs start from.

    Raises:
        ConfigError: no file matches, a file has another suffix or cannot be read, a row lacks the text field, the `hub` extra is missing.
    """
    return {"python-source": _open_python_source, "files": _open_files, "hub": _open_hub}[config.corpus](config, base)


# --- python-source ----------------------------------------------------------------------------------------------------------


def _open_python_source(config: Data, base: Path) -> Corpus:
    distributions = _distributions()
    versions = {name: distribution.version for name, distribution in sorted(distributions.items())}
    modules = _standard_library()
    python = platform.python_version()

    def documents() -> list[Document]:
        found = [file for name, distribution in distributions.items() for file in _distribution_files(name, distribution)]
        return found + [file for name, path in modules.items() for file in _module_files(name, path)]

    return Corpus({"python": python, "packages": versions}, {**versions, **dict.fromkeys(modules, python)}, documents)


def _distributions() -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions by normalised name. Editable ones are left out: their text changes under an unchanged version."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name != OWN_DISTRIBUTION and name not in found and not _is_editable(distribution):
            found[name] = distribution
    return found


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    try:
        return bool(json.loads(distribution.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False


def _distribution_files(name: str, distribution: importlib.metadata.Distribution) -> Iterator[Document]:
    # `Distribution.files` asks the disk about every entry, 25 s on a cold disk; its RECORD already holds names and sizes.
    record = distribution.read_text("RECORD")
    if record:
        entries = ((row[0], int(row[2]) if row[2:] and row[2].isdigit() else None) for row in csv.reader(record.splitlines()) if row)
    else:
        entries = ((file.as_posix(), None) for file in distribution.files or ())
    for file, size in entries:
        parts = PurePosixPath(file).parts
        if not file.endswith(".py") or ".." in parts or not SKIPPED_FOLDERS.isdisjoint(parts[:-1]):
            continue
        path = Path(str(distribution.locate_file(file)))
        if size is None:
            size = path.stat().st_size if path.is_file() else 0
        if size >= MIN_SOURCE_BYTES:
            yield Document(name, name, file, size, path)


def _standard_library() -> dict[str, Path]:
    """The standard library as packages: `stdlib/json` -> its folder, `stdlib/argparse` -> its file."""
    found = {}
    for entry in Path(sysconfig.get_path("stdlib")).iterdir():
        name = entry.stem if entry.suffix == ".py" else entry.name
        if name.isidentifier() and name not in SKIPPED_FOLDERS and (entry.suffix == ".py" or entry.is_dir()):
            found[f"stdlib/{name}"] = entry
    return dict(sorted(found.items()))


def _module_files(name: str, path: Path) -> Iterator[Document]:
    if path.is_file():
        files = [path]
    else:
        files = []
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = [inner for inner in subfolders if inner not in SKIPPED_FOLDERS]
            files += [Path(folder, file) for file in names if file.endswith(".py")]
    for file in files:
        size = file.stat().st_size
        if size >= MIN_SOURCE_BYTES:
            yield Document(name, name, file.relative_to(path.parent).as_posix(), size, file)


# --- files ------------------------------------------------------------------------------------------------------------------


def _open_files(config: Data, base: Path) -> Corpus:
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
            yield f":{number}", _text_of(row, text_field, f"line {number} of {path.name}")


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
                    yield f":{number}", _text_of(row, text_field, f"row {number} of {path.name}")
    except pyarrow.ArrowInvalid as error:
        raise refused("files", path.name, f"not a Parquet file ({error}); write it again or narrow the glob") from None


_READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".py": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text_of(row: Any, text_field: str, place: str) -> bytes:
    if not isinstance(row, dict) or text_field not in row:
        raise _no_text_field(text_field, place, list(row) if isinstance(row, dict) else [])
    text = row[text_field]
    if not isinstance(text, str):
        raise refused("text_field", text_field, f"{place} holds {type(text).__name__} there; name a column of text")
    return text.encode("utf-8", errors="replace")  # a lone surrogate, which JSON can spell, has no UTF-8


def _no_text_field(text_field: str, place: str, known: list[str]) -> ConfigError:
    return refused("text_field", text_field, f"{place} has no such column; it has {', '.join(map(str, known)) or 'none'}")


# --- hub --------------------------------------------------------------------------------------------------------------------


def _open_hub(config: Data, base: Path) -> Corpus:
    name, revision = str(config.dataset), str(config.revision)

    def documents() -> list[Document]:
        try:
            import datasets
        except ImportError:
            raise refused("corpus", "hub", "it needs the package `datasets`; install it with `pip install 'sparsemem[hub]'`") from None
        limit = round(config.max_bytes * READ_AHEAD)
        found = []
        try:
            rows = datasets.load_dataset(name, config.subset, split=config.split, revision=revision, streaming=True)
            for number, row in enumerate(rows, 1):
                text = _text_of(row, config.text_field, f"row {number} of {name}")
                if text.strip():
                    found.append(Document(name, f"{name}:{number}", "", len(text), text))
                limit -= len(text)
                if limit <= 0:
                    break
        except ConfigError:
            raise
        except Exception as error:  # the library and its network raise dozens of kinds
            remedy = "check `dataset`, `subset`, `split` and `revision`, and the network"
            raise refused("dataset", name, f"it cannot be read ({type(error).__name__}: {error}); {remedy}") from error
        return found

    return Corpus([name, config.subset, revision, config.split], {name: revision}, documents)


def stable_order(name: str) -> bytes:
    """A sort key: an order that looks random, is the same on every machine, and does not move when names are added."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
