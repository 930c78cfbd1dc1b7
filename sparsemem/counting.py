"""How often each number occurs."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(numbers_A: Tensor, below: int) -> Tensor:
    """Of each number below a bound, int64: `torch.bincount`, for which a GPU waits twice to see the range of the
    numbers.
    """
    if numbers_A.device.type == "cpu":
        return torch.bincount(numbers_A, minlength=below)
    return numbers_A.new_zeros(below).scatter_add_(0, numbers_A, torch.ones_like(numbers_A))
