"""A trial on several devices: the process that trains it is the first rank and starts the others (`train.rank`), which
end with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from sparsemem import parallel
from sparsemem.config import Trial
from sparsemem.failure import record_failure

GRACE_SECONDS = 10.0  # that the first rank has to notice by itself that another one is gone


@contextmanager
def spawn_ranks(
    trial: Trial, tokens_folder: Path, trial_folder: Path, threads: int, device: torch.device, ranks: int
) -> Iterator[torch.device]:
    """Be the first of so many ranks and start the others. Yields this rank's device.

    Args:
        threads: of each rank.
        device: a CPU, or a GPU in place of as many as there are ranks.
    """
    if ranks == 1:
        yield device
        return
    rendezvous = trial_folder / "ranks"
    rendezvous.unlink(missing_ok=True)  # of a run that was killed
    left = threading.Event()
    with ExitStack() as held:
        held.callback(rendezvous.unlink, missing_ok=True)
        for rank in range(1, ranks):
            process = subprocess.Popen([sys.executable, "-m", "sparsemem.train.rank"], stdin=subprocess.PIPE)
            held.callback(_end, process)
            settings = [
                trial.model_dump(mode="json"),
                str(tokens_folder),
                str(trial_folder),
                threads,
                device.type,
                rank,
                ranks,
            ]
            assert process.stdin is not None
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
            threading.Thread(target=_watch, args=(process, rank, trial_folder, left), daemon=True).start()
        held.callback(left.set)
        device = device_of(device.type, 0)
        with parallel.process_group(rendezvous, 0, ranks, device):
            try:
                yield device
            except BaseException:
                held.close()  # the others first: they shall not take this rank's end for an error
                raise


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _watch(process: subprocess.Popen[bytes], rank: int, trial_folder: Path, left: threading.Event) -> None:
    """End this process with another rank that failed. It may be waiting for that rank for ever."""
    code = process.wait()
    if code != 0 and not left.is_set():
        how = f"was killed by signal {-code} (often: out of memory)" if code < 0 else f"ended with exit code {code}"
        record_failure(trial_folder, f"its rank {rank} {how}", unless_known=True)
        if not left.wait(GRACE_SECONDS):
            os._exit(1)


def device_of(kind: str, rank: int) -> torch.device:
    """Each rank has the GPU of its number; a CPU is everybody's."""
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
