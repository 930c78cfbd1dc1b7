"""Root mean square norm with a gain (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.kernels import REFERENCE


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The last dimension scaled to unit root mean square, times the gain; in x's dtype."""
    if REFERENCE:
        return rms_norm_reference(x, gain, eps)
    if x.device.type != "cpu" or x.dtype == torch.bfloat16:
        return F.rms_norm(x.float(), gain.shape, gain, eps).to(x.dtype)  # in bf16 a gain near one moves by 1/128
    return _RMSNorm.apply(x, gain, eps)


def rms_norm_reference(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * gain).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """y = n g with n = x r, r = (mean x^2 + eps)^-1/2; dg = sum of dy n over rows, dx = r (dy g - n mean(dy g n)).

    torch's own norm is differentiated operation by operation on a CPU, which passes over the rows twice as often.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, gain)
        return normed * gain

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse, gain = ctx.saved_tensors
        product = gradient * normed
        mean = (product @ gain).unsqueeze(-1) / gain.numel()
        into_x = (gradient * gain).addcmul_(normed, mean, value=-1).mul_(inverse)
        return into_x, product.flatten(0, -2).sum(0), None
