"""Rotary positions (arXiv 2104.09864).

Shape letters: B sequences, T positions, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsemem.kernels import REFERENCE


def rotations(context: int, heads: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Cosines and signed sines of RoPE's angles (arXiv 2104.09864), position times theta^(-2 i / head_dim): (2,
    context, heads, head_dim).

    The same for each head, side by side, so that a product with them runs along memory.
    """
    # Powers and sines in float64, rounded once: in float32 each vector width of a processor rounds them in its own way.
    frequencies = (theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)).float()
    angles_TK = torch.outer(torch.arange(context, device=device, dtype=torch.float32), frequencies).double()
    cos_sin_2TK = torch.stack(
        (torch.cat((angles_TK.cos(),) * 2, -1), torch.cat((-angles_TK.sin(), angles_TK.sin()), -1))
    )
    return cos_sin_2TK.float().unsqueeze(2).expand(-1, -1, heads, -1).contiguous()


def rotate(x_BTHK: Tensor, cos_sin_2THK: Tensor) -> Tensor:
    """Turn the pairs (i, i + K/2) of the last dimension by the angle of their position; `cos_sin` is that of as many
    heads or more.
    """
    cos_THK, sin_THK = cos_sin_2THK[:, :, : x_BTHK.shape[2]].to(x_BTHK.dtype)
    return rotate_reference(x_BTHK, cos_THK, sin_THK) if REFERENCE else _Rotate.apply(x_BTHK, cos_THK, sin_THK)


def rotate_reference(x_BTHK: Tensor, cos_THK: Tensor, sin_THK: Tensor) -> Tensor:
    return x_BTHK * cos_THK + _swap(x_BTHK) * sin_THK


class _Rotate(torch.autograd.Function):
    """y = x cos + swap(x) sin, swap exchanging the halves; the gradient turns back: dx = dy cos - swap(dy) sin."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_THK: Tensor, sin_THK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_THK, sin_THK)
        return (x_BTHK * cos_THK).addcmul_(_swap(x_BTHK), sin_THK)

    @staticmethod
    def backward(ctx: Any, gradient_BTHK: Tensor) -> tuple[Tensor, None, None]:
        cos_THK, sin_THK = ctx.saved_tensors
        return (gradient_BTHK * cos_THK).addcmul_(_swap(gradient_BTHK), sin_THK, value=-1), None, None


def _swap(x: Tensor) -> Tensor:
    return x.roll(x.shape[-1] // 2, -1)
