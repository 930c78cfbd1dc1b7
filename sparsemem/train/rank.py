"""`python -m sparsemem.train.rank`: another rank of a trial.

Its standard input says what to train, and closes when the first rank ends, even by `kill -9`: then it ends too.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from sparsemem import parallel
from sparsemem.config import Trial
from sparsemem.train.loop import follow
from sparsemem.train.ranks import device_of


def _end_with_first() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    with open(0, "rb", buffering=0, closefd=False) as first:
        fields, tokens_folder, trial_folder, threads, kind, rank, ranks = json.loads(first.readline())
    threading.Thread(target=_end_with_first, daemon=True).start()
    device = device_of(kind, rank)
    with parallel.process_group(Path(trial_folder) / "ranks", rank, ranks, device):
        follow(Trial.model_validate(fields), Path(tokens_folder), Path(trial_folder), threads, device)
