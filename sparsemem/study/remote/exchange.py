"""What a driver, a worker on another machine and an onlooker pass to each other through a storage. It must not know
engines or torch.

    <study>/study.yaml  trials.csv  data.json      as in the results folder, for onlookers and for other drivers
            driver.json                            renewed every few seconds by the driver
            data/<digest>/                         prepared corpora
            trials/<id>/                           as in the results folder, with checkpoints; and beat.json,
                                                   renewed while it is trained

The results folder stays the driver's, and what a person reads; the storage is how files get there. Two orders make any
moment a good one to be killed in: a worker sends `result.json` after everything else, and a checkpoint is deleted only
once the driver holds a whole result.

Two workers may train one trial at once, where one was taken for dead that was only cut off. Training is deterministic,
so both send the same files (but for times), each whole. Two drivers exclude each other by `driver.json`: one that finds
it watches whether it changes, which needs no clock to agree. Two that begin within the same second do not see each
other, and one that could not renew it for all the time that the other watched is not waited for. Both then train the
same trials, each for its own results folder: work done twice, not wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sparsemem.config import ConfigError
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.state import BEAT_SECONDS
from sparsemem.study.remote.storage import Storage
from sparsemem.trial_files import MODEL, MODEL_FILES

CONNECTIONS = 16
FOLLOW_SECONDS = 2.0
WATCHED_BEATS = 5
FIRST_PATIENCE_SECONDS = 10.0  # of a driver that begins: a misspelt address is refused, not waited for
SIGNS = ("driver.json", "beat.json", "worker.json", "failure.json")  # what is gone there ends here too; records stay
NAMES = re.compile(r"(trials/[0-9a-f]{12}/)?\w[\w.-]*")  # a name from outside never leaves the study's folder


# --- the driver -------------------------------------------------------------------------------------------------------


@contextmanager
def driver_lease(storage: Storage, ledger: Ledger, say: Callable[[str], None]) -> Iterator[Driver]:
    """Hold a study in a storage for one driver.

    Raises:
        ConfigError: another driver holds it, naming its process and machine; or the storage cannot be used.
    """
    first = storage.at_once(FIRST_PATIENCE_SECONDS)
    try:
        first.create()
        if found := _sign_of(first):
            say(
                f"{storage.uri}: {_holder(found)} has not ended its run of {storage.study}; watching whether it is "
                "alive ..."
            )
            for _ in range(WATCHED_BEATS):
                time.sleep(BEAT_SECONDS)
                if (now := _sign_of(first)) is None:
                    break
                if now != found:
                    raise ConfigError(
                        f"{storage.uri}: {storage.study} is being run by {_holder(now)}; wait for it or stop it"
                    )
        first.write("driver.json", _sign(0))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"field `run.storage` has the value {storage.uri!r}, which cannot be used: {error}; make the folder or "
            "bucket first, give credentials by the environment, and an address that every machine reaches"
        ) from None
    with heartbeat(storage, "driver.json"):
        yield Driver(storage, ledger)


def _sign_of(storage: Storage) -> bytes | None:
    try:
        return storage.read("driver.json")
    except FileNotFoundError:
        return None


def _holder(sign: bytes) -> str:
    try:
        content = json.loads(sign)
        return f"process {content['process']} on {content['machine']}"
    except (ValueError, TypeError, KeyError):
        return "another process"


class Driver:
    """Keeps a ledger and a storage of the same study alike."""

    def __init__(self, storage: Storage, ledger: Ledger) -> None:
        self.storage, self.ledger = storage, ledger
        self._follower = Follower(ledger.folder)

    @property
    def _trials(self) -> set[str]:
        """Planned ones; a search plans more as it goes on."""
        return {row["trial_id"] for row in self.ledger.rows}

    def holds_study(self) -> bool:
        return "study.yaml" in self.storage.list()

    def begin(self) -> None:
        """Bring here what is known there of the planned trials.

        Raises:
            ConfigError: trials there were trained on another corpus than those here.
        """
        there, here = _corpora(self.storage.read("study.yaml")), self.ledger.folder / "study.yaml"
        for id_, digest in (_corpora(here.read_bytes()) if here.exists() else {}).items():
            if there.get(id_, digest) != digest:
                raise ConfigError(
                    f"{self.storage.uri}: its trials of {self.storage.study} were trained on the corpus {there[id_]}, "
                    f"those in {self.ledger.folder} on {digest}; give `--results` another folder, or the study another "
                    "`study` name"
                )
        if not here.exists():
            self._follower.pull(self.storage, lambda name: name == "study.yaml" or name.startswith("data"))
        self.pull(self.storage)

    def send(self, waiting: Sequence[str], corpora: Mapping[str, Path], say: Callable[[str], None]) -> None:
        """Bring there what is known here of the planned trials, and what those waiting need.

        Args:
            corpora: data id -> folder of the prepared corpus.
        """
        there = self.storage.list()
        for folder in set(corpora.values()):
            files = sorted(
                folder.iterdir(), key=lambda path: path.name == "manifest.json"
            )  # last: the others are checked by it
            missing = [
                path
                for path in files
                if there.get(f"data/{folder.name}/{path.name}", (-1, 0))[0] != path.stat().st_size
            ]
            if missing:
                say(
                    f"{self.storage.uri}: sending the corpus, {sum(path.stat().st_size for path in missing) / 1e6:.1f} "
                    "MB"
                )
            for path in missing:
                self.storage.put(path, f"data/{folder.name}/{path.name}")
        for id_ in waiting:
            (self.ledger.trial_folder(id_) / "failure.json").unlink(missing_ok=True)  # it would hide a new one
            if (
                f"trials/{id_}/result.json" in there
            ):  # not whole, and set aside here; a worker would take it for the trial's
                self.storage.delete(f"trials/{id_}/result.json")
        records = {path.name: path for path in self.ledger.folder.glob("data*.json")}
        for id_ in self._trials:
            for path in self.ledger.trial_folder(id_).glob("[!.]*"):
                size, _ = there.get(name := f"trials/{id_}/{path.name}", (-1, 0))
                if path.name in ("lock", "log.txt", *SIGNS) or _is_aside(name):
                    continue
                if size == -1 or (path.name == "trial.yaml" and size != path.stat().st_size):
                    records[name] = path
        together(lambda name: self.storage.put(records[name], name), records)
        packed = self.ledger.files.packed  # there every trial has a folder
        lacking = {
            f"trials/{id_}/{name}": text for id_ in self._trials & packed.keys() for name, text in packed[id_].items()
        }
        together(lambda name: self.storage.write(name, lacking[name]), lacking.keys() - there)
        self._send_table(self.storage)

    def _send_table(self, storage: Storage) -> None:
        for name in ("trials.csv", "study.yaml"):  # an onlooker who finds the latter finds the former
            storage.put(self.ledger.folder / name, name)

    @contextmanager
    def following(self, say: Callable[[str], None]) -> Iterator[None]:
        """Pull now and then while the body runs, and once at its end: in patience, unless it was interrupted."""
        at_once = self.storage.at_once()
        aside = set(filter(_is_aside, self.storage.list()))
        try:
            with every(FOLLOW_SECONDS, lambda: self.pull(at_once)):
                yield
        except BaseException:
            with contextlib.suppress(OSError):
                self._end(at_once, aside, say)
            raise
        self._end(self.storage, aside, say)

    def _end(self, storage: Storage, aside: set[str], say: Callable[[str], None]) -> None:
        try:
            listed = self.pull(storage)
        finally:
            for id_ in self._trials:  # nothing of ours runs any more, whether or not the storage can say so
                (self.ledger.trial_folder(id_) / "beat.json").unlink(missing_ok=True)
        self.ledger.write_table()
        self._send_table(storage)
        for name in sorted(set(filter(_is_aside, listed)) - aside):
            say(
                f"{storage.uri}: {storage.study}/{name}: a damaged checkpoint was found and set aside; its trial went "
                "on without it"
            )

    def pull(self, storage: Storage) -> set[str]:
        """Bring curves, failures and results here; remove there what a trial with a result needs no more. Returns all
        names there.
        """
        waiting = set(self.ledger.unfinished())
        listed = self._follower.pull(storage, lambda name: PurePosixPath(name).parent.name in waiting)
        for id_ in waiting - set(self.ledger.unfinished()):
            for path in self.ledger.trial_folder(id_).iterdir():
                if path.name in SIGNS or path.match("checkpoint*.pt"):  # the latter of a time without the storage
                    path.unlink(missing_ok=True)
        final = self._trials - set(self.ledger.unfinished())
        for name in listed:
            place = PurePosixPath(name)
            if (
                place.parent.name in final
                and place.name.startswith(("checkpoint", "worker", "."))
                and not _is_aside(name)
            ):
                storage.delete(name)
        return listed


def _corpora(study_yaml: bytes) -> dict[str, str]:
    """Data id -> digest of the corpus that a study's trials were trained on."""
    recorded: Any = yaml.safe_load(study_yaml)
    return {entry["id"]: entry["digest"] for entry in recorded["provenance"]["data"]}


