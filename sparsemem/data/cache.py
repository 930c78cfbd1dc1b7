"""Where prepared corpora lie: a folder each, named by its digest, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sparsemem.config import ConfigError
from sparsemem.locks import locked

STORED = ("train.npy", "val.npy", "val_bytes.npy", "canonical.npy", "tokenizer.json")


def kept_folder(digest: str, cache: Path | None = None) -> Path | None:
    """The prepared corpus of that digest where the cache has it whole, whatever has become of its text."""
    folder = (cache or cache_folder()) / digest
    return folder if _is_whole(folder, digest) else None


def whole_folder(digest: str, fill: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The prepared corpus of that digest; where it is missing or damaged, `fill` writes it into an empty folder that
    then takes its place.

    Raises:
        OSError: `fill` did not write all of it.
    """
    cache = cache or cache_folder()
    folder = cache / digest
    with _lock(cache, digest):
        if not _is_whole(folder, digest):
            shutil.rmtree(folder, ignore_errors=True)
            for left_over in cache.glob(f".{digest}.*"):  # of a builder that was killed
                shutil.rmtree(left_over, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{digest}.", dir=cache))
            try:
                fill(temporary)
                if not _is_whole(temporary, digest):
                    raise OSError(f"the corpus {digest} is not whole where it was copied from")
                temporary.chmod(0o755)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """Of this machine.

    Raises:
        ConfigError: none is given, and the user has no home.
    """
    if given := os.environ.get("SPARSEMEM_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "sparsemem"
    except RuntimeError:  # neither HOME nor an entry among the users, as in a container
        raise ConfigError(
            "there is no home folder to keep prepared texts in; set SPARSEMEM_CACHE to a folder that can be written"
        ) from None


@contextmanager
def _lock(cache: Path, digest: str) -> Iterator[None]:
    """Wait for other builders of the same tokens. The system frees the lock of a process that dies."""
    with ExitStack() as held:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(cache / f"{digest}.lock"))
        except OSError as error:
            raise ConfigError(
                f"the cache folder {cache} cannot be written ({error.strerror}); set SPARSEMEM_CACHE to one that can"
            ) from None
        yield


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["digest"] == digest and all(
            (folder / name).stat().st_size == manifest["stored"][name] for name in STORED
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False
