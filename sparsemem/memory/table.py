"""Where the rows of a memory live. Today: in the device of the model, updated only where they were read.

Shape letters: B sequences, T positions, H tables (one for each order and head), R rows of all tables, C width of a row.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.parameter import parameter


class MemoryTable(nn.Module):
    """Several tables of one row width, stored as one.

    The gradient of `rows_RC` is sparse: it holds the rows that were looked up, so that the optimiser's time does not grow with
    the rows that were not. `train.optim` recognises such parameters by their attribute `sparse_gradient`.
    """

    first_H: Tensor

    def __init__(self, rows: tuple[int, ...], width: int, std: float) -> None:
        """`rows[h]` is the number of rows of table h."""
        super().__init__()
        self.rows_RC = parameter(sum(rows), width, std=std)
        self.rows_RC.sparse_gradient = True  # type: ignore[attr-defined]
        self.register_buffer("first_H", torch.tensor([0, *accumulate(rows[:-1])]), persistent=False)

    def forward(self, rows_BTH: Tensor) -> Tensor:
        """Row numbers (B, T, H), each counted within its own table -> the rows side by side, (B, T, H * C)."""
        return F.embedding(rows_BTH + self.first_H, self.rows_RC, sparse=True).flatten(-2)
