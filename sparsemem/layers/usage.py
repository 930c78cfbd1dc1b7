"""What evaluation reads of a memory's rows, and how loud the memory is. It must not know which memory.

Shape letters: A reads, N rows of all tables.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from sparsemem.counting import occurrences


class Usage:
    """Running sums, on the processor and in float64, so that a log does not depend on how evaluation is cut into
    batches.
    """

    def __init__(self, rows: int) -> None:
        self._reads_N = torch.zeros(rows, dtype=torch.int64, device="cpu")
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64, device="cpu"))

    @torch.no_grad()
    def add(self, rows_A: Tensor, output: Tensor, **means: Tensor) -> None:
        """
        Args:
            rows_A: row numbers over all tables, int64, of any shape.
            output: what the memory adds.
            means: name -> values whose mean is logged.
        """
        self._reads_N += occurrences(rows_A.flatten(), len(self._reads_N)).cpu()
        for name, values in ({"output": output} | means).items():
            exact = values.double()
            self._sums[name] += torch.stack((exact.sum(), exact.square().sum(), exact.new_tensor(exact.numel()))).cpu()

    def summary(self) -> dict[str, float]:
        """`coverage`, `kl_uniform`, `output_std` and the means by their names; not numbers where nothing was read."""
        share_N = self._reads_N.double() / self._reads_N.sum()
        means = {name: float(total / count) for name, (total, _, count) in self._sums.items()}
        _, square, count = self._sums["output"].tolist()
        output = means.pop("output", math.nan)
        return {
            "coverage": float((self._reads_N > 0).double().mean()),
            "kl_uniform": float(torch.special.xlogy(share_N, share_N * len(share_N)).sum()),
            "output_std": math.sqrt(max(square / count - output**2, 0)) if count else math.nan,
            **means,
        }
