"""One trial from start to end: exact budget, same result after any interruption, and what bad luck leaves behind."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.data import Tokens
from sparsemem.kernels import matmul
from sparsemem.model import Transformer
from sparsemem.train import checkpoint, loop, measure_step, run_trial
from sparsemem.train.evaluate import why_diverged
from sparsemem.train.optim import Optimizer

Make = Callable[..., Trial]
TIMED = {"tokens_per_second", "seconds", "peak_memory_bytes", "ended"}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's allocator and denormals stay as the other tests expect them."""
    monkeypatch.setattr(loop, "prepare_process", lambda threads: torch.set_num_threads(threads))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: value for key, value in row.items() if key not in TIMED} for row in csv.DictReader(file)]


def _ends(folder: Path) -> tuple[Any, ...]:
    """All that a trial leaves, times aside."""
    result = {key: value for key, value in json.loads((folder / "result.json").read_text()).items() if key not in TIMED}
    held_out = (folder / "val_losses.csv").read_text() if (folder / "val_losses.csv").exists() else None
    return result, _rows(folder / "curve.csv"), held_out


class _Killed(BaseException):
    """As abrupt as a signal: nothing in the loop catches it."""


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Raise in place of the `step`-th training step from here on, with a checkpoint after each step before it."""
    real, calls = loop.train_step, iter(range(1, 10**6))

    def stopping(*arguments: Any) -> tuple[float, float]:
        if next(calls) == step:
            raise error
        return real(*arguments)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(loop, "CHECKPOINT_TIMES", 0)
    monkeypatch.setattr(loop, "train_step", stopping)


def _interrupted(monkeypatch: pytest.MonkeyPatch, trial: Trial, tokens: Path, folder: Path, *steps: int) -> None:
    for step in steps:
        with monkeypatch.context() as patch:
            _stop_at(patch, step, _Killed())
            with pytest.raises(_Killed):
                run_trial(trial, tokens, folder, threads=1)


# --- the way to the end -----------------------------------------------------------------------------------------------


def test_a_result_says_what_was_trained_and_what_came_out(
    make_trial: Make, tokens_folder: Path, tmp_path: Path
) -> None:
    trial = make_trial()
    result = run_trial(trial, tokens_folder, tmp_path, threads=1)
    assert result == json.loads((tmp_path / "result.json").read_text())
    fields = (
        "trial_id status val_loss val_loss_se val_bpb train_loss tokens steps tokens_per_second peak_memory_bytes "
        "seconds ended device"
    )
    assert list(result) == [*fields.split(), "threads", "precision", "versions"]
    assert abs((datetime.now(UTC) - datetime.fromisoformat(result["ended"])).total_seconds()) < 60
    assert (result["trial_id"], result["status"], result["threads"]) == (trial.id, "finished", 1)
    assert (result["tokens"], result["steps"]) == (2010, 16)
    assert 0 < result["val_loss"] < math.log(260) - 0.5  # it has learned something
    assert result["peak_memory_bytes"] > 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.csv",
        "lock",
        "result.json",
        "usage.csv",
        "val_losses.csv",
    ]


def test_the_curve_counts_every_token_of_the_budget_once(make_trial: Make, tokens_folder: Path, tmp_path: Path) -> None:
    run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step",
        "tokens",
        "train_loss",
        "val_loss",
        "lr",
        "grad_norm",
        "expert_load_max",
        "tokens_per_second",
        "seconds",
    ]
    assert [int(row["tokens"]) for row in rows] == [128 * step for step in range(1, 16)] + [2010]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [4, 8, 12, 16]
    assert float(rows[-1]["lr"]) == pytest.approx(0.001)  # the schedule ends with the budget
    assert all(float(row["expert_load_max"]) >= 1 for row in rows)
    assert [float(row["seconds"]) for row in rows] == sorted(float(row["seconds"]) for row in rows)


def test_long_curves_have_about_fifty_rows() -> None:
    assert len(loop._spread(100_000, loop.CURVE_ROWS)) == 50
    assert loop._spread(3, 8) == {1, 2, 3}
    assert max(loop._spread(1237, 50)) == 1237


def test_validation_figures_by_hand(make_trial: Make, tokens_folder: Path, tmp_path: Path) -> None:
    """Mean, standard error, and bits per byte = nats of all held-out targets / their bytes / ln 2."""
    result = run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    losses = np.array([float(row["nats_per_token"]) for row in _rows(tmp_path / "val_losses.csv")])
    tokens = Tokens.load(tokens_folder)
    sequences = 999 // 16
    assert len(losses) == sequences
    assert result["val_loss"] == pytest.approx(losses.mean(), rel=1e-7)
    assert result["val_loss_se"] == pytest.approx(losses.std(ddof=1) / math.sqrt(sequences), rel=1e-6)
    scored = tokens.val_bytes[1 : 1 + sequences * 16]
    assert result["val_bpb"] == pytest.approx(losses.sum() * 16 / scored.sum() / math.log(2), rel=1e-7)


def test_a_masked_document_start_is_in_no_figure(make_trial: Make, tokens_folder: Path, tmp_path: Path) -> None:
    """Neither its nats nor its bytes; the losses of sequences average to that of tokens."""
    trial = make_trial(data={"mask_document_start": True}, budget={"tokens": 256})
    result = run_trial(trial, tokens_folder, tmp_path, threads=1)
    assert result["tokens"] == 256
    tokens = Tokens.load(tokens_folder)
    count = 999 // 16
    inputs, targets = tokens.val[: count * 16], tokens.val[1 : count * 16 + 1]
    scored = inputs != tokens.separator_id
    assert 0 < scored.sum() < len(targets)
    losses = np.array([float(row["nats_per_token"]) for row in _rows(tmp_path / "val_losses.csv")])
    nats = losses.sum() * scored.sum() / count
    assert result["val_loss"] == pytest.approx(nats / scored.sum(), rel=1e-7)
    assert result["val_bpb"] == pytest.approx(
        nats / tokens.val_bytes[1 : count * 16 + 1][scored].sum() / math.log(2), rel=1e-7
    )


@pytest.mark.parametrize(("tokens", "last"), [(16, [1, 16]), (128, [8, 128]), (129, [1, 1]), (250, [8, 122])])
def test_the_last_batch_is_cut_to_the_budget(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, last: list[int]
) -> None:
    seen, real = [], loop.train_step

    def watching(
        model: Any, optimizer: Any, inputs: torch.Tensor, targets: torch.Tensor, count: int, *rest: Any
    ) -> tuple[float, float]:
        seen.append([len(inputs), count])
        return real(model, optimizer, inputs, targets, count, *rest)

    monkeypatch.setattr(loop, "train_step", watching)
    result = run_trial(make_trial(budget={"tokens": tokens}), tokens_folder, tmp_path, threads=1)
    assert seen[-1] == last
    assert sum(count for _, count in seen) == tokens == result["tokens"]


def _after_a_step(trial: Trial, targets: torch.Tensor, count: int) -> list[torch.Tensor]:
    sizes = solve(trial.model, trial.budget, trial.shares)
    model = Transformer(trial.model, sizes, 16, torch.arange(260), separator=0).initialize(0)
    inputs = torch.randint(260, (4, 16), generator=torch.Generator().manual_seed(0))
    loop.train_step(model, Optimizer(model, trial.train), inputs, targets, count, 0.01, 0.0, torch.float32)
    return [weight.detach() for weight in model.parameters()]


def test_masked_targets_teach_nothing(make_trial: Make) -> None:
    """The same step whatever the masked targets were, and one over the others' mean; without any target a step is
    finite.
    """
    targets = torch.randint(260, (4, 16), generator=torch.Generator().manual_seed(1))
    masked = targets.index_fill(1, torch.arange(8, 16), -1)
    trial = make_trial()
    kept = _after_a_step(trial, masked, 64)
    assert all(map(torch.equal, kept, _after_a_step(trial, masked, 64)))
    assert not all(map(torch.equal, kept, _after_a_step(trial, targets, 64)))
    assert all(weight.isfinite().all() for weight in _after_a_step(trial, targets.fill_(-1), 64))


def test_targets_beyond_the_budget_teach_nothing(make_trial: Make) -> None:
    targets = torch.randint(260, (4, 16), generator=torch.Generator().manual_seed(1))
    changed = targets.flatten().clone()
    changed[50:] = (changed[50:] + 1) % 260
    first, second = (_after_a_step(make_trial(), each.view(4, 16), 50) for each in (targets, changed))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    changed[49] = (changed[49] + 1) % 260
    assert not all(
        torch.equal(a, b) for a, b in zip(first, _after_a_step(make_trial(), changed.view(4, 16), 50), strict=True)
    )


def test_all_shares_of_a_seed_meet_the_same_batches(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paired design: what differs between two shares of a seed is the share."""
    seen: list[torch.Tensor] = []
    real = loop.train_step

    def watching(model: Any, optimizer: Any, inputs: torch.Tensor, *rest: Any) -> tuple[float, float]:
        seen.append(inputs)
        return real(model, optimizer, inputs, *rest)

    monkeypatch.setattr(loop, "train_step", watching)
    orders = []
    for name, rho, seed in (("a", 1, 0), ("b", 0.5, 0), ("c", 0, 0), ("d", "dense", 0), ("e", 0.5, 1)):
        run_trial(make_trial(rho, seed), tokens_folder, tmp_path / name, threads=1)
        orders.append(torch.cat(seen))
        seen.clear()
    assert all(torch.equal(orders[0], order) for order in orders[1:4])
    assert not torch.equal(orders[0], orders[4])


