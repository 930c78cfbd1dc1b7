"""RMS norm with a gain (arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn

from sparsemem.accounting import Account, always_active
from sparsemem.kernels.rms_norm import rms_norm
from sparsemem.parameter import parameter


class RMSNorm(nn.Module):
    """Scale the last dimension to unit root mean square, times a gain that starts at one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain = parameter(width, mean=1.0)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain, self.eps)


def norm_account(width: int) -> Account:
    """A norm has parameters but no product between matrices."""
    return always_active(width, flops=0)
