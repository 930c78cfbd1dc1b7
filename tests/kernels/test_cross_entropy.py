"""The chunked head against torch's logits and cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsemem.kernels import cross_entropy as head
from sparsemem.kernels.cross_entropy import head_loss, head_losses


@pytest.mark.parametrize("tokens", [1, 6, 7, 15])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("unscored", [0, 1, 5])
def test_loss_and_gradients_are_those_of_all_logits_at_once(
    tokens: int, scale: float, unscored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of six rows; with the large scale probabilities of targets underflow, losses and gradients do not."""
    monkeypatch.setattr(head, "CPU_ROWS", 6)
    x, weight = (scale * torch.randn(tokens, 8)).requires_grad_(), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (tokens,))
    targets[1 : 1 + unscored] = -1
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets, ignore_index=-1)
    loss = head_loss(x, weight, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    for ours, theirs in zip((x, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5 * scale)
    losses = F.cross_entropy(F.linear(*exact), targets, reduction="none", ignore_index=-1)
    torch.testing.assert_close(head_losses(x, weight, targets).double(), losses.detach(), rtol=1e-5, atol=1e-5)


def test_without_targets_there_is_no_loss_and_no_gradient() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    loss = head_loss(x, weight, torch.full((3,), -1))
    loss.backward()
    assert loss == 0
    assert not any(tensor.grad.any() for tensor in (x, weight) if tensor.grad is not None)
    assert head_losses(x, weight, torch.tensor([-1, 0, -1])).count_nonzero() == 1
