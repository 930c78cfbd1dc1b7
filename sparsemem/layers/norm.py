"""RMS norm with a gain (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.kernels.rms_norm import rms_norm
from sparsemem.parameter import parameter


class RMSNorm(nn.Module):
    """Scale the last dimension to unit root mean square, times a gain that starts at one; of several residual streams,
    which are the dimension before it, each has its own gain.
    """

    def __init__(self, width: int, eps: float, streams: int = 1) -> None:
        super().__init__()
        self.gain = parameter(streams * width, mean=1.0)  # flat, since matrices are decayed
        self.eps, self.streams = eps, streams

    def forward(self, x: Tensor) -> Tensor:
        if self.streams == 1:
            return rms_norm(x, self.gain, self.eps)
        gains = self.gain.view(self.streams, -1)
        return torch.stack(
            [rms_norm(x_BTD, gain, self.eps) for x_BTD, gain in zip(x.unbind(-2), gains, strict=True)], dim=-2
        )


def norm_account(width: int) -> Account:
    """A norm has parameters but no product between matrices."""
    return always_active(width, flops=0)
