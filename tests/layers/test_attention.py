"""Attention against a naive loop in float64, and the property RoPE is chosen for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sparsemem.config import Model
from sparsemem.kernels.rotary import rotate, rotations
from sparsemem.layers.attention import Attention, attention_account
from sparsemem.parameter import initialize


def _model(heads: int = 4, kv_heads: int | None = None, **changes: Any) -> Model:
    moe = {"expert_width": 8, "top_k": 1, "normalize_gates": False}
    return Model.model_validate(
        {"layers": 2, "width": 32, "heads": heads, "kv_heads": kv_heads, "init_std": 0.3, "moe": moe} | changes
    )


def _rms(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def _turned(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """RoPE (arXiv 2104.09864, eq. 34) as complex numbers: pair i turns by position * theta^(-2i/K)."""
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-2.0 * np.arange(half) / len(x)))
    return np.concatenate([pairs.real, pairs.imag])


def _naive(layer: Attention, config: Model, x_BTD: np.ndarray) -> np.ndarray:
    project_in, project_out, query_gain, key_gain = (
        weight.detach().double().numpy()
        for weight in (layer.project_in, layer.project_out, layer.query_norm.gain, layer.key_norm.gain)
    )
    heads, groups = config.heads, config.kv_heads or config.heads
    width = config.head_dim or config.width // heads
    out = np.zeros_like(x_BTD)
    for b, x_TD in enumerate(x_BTD):
        rows = x_TD @ project_in.T
        for h in range(heads):
            g = h * groups // heads  # consecutive query heads share a key-value head
            parts = [rows[:, start * width : (start + 1) * width] for start in (h, heads + g, heads + groups + g)]
            q = [
                _turned(row, t, config.rope_theta) for t, row in enumerate(_rms(parts[0], query_gain, config.norm_eps))
            ]
            k = [_turned(row, t, config.rope_theta) for t, row in enumerate(_rms(parts[1], key_gain, config.norm_eps))]
            for t in range(len(x_TD)):
                scores = np.array([q[t] @ k[s] / math.sqrt(width) for s in range(t + 1)])
                weights = np.exp(scores - scores.max())
                mixed = (weights / weights.sum()) @ parts[2][: t + 1]
                out[b, t] += project_out[:, h * width : (h + 1) * width] @ mixed
    return out


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [
        (1, None, None),
        (4, None, None),
        (4, 4, None),
        (4, 2, None),
        (4, 1, None),
        (4, 2, 12),
        (4, None, 4),
        (3, None, 10),
    ],
)
def test_equals_the_naive_loop(heads: int, kv_heads: int | None, head_dim: int | None) -> None:
    config = _model(heads, kv_heads, head_dim=head_dim, rope_theta=100.0)
    layer = Attention(config)
    initialize(layer, seed=0)
    torch.manual_seed(0)
    layer.query_norm.gain.data.uniform_(0.5, 2)
    layer.key_norm.gain.data.uniform_(0.5, 2)
    x = torch.randn(2, 9, config.width)
    turns = rotations(16, heads, config.head_width, config.rope_theta, x.device)[:, :9]
    np.testing.assert_allclose(
        layer(x, turns).detach().numpy(), _naive(layer, config, x.double().numpy()), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize("theta", [100.0, 10_000.0])
def test_scores_depend_on_the_distance_only(theta: float) -> None:
    """The relative-position property of RoPE: turning query and key by the same shift keeps their product."""
    turns = rotations(64, 1, 8, theta, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 8)

    def score(t: int, s: int) -> float:
        return float((rotate(query, turns[:, t : t + 1]) * rotate(key, turns[:, s : s + 1])).sum())

    for distance in (0, 1, 7):
        expected = score(distance, 0)
        assert [score(s + distance, s) for s in (1, 20, 50)] == pytest.approx([expected] * 3, abs=1e-4)
    assert score(7, 0) != pytest.approx(score(0, 7), abs=1e-3)  # direction matters


def test_a_rotation_keeps_lengths_and_position_zero_is_not_turned() -> None:
    turns = rotations(32, 2, 8, 10_000.0, torch.device("cpu"))
    x = torch.randn(1, 32, 2, 8)
    turned = rotate(x, turns)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


@pytest.mark.parametrize("heads", [3, 2])
def test_the_gradient_of_a_rotation_is_exact_also_for_fewer_heads(heads: int) -> None:
    turns = rotations(5, 3, 4, 100.0, torch.device("cpu"))
    x = torch.randn(2, 5, heads, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, turns), (x,))


def test_a_later_token_changes_no_earlier_output() -> None:
    config = _model(4, 2)
    layer = Attention(config)
    initialize(layer, seed=0)
    x = torch.randn(1, 10, config.width)
    changed = x.clone()
    changed[:, 6:] += 1
    turns = rotations(10, 4, 8, config.rope_theta, x.device)
    torch.testing.assert_close(layer(x, turns)[:, :6], layer(changed, turns)[:, :6], rtol=0, atol=0)


def test_qk_norm_bounds_the_scores_however_large_the_input() -> None:
    """QK-norm makes attention blind to the scale of its input but for the values."""
    config = _model(2)
    layer = Attention(config)
    initialize(layer, seed=0)
    x = torch.randn(1, 6, config.width)
    turns = rotations(6, 2, 16, config.rope_theta, x.device)
    torch.testing.assert_close(layer(1000 * x, turns), 1000 * layer(x, turns), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("heads", "kv_heads", "context"), [(4, None, 1), (4, 2, 7), (8, 1, 128)])
def test_the_account_counts_the_tensors_and_the_causal_triangle(heads: int, kv_heads: int | None, context: int) -> None:
    config = _model(heads, kv_heads)
    layer, account = Attention(config), attention_account(config, context)
    assert account.total == account.active == sum(weight.numel() for weight in layer.parameters())
    matrices = layer.project_in.numel() + layer.project_out.numel()
    # Every (query, key <= query) pair of every head: a product for the score and one for the weighted sum, two FLOPs an
    # element.
    pairs = sum(t + 1 for t in range(context))
    assert account.flops * context == 2 * matrices * context + pairs * heads * (config.width // heads) * 4
