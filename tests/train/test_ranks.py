"""Two processes that train one trial together come to what one comes to, up to the order of sums."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsemem.config import Trial
from sparsemem.train import loop, run_trial

Make = Callable[..., Trial]
SUMS = 5e-5
"""Relative, of the first steps: sums are taken in another order."""
CHOICES = 2e-3
"""Relative, of the losses at the end: sooner or later two near-equal scores are told apart the other way, and a token
reads another row.
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "prepare_process", lambda threads: torch.set_num_threads(threads))


def _curve(folder: Path) -> list[dict[str, str]]:
    with (folder / "curve.csv").open() as file:
        return list(csv.DictReader(file))


def _assert_alike(one: Path, two: Path) -> None:
    alone, together = _curve(one), _curve(two)
    assert len(alone) == len(together) > 1
    for a, b in zip(alone[:4], together[:4], strict=True):
        for column in ("train_loss", "grad_norm", "expert_load_max", "val_loss"):
            assert a[column] == b[column] == "" or float(b[column]) == pytest.approx(float(a[column]), rel=SUMS), column
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    for loss in ("train_loss", "val_loss"):
        assert results[1][loss] == pytest.approx(results[0][loss], rel=CHOICES)
    assert results[1]["tokens"] == results[0]["tokens"]


def _both(trial: Trial, tokens: Path, folder: Path) -> None:
    run_trial(trial, tokens, folder / "one", threads=1, device="cpu")
    run_trial(trial, tokens, folder / "two", threads=2, device="cpu", ranks=2)
    _assert_alike(folder / "one", folder / "two")
    assert sorted(path.name for path in (folder / "two").iterdir()) == sorted(
        path.name for path in (folder / "one").iterdir()
    )


@pytest.mark.parametrize("tokens", [2010, 1936])
def test_experts_and_engram_on_two_ranks(make_trial: Make, tokens_folder: Path, tmp_path: Path, tokens: int) -> None:
    """The last batch is cut to six sequences, the last one in part; or to a single one, which is trained
    whole by both.
    """
    moe = {"expert_width": 8, "top_k": 2, "balance_loss": 0.1, "z_loss": 0.01, "bias_rate": 0.01}
    _both(make_trial(model={"moe": moe}, budget={"tokens": tokens}), tokens_folder, tmp_path)


def test_masked_targets_on_two_ranks(make_trial: Make, tokens_folder: Path, tmp_path: Path) -> None:
    """The parts of a batch hold unequal numbers of targets."""
    _both(make_trial(data={"mask_document_start": True}, budget={"tokens": 1000}), tokens_folder, tmp_path)


@pytest.mark.slow
def test_each_kind_of_memory_on_two_ranks(memory_trial: Trial, tokens_folder: Path, tmp_path: Path) -> None:
    _both(memory_trial, tokens_folder, tmp_path)


def _killed_at(step: int, monkeypatch: pytest.MonkeyPatch, trial: Trial, tokens: Path, folder: Path) -> None:
    """As abrupt as a signal to the first rank, with a checkpoint after each step before."""
    real, calls = loop.train_step, iter(range(1, 10**6))

    class Killed(BaseException):
        pass

    def stopping(*arguments: Any) -> tuple[float, float]:
        if next(calls) == step:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(loop, "CHECKPOINT_TIMES", 0)
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(Killed):
            run_trial(trial, tokens, folder, threads=2, device="cpu", ranks=2)


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint_as_if_nothing_had_happened(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_trial(make_trial(), tokens_folder, tmp_path / "whole", threads=2, device="cpu", ranks=2)
    _killed_at(7, monkeypatch, make_trial(), tokens_folder, tmp_path / "parts")
    run_trial(make_trial(), tokens_folder, tmp_path / "parts", threads=2, device="cpu", ranks=2)
    assert (tmp_path / "parts" / "val_losses.csv").read_bytes() == (tmp_path / "whole" / "val_losses.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")
def test_a_rank_that_is_killed_fails_the_trial_and_leaves_no_process(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ended = loop.train_step, list[int]()

    def killing(*arguments: Any) -> tuple[float, float]:
        if not ended:
            ended.extend(
                pid for pid in _children() if b"sparsemem.train.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
            )
            os.kill(ended[0], signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killing)
    with pytest.raises(RuntimeError):
        run_trial(make_trial(), tokens_folder, tmp_path, threads=2, device="cpu", ranks=2)
    assert json.loads((tmp_path / "failure.json").read_text())["status"] == "failed"
    assert not any(Path(f"/proc/{pid}").exists() for pid in ended)


def _children() -> list[int]:
    return [
        int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()
    ]
