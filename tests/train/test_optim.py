"""Schedules and what each kind of parameter is subject to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsemem.config import Train
from sparsemem.train.optim import Optimizer, learning_rate


def _train(**changes: Any) -> Train:
    return Train.model_validate({"batch_tokens": 64, "lr": 0.01, "warmup": 0.1} | changes)


def test_warm_up_rises_linearly_to_the_rate() -> None:
    for schedule in ("cosine", "wsd"):
        rates = [learning_rate(_train(schedule=schedule), done) for done in (0.01, 0.05, 0.1)]
        assert rates == pytest.approx([0.001, 0.005, 0.01])


def test_cosine_falls_over_half_a_period_to_its_floor() -> None:
    train = _train(schedule="cosine", final_lr=0.1)
    for done in (0.1, 0.325, 0.55, 0.775, 1.0):
        expected = 0.001 + 0.009 * (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2
        assert learning_rate(train, done) == pytest.approx(expected)


def test_wsd_is_flat_then_linear() -> None:
    train = _train(schedule="wsd", decay=0.2, final_lr=0.1)
    rates = [learning_rate(train, done) for done in (0.1, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.01, 0.01, 0.01, 0.0055, 0.001])


@given(
    done=st.floats(0, 1),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "wsd"]),
)
def test_the_rate_is_never_negative_nor_above_the_configured_one(
    done: float, warmup: float, decay: float, final: float, schedule: Any
) -> None:
    if schedule == "wsd":
        decay = min(decay, 1 - warmup)
    train = _train(schedule=schedule, warmup=warmup, decay=decay, final_lr=final)
    assert 0 <= learning_rate(train, done) <= 0.01 * (1 + 1e-9)
    if warmup < 1 and (schedule == "cosine" or decay > 0):
        assert learning_rate(train, 1.0) == pytest.approx(0.01 * final)


def _step(config: Train, gradient: float) -> tuple[nn.Module, float]:
    model = nn.Module()
    model.register_parameter("matrix", nn.Parameter(torch.ones(4, 4)))
    model.register_parameter("gain", nn.Parameter(torch.ones(4)))
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, gradient)
    return model, Optimizer(model, config).step(0.01, done=0.0)


def test_decay_takes_matrices_and_spares_gains() -> None:
    model, _ = _step(_train(weight_decay=0.5), gradient=0.0)
    assert torch.allclose(model.get_parameter("matrix"), torch.tensor(1 - 0.01 * 0.5))
    assert model.get_parameter("gain").eq(1).all()


def test_the_reported_norm_is_the_one_before_clipping() -> None:
    assert _step(_train(grad_clip=0.5), gradient=3.0)[1] == pytest.approx(3 * math.sqrt(20))


def test_the_first_step_moves_each_weight_by_the_scheduled_rate() -> None:
    """Adam's first update is the rate times the gradient's sign, whatever the rate in the config and the clipping."""
    model, _ = _step(_train(lr=123.0, weight_decay=0, grad_clip=0.1), gradient=-5.0)
    for weight in model.parameters():
        assert torch.allclose(weight, torch.tensor(1.01), atol=1e-5)


def _two_weights(first: str, second: str) -> nn.Module:
    module = nn.Module()
    for name in (first, second):
        module.register_parameter(name, nn.Parameter(torch.full((4, 3) if name == "wide" else (4,), 0.5)))
    module.register_parameter("late", nn.Parameter(torch.full((3, 4), 0.5)))
    module.register_parameter("early", nn.Parameter(torch.full((3, 4), -0.5)))
    return module


def _stepped(module: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    for name, weight in module.named_parameters():
        weight.grad = torch.full_like(weight, {"late": 1.0, "early": -2.0}.get(name, 0.1))
    optimizer.step(0.01, 0.5)
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def test_a_state_is_taken_over_by_name_whatever_the_order_of_the_weights() -> None:
    """By position, moments of one weight would move another, or be read beyond their end."""
    one, other = _two_weights("narrow", "wide"), nn.Module()
    optimizer = Optimizer(one, _train())
    _stepped(one, optimizer)
    for name, weight in reversed(list(one.named_parameters())):
        other.register_parameter(name, nn.Parameter(weight.detach().clone()))
    resumed = Optimizer(other, _train())
    resumed.load_state_dict(optimizer.state_dict())
    after, expected = _stepped(other, resumed), _stepped(one, optimizer)
    assert all(torch.allclose(after[name], weight, rtol=0, atol=1e-7) for name, weight in expected.items())


def test_a_state_of_other_weights_is_refused() -> None:
    optimizer = Optimizer(_two_weights("narrow", "wide"), _train())
    state = optimizer.state_dict()
    for wrong, words in (
        ([state["wide"]], "by their names"),  # as it was written once
        ({name: each for name, each in state.items() if name != "wide"}, "by their names"),
        (state | {"wide": state["late"]}, r"`wide` has the shape \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(wrong)  # type: ignore[arg-type]
