"""The order of training: each window once an epoch, the same for a step whenever it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.config import ConfigError
from sparsemem.data import Batches, validation_windows


@given(
    windows=st.integers(3, 40),
    rows=st.integers(1, 3),
    context=st.integers(1, 5),
    spare=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_an_epoch_covers_each_window_once(windows: int, rows: int, context: int, spare: int, seed: int) -> None:
    tokens = np.arange(windows * context + 1 + min(spare, context - 1), dtype=np.uint16)
    batches = Batches(tokens, context, rows * context, seed)
    epochs = 3
    steps = epochs * windows // rows
    starts = torch.cat([batches.batch(step)[0][:, 0] for step in range(steps)]).numpy() // context
    for epoch in range(epochs - 1):
        assert sorted(starts[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


def test_targets_are_the_next_tokens() -> None:
    inputs_BT, targets_BT = Batches(np.arange(101, dtype=np.uint16), context=10, batch_tokens=30, seed=0).batch(2)
    assert inputs_BT.shape == targets_BT.shape == (3, 10)
    assert inputs_BT.dtype == torch.int64
    assert torch.equal(inputs_BT + 1, targets_BT)


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    tokens = np.arange(1001, dtype=np.uint32)
    walked = Batches(tokens, 10, 70, seed=3)
    in_order = [walked.batch(step)[0] for step in range(60)]
    for step in (59, 0, 14, 15, 37):  # resumed, and across the ends of epochs
        assert torch.equal(Batches(tokens, 10, 70, seed=3).batch(step)[0], in_order[step])
        assert torch.equal(walked.batch(step)[0], in_order[step])


def test_epochs_and_seeds_differ_in_order() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    first, second = (Batches(tokens, 10, 1000, seed=0).batch(step)[0] for step in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, Batches(tokens, 10, 1000, seed=1).batch(0)[0])


def test_the_order_is_pinned() -> None:
    """A change of this order makes committed results irreproducible."""
    inputs_BT, _ = Batches(np.arange(9, dtype=np.uint16), context=1, batch_tokens=8, seed=0).batch(0)
    assert inputs_BT[:, 0].tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_text_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`train.batch_tokens` has the value 110.* holds 10;"):
        Batches(np.arange(101, dtype=np.uint16), context=10, batch_tokens=110, seed=0)


def test_validation_windows_are_the_first_ones() -> None:
    inputs_ST, targets_ST = validation_windows(np.arange(101, dtype=np.uint16), context=10, count=3)
    assert torch.equal(inputs_ST, torch.arange(30).reshape(3, 10))
    assert torch.equal(targets_ST, torch.arange(1, 31).reshape(3, 10))


@pytest.mark.parametrize("count", [0, 11])
def test_too_many_or_no_validation_windows_are_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=r"data.validation_tokens"):
        validation_windows(np.arange(101, dtype=np.uint16), context=10, count=count)


def test_the_target_after_a_separator_may_be_none() -> None:
    tokens = np.array([5, 0, 6, 7, 0, 0, 8, 9, 1], dtype=np.uint16)
    for inputs_BT, targets_BT in (
        Batches(tokens, 4, 8, 0, unscored_after=0).batch(0),
        validation_windows(tokens, 4, 2, unscored_after=0),
    ):
        assert sorted(inputs_BT.tolist()) == [[0, 0, 8, 9], [5, 0, 6, 7]]
        assert sorted(targets_BT.tolist()) == [[-1, -1, 9, 1], [0, -1, 7, 0]]
