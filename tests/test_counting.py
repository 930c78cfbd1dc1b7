"""Counts, both ways."""

from __future__ import annotations

import torch

from sparsemem.counting import occurrences


def test_each_number_is_counted_and_absent_ones_are_zero() -> None:
    assert occurrences(torch.tensor([3, 0, 3]), 5).tolist() == [1, 0, 0, 2, 0]
    assert occurrences(torch.tensor([3, 0, 3], device="meta"), 5).shape == (5,)  # as on a GPU
