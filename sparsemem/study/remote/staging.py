"""A worker's side of the exchange: a job's files are brought to its machine, and what training writes is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from sparsemem.files import scratch_folder
from sparsemem.study.jobs import Job
from sparsemem.study.remote.exchange import NAMES, every, heartbeat
from sparsemem.study.remote.storage import Storage

SEND_SECONDS = 1.0
OWN = ("lock", "trial.yaml", "result.json", "log.txt")
"""Of a trial's folder, what a worker does not send as it changes: `result.json` comes last, the rest is
the driver's.
"""


@contextmanager
def staged(job: Job) -> Iterator[Job]:
    """The job with folders of this machine; what its training writes is sent as it appears, and at the end of the body
    all the rest.

    Raises:
        StorageAway: at either end the storage could not be reached; what was sent is there, and the trial goes on from
            that.
    """
    from sparsemem.data.cache import cache_folder, whole_folder

    assert job.storage is not None
    storage, trial = Storage(job.storage, job.trial_folder.parents[1].name), f"trials/{job.trial_folder.name}"
    digest = job.tokens_folder.name

    scratch = cache_folder() / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with scratch_folder(scratch, "trial-") as own, heartbeat(storage, f"{trial}/beat.json"):
        folder = own / "trial"
        folder.mkdir()
        for name in storage.list(trial):
            if NAMES.fullmatch(name) and not name.endswith("/beat.json") and ".corrupt-" not in name:
                storage.get(name, folder / PurePosixPath(name).name)
        sender = _Sender(folder, trial)
        here = Job(folder, whole_folder(digest, partial(_fetch_corpus, storage, digest)))
        try:
            with every(SEND_SECONDS, lambda: sender.send(storage.at_once())):
                yield here
        finally:
            sender.send(storage)
            if (folder / "result.json").exists():
                storage.put(folder / "result.json", f"{trial}/result.json")


def corpus_in(storage: Storage, digest: str) -> Callable[[Path], None] | None:
    """What brings the prepared corpus of that digest into a folder here; None where the storage does not hold it."""
    held = f"data/{digest}/manifest.json" in storage.list(f"data/{digest}")  # sent last
    return partial(_fetch_corpus, storage, digest) if held else None


def _fetch_corpus(storage: Storage, digest: str, folder: Path) -> None:
    for name in storage.list(f"data/{digest}"):
        storage.get(name, folder / PurePosixPath(name).name)


class _Sender:
    """Keeps the storage's copy of a trial's folder as the folder is."""

    def __init__(self, folder: Path, trial: str) -> None:
        self._folder, self._trial = folder, trial
        self._sent = self._found()

    def _found(self) -> dict[str, tuple[int, int, int]]:
        """Files to send, each with what tells it from any other content."""
        found = {}
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.name not in OWN and not path.name.startswith("."):
                    stat = path.stat()
                    found[path.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return found

    def send(self, storage: Storage) -> None:
        found, sent = self._found(), self._sent
        ended = (
            self._folder / "result.json"
        ).exists()  # looked for last: it is there before training removes its checkpoints
        for name in [name for name in found if sent.get(name) != found[name]]:
            before = next(
                (old for old, content in sent.items() if content == found[name] and found.get(old) != content), None
            )
            with contextlib.suppress(
                OSError
            ):  # renamed there too, which spares sending it; where that fails it is sent
                if before:
                    storage.at_once().move(f"{self._trial}/{before}", f"{self._trial}/{name}")
                    sent[name] = sent.pop(before)
        for name, content in found.items():
            if sent.get(name) != content:
                with contextlib.suppress(FileNotFoundError):  # replaced or removed meanwhile: next time
                    storage.put(self._folder / name, f"{self._trial}/{name}")
                    sent[name] = content
        for name in sent.keys() - found.keys() if not ended else ():
            storage.delete(f"{self._trial}/{name}")
            del sent[name]
