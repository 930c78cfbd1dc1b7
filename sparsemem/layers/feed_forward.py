"""SwiGLU feed-forward (arXiv 2002.05202): the dense block, the shared experts, and the shape of a routed expert.

Shape letters: D model width, F inner width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.layers.product import linear
from sparsemem.parameter import parameter, residual_std

if TYPE_CHECKING:
    from sparsemem.config import Model


class FeedForward(nn.Module):
    """`down(silu(gate x) * up x)`; gate and up are one fused matrix."""

    def __init__(self, config: Model, inner: int) -> None:
        super().__init__()
        self.gate_up = parameter(2 * inner, config.width, std=config.init_std)
        self.down = parameter(inner, config.width, std=residual_std(config.init_std, config.layers))

    def forward(self, x: Tensor) -> Tensor:
        return linear(_Gated.apply(linear(x, self.gate_up)), self.down.T)


def gated(gate_up: Tensor) -> Tensor:
    """(..., 2F), gate first -> (..., F): `silu(gate) * up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_backward(gradient: Tensor, gate_up: Tensor, activated: Tensor) -> Tensor:
    """(..., F) -> (..., 2F): d gate = dy up silu'(gate), d up = dy silu(gate), written side by side; `activated` is silu(gate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    into_gate, into_up = result.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=into_gate)
    torch.mul(activated, gradient, out=into_up)
    return result


class _Gated(torch.autograd.Function):
    """`gated` with `gated_backward`, which spares the copies of two gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(gradient, gate_up, F.silu(gate_up.chunk(2, dim=-1)[0]))


def feed_forward_account(width: int, inner: int) -> Account:
    """Three matrices of width x inner."""
    return always_active(3 * width * inner)
