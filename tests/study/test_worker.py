"""What a process does with a job, whichever engine started it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sparsemem.config import Run
from sparsemem.study.engines import worker
from sparsemem.study.jobs import Job


@pytest.mark.parametrize(
    ("gpus", "device", "ranks", "share"),
    [(0.0, "cpu", 1, 1.0), (0.25, "cuda", 1, 0.25), (1.0, "cuda", 1, 1.0), (4.0, "cuda", 4, 1.0)],
)
def test_a_trial_gets_the_devices_that_the_study_says(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, gpus: float, device: str, ranks: int, share: float
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("sparsemem.train.run_trial", lambda *_, **settings: seen.append(settings))
    worker.run_job(make_job(), Run(gpus_per_trial=gpus))
    assert seen == [{"threads": 1, "device": device, "ranks": ranks, "gpu_share": share, "keep": False}]