def _is_aside(name: str) -> bool:
    return ".corrupt-" in name


# --- an onlooker ------------------------------------------------------------------------------------------------------


@contextmanager
def mirrored(address: str) -> Iterator[Path]:
    """A results folder; from an address of a storage, a temporary one that is kept as the storage is while the body
    runs.

    Raises:
        ConfigError: there is no study at this address.
    """
    if "://" not in address:
        yield Path(address)
        return
    try:
        storage = Storage.at(address)
    except ValueError as error:
        raise ConfigError(f"{address}: {error}") from None
    first = storage.at_once(FIRST_PATIENCE_SECONDS)
    with tempfile.TemporaryDirectory(prefix="sparsemem-") as temporary:
        folder = Path(temporary) / storage.study
        folder.mkdir()
        follower = Follower(folder)
        try:
            if "study.yaml" not in follower.pull(first):
                raise FileNotFoundError("there is no study.yaml")
        except (OSError, ValueError) as error:
            remedy = "give the value of its `run.storage` with /NAME of the study after its path"
            raise ConfigError(f"{address}: holds no study ({error}); {remedy}") from None
        if any(folder.rglob("driver.json")) or any(folder.rglob("beat.json")):  # alive is what changes
            time.sleep(2 * BEAT_SECONDS)
            follower.pull(first)
        at_once = storage.at_once()
        with every(FOLLOW_SECONDS, lambda: follower.pull(at_once)):
            yield folder


