"""What a process does with a job, whichever engine started it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparsemem.config import Run
from sparsemem.study import worker
from sparsemem.study.engine import Job


@pytest.mark.parametrize(("gpus", "shares"), [(0.0, []), (0.25, [0.25]), (1.0, []), (4.0, [])])
def test_trials_that_share_a_gpu_are_held_to_their_share_of_its_memory(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, gpus: float, shares: list[float]
) -> None:
    held: list[float] = []
    seen: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", held.append)
    monkeypatch.setattr("sparsemem.train.run_trial", lambda *_, **settings: seen.append(settings))
    worker.run_job(make_job(), Run(gpus_per_trial=gpus))
    assert held == shares
    assert [(settings["device"], settings["ranks"]) for settings in seen] == [(None if gpus else "cpu", 4 if gpus == 4 else 1)]
