"""Initial weights: drawn from streams named by seed and parameter, so that trials of one seed start alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemem.parameter import initialize, parameter


def _drawn(seed: int, *shape: int, std: float = 0.1) -> torch.Tensor:
    module = nn.Module()
    module.register_parameter("weight", parameter(*shape, std=std))
    initialize(module, seed)
    return module.get_parameter("weight").detach()


@pytest.mark.parametrize(("short", "long"), [(1, 2), (3, 5), (7, 64), (15, 17), (16, 16), (1000, 100_003)])
@pytest.mark.parametrize("row", [1, 5, 16])
def test_a_longer_stack_begins_with_the_values_of_a_shorter_one(short: int, long: int, row: int) -> None:
    """Experts and rows are added at the end, so that a share changes no weight that both models hold."""
    assert torch.equal(_drawn(3, short, row), _drawn(3, long, row)[:short])


def test_moments_and_seeds() -> None:
    weight = _drawn(0, 400, 500, std=0.05)
    assert float(weight.mean()) == pytest.approx(0, abs=5e-4)
    assert float(weight.std()) == pytest.approx(0.05, rel=0.01)
    assert torch.equal(weight, _drawn(0, 400, 500, std=0.05))
    assert not torch.equal(weight, _drawn(1, 400, 500, std=0.05))


def test_names_separate_the_streams_and_the_global_generator_is_left_alone() -> None:
    module = nn.Module()
    module.register_parameter("first", parameter(64, std=1.0))
    module.register_parameter("second", parameter(64, std=1.0))
    module.register_parameter("gain", parameter(64, mean=1.0))
    before = torch.get_rng_state()
    initialize(module, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(module.get_parameter("first"), module.get_parameter("second"))
    assert module.get_parameter("gain").eq(1).all()


def test_draws_are_those_of_every_processor() -> None:
    """Torch draws blocks of 16 by its processor's own instructions: they agree but for rounding, and paired trials may
    run anywhere.
    """
    ends = _drawn(0, 20, std=1.0)[[0, 1, 15, 16, 19]]
    assert ends.tolist() == pytest.approx(
        [-0.5006074, 0.303313, -0.2695287, -0.6369814, -0.2228728], rel=1e-6
    )  # by this code, torch 2.13
