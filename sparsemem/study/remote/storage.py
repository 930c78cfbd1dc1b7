"""A place that every machine of a study reaches, where they share no disk: a folder, or a bucket of an object store.

Nothing here knows trials. A file appears there whole or not at all, and what fails because the place is away for a
while is tried again.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

from sparsemem.config import ConfigError, Study
from sparsemem.files import write_atomically
from sparsemem.study.ledger import Ledger
from sparsemem.values import parse_storage

T = TypeVar("T")

PATIENCE_SECONDS = 300.0
ATTEMPT_SECONDS = 10.0  # an attempt is given up after so long without a byte
LONGEST_WAIT_SECONDS = 15.0
CHUNK_BYTES = 8 * 2**20


class StorageAway(OSError):
    """The place could not be reached for as long as patience lasted. What it holds is as it was; running
    again goes on.
    """


@dataclass(frozen=True)
class Storage:
    """A study's folder in such a place. Names are relative to it, with forward slashes."""

    uri: str
    """`s3://bucket/prefix?region=...`, `gs://bucket/prefix`, `file:///folder` or the path of a folder; see
    `config.Run.storage`.
    """
    study: str
    patience: float = PATIENCE_SECONDS
    """Seconds for which what fails is tried again, at growing intervals."""

    @classmethod
    def at(cls, address: str) -> Storage:
        """From the address of the study's folder itself, which ends in `/<study>` before any `?`.

        Raises:
            ValueError: see `config.Run.storage`.
        """
        place, question, options = parse_storage(address).partition("?")
        root, _, study = place.rstrip("/").rpartition("/")
        return cls(root + question + options, study)

    def at_once(self, patience: float = 0.0) -> Storage:
        """The same place with other patience; none: each failure is the caller's."""
        return replace(self, patience=patience)

    def write(self, name: str, content: bytes) -> None:
        self._patiently(lambda: self._write(name, lambda stream: stream.write(content)))

    def put(self, path: Path, name: str) -> None:
        """Copy a local file there, as it is when an attempt begins.

        Raises:
            FileNotFoundError: there is no such local file.
        """

        def attempt() -> None:
            with open(path, "rb") as file:
                self._write(name, lambda stream: shutil.copyfileobj(file, stream, CHUNK_BYTES))

        self._patiently(attempt)

    def read(self, name: str) -> bytes:
        """
        Raises:
            FileNotFoundError: there is no such file.
        """
        return self._patiently(lambda: self._read(name, lambda stream: stream.read()))

    def get(self, name: str, path: Path) -> None:
        """Copy a file from there, whole or not at all.

        Raises:
            FileNotFoundError: there is no such file.
        """

        def copy(stream: BinaryIO) -> None:
            write_atomically(path, lambda file: shutil.copyfileobj(stream, file, CHUNK_BYTES))

        path.parent.mkdir(parents=True, exist_ok=True)
        self._patiently(lambda: self._read(name, copy))

    def list(self, folder: str = "") -> dict[str, tuple[int, int]]:
        """Names of all files below a folder, each with what changes when the file does."""
        from pyarrow.fs import FileSelector

        def attempt() -> dict[str, tuple[int, int]]:
            system, root = self._open
            found = system.get_file_info(
                FileSelector(f"{root}/{folder}".rstrip("/"), allow_not_found=True, recursive=True)
            )
            return {info.path[len(root) + 1 :]: (info.size, info.mtime_ns) for info in found if info.is_file}

        return self._patiently(attempt)

    def move(self, name: str, new: str) -> None:
        """Rename a file, replacing what has the new name; an object store copies it on its own side."""
        system, root = self._open
        self._patiently(lambda: system.move(f"{root}/{name}", f"{root}/{new}"))

    def delete(self, name: str) -> None:
        """Where it exists."""
        system, root = self._open
        with contextlib.suppress(FileNotFoundError):
            self._patiently(lambda: system.delete_file(f"{root}/{name}"))

    def create(self) -> None:
        """Make the study's folder where there is a need to; the place itself must exist.

        Raises:
            FileNotFoundError: it does not.
        """
        system, root = self._opened
        if system.type_name == "local":
            Path(root).mkdir(exist_ok=True)

    # --- one attempt ---

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """File system, and the study's folder in it."""
        from pyarrow import fs

        parts = urlsplit(self.uri)
        options = dict(parse_qsl(parts.query))
        if parts.scheme == "s3":  # opened from an address it would wait for minutes inside of one attempt
            region = options.pop("region", None) or (None if options else fs.resolve_s3_region(parts.netloc))
            retry = fs.AwsStandardS3RetryStrategy(max_attempts=1)
            times = {"connect_timeout": ATTEMPT_SECONDS, "request_timeout": ATTEMPT_SECONDS, "retry_strategy": retry}
            system, place = fs.S3FileSystem(region=region, **times, **options), parts.netloc + unquote(parts.path)
        elif parts.scheme == "gs":
            system = fs.GcsFileSystem(retry_time_limit=timedelta(seconds=ATTEMPT_SECONDS), **options)
            place = parts.netloc + unquote(parts.path)
        else:
            system, place = fs.LocalFileSystem(), unquote(parts.path) if parts.scheme else self.uri
        return system, f"{place.rstrip('/')}/{self.study}"

    @property
    def _open(self) -> tuple[Any, str]:
        """
        Raises:
            OSError: a shared folder is not mounted at the moment; what would be written there would be lost.
        """
        system, root = self._opened
        if system.type_name == "local" and not Path(root).is_dir():
            raise OSError(f"{root} is not there")
        return system, root

    def _write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        system, root = self._open
        path = f"{root}/{name}"
        if system.type_name != "local":  # an object appears when its stream is closed
            stream = system.open_output_stream(path)
            try:
                with stream:
                    fill(stream)
            except BaseException:  # closing has made an object of what was sent
                with contextlib.suppress(OSError):
                    system.delete_file(path)
                raise
            return
        folder, _, last = path.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid4().hex}"
        system.create_dir(folder)
        try:
            with system.open_output_stream(temporary) as stream:
                fill(stream)
            system.move(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _read(self, name: str, use: Callable[[Any], T]) -> T:
        system, root = self._open
        with system.open_input_stream(f"{root}/{name}") as stream:
            return use(stream)

    def _patiently(self, attempt: Callable[[], T]) -> T:
        deadline, wait = time.monotonic() + self.patience, 0.25
        while True:
            try:
                return attempt()
            except FileNotFoundError:
                raise
            except OSError as error:
                if time.monotonic() + wait > deadline:
                    raise StorageAway(
                        f"the storage {self.uri} could not be reached for {self.patience:.0f} s: {error}"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def storage_of(study: Study, base: Path, ledger: Ledger) -> Storage | None:
    """What `run.storage` names.

    Raises:
        ConfigError: it is the results folder.
    """
    uri = study.run.storage
    if uri and "://" not in uri:
        uri = str((base / uri).resolve())
        if Path(uri) / study.study == ledger.folder.resolve():
            raise ConfigError(
                f"field `run.storage` has the value {study.run.storage!r}: that is the results folder; name another one"
            )
    return Storage(uri, study.study) if uri else None