# --- all of them ------------------------------------------------------------------------------------------------------


class Follower:
    """Brings the text files of a storage, and kept models where they are wanted, into a folder as they change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, tuple[int, int]] = {}

    def pull(
        self,
        storage: Storage,
        wanted: Callable[[str], bool] = lambda name: PurePosixPath(name).name not in MODEL_FILES,
    ) -> set[str]:
        """Returns all names there, also of files that are not wanted."""
        listed = storage.list()
        names = [
            name
            for name in listed
            if NAMES.fullmatch(name) and name.endswith((".yaml", ".csv", ".json", MODEL)) and wanted(name)
        ]

        def get(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # gone since
                storage.get(name, self._folder / name)
                if name not in self._seen and name.endswith(("beat.json", "driver.json")):
                    os.utime(
                        self._folder / name, (0, 0)
                    )  # not seen to change yet: it may be of a process that was killed
                self._seen[name] = listed[name]

        def turn(name: str) -> int:  # a folder with study.yaml is a study's; one with result.json is whole
            return 0 if name == "study.yaml" else 2 if name.endswith("/result.json") else 1

        for _, group in itertools.groupby(
            sorted((name for name in names if self._seen.get(name) != listed[name]), key=turn), turn
        ):
            together(get, group)
        for name in self._seen.keys() - listed.keys():
            del self._seen[name]
            if name.endswith(SIGNS):
                (self._folder / name).unlink(missing_ok=True)
        return set(listed)


@contextmanager
def heartbeat(storage: Storage, name: str) -> Iterator[None]:
    """Renew a file for as long as the body runs, so that others see that this process is alive."""
    at_once, beats = storage.at_once(), itertools.count()

    def beat() -> None:
        at_once.write(name, _sign(next(beats)))

    with contextlib.suppress(OSError):
        beat()
    try:
        with every(BEAT_SECONDS, beat):
            yield
    finally:
        with contextlib.suppress(OSError):
            at_once.delete(name)


def _sign(beat: int) -> bytes:
    return json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "beat": beat}).encode()


def together(action: Callable[[str], object], names: Iterable[str]) -> None:
    """Do something for each name, several at once: most of a small file's way is waiting."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(action, names))


@contextmanager
def every(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Do something every so many seconds while the body runs; what a storage or disk refuses is tried again the next
    time.
    """
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            with contextlib.suppress(OSError):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
