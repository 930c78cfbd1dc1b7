"""Dense matrix products by the faster of the two libraries inside torch. It must not know layers.

torch gives fp32 products to MKL, which stops at AVX2 on processors that are not Intel's; oneDNN takes AVX-512 wherever there is any:
230 against 105 GFLOP/s a core on a Zen 5 (docs/LOG.md). Both multiply in fp32. What is neither fp32 nor, where the processor multiplies
it, bf16 goes torch's usual way, and so does all that is not on a CPU.

Shape letters: S rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_DTYPES = {torch.float32, torch.bfloat16} if _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}


def fast(weight: Tensor) -> bool:
    """Whether products with the weight go through oneDNN."""
    return _ONEDNN is not None and weight.device.type == "cpu" and weight.dtype in _DTYPES


def product(x_SK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T`, (S, N), for the inside of autograd functions: it has no gradient of its own. Any strides."""
    if fast(weight_NK):
        return _ONEDNN(x_SK, weight_NK, None, "none", [], "")
    return x_SK @ weight_NK.T


def weight_gradient(x_SK: Tensor, gradient_SN: Tensor) -> Tensor:
    """Gradient of a weight (N, K) from the rows that it was multiplied with and the gradient of what came out."""
    if x_SK.shape[1] <= gradient_SN.shape[1]:  # one side has to be transposed in memory: the narrower
        return product(x_SK.T, gradient_SN.T).T
    return product(gradient_SN.T, x_SK.T)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N): `torch.nn.functional.linear`, which it is where nothing is won."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight_NK, bias_N)
    y = _Linear.apply(x, weight_NK)
    return y if bias_N is None else y + bias_N


def linears(x_BSK: Tensor, weight_BNK: Tensor) -> Tensor:
    """Products of several pairs at once: (B, S, N)."""
    if weight_BNK.dtype != torch.float32 or not fast(weight_BNK):
        return x_BSK @ weight_BNK.mT
    return torch.stack([linear(x_SK, weight_NK) for x_SK, weight_NK in zip(x_BSK, weight_BNK, strict=True)])


class _Linear(torch.autograd.Function):
    """y = x W^T; dx = dy W and dW = dy^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return product(x.flatten(0, -2), weight_NK).view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        gradient_SN = gradient.flatten(0, -2)
        into_x, into_weight = ctx.needs_input_grad
        return (
            product(gradient_SN, weight_NK.T).view_as(x) if into_x else None,
            weight_gradient(x.flatten(0, -2), gradient_SN) if into_weight else None,
        )
