"""Mixture of experts against a per-token float64 loop: no token is dropped, whatever the load."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsemem.config import Model
from sparsemem.kernels import grouped_experts as moe
from sparsemem.kernels.matmul import fast
from sparsemem.mechanisms.moe.layer import MixtureOfExperts, moe_account
from sparsemem.parameter import initialize

WIDTH, INNER = 8, 16


def _layer(experts: int, top_k: int, shared: int = 0, seed: int = 0, **moe: Any) -> MixtureOfExperts:
    fields = {"expert_width": INNER, "top_k": top_k} | moe
    layer = MixtureOfExperts(
        Model.model_validate({"layers": 1, "width": WIDTH, "heads": 1, "init_std": 0.7, "moe": fields}), experts, shared
    )
    initialize(layer, seed)
    return layer


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _affinity(logits: np.ndarray, gate: str) -> np.ndarray:
    if gate == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _naive(layer: MixtureOfExperts, x_SD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output and loads, token by token (DeepSeekMoE eq. 9-11, DeepSeek-V3's selection on `s + b`; MECHANISMS 4)."""
    config = layer.config
    router, gate_up, down, bias = (
        t.detach().double().numpy() for t in (layer.router_ED, layer.gate_up_EDF, layer.down_EFD, layer.bias_E)
    )
    out, load = np.zeros_like(x_SD), np.zeros(len(router), int)
    for s, x in enumerate(x_SD):
        affinity = _affinity(router @ x, config.gate)
        chosen = np.argsort(-(affinity + bias), kind="stable")[: config.top_k]
        gates = affinity[chosen] / (affinity[chosen].sum() if config.normalize_gates else 1)
        for expert, gate in zip(chosen, gates, strict=True):
            hidden = x @ gate_up[expert]
            out[s] += gate * ((_silu(hidden[:INNER]) * hidden[INNER:]) @ down[expert])
            load[expert] += 1
    if layer.shared is not None:
        weights, inner = layer.shared.gate_up.detach().double().numpy(), layer.shared.down.shape[0]
        out += (
            _silu(x_SD @ weights[:inner].T) * (x_SD @ weights[inner:].T)
        ) @ layer.shared.down.detach().double().numpy()
    return out, load


@settings(max_examples=40, deadline=None)
@given(data=st.data(), experts=st.integers(1, 9), tokens=st.integers(1, 20), seed=st.integers(0, 99))
def test_dispatch_equals_the_per_token_loop(data: st.DataObject, experts: int, tokens: int, seed: int) -> None:
    layer = _layer(
        experts,
        data.draw(st.integers(1, experts)),
        data.draw(st.sampled_from([0, 5])),
        seed,
        gate=data.draw(st.sampled_from(["sigmoid", "softmax"])),
        normalize_gates=data.draw(st.booleans()),
    )
    generator = torch.Generator().manual_seed(seed)
    layer.bias_E.copy_(torch.randn(experts, generator=generator))  # large enough to reorder, and to leave experts empty
    x = torch.randn(1, tokens, WIDTH, generator=generator)
    y, _ = layer(x)
    expected, load = _naive(layer, x[0].double().numpy())
    np.testing.assert_allclose(y[0].detach().numpy(), expected, rtol=2e-3, atol=2e-4)
    assert layer.load_E.tolist() == load.tolist()


@pytest.mark.parametrize("favourite", [0, 3, 5])
def test_no_token_is_dropped_when_all_go_to_one_expert(favourite: int) -> None:
    layer = _layer(6, 1)
    layer.bias_E[favourite] = 100.0
    x = torch.randn(2, 16, WIDTH)
    y, _ = layer(x)
    expected, load = _naive(layer, x.flatten(0, 1).double().numpy())
    assert load[favourite] == 32
    np.testing.assert_allclose(y.flatten(0, 1).detach().numpy(), expected, rtol=2e-3, atol=2e-4)
    y.sum().backward()
    assert layer.gate_up_EDF.grad is not None
    touched = layer.gate_up_EDF.grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [expert == favourite for expert in range(6)]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [4, 6, 7, 8, 50])