def test_a_finished_trial_is_not_trained_again(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("trained again"))
    assert run_trial(make_trial(), tokens_folder, tmp_path, threads=1) == result


def test_two_workers_do_not_train_one_trial_at_once(make_trial: Make, tokens_folder: Path, tmp_path: Path) -> None:
    worker = threading.Thread(target=run_trial, args=(make_trial(), tokens_folder, tmp_path), kwargs={"threads": 1})
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker.start()
        worker.join(0.3)
        assert not (tmp_path / "curve.csv").exists()
    worker.join(30)
    assert (tmp_path / "result.json").exists()


def test_the_time_of_a_step_is_measured(make_trial: Make) -> None:
    assert 0 < measure_step(make_trial(), threads=1, steps=2) < 5


# --- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1, 0.5, 0, "dense"])
def test_an_interrupted_trial_ends_as_the_uninterrupted_one_bit_for_bit(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rho: Any
) -> None:
    trial = make_trial(rho)
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
    # killed before any checkpoint, right after the first, in the middle, twice at one place, and in the last step
    _interrupted(monkeypatch, trial, tokens_folder, tmp_path / "parts", 1, 2, 6, 1, 9)
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoint.pt").exists()


def test_a_trial_goes_on_with_the_library_that_it_began_with(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial()
    with monkeypatch.context() as patch:
        patch.setattr(matmul, "_chosen", "onednn")
        run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
        _interrupted(patch, trial, tokens_folder, tmp_path / "parts", 6)
    monkeypatch.setattr(matmul, "_chosen", "torch")  # what another process measured
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert matmul.library() == "onednn"  # models as small as this one come to the same bits either way
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")


def test_rows_of_a_long_curve_survive_an_interruption_between_them(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row averages all steps since the last one, also those before the kill."""
    trial = make_trial()
    monkeypatch.setattr(loop, "CURVE_ROWS", 3)
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
    _interrupted(monkeypatch, trial, tokens_folder, tmp_path / "parts", 3, 7)
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[: len(content) // 2], _flip, lambda content: b"", lambda content: b"not a checkpoint"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_trial_still_ends_alike(
    make_trial: Make,
    tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    trial = make_trial()
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
    _interrupted(monkeypatch, trial, tokens_folder, tmp_path / "parts", 6)
    path = tmp_path / "parts" / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")
    assert (tmp_path / "parts" / "checkpoint.pt.corrupt-1").exists()
    assert "set aside as checkpoint.pt.corrupt-1" in capsys.readouterr().err


def test_a_damaged_checkpoint_costs_one_interval_and_two_cost_the_trial(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = make_trial()
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
    for damaged, trained in (
        (["checkpoint.pt"], 12),
        (["checkpoint.previous.pt"], 11),
        (["checkpoint.pt", "checkpoint.previous.pt"], 16),
    ):
        folder = tmp_path / f"{trained}"
        _interrupted(monkeypatch, trial, tokens_folder, folder, 6)  # five steps done, a checkpoint after each
        for name in damaged:
            (folder / name).write_bytes(_flip((folder / name).read_bytes()))
        steps, real = [], loop.train_step
        with monkeypatch.context() as patch:
            patch.setattr(
                loop, "train_step", lambda *arguments, real=real, steps=steps: (steps.append(1), real(*arguments))[1]
            )
            run_trial(trial, tokens_folder, folder, threads=1)
        assert len(steps) == trained
        assert _ends(folder) == _ends(tmp_path / "whole")
        assert len(list(folder.glob("*.corrupt-1"))) == len(damaged) - (damaged == ["checkpoint.previous.pt"])
        assert not list(folder.glob("checkpoint*.pt"))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(5, "Input/output error"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_left_where_it_is(tmp_path: Path, error: Exception) -> None:
    checkpoint.save(tmp_path, {"trial_id": "a", "corpus": "b"})

    def without_memory(state: dict[str, Any]) -> None:
        raise error

    with pytest.raises(type(error)):
        checkpoint.load(tmp_path, "a", "b", without_memory)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.LAST]


def test_a_checkpoint_is_never_unpickled_into_objects(tmp_path: Path) -> None:
    """`weights_only`: a checkpoint from elsewhere cannot run code."""

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    checkpoint.save(tmp_path, {"trial_id": "x", "corpus": "y", "payload": Payload()})
    assert not checkpoint.load(tmp_path, "x", "y", lambda state: None)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_trial_or_corpus_is_not_used(
    make_trial: Make,
    tokens_folder: Path,
    other_tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_trial(make_trial(), tokens_folder, tmp_path / "whole", threads=1)
    for name, trial, tokens in (
        ("trial", make_trial(seed=1), tokens_folder),
        ("corpus", make_trial(), other_tokens_folder),
    ):
        _interrupted(monkeypatch, trial, tokens, tmp_path / name, 5)
        run_trial(make_trial(), tokens_folder, tmp_path / name, threads=1)
        assert _ends(tmp_path / name) == _ends(tmp_path / "whole")
        assert name in capsys.readouterr().err


def test_a_checkpoint_of_other_code_is_set_aside_too(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field or a tensor that this version does not know, after an update of the package in the middle of a study."""
    trial = make_trial()
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)
    _interrupted(monkeypatch, trial, tokens_folder, tmp_path / "parts", 6)
    path = tmp_path / "parts" / "checkpoint.pt"
    states: list[dict[str, Any]] = []
    assert checkpoint.load(path.parent, trial.id, Tokens.load(tokens_folder).digest, states.append)
    states[0]["model"]["renamed"] = states[0]["model"].pop("embedding")
    checkpoint.save(path.parent, states[0])
    states[0]["since"]["renamed"] = 0.0
    checkpoint.save(
        path.parent, states[0]
    )  # now neither generation can be used, and nothing of either may stay in the run
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")


# --- bad ends ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 6, 16])
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_as_diverged_with_its_curve(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, loss: float
) -> None:
    real, calls = loop.train_step, iter(range(1, 10**6))
    monkeypatch.setattr(
        loop, "train_step", lambda *arguments: (loss, math.nan) if next(calls) == step else real(*arguments)
    )
    result = run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    assert (result["status"], result["steps"], result["val_loss"]) == ("diverged", step, None)
    assert result["why"] == f"the loss of step {step} is {loss}"
    assert len(_rows(tmp_path / "curve.csv")) == step
    assert not (tmp_path / "failure.json").exists()
    assert json.loads((tmp_path / "result.json").read_text()) == result  # JSON without NaN


@pytest.mark.parametrize("tokens", [128, 2010])
@pytest.mark.parametrize("lr", [1e3, 1e15, 1e35])
def test_an_absurd_rate_ends_as_diverged_also_in_the_last_step(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, tokens: int, lr: float
) -> None:
    """With one step in all, the loss is finite and only the evaluation shows the damage."""
    trial = make_trial(train={"lr": lr, "warmup": 0, "final_lr": 1.0}, budget={"tokens": tokens})
    result = run_trial(trial, tokens_folder, tmp_path, threads=1)
    assert result["status"] == "diverged"
    assert len(_rows(tmp_path / "curve.csv")) == result["steps"]
    assert not (tmp_path / "failure.json").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("something else"), "failed"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        # outside torch's allocator, for instance a context where others fill the GPU
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported ..."),
            "out_of_memory",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "failed"),
        # what torch raises on Linux and on other systems where a tensor does not fit into the memory
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                "..."
            ),
            "out_of_memory",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried ..."
            ),
            "out_of_memory",
        ),
    ],
)
def test_failures_are_told_apart_and_the_trial_goes_on_from_its_checkpoint(
    make_trial: Make,
    tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: str,
) -> None:
    trial = make_trial()
    with monkeypatch.context() as patch:
        _stop_at(patch, 3, error)
        with pytest.raises(MemoryError if status == "out_of_memory" else type(error)):
            run_trial(trial, tokens_folder, tmp_path, threads=1)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["status"] == status
    assert failure["message"] == (str(error) or type(error).__name__)
    assert type(error).__name__ in failure["traceback"]
    assert not (tmp_path / "result.json").exists()

    run_trial(trial, tokens_folder, tmp_path, threads=1)  # from its checkpoint, to the end
    assert not (tmp_path / "failure.json").exists()
    assert json.loads((tmp_path / "result.json").read_text())["trial_id"] == trial.id


