"""Dense matrix products by the faster of the two libraries inside torch; the reference is torch's own.

torch gives fp32 products to MKL, which stops at AVX2 on processors that are not Intel's; oneDNN takes AVX-512 wherever
there is any: 230 against 105 GFLOP/s a core on a Zen 5. On Intel's, and with AVX2, MKL is level or ahead, by far where
matrices are small (docs/LOG.md). So both are measured, once a process. Both multiply in fp32. What is neither fp32 nor,
where the processor multiplies it, bf16 goes torch's usual way, and so does all that is not on a CPU.

Shape letters: S rows (tokens), K inputs, N outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.kernels import REFERENCE

_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_BF16 = bool(_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported())
_MEASURED = ((2048, 64, 192), (2048, 128, 384), (256, 64, 4096))  # S, K, N: projections and a head of small models
_MARGIN, _ROUNDS = 1.25, 9
_chosen: str | None = None  # by a measurement, or by the checkpoint that this process goes on from


def library() -> str:
    """`onednn` or `torch`: what multiplies fp32 matrices in this process. oneDNN must be faster by a quarter, so that
    noise never chooses.

    The libraries sum in different orders. A trial keeps its library in its checkpoint and goes on with it, bit for bit.
    """
    global _chosen
    if _chosen is None:
        _chosen = "onednn" if _ONEDNN is not None and _speed_up() > _MARGIN else "torch"
    return _chosen


def use_library(name: str | None) -> None:
    """Take `onednn` or `torch` from now on, where there is a choice; None: measure."""
    global _chosen
    _chosen = name if _ONEDNN is not None else "torch"


@torch.no_grad()
def _speed_up() -> float:
    """Time of torch's own product over oneDNN's, the geometric mean over shapes, each at its best of some rounds in
    turns.
    """
    return math.prod(_ratio(torch.ones(S, K), torch.ones(N, K)) for S, K, N in _MEASURED) ** (1 / len(_MEASURED))


def _ratio(x_SK: Tensor, weight_NK: Tensor) -> float:
    seconds = [
        (_seconds(lambda: x_SK @ weight_NK.T), _seconds(lambda: by_onednn(x_SK, weight_NK))) for _ in range(1 + _ROUNDS)
    ]
    own, onednn = (min(times) for times in zip(*seconds[1:], strict=True))
    return own / onednn


def _seconds(work: Callable[[], object]) -> float:
    """Of this thread at work, which other processes disturb least; other threads have like parts of a product."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def fast(weight: Tensor) -> bool:
    """Whether products with the weight go through oneDNN."""
    if REFERENCE or _ONEDNN is None or weight.device.type != "cpu":
        return False
    return library() == "onednn" if weight.dtype == torch.float32 else _BF16 and weight.dtype == torch.bfloat16


def by_onednn(x_SK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T` on a CPU by oneDNN, where torch has it, whatever the library of this process."""
    return x_SK @ weight_NK.T if _ONEDNN is None else _ONEDNN(x_SK, weight_NK, None, "none", [], "")


def matmul(x_SK: Tensor, weight_NK: Tensor) -> Tensor:
    """`x @ weight.T`, (S, N), for the inside of autograd functions: it has no gradient of its own. Any strides."""
    if fast(weight_NK):
        return by_onednn(x_SK, weight_NK)
    return x_SK @ weight_NK.T


def weight_gradient(x_SK: Tensor, gradient_SN: Tensor) -> Tensor:
    """Gradient of a weight (N, K) from the rows that it was multiplied with and the gradient of what came out."""
    if x_SK.shape[1] <= gradient_SN.shape[1]:  # one side has to be transposed in memory: the narrower
        return matmul(x_SK.T, gradient_SN.T).T
    return matmul(gradient_SN.T, x_SK.T)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N): `torch.nn.functional.linear`, which it is where nothing is won."""
    if x.dtype != torch.float32 or not fast(weight_NK) or torch.is_autocast_enabled("cpu"):
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
        return matmul(x.flatten(0, -2), weight_NK).view(*x.shape[:-1], len(weight_NK))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        gradient_SN = gradient.flatten(0, -2)
        into_x, into_weight = ctx.needs_input_grad
        return (
            matmul(gradient_SN, weight_NK.T).view_as(x) if into_x else None,
            weight_gradient(x.flatten(0, -2), gradient_SN) if into_weight else None,
        )
