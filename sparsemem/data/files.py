"""The corpus `files`: the user's own text. It is named by what the files hold, not by what they are called. It must not
know tokens.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from sparsemem.config import Data, nearest_path
from sparsemem.data.corpus import Corpus, Document, refused
from sparsemem.data.readers import CHUNK_BYTES, COMPRESSED, READERS, kind_of, opened

MOST_NAMES = 4  # of files that are read in part, in a remark
# times `max_bytes` up to which the text of rows is counted: a column of text may be little of its file, or more than it
COUNTED = 4
READ_AHEAD = 1.5  # text read of the user's files over what is kept: room for what de-duplication drops

SHORT_PARAGRAPH = 100  # bytes
FEW_COPIES = 0.01  # of the text: fewer copies inside documents are not told

# part of the digest: what is read and held out follows from content and sizes, not from names
SPLIT = "by size, no short ends"


def open_files(config: Data, base: Path) -> Corpus:
    """See `prepare.open_corpus`."""
    held = _matches("validation_files", config.validation_files, base)
    train = {name: path for name, path in _matches("files", config.files, base).items() if name not in held}
    if not train:
        raise refused("files", list(config.files), "`validation_files` holds all of these out; name some to train on")
    digests = {name: _file_digest(path) for name, path in (train | held).items()}
    sizes = {name: _size(path, config) for name, path in (train | held).items()}
    remarks, unread = list[str](), dict[str, int]()
    levelled = [len(side) > 1 and sum(sizes[name] for name in side) > config.max_bytes for side in (train, held)]

    def read(paths: dict[str, Path], limit: int, level: bool) -> list[Document]:
        return _read(config, paths, digests, sizes, limit, level, remarks, unread)

    def identity(paths: dict[str, Path]) -> list[list[str]]:
        return sorted([digests[name], READERS[kind_of(path)].__name__] for name, path in paths.items())

    return Corpus(
        identity=[SPLIT, identity(train), identity(held), *(["levelled"] if any(levelled) else [])],
        versions={name: digest[:12] for name, digest in digests.items()},
        documents=lambda: read(train, round(config.max_bytes * READ_AHEAD), levelled[0]),
        validation=(lambda: read(held, config.max_bytes, levelled[1])) if held else None,
        remarks=remarks,
        unread=unread,
    )


def matching(pattern: str, base: Path) -> list[Path]:
    """Files that a glob matches, relative to a folder whose own name is no pattern; a file of that very name comes
    first.
    """
    if os.path.isfile(base / pattern):
        return [base / pattern]
    return [
        Path(match)
        for match in glob.glob(os.path.join(glob.escape(str(base)), pattern), recursive=True)
        if os.path.isfile(match)
    ]


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
    if near := nearest_path(pattern, base):
        return f"no file matches it in {base}; did you mean '{near}'?"
    return f"no file matches it in {base}; write globs relative to the study's file, such as 'corpus/*.txt'"


def _read(
    config: Data,
    paths: dict[str, Path],
    digests: dict[str, str],
    sizes: dict[str, int],
    limit: int,
    level: bool,
    remarks: list[str],
    unread: dict[str, int],
) -> list[Document]:
    """Documents of the files, of all together about `limit` bytes.

    Args:
        sizes: about, of each file's text.
        level: each file gives its first bytes before any gives more, as small ones leave room for large ones.
        unread: receives what was left of each file, about.
    """
    documents, copied = list[Document](), dict[str, int]()
    names = sorted(paths, key=lambda name: (sizes[name] * level, digests[name], name))
    for place, name in enumerate(names):
        room = limit // (len(names) - place) if level else limit
        if room <= 0:
            unread[name] = sizes[name]
            continue
        found, empty, taken = [], 0, 0
        try:
            for row in READERS[kind_of(paths[name])](paths[name], room, config):
                if row.text is None:
                    empty += 1
                    continue
                taken += len(row.text)
                if row.text.strip():
                    found.append(Document(name, digests[name], row.name, len(row.text), row.text))
                if taken >= room:
                    if sizes[name] > taken:
                        unread[name] = sizes[name] - taken
                    break
        except (OSError, EOFError) as error:
            remedy = (
                f"the file cannot be read ({getattr(error, 'strerror', None) or error}); repair it or narrow the glob"
            )
            raise refused("files", name, remedy) from None
        if (
            len(found) == 1
            and is_undivided(config, paths[name])
            and (copies := _copied_paragraphs(found[0].read() or b""))
        ):
            copied[name] = copies
        if empty and not found:
            raise refused(
                "text_field", config.text_field, f"all {empty} rows of {name} are null there; name the column of text"
            )
        if empty:
            remarks.append(f"{name}: {empty} rows skipped whose `{config.text_field}` is null")
        documents += found
        limit -= taken
    if sum(copied.values()) >= FEW_COPIES * max(1, sum(document.size for document in documents)):
        first, *others = sorted(copied, key=lambda name: (-copied[name], digests[name]))
        more = f" and {len(others)} more" if others else ""
        remarks.append(
            f"{sum(copied.values()):,} bytes of paragraphs stand again in one document, {first}{more}; copies are "
            "dropped by document, and `data.document_separator: blank lines` makes each paragraph one"
        )
    if cut := sorted((name for name in paths if name in unread), key=lambda name: (-unread[name], digests[name])):
        parts = ", ".join(
            f"{sizes[name] - unread[name]:,} of about {sizes[name]:,} bytes of {name}" for name in cut[:MOST_NAMES]
        )
        more = f" and parts of {len(cut) - MOST_NAMES} more" if len(cut) > MOST_NAMES else ""
        remarks.append(f"read {parts}{more}: what was read suffices for `data.max_bytes` {config.max_bytes:,}")
    return documents


def is_undivided(config: Data, *files: Path) -> bool:
    """Whether a file, or any that `data.files` may match, is one document as its text is not divided."""
    text, kinds = READERS[".txt"], {kind_of(path) for path in (files or map(Path, config.files))}
    return config.document_separator is None and any(READERS.get(kind, text) is text for kind in kinds)


def _copied_paragraphs(text: bytes) -> int:
    """Bytes of the paragraphs between blank lines that stand in a text before; short ones, such as headings, are alike
    in any.
    """
    paragraphs = [part for each in re.split(rb"\n[ \t\r]*\n", text) if len(part := each.strip()) >= SHORT_PARAGRAPH]
    return sum(map(len, paragraphs)) - sum(map(len, set(paragraphs)))


def _size(path: Path, config: Data) -> int:
    """Bytes of a file's text: of plain text as it lies on the disk, decompressed; of rows what their texts hold, about
    where they are more than `COUNTED` times what is kept.
    """
    status = path.stat()
    most = 0 if READERS[kind_of(path)] is READERS[".txt"] else COUNTED * config.max_bytes
    return _text_bytes(path, config, most, status.st_mtime_ns, status.st_size)


@functools.cache
def _text_bytes(path: Path, config: Data, most: int, changed: int, size: int) -> int:
    try:
        if not most:
            if path.suffix.lower() not in COMPRESSED:
                return size
            with opened(path) as stream:
                return sum(map(len, iter(lambda: stream.read(CHUNK_BYTES), b"")))
        taken = 0
        for row in READERS[kind_of(path)](path, most, config):
            taken += len(row.text or b"")
            if taken >= most:
                return max(taken, size)
    except (OSError, EOFError):
        return size  # reading it refuses it
    return taken


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refused(
            "files", path.name, f"the file cannot be read ({error.strerror}); allow it or narrow the glob"
        ) from None
