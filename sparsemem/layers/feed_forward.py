"""SwiGLU feed-forward (arXiv 2002.05202): the dense block, the shared experts, and the shape of a routed expert.

Shape letters: D model width, F inner width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.config import Model
from sparsemem.layers.product import linear
from sparsemem.parameter import parameter, residual_std


class FeedForward(nn.Module):
    """`down(silu(gate x) * up x)`; gate and up are one fused matrix."""

    def __init__(self, config: Model, inner: int) -> None:
        super().__init__()
        self.gate_up = parameter(2 * inner, config.width, std=config.init_std)
        self.down = parameter(inner, config.width, std=residual_std(config.init_std, config.layers))

    def forward(self, x: Tensor) -> Tensor:
        return linear(gated(linear(x, self.gate_up)), self.down.T)


def gated(gate_up: Tensor) -> Tensor:
    """(..., 2F), gate first -> (..., F): `silu(gate) * up`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def feed_forward_account(width: int, inner: int) -> Account:
    """Three matrices of width x inner."""
    return always_active(3 * width * inner)
