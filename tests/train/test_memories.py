"""Every kind of memory trains by the same loop: interruptions, the log of what was read."""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.mechanisms.engram import layer as engram
from sparsemem.mechanisms.product_key import PRODUCT_KEY
from sparsemem.mechanisms.product_key.fields import memory_layers
from sparsemem.train import loop, run_trial


def _pool(trial: Trial) -> str:
    return next(pool for pool in trial.shares if pool != "moe")


def test_an_interrupted_trial_ends_as_the_uninterrupted_one_bit_for_bit(
    memory_trial: Trial, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm's statistics, the Tucker filter's signs, the moments of shared tables and the log of use are all part
    of a checkpoint.
    """
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
    for name in ("val_losses.csv", "usage.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_what_a_memory_reads_is_logged_at_every_evaluation(
    memory_trial: Trial, tokens_folder: Path, tmp_path: Path
) -> None:
    run_trial(memory_trial, tokens_folder, tmp_path, threads=1)
    pool = _pool(memory_trial)
    with open(tmp_path / "usage.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    layers = memory_layers(memory_trial.model, pool) if pool in PRODUCT_KEY else (0,)
    assert [(int(row["layer"]), row["pool"]) for row in rows] == [
        (layer, pool) for layer in layers
    ] * memory_trial.train.evaluations
    assert all(
        0 < float(row["coverage"]) <= 1 and float(row["kl_uniform"]) >= 0 and float(row["output_std"]) > 0
        for row in rows
    )
    assert all(row["gate_mean"] == "" for row in rows)
    if pool not in PRODUCT_KEY:
        assert all(row["top1_score"] == row["topm_score"] == row["singular_values"] == "" for row in rows)
        return
    assert all(float(row["top1_score"]) >= float(row["topm_score"]) for row in rows)
    ranks = max(memory_trial.model.pools[pool].tucker_rank, 0)
    assert all(len(row["singular_values"].split()) == ranks for row in rows)


def test_what_engram_reads_is_counted_by_hand(
    make_trial: Callable[..., Trial], tokens_folder: Path, tmp_path: Path
) -> None:
    """Coverage and divergence from the rows that its hash gives for the held-out text, and the mean of its gates."""
    rows, gates = Counter[int](), list[float]()
    trial = make_trial(train={"evaluations": 1})
    real_hash, real_gate = engram.NgramHash.forward, engram.EngramMemory.gate

    def hashed(module: engram.NgramHash, tokens_BT: torch.Tensor) -> torch.Tensor:
        rows_BTH = real_hash(module, tokens_BT)
        if not torch.is_grad_enabled():
            first = [0, *accumulate(module.primes_NH.flatten().tolist())]
            rows.update(
                first[h] + row for h in range(rows_BTH.shape[-1]) for row in rows_BTH[..., h].flatten().tolist()
            )
        return rows_BTH

    def gated(module: engram.EngramMemory, *of: torch.Tensor) -> torch.Tensor:
        gate_BT1 = real_gate(module, *of)
        gates.extend([] if torch.is_grad_enabled() else gate_BT1.flatten().tolist())
        return gate_BT1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engram.NgramHash, "forward", hashed)
        patch.setattr(engram.EngramMemory, "gate", gated)
        run_trial(trial, tokens_folder, tmp_path, threads=1)
    with open(tmp_path / "usage.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert trial.model.engram is not None
    assert (int(row["layer"]), row["pool"]) == (trial.model.engram.layers[0], "engram")
    held, reads = solve(trial.model, trial.budget, trial.shares).rows("engram"), rows.total()
    assert float(row["coverage"]) == pytest.approx(len(rows) / held)
    assert float(row["kl_uniform"]) == pytest.approx(sum(n / reads * math.log(n / reads * held) for n in rows.values()))
    assert float(row["gate_mean"]) == pytest.approx(statistics.mean(gates))
    assert row["top1_score"] == row["topm_score"] == row["singular_values"] == ""
