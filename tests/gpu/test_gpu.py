"""What only a GPU can show: `make test-gpu`. It needs torch, numpy, pydantic, yaml and pytest, and nothing
of a study.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsemem.config import Trial
from sparsemem.mechanisms.moe.layer import MixtureOfExperts
from sparsemem.train import loop
from sparsemem.train.loop import run_trial
from sparsemem.train.step import StepTimer

from ..fake_cuda import cases
from ..fake_cuda.test_budgets import BUDGETS
from ..train.conftest import BASE, MEMORIES, write_tokens

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def tokens_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("corpus") / "tokens")


def _trial(pool: str | None = None, precision: str = "auto") -> Trial:
    raw: dict[str, Any] = {**BASE, "train": BASE["train"] | {"precision": precision}}
    if pool is None:
        return Trial.model_validate(raw | {"shares": {"moe": 1.0}})
    if pool in MEMORIES:
        raw["model"] = BASE["model"] | {"engram": None, pool: MEMORIES[pool]}
        raw["budget"] = BASE["budget"] | {"total_params": 24_000, "active_params": 10_000}
    return Trial.model_validate(raw | {"shares": {"moe": 0.5, pool: 0.5}})


@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize("pool", [None, "engram", *MEMORIES])
def test_a_gpu_comes_to_the_loss_of_the_cpu(
    tokens_folder: Path, tmp_path: Path, pool: str | None, precision: str
) -> None:
    on_cpu = run_trial(_trial(pool), tokens_folder, tmp_path / "cpu", threads=1, device="cpu")
    on_gpu = run_trial(_trial(pool, precision), tokens_folder, tmp_path / "gpu", threads=1, device="cuda")
    assert on_gpu["val_loss"] == pytest.approx(on_cpu["val_loss"], abs=0.05)
    assert on_gpu["precision"] == ("bf16" if precision == "auto" else "fp32")


def test_a_killed_trial_goes_on(tokens_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearly the same loss: sums of a GPU have no fixed order."""
    whole = run_trial(_trial("engram"), tokens_folder, tmp_path / "whole", threads=1, device="cuda")
    real, calls = loop.train_step, iter(range(10**6))

    def killed(*arguments: Any) -> tuple[float, float]:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(loop, "CHECKPOINT_TIMES", 0)
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_trial(_trial("engram"), tokens_folder, tmp_path / "parts", threads=1, device="cuda")
    assert (tmp_path / "parts" / "checkpoint.pt").exists()
    parts = run_trial(_trial("engram"), tokens_folder, tmp_path / "parts", threads=1, device="cuda")
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], abs=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tokens_folder: Path, tmp_path: Path) -> None:
    one = run_trial(_trial(precision="fp32"), tokens_folder, tmp_path / "one", threads=1, device="cuda")
    two = run_trial(_trial(precision="fp32"), tokens_folder, tmp_path / "two", threads=2, device="cuda", ranks=2)
    assert two["val_loss"] == pytest.approx(one["val_loss"], abs=0.01)


@pytest.mark.parametrize("case", ["dense", "moe", *cases.MEMORIES])
def test_a_step_waits_for_the_gpu_no_more_often_than_its_budget_says(case: str) -> None:
    shares = {} if case == "dense" else {"moe": 1.0} if case == "moe" else {"moe": 0.5, case: 0.5}
    timer = StepTimer(cases.trial(shares), threads=1, device="cuda")
    timer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            timer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    _, syncs, transfers = BUDGETS[case]["training"]
    assert len(waits) <= syncs + transfers, waits


@pytest.mark.parametrize("shares", [{}, {"moe": 1.0}])
def test_a_forward_pass_never_waits_for_the_gpu(shares: dict[str, float]) -> None:
    timer = StepTimer(cases.trial(shares), threads=1, device="cuda")
    timer.step()
    tokens_BT = torch.randint(260, (8, 16), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=timer.precision):
            timer.model.loss(tokens_BT, tokens_BT, tokens_BT.numel())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("experts", [6, 1100])
def test_gradients_of_busy_and_idle_experts_are_those_of_a_loop(experts: int) -> None:
    """More experts than one grouped product takes, most of them without a token, in memory that held other things."""
    torch.manual_seed(0)
    config = cases.trial({"moe": 1.0}).model
    layer = MixtureOfExperts(config, experts, 0).cuda()
    for weight in (layer.gate_up_EDF, layer.down_EFD):
        torch.nn.init.normal_(weight, std=0.2)
    x_SD = torch.randn(64, config.width, device="cuda", requires_grad=True)
    gates_SK, experts_SK = (
        torch.rand(64, 2, device="cuda"),
        torch.tensor([[1, 3], [3, experts - 1]], device="cuda").repeat(32, 1),
    )
    leaves = [x_SD, layer.gate_up_EDF, layer.down_EFD]
    filled = [torch.full_like(weight, torch.nan, dtype=torch.bfloat16) for weight in leaves for _ in range(4)]
    del filled
    with torch.autocast("cuda", torch.bfloat16):
        y_SD = layer.routed(x_SD, gates_SK, experts_SK)
    ours = [y_SD, *torch.autograd.grad(y_SD.float().square().sum(), leaves)]
    expected_SD = torch.zeros_like(x_SD)
    for place in range(2):
        gate_SF, up_SF = torch.einsum("sd,sdf->sf", x_SD, layer.gate_up_EDF[experts_SK[:, place]]).chunk(2, -1)
        inner_SF = torch.nn.functional.silu(gate_SF) * up_SF
        expected_SD = expected_SD + gates_SK[:, place, None] * torch.einsum(
            "sf,sfd->sd", inner_SF, layer.down_EFD[experts_SK[:, place]]
        )
    theirs = [expected_SD, *torch.autograd.grad(expected_SD.square().sum(), leaves)]
    for near, exact in zip(ours, theirs, strict=True):
        assert (near.float() - exact).norm() < 0.05 * exact.norm()
    idle = [expert for expert in range(experts) if expert not in (1, 3, experts - 1)]
    assert all((gradient[idle] == 0).all() for gradient in ours[2:])


@pytest.mark.parametrize("name", ["step", "profile", "moe", "memory", "eval"])
def test_benches_run_wholly_on_the_gpu(name: str) -> None:
    assert {device for device, _ in cases.bench(name)["rows"].values()} == {"cuda"}
