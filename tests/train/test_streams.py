"""Trials on several residual streams: interruptions, what they leave, and what their budget refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparsemem
from sparsemem.budget import solve
from sparsemem.config import BudgetError, Trial
from sparsemem.config.model import MANY_STREAMS
from sparsemem.train import loop, run_trial

from .conftest import BASE
from .test_kept import held_out_loss
from .test_kept import tokens as tokens  # a fixture


def _trial(make_trial: Callable[..., Trial], residual: str, **changes: Any) -> Trial:
    engram = BASE["model"]["engram"] | {"fusion": "per_branch"}
    model = {"residual": residual, "streams": 2, "engram": engram}
    return make_trial(model=model, budget={"total_params": 24_000, "active_params": 12_000} | changes)


@pytest.mark.parametrize("residual", MANY_STREAMS)
def test_an_interrupted_trial_ends_alike_and_its_model_is_read_again(
    residual: str, make_trial: Callable[..., Trial], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = _trial(make_trial, residual)
    whole = run_trial(trial, tokens, tmp_path / "whole", threads=1, device="cpu")
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_TIMES", 0)
    real, left = loop.train_step, [6]

    def killed(*arguments: object) -> tuple[float, float]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial, tokens, tmp_path / "parts", threads=1, device="cpu")
    monkeypatch.setattr(loop, "train_step", real)
    parts = run_trial(trial, tokens, tmp_path / "parts", threads=1, device="cpu", keep=True)
    assert parts["val_loss"] == whole["val_loss"] < 5.5
    for name in ("val_losses.csv", "usage.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    model = sparsemem.load_model(tmp_path / "parts")
    assert held_out_loss(model, tokens) == whole["val_loss"]
    assert model.trial.model.residual == residual


@pytest.mark.parametrize("residual", MANY_STREAMS)
def test_what_the_streams_take_is_named_where_a_budget_is_too_small(
    residual: str, make_trial: Callable[..., Trial]
) -> None:
    trial = _trial(make_trial, residual, active_params=2_000)
    with pytest.raises(BudgetError, match="value 2,000: attention, what reads and writes the residual"):
        solve(trial.model, trial.budget, trial.shares)
