"""What a worker process does, under either engine: train one job to its end.

`python -m sparsemem.study.worker` is such a process, which dies with its driver. The driver holds the other end of this process's standard
input and never writes to it: it closes when the driver ends, even by `kill -9`. That holds on every system, where a parent-death signal
exists on Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import threading
import traceback
from pathlib import Path

import yaml

from sparsemem.config import Trial
from sparsemem.study.engine import Job
from sparsemem.study.exchange import brought_here
from sparsemem.study.storage import StorageAway


def run_job(job: Job, threads: int, device: str | None = None) -> None:
    """Train a job in this process; how it ended stands in its folder.

    Args:
        threads, device: see `train.run_trial`.

    Raises:
        As `train.run_trial`.
        StorageAway: see `exchange.brought_here`.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
    from sparsemem.train import run_trial

    with brought_here(job) if job.storage else contextlib.nullcontext(job) as here:
        trial = Trial.model_validate(yaml.safe_load((here.trial_folder / "trial.yaml").read_text(encoding="utf-8")))
        run_trial(trial, here.tokens_folder, here.trial_folder, threads=threads, device=device)


def main() -> int:
    """Exit codes: 0 finished or diverged, 3 out of memory, 4 storage away, 1 anything else; `failure.json` in its folder says what."""
    parser = argparse.ArgumentParser(prog="python -m sparsemem.study.worker", description=__doc__)
    parser.add_argument("trial_folder", type=Path, help="holds trial.yaml; receives curve.csv and result.json")
    parser.add_argument("tokens_folder", type=Path, help="a prepared corpus")
    parser.add_argument("--storage", help="where both are, if not on this machine's disk")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    try:
        run_job(Job(arguments.trial_folder, arguments.tokens_folder, arguments.storage), arguments.threads)
    except MemoryError:
        return 3
    except StorageAway:
        traceback.print_exc()
        return 4
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
