"""Every kind of memory trains by the same loop: interruptions, the log of what was read."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from sparsemem.config import PRODUCT_KEY, Trial
from sparsemem.train import loop, run_trial


def _pool(trial: Trial) -> str:
    return next(pool for pool in trial.shares if pool != "moe")


def test_an_interrupted_trial_ends_as_the_uninterrupted_one_bit_for_bit(
    memory_trial: Trial, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm's statistics, the Tucker filter's signs, the moments of shared tables and the log of use are all part of a checkpoint."""
    whole = run_trial(memory_trial, tokens_folder, tmp_path / "whole", threads=1)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_TIMES", 0)
    real = loop.train_step
    for steps in (1, 6, 3):
        left = [steps]

        def killed(*arguments: object, left: list[int] = left) -> tuple[float, float]:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(memory_trial, tokens_folder, tmp_path / "parts", threads=1)
    monkeypatch.setattr(loop, "train_step", real)
    parts = run_trial(memory_trial, tokens_folder, tmp_path / "parts", threads=1)
    assert parts["val_loss"] == whole["val_loss"]
    for name in ("val_losses.csv", *(["usage.csv"] if _pool(memory_trial) in PRODUCT_KEY else [])):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_what_a_product_key_memory_reads_is_logged_at_every_evaluation(memory_trial: Trial, tokens_folder: Path, tmp_path: Path) -> None:
    run_trial(memory_trial, tokens_folder, tmp_path, threads=1)
    pool = _pool(memory_trial)
    if pool not in PRODUCT_KEY:
        assert not (tmp_path / "usage.csv").exists()
        return
    with open(tmp_path / "usage.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    layers = memory_trial.model.memory_layers(pool)
    assert [(int(row["layer"]), row["pool"]) for row in rows] == [(layer, pool) for layer in layers] * memory_trial.train.evaluations
    assert all(0 < float(row["coverage"]) <= 1 and float(row["kl_uniform"]) >= 0 and float(row["output_std"]) > 0 for row in rows)
    assert all(float(row["top1_score"]) >= float(row["topm_score"]) for row in rows)
    ranks = max(memory_trial.model.product_keys[pool].tucker_rank, 0)
    assert all(len(row["singular_values"].split()) == ranks for row in rows)
