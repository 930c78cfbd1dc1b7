"""Drivers as real processes, everything that descends from them, and what they must leave behind. Only processes of a
driver under test are ever ended: they carry its mark in their environment, which their children inherit, whoever adopts
them.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "study": "tiny",
    "question": "Does it survive?",
    "data": {"corpus": "files", "files": ["corpus/*.txt"], "vocab_size": 300, "context": 16, "validation_tokens": 2048},
    "model": {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "moe": {"expert_width": 8, "top_k": 2, "shared_experts": 1},
        "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4, "conv": False},
    },
    "budget": {"total_params": "30k", "active_params": "7k", "tokens": 24_000, "tolerance": "5%"},
    "train": {"batch_tokens": 256, "lr": 0.01},
    "vary": {"rho": [0.5], "seed": [0, 1]},
}
TIMES = ("tokens_per_second", "peak_memory_bytes", "seconds")
PATIENCE = 180.0
MARK = "FAULTS_MARK"
HOOK = Path(__file__).parent / "hook"
ROOT = Path(__file__).parents[2]


def write_study(folder: Path, **fields: Any) -> Path:
    """The tiny study with the given fields replaced, beside its corpus."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | fields, sort_keys=False), encoding="utf-8")
    return path


def write_corpus(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(300)]
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choices(words, k=1200)), encoding="utf-8")


IN_TURN = """
import sys, yaml
from pathlib import Path
from sparsemem.api import run_study
from sparsemem.config import Trial, load_study
from sparsemem.study import launch
from sparsemem.train import run_trial

def train(jobs, run):
    for job in jobs:
        trial = Trial.model_validate(yaml.safe_load((job.trial_folder / "trial.yaml").read_text()))
        run_trial(trial, job.tokens_folder, job.trial_folder, threads=1, device="cpu")

launch.find_engine = lambda *arguments: train
run_study(load_study(Path(sys.argv[1])), Path(sys.argv[1]).parent, Path(sys.argv[2]))
"""