def test_a_validation_loss_worse_than_guessing_is_diverged(
    make_trial: Make, tokens_folder: Path, tmp_path: Path
) -> None:
    """The exact end of such a trial; its held-out losses are kept, its loss is no result."""
    result = run_trial(make_trial(train={"lr": 3.0, "warmup": 0, "final_lr": 1.0}), tokens_folder, tmp_path, threads=1)
    assert result["status"] == "diverged"
    assert re.fullmatch(
        r"the held-out loss ended at [\d.]+ nats, above chance \([\d.]+\), after a training loss of [\d.]+",
        result["why"],
    )


def test_a_trial_that_has_hardly_begun_to_learn_has_not_diverged(
    make_trial: Make, tokens_folder: Path, tmp_path: Path
) -> None:
    """Of a new model, the loss is a little above that of equally likely tokens, and a rate of next to nothing leaves it
    there.
    """
    trial = make_trial(train={"lr": 1e-9, "warmup": 0}, budget={"tokens": 256})
    result = run_trial(trial, tokens_folder, tmp_path, threads=1)
    assert result["val_loss"] > math.log(trial.data.vocab_size)
    assert result["status"] == "finished"
    assert "why" not in result


def test_a_model_that_tells_no_token_from_another_is_dead() -> None:
    """What a rate of 30 left of a small model: 5.70378 nats at every sequence of 300 entries, which reads like a result
    without noise.
    """
    chance = math.log(300)
    assert "the model is dead; lower `train.lr`" in why_diverged(torch.full((8,), 5.70378256), best=5.7, chance=chance)
    spread = torch.linspace(-0.01, 0.01, 8)
    assert why_diverged(chance + spread, best=5.7, chance=chance) == ""


