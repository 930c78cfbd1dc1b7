"""RMS norm: unit root mean square times a gain, whatever the scale of its input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemem.layers.norm import RMSNorm, norm_account


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_divides_by_the_root_mean_square_and_multiplies_by_the_gain(eps: float) -> None:
    norm, x = RMSNorm(12, eps), torch.randn(5, 3, 12)
    norm.gain.data = torch.linspace(-1, 2, 12)
    exact = x.double().numpy()
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + eps) * np.linspace(-1, 2, 12)
    np.testing.assert_allclose(norm(x).detach().numpy(), exact, rtol=1e-5, atol=1e-6)


def test_a_zero_vector_stays_zero_with_a_finite_gradient() -> None:
    norm = RMSNorm(4, 1e-6)
    norm.gain.data.fill_(1.0)
    x = torch.zeros(2, 4, requires_grad=True)
    norm(x).sum().backward()
    assert norm(x).eq(0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_gradient_is_exact() -> None:
    norm = RMSNorm(6, 1e-3).double()
    norm.gain.data = torch.linspace(-1, 2, 6, dtype=torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, gain: torch.func.functional_call(norm, {"gain": gain}, (x,)), (x, norm.gain)
    )


def test_a_gain_that_bf16_cannot_hold_counts_all_the_same() -> None:
    """A gain near one learns in steps below 1/128."""
    norm, x = RMSNorm(64, 1e-6), torch.randn(400, 64).bfloat16()
    norm.gain.data.fill_(1.0)
    before = norm(x).detach()
    norm.gain.data.fill_(1.002)
    after = norm(x).detach()
    assert after.dtype == torch.bfloat16
    assert float(after.double().norm() / before.double().norm()) == pytest.approx(1.002, abs=2e-4)


def test_the_account_is_the_gain_without_flops() -> None:
    account = norm_account(7)
    assert (account.total, account.active, account.flops) == (RMSNorm(7, 1e-6).gain.numel(), 7, 0)
