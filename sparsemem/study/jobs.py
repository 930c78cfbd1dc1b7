"""The seam between a study and whatever runs its trials, and how many trials this machine runs at once.

An engine is a scheduler and nothing else: identity, resumption and results live in the trial folders, so a study may be
begun with one engine and ended with the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sparsemem.config import ConfigError, Run

ENGINES = ("ray", "local")


@dataclass(frozen=True)
class Job:
    """One trial to run. Both folders are absolute; the trial's holds `trial.yaml`."""

    trial_folder: Path
    tokens_folder: Path
    storage: str | None = None
    """Where a worker gets both, by their names, if it does not share the driver's disk: see `exchange`."""


class Engine(Protocol):
    """Runs jobs, each in a process of its own, starting a failing one again up to `run.max_failures` times.

    Returns when every job has ended; how it ended stands in its folder. On KeyboardInterrupt it stops its processes and
    raises it on.
    """

    def __call__(self, jobs: Sequence[Job], run: Run) -> None: ...


def slots(run: Run) -> int:
    """Trials that this machine runs at once.

    Raises:
        ConfigError: it cannot hold even one.
    """
    cpus, wanted = processors(), run.gpus_per_trial
    if run.cpus_per_trial > cpus:
        raise ConfigError(
            f"field `run.cpus_per_trial` has the value {run.cpus_per_trial}: this machine offers {cpus}; lower it"
        )
    bounds = [cpus // run.cpus_per_trial]
    if run.max_concurrent:
        bounds.append(run.max_concurrent)
    if run.memory_per_trial:
        bounds.append(memory() // run.memory_per_trial)
        if not bounds[-1]:
            raise ConfigError(
                f"field `run.memory_per_trial` has the value {run.memory_per_trial:,}: this machine offers "
                f"{memory():,} bytes; lower it"
            )
    if wanted:
        import torch

        gpus = torch.cuda.device_count()
        if wanted > gpus:
            raise ConfigError(
                f"field `run.gpus_per_trial` has the value {wanted:g}: PyTorch sees {gpus} GPUs here; lower it, 0 for "
                "none"
            )
        bounds.append(int(gpus // wanted) if wanted > 1 else gpus * int(1 / wanted))
    return min(bounds)


def processors() -> int:
    """Processors that this process may use: its affinity, capped by a container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit ("max")
        return cpus


def memory() -> int:
    """Bytes of main memory that this process may use: the machine's, capped by a container's limit."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return installed