def undisturbed(study: Path, results: Path) -> list[dict[str, str]]:
    """The table of a run of the same study that nothing happens to."""
    subprocess.run(
        [sys.executable, "-c", IN_TURN, str(study), str(results)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return table(results / "tiny")


@dataclass(frozen=True)
class Process:
    pid: int
    command: str
    kind: str


class Driver:
    """`sparsemem run` in a process of its own."""

    def __init__(self, study: Path, engine: str, results: Path, **faults: Any) -> None:
        """`faults`: see `hook/sitecustomize.py`."""
        self.folder, self.mark = results / "tiny", uuid.uuid4().hex
        paths = [str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
        faults = {"checkpoint_seconds": 0.1, **faults}
        self._marks = Path(faults.get("marks", results))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sparsemem", "run", str(study), "--engine", engine, "--results", str(results)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(paths),
                "FAULTS": json.dumps(faults, default=str),
                MARK: self.mark,
            },
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for it: exit code, what it printed, what it said."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def processes(self) -> list[Process]:
        """All that live and carry the mark, the driver included."""
        found = []
        for entry in Path("/proc").iterdir():
            if (
                entry.name.isdigit()
                and _carries(int(entry.name), self.mark)
                and (process := self._look(int(entry.name)))
            ):
                found.append(process)
        return found

    def kill(self, process: Process, signal_: int = signal.SIGKILL) -> bool:
        """End one of them, if it is still there: whoever has got its number since is not touched."""
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(process.pid)
            try:
                if _carries(process.pid, self.mark):
                    signal.pidfd_send_signal(handle, signal_)
                    return True
            finally:
                os.close(handle)
        return False

    def at(self, moments: Sequence[str]) -> Process:
        """Wait for a process that has come to one of the moments of `faults`."""

        def there() -> Process | None:
            texts = [path.read_text() for moment in moments if (path := self._marks / moment).exists()]
            living = [pid for text in texts if text.endswith("\n") and self.carries(pid := int(text))]
            return self._look(living[0]) if living else None

        return self.wait_for(there, f"none of {moments} was reached")

    def training(self) -> tuple[Process, Path]:
        """Wait until a trial is being trained: its process and its folder."""

        def there() -> tuple[Process, Path] | None:
            for lock in self.folder.glob("trials/*/lock"):
                if (lock.parent / "curve.csv").exists() and (pid := holder(lock)) and (process := self._look(pid)):
                    return process, lock.parent
            return None

        return self.wait_for(there, "no trial started")

    def wait_for(self, there: Callable[[], Any], otherwise: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := there():
                return found
            assert self.process.poll() is None, (otherwise, self.process.communicate())
            time.sleep(0.01)
        raise AssertionError(otherwise)

    def carries(self, pid: int) -> bool:
        """Whether such a process lives and is this driver's."""
        return _carries(pid, self.mark)

    def orphans(self, seconds: float = 80.0) -> list[Process]:  # Ray's agents try for 60 s to tell a lost control store
        """What is left of it so long after its end."""
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _look(self, pid: int) -> Process | None:
        try:
            command = (
                Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
            )
            parent = int(
                Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            )
        except OSError:
            return None
        if pid == self.process.pid:
            return Process(pid, command, "driver")
        server = parent == self.process.pid and re.search(
            r"sparsemem\.study\.engines\.worker \d+$", command
        )  # its forks are called alike
        return Process(pid, command, "server" if server else _kind(command))


@contextlib.contextmanager
def drivers() -> Iterator[Callable[..., Driver]]:
    """Starts drivers, and at the end stops what a failed test left of them."""
    started: list[Driver] = []

    def start(*arguments: Any, **faults: Any) -> Driver:
        started.append(Driver(*arguments, **faults))
        return started[-1]

    yield start
    for driver in started:
        for process in driver.processes():
            driver.kill(process)
        driver.end()


def _carries(pid: int, mark: str) -> bool:
    try:
        return (
            f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        )  # empty for a dead one that waits to be reaped
    except OSError:
        return False


def _kind(command: str) -> str:
    kinds = {
        "gcs_server --": "gcs",
        "raylet --": "raylet",
        "ray::IDLE": "idle worker",
        "ray::DashboardAgent": "dashboard agent",
        "ray::RuntimeEnvAgent": "runtime agent",
        "ray::": "trial",
        "sparsemem.study.engines.worker": "trial",
        "log_monitor.py": "log monitor",
        "dashboard.py": "dashboard",
        "monitor.py": "monitor",
        "_worker.py": "starting worker",
    }
    return next((kind for sign, kind in kinds.items() if sign in command), "other")


def holder(lock: Path) -> int | None:
    """The process that holds a lock, from the kernel's table."""
    inode = lock.stat().st_ino
    for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if "->" not in fields and fields[3] == "WRITE" and fields[5].endswith(f":{inode}"):
            return int(fields[4])
    return None


# --- what is left -----------------------------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of `trials.csv`, times aside."""
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def leftovers(folder: Path) -> list[str]:
    """Files of an ended study that cannot be read or that should not be there, and why."""
    return [
        f"{path.relative_to(folder)}: {wrong}"
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (wrong := _wrong(path))
    ]


def _wrong(path: Path) -> str:
    if path.name.startswith(".") or path.name.startswith("checkpoint") or path.name == "failure.json":
        return "left over"
    try:
        text = path.read_text(encoding="utf-8") if path.suffix in (".json", ".yaml", ".csv", ".svg", ".html") else "-"
        if path.suffix == ".json":
            json.loads(text)
        elif path.suffix == ".yaml":
            assert isinstance(yaml.safe_load(text), dict)
        elif path.suffix == ".csv":
            assert len({len(row) for row in csv.reader(text.splitlines())}) == 1
        assert text or path.name in ("lock", "log.txt")
    except (ValueError, AssertionError, yaml.YAMLError) as error:
        return f"unreadable ({error!r})"
    return ""


class Audit:
    """Counts how often each trial's result was written: every writing leaves another inode, or another time of the same
    one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, set[tuple[int, int]]] = {}

    def look(self) -> Mapping[str, int]:
        """Trial -> results seen so far."""
        for path in self._folder.glob("trials/*/result.json"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                self._seen.setdefault(path.parent.name, set()).add((status.st_ino, status.st_mtime_ns))
        return {trial: len(seen) for trial, seen in self._seen.items()}


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of this size at `folder`, in memory.

    Raises:
        PermissionError: mounting is not allowed here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        raise PermissionError("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