def test_a_full_disk_leaves_no_half_result(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.write_json

    def full(path: Path, value: Any) -> None:
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        real(path, value)

    monkeypatch.setattr(loop, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    assert not (tmp_path / "result.json").exists()
    assert "No space" in json.loads((tmp_path / "failure.json").read_text())["message"]


@pytest.mark.parametrize("name", ["checkpoint.pt", "curve.csv"])
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    make_trial: Make,
    tokens_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """And the last good checkpoint stays: the trial is killed while the disk is full."""
    trial, real, calls = make_trial(), os.fsync, iter(range(10**6))
    run_trial(trial, tokens_folder, tmp_path / "whole", threads=1)

    def full(file: int) -> None:
        if f".{name}." in os.readlink(f"/proc/self/fd/{file}") and next(calls) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        _interrupted(monkeypatch, trial, tokens_folder, tmp_path / "parts", 9)
    assert f"disk full (No space left on device): '{tmp_path / 'parts' / name}'" in capsys.readouterr().err
    left = sorted(path.name for path in (tmp_path / "parts").glob("checkpoint*"))
    assert left == (
        ["checkpoint.previous.pt"] if name == "checkpoint.pt" else ["checkpoint.previous.pt", "checkpoint.pt"]
    )
    run_trial(trial, tokens_folder, tmp_path / "parts", threads=1)
    assert _ends(tmp_path / "parts") == _ends(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*.corrupt-*"))


def test_a_trial_that_begins_again_removes_what_kills_have_left(
    make_trial: Make, tokens_folder: Path, tmp_path: Path
) -> None:
    run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    for left in (
        "checkpoint.pt",
        "checkpoint.previous.pt",
        ".checkpoint.pt.0abc_d12.tmp",
    ):  # killed between its result and its end
        (tmp_path / left).write_bytes(b"left")
    run_trial(make_trial(), tokens_folder, tmp_path, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_trial_that_was_promised_a_gpu_does_not_train_without_one(
    make_trial: Make, tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        RuntimeError, match=r"takes 2 GPUs, but PyTorch .* sees 1 here.*CUDA build of PyTorch.*`run.gpus_per_trial: 0`"
    ):
        run_trial(make_trial(), tokens_folder, tmp_path, threads=2, device="cuda", ranks=2)
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["status"] == "failed"
    assert "sees 1 here" in failure["message"]
