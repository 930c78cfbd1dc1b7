"""Losses of a fixed seed over 200 steps, for every mechanism: a change that moves them changes every stored result, and must mean to.

What is compared: the training loss of each step, fp32, one thread, to one part in 100,000. Rounding alone moves a smooth curve by two
parts in ten million; where a choice of experts or rows flips on it, the curve is another one from there on. The rate is low enough that
none flips within the steps compared: initial weights that differ by one part in ten million gave the same curves. Four cases stand aside
for it: Engram's gate is the plain one, since the signed root is infinitely steep at zero; UltraMemV2, whose filter decides closely and
often, the softmax gates and PEER, one of whose choices each flips with the order of a sum, are compared over their first steps. Whether
the rest of a curve is the same but for its flips, `choices` tells.

`python -m tests.train.test_golden` writes the file anew.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Batches, Tokens
from sparsemem.files import write_text
from sparsemem.layers import moe
from sparsemem.model import Transformer
from sparsemem.train.loop import train_step
from sparsemem.train.optim import Optimizer, learning_rate

from .conftest import BASE, MEMORIES, write_tokens

GOLDEN = Path(__file__).with_name("golden.csv")
STEPS = 200
COMPARED = {"ultramem_v2": 20, "moe_softmax": 50, "peer": 45}
MODEL = BASE["model"]
SOFTMAX = MODEL["moe"] | {"gate": "softmax", "normalize_gates": False, "balance_loss": 0.01, "z_loss": 0.001}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"shares": {}},
    "moe_sigmoid": {"shares": {"moe": 1.0}},
    "moe_softmax": {"shares": {"moe": 1.0}, "model": MODEL | {"moe": SOFTMAX}},
    "engram": {"shares": {"moe": 0.5, "engram": 0.5}, "model": MODEL | {"engram": MODEL["engram"] | {"gate": "plain"}}},
    **{
        pool: {
            "shares": {"moe": 0.5, pool: 0.5},
            "model": MODEL | {"engram": None, pool: fields},
            "budget": BASE["budget"] | {"total_params": 24_000, "active_params": 10_000},
        }
        for pool, fields in MEMORIES.items()
    },
}


def curve(case: str, tokens: Tokens, steps: int) -> list[float]:
    """Training losses of the first so many of 200 steps."""
    trial = Trial.model_validate(BASE | CASES[case] | {"train": BASE["train"] | {"lr": 0.002}})
    sizes = solve(trial.model, trial.budget, trial.shares)
    model = Transformer(trial.model, sizes, trial.data.context, torch.from_numpy(tokens.canonical), tokens.separator_id).initialize(0)
    optimizer, batches = Optimizer(model, trial.train), Batches(tokens.train, trial.data.context, trial.train.batch_tokens, seed=0)
    losses: list[float] = []
    for step in range(steps):
        done = (step + 1) / STEPS
        rate = learning_rate(trial.train, done)
        losses.append(train_step(model, optimizer, *batches.batch(step), trial.train.batch_tokens, rate, done, torch.float32)[0])
    return losses


def golden(case: str) -> list[float]:
    with GOLDEN.open(newline="") as file:
        return [float(row[case]) for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES)
def test_every_step_gives_the_committed_loss(case: str, tokens_folder: Path) -> None:
    expected = golden(case)[: COMPARED.get(case, STEPS)]
    assert curve(case, Tokens.load(tokens_folder), len(expected)) == pytest.approx(expected, rel=1e-5)


def test_experts_one_by_one_give_the_losses_of_all_at_once(tokens_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDE": 1, "BUSY": 0, "STEP": 4}.items():
        monkeypatch.setattr(moe, name, value)
    assert curve("moe_sigmoid", Tokens.load(tokens_folder), STEPS) == pytest.approx(golden("moe_sigmoid"), rel=1e-5)


def test_the_committed_losses_fall() -> None:
    assert all(golden(case)[-1] < 0.7 * golden(case)[0] for case in CASES)


def _write(rows: Iterable[Iterable[float]]) -> None:
    write_text(GOLDEN, "\n".join([",".join(CASES), *(",".join(f"{loss:.7g}" for loss in row) for row in rows)]) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens.load(write_tokens(Path(folder) / "tokens"))
        _write(zip(*(curve(case, tokens, STEPS) for case in CASES), strict=True))
