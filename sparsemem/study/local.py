"""Trials in plain subprocesses, one a slot, without Ray. It must not know studies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Self

from sparsemem.config import Run
from sparsemem.study.engine import Job, record_failure, slots

POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0


def run_trials(jobs: Sequence[Job], run: Run) -> None:
    """See `engine.Engine`."""
    waiting = deque(jobs)
    with Workers(run) as workers:
        while waiting or workers.busy:
            while waiting and workers.free:
                workers.start(waiting.popleft())
            workers.ended()
            time.sleep(POLL_SECONDS)


class Workers:
    """Processes that train, one a slot. The output of a trial's process goes to `log.txt` in its folder; leaving the body ends them all."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._free = list(reversed(range(slots(run))))
        self._working: dict[Job, tuple[int, subprocess.Popen[bytes]]] = {}
        self._attempts = Counter[Job]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        _stop([process for _, process in self._working.values()])

    @property
    def free(self) -> int:
        """Slots without a trial."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        return bool(self._working)

    def start(self, job: Job) -> None:
        """In a free slot."""
        self._attempts[job] += 1
        slot = self._free.pop()
        self._working[job] = slot, _start(job, self._run, slot)

    def stop(self, job: Job) -> None:
        """End a trial's process before its time."""
        slot, process = self._working.pop(job)
        _stop([process])
        self._free.append(slot)

    def ended(self) -> list[Job]:
        """Jobs that have ended since the last call; a failing one is started again up to `max_failures` times first."""
        ended = []
        for job, (slot, process) in list(self._working.items()):
            code = process.poll()
            if code is None:
                continue
            del self._working[job]
            self._free.append(slot)
            _note(job, code)
            if code != 0 and self._attempts[job] <= self._run.max_failures:
                self.start(job)
            else:
                ended.append(job)
        return ended


def _start(job: Job, run: Run, slot: int) -> subprocess.Popen[bytes]:
    (job.trial_folder / "failure.json").unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(run.cpus_per_trial), "CUDA_VISIBLE_DEVICES": _devices(run.gpus_per_trial, slot)}
    command = [sys.executable, "-m", "sparsemem.study.worker", str(job.trial_folder), str(job.tokens_folder)]
    if job.storage:
        command += ["--storage", job.storage]
    with open(job.trial_folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [*command, "--threads", str(run.cpus_per_trial)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which then ends its workers
        )


def _devices(gpus_per_trial: float, slot: int) -> str:
    """The GPUs of a slot, as CUDA_VISIBLE_DEVICES; none without `gpus_per_trial`, as under Ray."""
    if not gpus_per_trial:
        return ""
    granted = os.environ.get("CUDA_VISIBLE_DEVICES")
    width = max(1, int(gpus_per_trial))
    first = slot * width if gpus_per_trial >= 1 else slot // int(1 / gpus_per_trial)
    wanted = range(first, first + width)
    return ",".join(granted.split(",")[gpu] if granted else str(gpu) for gpu in wanted)


def _note(job: Job, code: int) -> None:
    """Keep the log of a trial that went wrong, and say how its process ended where it could not."""
    if code == 0:
        (job.trial_folder / "log.txt").unlink(missing_ok=True)
    elif code < 0:
        record_failure(job.trial_folder, f"killed by signal {-code}" + (" (often: out of memory)" if code == -9 else ""))
    elif code == 4:
        record_failure(job.trial_folder, "the storage could not be reached; log.txt in its folder says more", "interrupted")
    elif not (job.trial_folder / "failure.json").exists():
        record_failure(job.trial_folder, f"its process ended with exit code {code}; log.txt in its folder says more")


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
