"""The held-out losses: by hand, and without a trace in the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Tokens, validation_windows
from sparsemem.model import Transformer
from sparsemem.train.evaluate import sequence_losses


@pytest.fixture
def model(make_trial: Callable[..., Trial], tokens_folder: Path) -> Transformer:
    trial, tokens = make_trial(), Tokens.load(tokens_folder)
    sizes = solve(trial.model, trial.budget, trial.shares)
    return Transformer(
        trial.model, sizes, trial.data.context, torch.from_numpy(tokens.canonical), tokens.separator_id
    ).initialize(0)


@pytest.mark.parametrize("count", [1, 32, 35])
def test_losses_are_means_of_each_sequence_alone(
    model: Transformer, tokens_folder: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsemem.train.evaluate.TOKENS_AT_ONCE", 32 * 16)
    inputs, targets = validation_windows(Tokens.load(tokens_folder).val, 16, count)
    losses = sequence_losses(model, inputs, targets, torch.float32)
    assert losses.shape == (count,)
    assert losses.dtype == torch.float64
    for s in (0, count // 2, count - 1):
        alone = model.losses(inputs[s : s + 1], targets[s : s + 1]).double().mean()
        assert losses[s].item() == pytest.approx(alone.item(), rel=1e-5)


def test_targets_that_do_not_count_leave_the_mean_over_tokens(model: Transformer, tokens_folder: Path) -> None:
    tokens = Tokens.load(tokens_folder)
    inputs, targets = validation_windows(tokens.val, 16, 20, unscored_after=tokens.separator_id)
    scored = targets >= 0
    assert 1 < (~scored).sum() < 50
    each = model.losses(inputs, targets.clamp_min(0)).double()
    assert sequence_losses(model, inputs, targets, torch.float32).mean().item() == pytest.approx(
        each[scored].mean().item(), rel=1e-6
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(model: Transformer, tokens_folder: Path, training: bool) -> None:
    """The mode, the expert loads that balancing counts, every buffer and every gradient."""
    model.train(training)
    before = copy.deepcopy(dict(model.named_buffers()))
    inputs, targets = validation_windows(Tokens.load(tokens_folder).val, 16, 5)
    losses = sequence_losses(model, inputs, targets, torch.float32)
    assert not losses.requires_grad
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(weight.grad is None for weight in model.parameters())
