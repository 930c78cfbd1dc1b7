"""Atomic writes: a reader sees the old file or the new one, never half of one; and what killed writers leave is
removed.

A writer holds a lock on its temporary file or folder; the system drops it when the process ends, however it ends. Where
the file system has no locks, what killed writers leave stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsemem.locks import flock

TEMPORARY = ".tmp"
SCRATCH_LOCK = "in-use"


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], check: Callable[[Path], object] = lambda temporary: None
) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, let `check` look at it, then move it into
    place.

    Raises:
        OSError: the disk is full or the folder is not writable; `path` is untouched then.
    """
    with _naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                flock(file, fcntl.LOCK_EX)
                write(file)
                file.flush()
                os.fsync(file.fileno())
                check(Path(temporary))
                os.chmod(temporary, 0o666 & ~_umask())
                os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def or_warn(write: Callable[..., object], *arguments: Any) -> None:
    """Write what is not worth ending for: a failure to do so is named on stderr."""
    try:
        write(*arguments)
    except OSError as error:
        with contextlib.suppress(OSError):  # the log may lie on the same full disk
            print(f"warning: {error}", file=sys.stderr, flush=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left in this folder."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                path.unlink()


@contextlib.contextmanager
def scratch_folder(parent: Path | None, prefix: str) -> Iterator[Path]:
    """A temporary folder that goes with the body; those of killed processes in `parent` (default: the system's) are
    removed first.
    """
    for left in Path(parent or tempfile.gettempdir()).glob(f"{prefix}*/{SCRATCH_LOCK}"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            if flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            flock(file, fcntl.LOCK_EX)
            os.rename(
                file.name, folder / SCRATCH_LOCK
            )  # never seen unlocked, or another process would take it for left
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Not-a-number is refused: JSON has no word for it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A failed write does not say by itself which file it was."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"disk full ({error.strerror})", str(path)) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def set_aside(path: Path) -> Path:
    """Rename a damaged file to the first free `NAME.corrupt-N` beside it and return that path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    return path.rename(aside)
