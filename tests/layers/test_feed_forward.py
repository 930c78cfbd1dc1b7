"""SwiGLU against its formula (arXiv 2002.05202, eq. 6): `(silu(x W) * x V) W_2`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemem.config import Model
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.parameter import initialize


@pytest.mark.parametrize(("width", "inner"), [(8, 12), (8, 1), (16, 33)])
def test_equals_the_formula_and_its_account(width: int, inner: int) -> None:
    config = Model.model_validate(
        {
            "layers": 2,
            "width": width,
            "heads": 1,
            "init_std": 0.5,
            "moe": {"expert_width": 8, "top_k": 1, "normalize_gates": False},
        }
    )
    layer = FeedForward(config, inner)
    initialize(layer, seed=0)
    x = torch.randn(3, 5, width)
    gate_up, down, exact = (t.detach().double().numpy() for t in (layer.gate_up, layer.down, x))
    gate, up = exact @ gate_up[:inner].T, exact @ gate_up[inner:].T
    np.testing.assert_allclose(
        layer(x).detach().numpy(), (gate / (1 + np.exp(-gate)) * up) @ down, rtol=1e-4, atol=1e-5
    )

    account = feed_forward_account(width, inner)
    assert account.total == account.active == sum(weight.numel() for weight in layer.parameters())
    assert account.flops == 2 * account.total


def test_the_gradient_is_exact() -> None:
    layer = FeedForward(Model.model_validate({"layers": 2, "width": 8, "heads": 1}), 3)
    initialize(layer, seed=0)
    weights = {name: 10 * weight.detach().double() for name, weight in layer.named_parameters()}
    inputs = [tensor.requires_grad_() for tensor in (torch.randn(2, 5, 8, dtype=torch.float64), *weights.values())]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(weights, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, inputs)


def test_the_residual_write_starts_smaller_the_deeper_the_model() -> None:
    """GPT-2's rule: matrices that write to the residual stream start at `init_std / sqrt(2 layers)`."""
    for layers in (1, 16):
        config = Model.model_validate(
            {
                "layers": layers,
                "width": 64,
                "heads": 1,
                "init_std": 0.1,
                "moe": {"expert_width": 8, "top_k": 1, "normalize_gates": False},
            }
        )
        layer = FeedForward(config, 256)
        initialize(layer, seed=1)
        assert float(layer.gate_up.detach().std()) == pytest.approx(0.1, rel=0.05)
        assert float(layer.down.detach().std()) == pytest.approx(0.1 / (2 * layers) ** 0.5, rel=0.05)