def test_any_expert_width_that_the_config_takes_can_be_trained(inner: int, precision: torch.dtype) -> None:
    """torch's grouped product wants rows of a multiple of 16 bytes; a user's `expert_width` must not meet that in the
    first step.
    """
    try:
        layer = _layer(3, 1, expert_width=inner)
    except ValidationError as refused:  # the config may refuse such a width, if it says what would be right
        if "multiple" in str(refused):
            return
        raise
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        y, _ = layer(torch.randn(1, 8, WIDTH))
    y.square().sum().backward()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_bias_enters_the_selection_but_not_the_gates(gate: str, normalize: bool) -> None:
    """Loss-free balancing (arXiv 2408.15664, eq. 3)."""
    layer = _layer(5, 2, gate=gate, normalize_gates=normalize)
    x = torch.randn(40, WIDTH)
    gates, experts, _ = layer.route(x)
    layer.bias_E.fill_(0.3)
    assert torch.equal(layer.route(x)[0], gates)  # a bias alike for all changes nothing
    layer.bias_E.copy_(torch.tensor([0.0, 0, 0, 0, 50]))
    biased_gates, biased, _ = layer.route(x)
    assert not torch.equal(biased, experts)
    assert (biased == 4).any(-1).all()
    affinity = torch.tensor(_affinity((x.double() @ layer.router_ED.detach().double().T).numpy(), gate))
    expected = affinity.gather(-1, biased)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    torch.testing.assert_close(biased_gates.double(), expected, rtol=1e-4, atol=1e-6)


def test_the_bias_moves_against_the_load_by_its_rate() -> None:
    """`b += rate * sign(mean load - load)` (arXiv 2408.15664, algorithm 1)."""
    layer = _layer(4, 1, bias_rate=0.01)
    layer.load_E.copy_(torch.tensor([10, 2, 6, 6]))
    layer.end_step()
    assert layer.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0, 0])
    assert layer.imbalance == pytest.approx(10 / 6)
    assert layer.load_E.tolist() == [0, 0, 0, 0]
    layer.load_E.fill_(3)
    layer.end_step()
    assert layer.bias_E.tolist() == pytest.approx([-0.01, 0.01, 0, 0])
    assert layer.imbalance == 1


def test_balancing_levels_the_load_of_a_lopsided_router() -> None:
    layer = _layer(8, 2, bias_rate=0.003)
    x = torch.randn(1, 512, WIDTH) + 1.0
    layer(x)
    layer.end_step()
    before = layer.imbalance
    for _ in range(400):
        layer.route(x[0])
        layer.end_step()
    assert before > 1.5
    assert layer.imbalance < 1.15


def test_a_rate_of_zero_keeps_the_bias() -> None:
    layer = _layer(4, 1, bias_rate=0)
    layer.load_E.copy_(torch.tensor([10, 2, 6, 6]))
    layer.end_step()
    assert not layer.bias_E.any()


