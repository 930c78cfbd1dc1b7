"""Parameters that know how they start, so that the model can initialise each one from its own random stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def parameter(
    *shape: int,
    std: float = 0.0,
    mean: float = 0.0,
    uniform: tuple[float, float] | None = None,
    values: Sequence[float] | None = None,
) -> nn.Parameter:
    """An uninitialised parameter that remembers its initial distribution: Normal(mean, std^2), or between the two ends
    of `uniform`, or these `values`.
    """
    result = nn.Parameter(torch.empty(*shape))
    result.initial = (mean, std, uniform, values)  # type: ignore[attr-defined]
    return result


def residual_std(std: float, layers: int) -> float:
    """Initial scale of matrices that write to the residual stream, so that its variance does not grow with depth
    (GPT-2).
    """
    return std / math.sqrt(2 * layers)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Draw every parameter from a stream of its own, named by `seed` and the parameter's name.

    Two models that share a parameter's name and shape therefore start from the same values, whatever else they hold;
    and a longer stack of experts or rows begins with the values of a shorter one. This is what pairs trials of one seed
    across shares.
    """
    for name, weight in module.named_parameters():
        mean, std, uniform, values = weight.initial  # type: ignore[attr-defined]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        stream = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if values is not None:
            weight.copy_(torch.tensor(values).view(weight.shape))
        elif uniform:
            weight.copy_(torch.rand(weight.shape, generator=stream) * (uniform[1] - uniform[0]) + uniform[0])
        else:
            weight.copy_(_normal(weight, stream) * std + mean if std else torch.full_like(weight, mean))


def _normal(like: Tensor, stream: torch.Generator) -> Tensor:
    """Standard normal values on the CPU, so that every device starts alike.

    torch draws 16 values at a time and treats a shorter tail differently: drawing whole blocks keeps any prefix the
    same.
    """
    count = like.numel()
    return torch.randn(-(-count // 16) * 16, generator=stream)[:count].view(like.shape).to(like.device)
