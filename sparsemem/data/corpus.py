"""What a corpus is: documents that are listed before they are read, and a name that differs where the text differs.

- `python_source`, `files` and `hub` list the documents. What is kept of them, and on which side of the split, is for
  `selection`.
- A document belongs to a `unit`, the thing that is held out whole: a package, a file, or the document itself.

It must not know tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError


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
        documents: lists the documents. Raises ConfigError as `prepare.open_corpus` does.
        validation: lists those that are held out, where the user names them.
        remarks: what listing them left out, a line each.
        unread: bytes of each file that listing them left unread, about.
    """

    identity: Any
    versions: dict[str, str]
    documents: Callable[[], list[Document]]
    validation: Callable[[], list[Document]] | None = None
    remarks: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)


def refused(field: str, value: Any, remedy: str) -> ConfigError:
    """The error for one field of `data`."""
    return ConfigError(f"field `data.{field}` has the value {value!r}: {remedy}")


def stable_order(name: str) -> bytes:
    """A sort key: an order that looks random, is the same on every machine, and does not move when names are added."""
    return hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