def test_evaluation_leaves_loads_alone_and_the_bias_is_no_parameter() -> None:
    layer = _layer(4, 1).eval()
    layer(torch.randn(1, 8, WIDTH))
    assert not layer.load_E.any()
    assert "bias_E" not in dict(layer.named_parameters())
    assert "bias_E" in layer.state_dict()


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("flushed", [True, False])
def test_gates_that_underflow_are_numbers(gate: str, flushed: bool) -> None:
    """Sigmoids at logits of -120, or softmax probabilities of experts that a bias chose against a preference of 120,
    are all zero.
    """
    torch.set_flush_denormal(flushed)  # as in training
    layer = _layer(4, 2, gate=gate, balance_loss=0.01, bias_rate=0.02)
    layer.router_ED.data = torch.zeros(4, WIDTH).index_fill_(
        0, torch.arange(3) if gate == "softmax" else torch.arange(4), -120.0
    )
    layer.bias_E.copy_(torch.tensor([9.0, 9, 0, 0]))
    x = torch.eye(1, WIDTH).requires_grad_()
    gates, _, auxiliary = layer.route(x)
    assert gates.tolist() == [[0.5, 0.5]]
    (gates.square().sum() + auxiliary).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_the_balance_loss_is_its_weight_at_perfect_balance(gate: str) -> None:
    """Switch Transformer (arXiv 2101.03961, eq. 4): E * sum(share of assignments * mean probability) is 1 when both are
    uniform.
    """
    layer = _layer(4, 1, gate=gate, balance_loss=0.01)
    layer.router_ED.data = 3 * torch.eye(4, WIDTH)
    x = torch.eye(4, WIDTH)  # token i prefers expert i
    assert layer.route(x)[2].item() == pytest.approx(0.01, rel=1e-6)
    collapsed = layer.route(x[:1].repeat(4, 1))[2]
    assert collapsed.item() > 0.015


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_auxiliary_losses_equal_their_formulas(gate: str, top_k: int) -> None:
    """z-loss: mean squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    layer, x = _layer(5, top_k, gate=gate, balance_loss=0.3, z_loss=0.7), torch.randn(30, WIDTH)
    logits = x.double().numpy() @ layer.router_ED.detach().double().numpy().T
    affinity = _affinity(logits, gate)
    chosen = np.argsort(-affinity, kind="stable")[:, :top_k] if top_k > 1 else affinity.argmax(-1)[:, None]
    balance = 5 * sum((chosen == e).sum() / chosen.size * (affinity[:, e] / affinity.sum(-1)).mean() for e in range(5))
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    assert layer.route(x)[2].item() == pytest.approx(0.3 * balance + 0.7 * z, rel=1e-4)
    assert _layer(5, top_k, gate=gate).route(x)[2].item() == 0


def _reference(
    layer: MixtureOfExperts, x_SD: torch.Tensor, weights: list[torch.Tensor], chosen_SK: torch.Tensor
) -> torch.Tensor:
    """The same layer as plain float64 operations that autograd differentiates one by one."""
    router, gate_up, down = weights
    affinity = (x_SD @ router.T).sigmoid() if layer.config.gate == "sigmoid" else (x_SD @ router.T).softmax(-1)
    gates = affinity.gather(-1, chosen_SK)
    gates = gates / gates.sum(-1, keepdim=True) if layer.config.normalize_gates else gates
    rows = []
    for s in range(len(x_SD)):
        hidden = [x_SD[s] @ gate_up[e] for e in chosen_SK[s]]
        outputs = [
            (torch.nn.functional.silu(h[:INNER]) * h[INNER:]) @ down[e]
            for h, e in zip(hidden, chosen_SK[s], strict=True)
        ]
        rows.append(sum(gate * output for gate, output in zip(gates[s], outputs, strict=True)))
    return torch.stack(rows)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), experts=st.integers(1, 7), tokens=st.integers(1, 13), seed=st.integers(0, 99))
def test_gradients_equal_those_of_the_naive_loop(data: st.DataObject, experts: int, tokens: int, seed: int) -> None:
    """Experts without a token and equal tokens included. torch's grouped product knows no float64 on a CPU, so
    gradcheck is replaced by autograd through the per-token loop.
    """
    top_k, gate, normalize = (
        data.draw(choice)
        for choice in (st.integers(1, experts), st.sampled_from(["sigmoid", "softmax"]), st.booleans())
    )
    wide, busy, step = data.draw(
        st.sampled_from([(moe.WIDE, moe.BUSY, moe.STEP), (1, 0, 1), (1, 0, 4)])
    )  # all at once, one by one
    most = data.draw(st.sampled_from([{}, {"cpu": 1}, {"cpu": 2}, {"cpu": 5}]))  # experts of one grouped product
    layer = _layer(experts, top_k, seed=seed, gate=gate, normalize_gates=normalize)
    torch.manual_seed(seed)
    layer.bias_E.copy_(torch.randn(experts))
    x = torch.randn(tokens, WIDTH)[torch.randint(tokens, (tokens,))].requires_grad_()
    target = torch.randn(tokens, WIDTH)
    with patch.multiple(moe, WIDE=wide, BUSY=busy, STEP=step, MOST_EXPERTS=most):
        (layer(x.unsqueeze(0))[0][0] * target).sum().backward()
    parameters = [layer.router_ED, layer.gate_up_EDF, layer.down_EFD]
    exact = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    chosen = layer.route(x.detach())[1]
    (_reference(layer, exact[0], exact[1:], chosen) * target.double()).sum().backward()
    for ours, theirs in zip((x, *parameters), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-4)


def test_experts_beyond_those_of_one_product_change_nothing() -> None:
    """Bit for bit, experts without a token and parts without one included."""
    layer, x, found = _layer(7, 2), torch.randn(9, WIDTH), []
    gates, experts = torch.rand(9, 2), torch.tensor([[0, 1], [1, 6], [6, 0]]).repeat(3, 1)
    for most in ({}, {"cpu": 2}):
        with patch.object(moe, "MOST_EXPERTS", most):
            leaves = [x.clone().requires_grad_(), gates.clone().requires_grad_(), layer.gate_up_EDF, layer.down_EFD]
            y = layer.routed(leaves[0], leaves[1], experts)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(map(torch.equal, *found))


def test_an_expert_without_tokens_gets_no_gradient_out_of_what_memory_held() -> None:
    left = torch.full((5, 2, 3), torch.nan)
    left[[1, 3]] = 1.0
    kept = moe._without_idle(left, torch.tensor([0, 4, 4, 6, 6], dtype=torch.int32))
    assert kept.sum((1, 2)).tolist() == [0, 6, 0, 6, 0]


@pytest.mark.parametrize(("wide", "busy", "step"), [(moe.WIDE, moe.BUSY, moe.STEP), (1, 0, 4)])
def test_experts_in_bf16_stay_near_those_in_fp32(wide: int, busy: int, step: int) -> None:
    """All at once and, where the processor multiplies bf16, one by one: outputs and gradients within 2% of
    their norm.
    """
    layer = _layer(5, 2)
    x = torch.randn(60, WIDTH, requires_grad=True)
    gates, experts, _ = layer.route(x.detach())
    leaves = [x, gates.detach().requires_grad_(), layer.gate_up_EDF, layer.down_EFD]
    found: list[list[torch.Tensor]] = []
    for precision in (torch.float32, torch.bfloat16):
        with (
            patch.multiple(moe, WIDE=wide, BUSY=busy, STEP=step),
            torch.autocast("cpu", precision, enabled=precision != torch.float32),
        ):
            y = layer.routed(x, leaves[1], experts)
            weight = layer.gate_up_EDF.to(precision)
            assert (moe._sort(experts.flatten(), weight)[2].ends[0] is not None) == (wide > 1 or not fast(weight))
        assert y.dtype == precision
        found.append([y.detach().float(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    for exact, near in zip(*found, strict=True):
        assert 0 < (near - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("top_k", "normalize", "reached"), [(1, True, False), (1, False, True), (2, True, True)])
def test_a_single_gate_divided_by_itself_teaches_the_router_nothing(top_k: int, normalize: bool, reached: bool) -> None:
    layer = _layer(4, top_k, normalize_gates=normalize)
    layer(torch.randn(1, 11, WIDTH))[0].mean().backward()
    assert layer.router_ED.grad is not None
    assert bool(layer.router_ED.grad.abs().max() > 1e-5) == reached


@pytest.mark.parametrize(("experts", "top_k", "shared"), [(2, 2, 0), (7, 2, 9), (72, 6, 64)])
def test_the_accounts_count_the_tensors(experts: int, top_k: int, shared: int) -> None:
    fields = {"layers": 3, "width": 16, "heads": 1, "moe": {"expert_width": 24, "top_k": top_k}}
    config = Model.model_validate(fields)
    with torch.device("meta"):
        layer = MixtureOfExperts(config, experts, shared)
    account = moe_account(config, experts, shared)
    assert account.total == sum(weight.numel() for weight in layer.parameters())
    assert account.idle == (experts - top_k) * 3 * 16 * 24
    assert account.sparse_bytes == 4 * top_k * 3 * 16 * 24
    assert account.flops == 2 * account.active
