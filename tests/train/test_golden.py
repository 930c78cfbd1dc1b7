"""Losses of a fixed seed over 60 steps, for every mechanism: a change that moves them changes every stored result, and
must mean to.

What is compared, and why it holds on every processor:

- **In float64, the loss of each step, to one part in 10^10.** Processors differ in the last bit of a sum, an
  exponential or a product of matrices: about 1e-16 in float64. A choice of experts or rows flips where two scores are
  closer than that, which in 60 steps happens once in a billion. So the committed curves are those of the mathematics:
  model, gradients, optimisers, schedule, data order.
- **In float32, given the choices of the float64 run, the loss of each step, to two parts in a million.** Rounding
  (6e-8) does flip a choice now and then, and the curve is another one from there on; with the choices given, rounding
  moves a curve by two or three parts in ten million. This run takes the kernels that training takes.

Initial weights are drawn by `_exact_draws`, since torch draws normal values by other instructions on other processors
(`tests/test_parameter.py` compares those). Engram's gate is the plain one here: its signed root is infinitely steep at
zero.

`python -m tests.train.test_golden` writes the file anew.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Batches, Tokens
from sparsemem.files import write_text
from sparsemem.kernels import grouped_experts, matmul
from sparsemem.mechanisms.moe import layer as moe
from sparsemem.mechanisms.product_key import retrieval
from sparsemem.model import Transformer
from sparsemem.train.optim import Optimizer, learning_rate
from sparsemem.train.step import train_step

from .conftest import BASE, MEMORIES, write_tokens

GOLDEN = Path(__file__).with_name("golden.csv")
STEPS = 60
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


Choices = list[tuple[Tensor, ...]]


@contextmanager
def _exact_draws() -> Iterator[None]:
    """Random values that are the same bits on every processor and in both precisions: sums and quotients
    of integers.
    """

    def sizes(shape: Any) -> tuple[int, ...]:
        return tuple(shape[0]) if isinstance(shape[0], (tuple, list, torch.Size)) else shape

    def normal(
        *shape: Any, generator: torch.Generator, **_: Any
    ) -> Tensor:  # a sum of twelve uniform values (Irwin-Hall)
        draws = torch.randint(2**20, (12, *sizes(shape)), generator=generator).sum(0)
        return (draws / 2**20 - 6).to(torch.get_default_dtype())

    def uniform(*shape: Any, generator: torch.Generator, **_: Any) -> Tensor:
        return torch.randint(2**24, sizes(shape), generator=generator).to(torch.get_default_dtype()) / 2**24

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", normal)
        patch.setattr(torch, "rand", uniform)
        retrieval.top_score_moments.cache_clear()
        yield
    retrieval.top_score_moments.cache_clear()


@contextmanager
def _choosing(kept: Choices, given: bool) -> Iterator[None]:
    """Keep each choice of experts and of rows, in their order; or `given` them, take each in its turn."""
    best, pairs, turns = moe.topk, retrieval.choose_pairs, iter(kept)

    def choose(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if given:
            return next(turns)
        kept.append(make())
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "topk", lambda scores, count: (None, *choose(lambda: (best(scores, count)[1],))))
        patch.setattr(retrieval, "choose_pairs", lambda *scores: choose(lambda: pairs(*scores)))
        yield


def _curve(
    case: str, tokens: Tokens, dtype: torch.dtype, kept: Choices, given: bool = False, steps: int = STEPS
) -> list[float]:
    """Training losses of the first so many of all steps."""
    trial = Trial.model_validate(BASE | CASES[case] | {"train": BASE["train"] | {"lr": 0.002}})
    sizes = solve(trial.model, trial.budget, trial.shares)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _exact_draws():
            canonical = torch.from_numpy(tokens.canonical)
            model = Transformer(trial.model, sizes, trial.data.context, canonical, tokens.separator_id).initialize(0)
        optimizer, batches = (
            Optimizer(model, trial.train),
            Batches(tokens.train, trial.data.context, trial.train.batch_tokens, seed=0),
        )
        losses: list[float] = []
        with _choosing(kept, given):
            for step in range(steps):
                done = (step + 1) / STEPS
                rate = learning_rate(trial.train, done)
                losses.append(
                    train_step(
                        model, optimizer, *batches.batch(step), trial.train.batch_tokens, rate, done, torch.float32
                    )[0]
                )
    finally:
        torch.set_default_dtype(usual)
    return losses


def _golden(case: str) -> list[float]:
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
    tokens, kept = Tokens.load(tokens_folder), Choices()
    assert _curve(case, tokens, torch.float64, kept) == pytest.approx(_golden(case), rel=1e-10)
    assert _curve(case, tokens, torch.float32, kept, given=True) == pytest.approx(_golden(case), rel=2e-6)


@pytest.mark.parametrize("library", ["onednn", "torch"])
def test_either_library_gives_the_committed_losses(
    library: str, tokens_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN multiplies experts one by one, torch all at once."""
    tokens, kept, steps = Tokens.load(tokens_folder), Choices(), 20
    monkeypatch.setattr(matmul, "_chosen", library)
    _curve("moe_sigmoid", tokens, torch.float64, kept, steps=steps)
    for name, value in {"WIDE": 1, "BUSY": 0, "STEP": 4}.items():
        monkeypatch.setattr(grouped_experts, name, value)
    losses = _curve("moe_sigmoid", tokens, torch.float32, kept, given=True, steps=steps)
    assert losses == pytest.approx(_golden("moe_sigmoid")[:steps], rel=2e-6)


def test_the_committed_losses_fall() -> None:
    assert all(_golden(case)[-1] < 0.85 * _golden(case)[0] for case in CASES)


def _write(rows: Iterable[Iterable[float]]) -> None:
    write_text(GOLDEN, "\n".join([",".join(CASES), *(",".join(f"{loss:.14g}" for loss in row) for row in rows)]) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens.load(write_tokens(Path(folder) / "tokens"))
        _write(zip(*(_curve(case, tokens, torch.float64, []) for case in CASES), strict=True))
