"""A trial's share of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sparsemem.train.allocator import CONTEXT_BYTES, claim_gpus

GPU_BYTES = 80 * 2**30


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Fractions that torch's allocator was held to, of a machine with one GPU."""
    fractions: list[float] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=GPU_BYTES))
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", fractions.append)
    return fractions


def test_the_trials_that_share_a_gpu_fit_into_it_with_their_contexts(held: list[float]) -> None:
    for _ in range(4):
        claim_gpus(1, 0.25)
    assert sum(held) * GPU_BYTES + 4 * CONTEXT_BYTES == pytest.approx(GPU_BYTES)


def test_a_trial_with_a_whole_gpu_is_not_held(held: list[float]) -> None:
    claim_gpus(1, 1.0)
    assert not held


def test_a_share_below_a_context_is_refused(held: list[float]) -> None:
    with pytest.raises(ValueError, match=r"run\.gpus_per_trial.*0\.005.*less than a CUDA context"):
        claim_gpus(1, 0.005)
    assert not held
