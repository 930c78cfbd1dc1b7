"""Losses of a fixed seed, to the fourth digit: a change that moves them changes every stored result, and must mean to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Batches, Tokens
from sparsemem.model import Transformer
from sparsemem.train.loop import train_step
from sparsemem.train.optim import Optimizer, learning_rate

STEPS = 20
GOLDEN = {  # rho -> losses of steps 1, 5, 9, 13, 17 and 20, from this test on torch 2.13 (CPU)
    1: [5.560075, 5.034971, 4.542532, 4.141884, 4.014975, 3.928917],
    0.5: [5.560315, 5.049528, 4.558198, 4.152288, 4.018664, 3.933320],
    0: [5.559142, 5.050797, 4.566637, 4.168224, 4.045947, 3.955827],
}


@pytest.mark.parametrize("rho", [1, 0.5, 0])
def test_twenty_steps_give_the_committed_losses(make_trial: Callable[..., Trial], tokens_folder: Path, rho: float) -> None:
    trial, tokens = make_trial(rho), Tokens.load(tokens_folder)
    sizes = solve(trial.model, trial.budget, trial.shares)
    model = Transformer(trial.model, sizes, trial.data.context, torch.from_numpy(tokens.canonical), tokens.separator_id).initialize(0)
    optimizer, batches = Optimizer(model, trial.train), Batches(tokens.train, trial.data.context, trial.train.batch_tokens, seed=0)
    losses: list[float] = []
    for step in range(STEPS):
        done = (step + 1) / STEPS
        rate = learning_rate(trial.train, done)
        losses.append(train_step(model, optimizer, *batches.batch(step), trial.train.batch_tokens, rate, done, torch.float32)[0])
    assert losses[::4] + losses[-1:] == pytest.approx(GOLDEN[rho], rel=1e-4)
