"""The best of many scores against torch's topk."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.kernels.topk import topk


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    scores=st.integers(1, 700),
    top_m=st.integers(1, 80),
    levels=st.sampled_from([2, 50, 10**6]),
    seed=st.integers(0, 99),
)
def test_the_best_scores_are_those_of_topk_with_ties(scores: int, top_m: int, levels: int, seed: int) -> None:
    drawn = torch.randint(levels, (2, 3, scores), generator=torch.Generator().manual_seed(seed)).float()
    values, places = topk(drawn, top_m)
    assert values.equal(drawn.topk(min(top_m, scores)).values)
    assert values.equal(drawn.gather(-1, places))
    assert all(len(set(row)) == len(row) for row in places.flatten(0, 1).tolist())


def test_scores_that_are_no_numbers_still_give_places_that_exist() -> None:
    """A trial that diverges must end as diverged, not at an address out of range."""
    _, places = topk(torch.full((1, 2, 301), math.nan), 32)
    assert places.min() >= 0
    assert places.max() < 301
