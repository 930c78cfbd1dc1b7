"""Trials in processes forked from a server that this module starts, one a slot, without Ray. It must not
know studies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Sequence
from typing import Self

from sparsemem.config import Run
from sparsemem.failure import record_failure
from sparsemem.results import TrialStatus
from sparsemem.study.engines.worker import GRACE_SECONDS, STORAGE_AWAY
from sparsemem.study.jobs import Job, slots

POLL_SECONDS = 0.05


def run_trials(jobs: Sequence[Job], run: Run) -> None:
    """See `engine.Engine`."""
    waiting = deque(jobs)
    with Workers(run) as workers:
        while waiting or workers.busy:
            while waiting and workers.free:
                workers.start(waiting.popleft())
            workers.ended(POLL_SECONDS)


class Workers:
    """Processes that train, one a slot. The output of a trial's process goes to `log.txt` in its folder; leaving the
    body ends them all.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._free = list(reversed(range(slots(run))))
        self._working: dict[Job, int] = {}
        self._attempts = Counter[Job]()
        self._endings: deque[tuple[Job, int]] = deque()
        """Told by the server, not yet by `ended`."""

    def __enter__(self) -> Self:
        self._serve()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.close()  # it ends its workers, then itself
        try:
            self._process.wait(2 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its workers notice
            self._process.wait()

    def _serve(self) -> None:
        """Start the server, see `worker.serve`."""
        self._server, end = multiprocessing.Pipe()
        with end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sparsemem.study.engines.worker", str(end.fileno())],
                pass_fds=[end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": str(self._run.cpus_per_trial),
                    "OPENBLAS_NUM_THREADS": "1",
                },  # no thread at a fork
                start_new_session=True,  # Ctrl-C reaches the driver alone, which then ends its workers
            )

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
        self._working[job] = self._free.pop()
        (job.trial_folder / "failure.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the server is gone, as `_receive` will see
            self._server.send((job, self._run, _devices(self._run.gpus_per_trial, self._working[job])))

    def stop(self, job: Job) -> None:
        """End a trial's process before its time."""
        with contextlib.suppress(OSError):
            self._server.send((job, None, None))
        while not (found := [ending for ending in self._endings if ending[0] == job]):
            self._receive(None)
        self._endings.remove(found[0])
        self._free.append(self._working.pop(job))

    def ended(self, seconds: float) -> list[Job]:
        """Jobs that have ended since the last call, waiting at most so long for one. A failing one is first started
        again up to `max_failures` times.

        Raises:
            ChildProcessError: no process can be started.
        """
        self._receive(seconds)
        ended = []
        while self._endings:
            job, code = self._endings.popleft()
            self._free.append(self._working.pop(job))
            _note(job, code)
            if code != 0 and self._attempts[job] <= self._run.max_failures:
                self.start(job)
            else:
                ended.append(job)
        return ended

    def _receive(self, seconds: float | None) -> None:
        """What the server tells, waiting at most so long for the first (None: as long as it takes). A killed server is
        replaced.
        """
        try:
            while self._server.poll(seconds):
                self._endings.append(self._server.recv())
                seconds = 0.0
        except (EOFError, OSError):
            code = self._process.wait()
            if code >= 0:
                raise ChildProcessError(
                    f"the process that starts trials ended with exit code {code}; what it said stands above"
                ) from None
            for job in self._working.keys() - {job for job, _ in self._endings}:
                record_failure(
                    job.trial_folder,
                    f"the process that starts trials was killed by signal {-code}, and this one with it",
                )
                self._endings.append((job, 1))
            self._server.close()
            self._serve()


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
        record_failure(
            job.trial_folder, f"killed by signal {-code}" + (" (often: out of memory)" if code == -9 else "")
        )
    elif code == STORAGE_AWAY:
        record_failure(
            job.trial_folder,
            "the storage could not be reached; log.txt in its folder says more",
            TrialStatus.INTERRUPTED,
        )
    else:
        record_failure(
            job.trial_folder,
            f"its process ended with exit code {code}; log.txt in its folder says more",
            unless_known=True,
        )
