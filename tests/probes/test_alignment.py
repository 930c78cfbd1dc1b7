"""The soft alignment index by the paper's formula, and what it does at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from sparsemem.probes.alignment import layers_taken, soft_alignment


def test_the_index_is_the_mean_depth_of_the_closest_layers() -> None:
    cka = torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.6, 0.8], [0.5, 0.6]])  # reference's layers by the other's
    assert soft_alignment(cka, 1) == [1, 3]
    assert soft_alignment(cka, 2) == pytest.approx([(0.9 * 1 + 0.6 * 3) / 1.5, (0.8 * 3 + 0.6 * 4) / 1.4])
    assert soft_alignment(cka, 99) == soft_alignment(cka, 4)


def test_values_below_0_weigh_nothing() -> None:
    cka = torch.tensor([[-0.9, -0.1], [0.2, -0.2], [math.nan, -0.3]])
    first, second = soft_alignment(cka, 3)
    assert first == 2
    assert math.isnan(second)


def test_a_model_against_itself_is_off_its_own_depth_at_the_edges() -> None:
    layers = torch.arange(12.0)
    index = soft_alignment(1 / (1 + (layers[:, None] - layers).abs()), 3)
    assert index[0] > 1
    assert index[11] < 12
    assert index[5] == pytest.approx(6)


def test_k_grows_with_depth() -> None:
    assert layers_taken(30) == 5
    assert [layers_taken(layers) for layers in (1, 3, 6, 18)] == [1, 1, 1, 3]
