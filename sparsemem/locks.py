"""Locks on files, also where the file system has none of the system's (NFS and Lustre without a lock service answer
ENOLCK or ENOSYS).

The system drops its lock when the process ends, however it ends. In its place stands a marker beside the file, which
its holder renews: one that is not renewed is taken over, on the same machine at once where its process is gone.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
LEASE_SECONDS = 20.0  # a marker that was not renewed for so long is nobody's
RENEWED_SECONDS = 4.0


def flock(file: IO[Any], how: int) -> bool:
    """Lock an open file. Returns False where its file system has no locks.

    Args:
        how: as `fcntl.flock` takes it.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return False
        raise
    return True


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[IO[str]]:
    """Hold the lock of this file, which is made where there is none, and is open in the body to be read and written.

    Args:
        wait: until another process lets go of it; else a marker is watched for `LEASE_SECONDS` and a little more.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file cannot be opened.
    """
    with open(path, "a+", encoding="utf-8") as file:
        if flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            yield file
            return
        from filelock import SoftFileLease, Timeout

        lease = SoftFileLease(_marker(path), lease_duration=LEASE_SECONDS, heartbeat_interval=RENEWED_SECONDS)
        try:
            lease.acquire(timeout=-1 if wait else 1.5 * LEASE_SECONDS)
        except Timeout:
            raise BlockingIOError(errno.EAGAIN, "another process holds it", str(path)) from None
        try:
            yield file
        finally:
            lease.release()


def is_held(path: Path) -> bool:
    """Whether a process holds this lock. Nothing is written."""
    try:
        with open(path, encoding="utf-8") as file:
            if flock(
                file, fcntl.LOCK_SH | fcntl.LOCK_NB
            ):  # shared and for an instant: who wants it now only waits for it
                return False
        return time.time() - _marker(path).stat().st_mtime < LEASE_SECONDS
    except BlockingIOError:
        return True
    except OSError:
        return False


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.held")
