"""What a worker process does, under either engine: train one job to its end. And the server that forks such processes.

`python -m sparsemem.study.engines.worker` is the local engine's server. It has imported what training needs, without
starting a thread or CUDA, and forks a process for each job: as much on its own as a new Python, in milliseconds in
place of seconds.

The server ends with its driver, and workers with their server, even by `kill -9`: each holds one end of a pipe whose
other end only the process above it holds. That works on every system, where a parent-death signal exists on Linux only.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import yaml

from sparsemem.config import Run, Trial
from sparsemem.files import or_warn, write_json
from sparsemem.study.jobs import Job
from sparsemem.study.remote.staging import staged
from sparsemem.study.remote.storage import StorageAway
from sparsemem.trial_files import MODEL

STORAGE_AWAY = 4  # an exit code
GRACE_SECONDS = 5.0  # between asking a process to end and killing it


def run_job(job: Job, run: Run, node: str | None = None) -> None:
    """Train a job in this process; how it ended stands in its folder, and while it is running `worker.json` says where.

    Args:
        node: name of the node that this process is on; by default its host.

    Raises:
        As `train.run_trial`.
        StorageAway: see `staging.staged`.
    """
    os.environ["OMP_NUM_THREADS"] = str(run.cpus_per_trial)  # before torch is imported
    from sparsemem.train import run_trial

    device, ranks = "cuda" if run.gpus_per_trial else "cpu", max(1, int(run.gpus_per_trial))
    share = min(run.gpus_per_trial, 1.0) or 1.0  # of a GPU: no more than a promise unless the process is held to it
    worker = {
        "node": node or socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with staged(job) if job.storage else contextlib.nullcontext(job) as here:
        trial = Trial.model_validate(yaml.safe_load((here.trial_folder / "trial.yaml").read_text(encoding="utf-8")))
        place = here.trial_folder / "worker.json"
        or_warn(write_json, place, worker)
        settings: dict[str, Any] = {"threads": run.cpus_per_trial, "device": device, "ranks": ranks, "gpu_share": share}
        settings["keep"] = run.keeps(trial)
        run_trial(trial, here.tokens_folder, here.trial_folder, **settings)
        if run.probe and settings["keep"] and (here.trial_folder / MODEL).is_file():
            _probe(here, run, device)
        place.unlink(missing_ok=True)


def _probe(job: Job, run: Run, device: str) -> None:
    """What goes wrong here costs the probes, not the trial, and stands in its log."""
    from sparsemem.probes.trial import probe_folder

    try:
        probe_folder(job.trial_folder, job.tokens_folder, device, run.probe)
    except Exception:
        print(f"the probes failed; `sparsemem probe` runs them again:\n{traceback.format_exc()}", file=sys.stderr)


# --- the server -------------------------------------------------------------------------------------------------------


def serve(driver: Connection) -> None:
    """Fork a worker for each (job, run, GPUs) from the driver and send back (job, exit code); end a worker at (job,
    None, None).

    Exit codes: 0 finished or diverged, STORAGE_AWAY, 1 an error, which `failure.json` in the trial's folder tells, -N
    killed by signal N. Returns when the driver is gone, after its workers.
    """
    importlib.import_module("sparsemem.train")  # once for all of them
    working: dict[Job, BaseProcess] = {}
    while True:
        sentinels = {process.sentinel: job for job, process in working.items()}
        for ready in wait([driver, *sentinels]):
            if isinstance(ready, int):
                process = working.pop(sentinels[ready])
                process.join()
                with contextlib.suppress(
                    OSError
                ):  # the driver is gone, as `recv` will say; the other workers shall still be ended
                    driver.send((sentinels[ready], process.exitcode))
                continue
            try:
                job, run, gpus = driver.recv()
            except (EOFError, OSError):
                _end(working.values())
                return
            if run is not None:
                working[job] = multiprocessing.get_context("fork").Process(target=_work, args=(driver, job, run, gpus))
                working[job].start()
            elif job in working:
                _end([working[job]])  # what it came to is sent when its sentinel is seen


def _work(driver: Connection, job: Job, run: Run, gpus: str) -> None:
    driver.close()  # the server's end: the driver shall notice when the server is gone
    log = os.open(job.trial_folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    threading.Thread(target=_end_with_server, daemon=True).start()
    try:
        run_job(job, run)
    except StorageAway:
        traceback.print_exc()
        sys.exit(STORAGE_AWAY)


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def _end(processes: Iterable[BaseProcess]) -> None:
    processes = list(processes)
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # taking all that was imported down again takes a second
