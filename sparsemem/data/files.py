"""The corpus `files`: the user's own text. It is named by what the files hold, not by what they are called. It must not know tokens."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from sparsemem.config import Data
from sparsemem.data.corpus import Corpus, Document, refused
from sparsemem.data.readers import COMPRESSED, READERS, kind_of

READ_AHEAD = 1.5  # text read of the user's files over what is kept: room for what de-duplication drops


SPLIT = "by size, no short ends"  # part of the digest: what is read and held out follows from content and sizes, not from names


def open_files(config: Data, base: Path) -> Corpus:
    """See `prepare.open_corpus`."""
    held = _matches("validation_files", config.validation_files, base)
    train = {name: path for name, path in _matches("files", config.files, base).items() if name not in held}
    if not train:
        raise refused("files", list(config.files), "`validation_files` holds all of these out; name some to train on")
    digests = {name: _file_digest(path) for name, path in (train | held).items()}
    remarks: list[str] = []

    def identity(paths: dict[str, Path]) -> list[list[str]]:
        return sorted([digests[name], READERS[kind_of(path)].__name__] for name, path in paths.items())

    return Corpus(
        identity=[SPLIT, identity(train), identity(held)],
        versions={name: digest[:12] for name, digest in digests.items()},
        documents=lambda: _read(config, train, digests, round(config.max_bytes * READ_AHEAD), remarks),
        validation=(lambda: _read(config, held, digests, config.max_bytes, remarks)) if held else None,
        remarks=remarks,
    )


def matching(pattern: str, base: Path) -> list[Path]:
    """Files that a glob matches, relative to a folder whose own name is no pattern; a file of that very name comes first."""
    if os.path.isfile(base / pattern):
        return [base / pattern]
    return [Path(match) for match in glob.glob(os.path.join(glob.escape(str(base)), pattern), recursive=True) if os.path.isfile(match)]


def _matches(field: str, patterns: Sequence[str], base: Path) -> dict[str, Path]:
    """Files by their path relative to `base`, all of kinds that can be read.

    Raises:
        ConfigError: a pattern matches no file, or one that cannot be read.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = matching(pattern, base)
        if not matches:
            raise refused(field, pattern, _no_match(pattern, base))
        found |= {Path(os.path.relpath(match, base)).as_posix(): match for match in sorted(matches)}
    for name, path in found.items():
        if kind_of(path) not in READERS:
            kinds = f"{', '.join(READERS)}, also compressed ({', '.join(COMPRESSED)})"
            raise refused(field, name, f"the suffix is none of {kinds}; convert the file or narrow the glob")
    return found


def _no_match(pattern: str, base: Path) -> str:
    if os.path.isdir(base / pattern):
        return f"it is a folder; write the files in it, such as '{pattern.rstrip('/')}/**/*.txt'"
    if os.path.islink(base / pattern):
        return f"it is a link to {os.readlink(base / pattern)!r}, where there is no file; mend the link"
    return f"no file matches it in {base}; write globs relative to the study's file, such as 'corpus/*.txt'"


def _read(config: Data, paths: dict[str, Path], digests: dict[str, str], limit: int, remarks: list[str]) -> list[Document]:
    """Documents of the files, of all together about `limit` bytes."""
    documents: list[Document] = []
    unread, stopped_in = 0, ""
    for name in sorted(paths, key=lambda name: (digests[name], name)):
        if limit <= 0:
            unread += paths[name].stat().st_size
            continue
        found, empty = [], 0
        try:
            for row in READERS[kind_of(paths[name])](paths[name], limit, config):
                if row.text is None:
                    empty += 1
                    continue
                limit -= len(row.text)
                if row.text.strip():
                    found.append(Document(name, digests[name], row.name, len(row.text), row.text))
                if limit <= 0:
                    stopped_in = name
                    break
        except (OSError, EOFError) as error:
            remedy = f"the file cannot be read ({getattr(error, 'strerror', None) or error}); repair it or narrow the glob"
            raise refused("files", name, remedy) from None
        if empty and not found:
            raise refused("text_field", config.text_field, f"all {empty} rows of {name} are null there; name the column of text")
        if empty:
            remarks.append(f"{name}: {empty} rows skipped whose `{config.text_field}` is null")
        documents += found
    if stopped_in:
        others = f", {unread / 1e6:.2f} MB of other files not read" if unread else ""
        remarks.append(f"reading stopped in {stopped_in}{others}: what was read suffices for `data.max_bytes` {config.max_bytes:,}")
    return documents


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refused("files", path.name, f"the file cannot be read ({error.strerror}); allow it or narrow the glob") from None
