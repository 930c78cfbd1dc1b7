"""The head over the vocabulary and the cross-entropy, some rows at a time: logits of the whole batch never exist
together.

Shape letters: S tokens, D model width, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.kernels import REFERENCE
from sparsemem.kernels.matmul import matmul, weight_gradient

CPU_ROWS, GPU_ROWS = 256, 8192  # of a chunk: on a CPU a few MB of logits, which stay in its cache


def head_loss(x_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """Mean cross-entropy of the targets in nats, a scalar that trains `x` and `weight`; targets below 0 do not count.

    The products are in autocast's dtype where that is on, all else in fp32.
    """
    if REFERENCE:
        return head_loss_reference(x_SD, weight_VD, targets_S)
    return _HeadLoss.apply(x_SD, weight_VD, targets_S, _dtype(x_SD))


def head_loss_reference(x_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    logits_SV = F.linear(x_SD, weight_VD)
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    return F.cross_entropy(logits_SV, targets_S.clamp_min(-1), ignore_index=-1, reduction="sum") / (
        targets_S >= 0
    ).sum().clamp_min(1)


@torch.no_grad()
def head_losses(x_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """Cross-entropy of each target, (S,) in nats, 0 for targets below 0; without gradients."""
    weight_VD = weight_VD.to(_dtype(x_SD))
    scored_S, targets_S = targets_S >= 0, targets_S.clamp_min(0)
    return torch.cat([_chunk(x_RD, weight_VD, targets_R)[1] for x_RD, targets_R in _chunks(x_SD, targets_S)]) * scored_S


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = CPU_ROWS if tensors[0].device.type == "cpu" else GPU_ROWS
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _chunk(x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (R, V) and losses (R,), fp32 at least."""
    logits_RV = matmul(x_RD.to(weight_VD.dtype), weight_VD)
    logits_RV = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    top_R, chosen_R = logits_RV.amax(-1), logits_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1)
    probability_RV = torch.softmax(logits_RV, -1, out=logits_RV)
    # the largest probability is exp(top - logsumexp): exact also where that of the target underflows
    return probability_RV, top_R - probability_RV.amax(-1).log() - chosen_R


class _HeadLoss(torch.autograd.Function):
    """L = mean of logsumexp(x W^T) - (x W^T)[target] over the targets that count.

    dL/dlogits = (softmax - onehot) / their number, or 0, so that a chunk's gradients dx = dlogits W and dW += dlogits^T
    x are known as soon as its loss is, while its logits are still in the cache. The forward pass computes both; the
    backward pass scales them.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, weight_VD: Tensor, targets_S: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight_VD.to(dtype)
        scored_S, targets_S = targets_S >= 0, targets_S.clamp_min(0)
        losses, into_x = [], torch.empty_like(x_SD)
        into_weight = torch.zeros_like(weight_VD.T, memory_format=torch.contiguous_format)
        with torch.autocast(x_SD.device.type, enabled=False):
            for x_RD, targets_R, scored_R1, into_x_RD in _chunks(x_SD, targets_S, scored_S.unsqueeze(-1), into_x):
                gradient_RV, losses_R = _chunk(x_RD, weight, targets_R)
                gradient_RV.scatter_add_(-1, targets_R.unsqueeze(-1), gradient_RV.new_full((len(targets_R), 1), -1.0))
                gradient_RV = gradient_RV.to(dtype)
                into_x_RD.copy_(matmul(gradient_RV, weight.T) * scored_R1)
                into_weight += weight_gradient((x_RD * scored_R1).to(dtype), gradient_RV).T
                losses.append(losses_R)
        count = scored_S.sum().clamp_min(1)
        ctx.save_for_backward(into_x, into_weight, count)
        return (torch.cat(losses) * scored_S).sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        into_x, into_weight, count = ctx.saved_tensors
        scale = gradient / count
        return into_x * scale, (into_weight * scale).T, None, None
