"""SwiGLU's gate (arXiv 2002.05202): `silu(gate) * up`, gate and up side by side.

Shape letters: F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.kernels import REFERENCE


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2F), gate first -> (..., F)."""
    return swiglu_reference(gate_up) if REFERENCE else _SwiGLU.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated(gate_up: Tensor) -> Tensor:
    """`swiglu` without a gradient, for the inside of autograd functions."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_backward(gradient: Tensor, gate_up: Tensor, activated: Tensor) -> Tensor:
    """(..., F) -> (..., 2F): d gate = dy up silu'(gate), d up = dy silu(gate), written side by side; `activated` is
    silu(gate).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    into_gate, into_up = result.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=into_gate)
    torch.mul(activated, gradient, out=into_up)
    return result


class _SwiGLU(torch.autograd.Function):
    """`gated` with `gated_backward`, which spares the copies of two gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return gated_backward(gradient, gate_up, F.silu(gate_up.chunk(2, dim=-1)[0]))
