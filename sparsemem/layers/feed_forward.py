"""SwiGLU feed-forward (arXiv 2002.05202): the dense block, the shared experts, and the shape of a routed expert.

Shape letters: D model width, F inner width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.kernels.matmul import linear
from sparsemem.kernels.swiglu import swiglu
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
        return linear(swiglu(linear(x, self.gate_up)), self.down.T)


def feed_forward_account(width: int, inner: int) -> Account:
    """Three matrices of width x inner."""
    return always_active(3 * width * inner)
