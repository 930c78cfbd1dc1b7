"""A study small enough to train in a second, and an engine that does not train at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemem.config import Run
from sparsemem.study import launch
from sparsemem.study.engine import Job

TINY: dict[str, Any] = {
    "study": "tiny",
    "question": "Does it run?",
    "data": {"corpus": "files", "files": ["corpus/*.txt"], "vocab_size": 300, "context": 16, "validation_tokens": 2048},
    "model": {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "moe": {"expert_width": 8, "top_k": 2, "shared_experts": 1},
        "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4, "conv": False},
    },
    "budget": {"total_params": "30k", "active_params": "7k", "tokens": 4096, "tolerance": "5%"},
    "train": {"batch_tokens": 256, "lr": 0.01},
    "vary": {"rho": [1.0, 0.5, 0.0]},
}


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny study with the given fields replaced, beside its corpus, and returns the YAML's path."""
    _write_corpus(tmp_path / "corpus")

    def write(file: str = "tiny.yaml", **fields: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(TINY | fields, sort_keys=False), encoding="utf-8")
        return path

    return write


def _write_corpus(folder: Path) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(300)]
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(draw.choices(words, k=1200)), encoding="utf-8")


class FakeEngine:
    """Writes results in place of training; `outcomes` says otherwise for a trial by its place among the jobs."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.finish = finish
        self.outcomes: dict[int, Callable[[Path], None]] = {}

    def __call__(self, jobs: Sequence[Job], run: Run) -> None:
        for place, job in enumerate(jobs):
            self.ran.append(job.trial_folder.name)
            self.outcomes.get(place, finish)(job.trial_folder)


def finish(folder: Path, **fields: Any) -> None:
    """Leave a whole result that depends on the trial alone."""
    loss = 3 + int(folder.name, 16) % 1000 / 1000
    result = {"trial_id": folder.name, "status": "finished", "val_loss": loss, "val_loss_se": 0.01, "val_bpb": loss / 2, "train_loss": loss}
    measured = {"tokens": 4096, "tokens_per_second": 1e4, "peak_memory_bytes": 10**8, "seconds": 0.4}
    (folder / "val_losses.csv").write_text(f"sequence,nats_per_token\n0,{loss}\n", encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result | measured | fields), encoding="utf-8")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Stands in for both engines; the report is left out too."""
    fake = FakeEngine()
    monkeypatch.setattr(launch, "find_engine", lambda name, address: fake)
    monkeypatch.setattr(launch, "_report", lambda ledger, say: None)
    return fake
