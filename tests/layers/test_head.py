"""The chunked head against torch's logits and cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsemem.layers import head
from sparsemem.layers.head import head_loss, head_losses


@pytest.mark.parametrize("tokens", [1, 6, 7, 15])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of six rows; with the large scale probabilities of targets underflow, losses and gradients do not."""
    monkeypatch.setattr(head, "CPU_ROWS", 6)
    x, weight = (scale * torch.randn(tokens, 8)).requires_grad_(), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (tokens,))
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.cross_entropy(F.linear(*exact), targets)
    loss = head_loss(x, weight, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    for ours, theirs in zip((x, weight), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5 * scale)
    losses = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    torch.testing.assert_close(head_losses(x, weight, targets).double(), losses.detach(), rtol=1e-5, atol=1e-5)
