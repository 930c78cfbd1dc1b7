"""What a worker process does, under either engine: train one job to its end.

`python -m sparsemem.study.worker` is such a process, which dies with its driver. The driver holds the other end of this process's standard
input and never writes to it: it closes when the driver ends, even by `kill -9`. That holds on every system, where a parent-death signal
exists on Linux only.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import traceback
from datetime import UTC, datetime
from pathlib import Path

import yaml

from sparsemem.config import Trial
from sparsemem.files import or_warn, write_json
from sparsemem.study.engine import Job


def run_job(job: Job, threads: int, device: str | None = None, node: str | None = None) -> None:
    """Train a job in this process; how it ended stands in its folder, and while it is running `worker.json` says where.

    Args:
        threads, device: see `train.run_trial`.
        node: name of the node that this process is on; by default its host.

    Raises:
        As `train.run_trial`.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    from sparsemem.train import run_trial

    trial = Trial.model_validate(yaml.safe_load((job.trial_folder / "trial.yaml").read_text(encoding="utf-8")))
    place = job.trial_folder / "worker.json"
    or_warn(
        write_json,
        place,
        {"node": node or socket.gethostname(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat(timespec="seconds")},
    )
    run_trial(trial, job.tokens_folder, job.trial_folder, threads=threads, device=device)
    place.unlink(missing_ok=True)


def main() -> int:
    """Exit codes: 0 finished or diverged, 3 out of memory, 1 anything else; `failure.json` in the trial's folder says what."""
    parser = argparse.ArgumentParser(prog="python -m sparsemem.study.worker", description=__doc__)
    parser.add_argument("trial_folder", type=Path, help="holds trial.yaml; receives curve.csv and result.json")
    parser.add_argument("tokens_folder", type=Path, help="a prepared corpus")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
        run_job(Job(arguments.trial_folder, arguments.tokens_folder), arguments.threads)
    except MemoryError:
        return 3
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _end_with_driver() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin: the interpreter could not close it at the end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_driver, daemon=True).start()
    sys.exit(main())
