"""Loss on the fixed held-out set, sequence by sequence, so that two trials can be compared pairwise.

Shape letters: S held-out sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsemem.model import Transformer

TOKENS_AT_ONCE = 8192  # as fast as more of them
DIVERGED_NATS = 0.5  # per token; a trial's losses vary by less from row to row
DEAD_NATS = 1e-4  # from chance, at every sequence; a model as it starts is further off


def sequence_losses(model: Transformer, inputs_ST: Tensor, targets_ST: Tensor, precision: torch.dtype) -> Tensor:
    """Nats per token of each sequence, (S,) float64 on the CPU: the sum over its targets, over the mean number of
    targets a sequence.

    Where some targets are below 0, and do not count, the mean over sequences so stays the mean over tokens.
    """
    sums = [losses_BT.double().sum(1).cpu() for losses_BT in token_losses(model, inputs_ST, targets_ST, precision)]
    return torch.cat(sums) / ((targets_ST >= 0).sum().item() / len(targets_ST))


def token_losses(model: Transformer, inputs_ST: Tensor, targets_ST: Tensor, precision: torch.dtype) -> Iterator[Tensor]:
    """Nats of each target in turn, (B, T) on the model's device, 0 where the target is below 0; B sequences at once."""
    training = model.training
    model.eval()
    device = model.embedding.device
    at_once = sequences_at_once(inputs_ST.shape[1])
    with torch.inference_mode(), torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        for inputs_BT, targets_BT in zip(inputs_ST.split(at_once), targets_ST.split(at_once), strict=True):
            yield model.losses(inputs_BT.to(device), targets_BT.to(device))
    model.train(training)


def sequences_at_once(context: int) -> int:
    return max(1, TOKENS_AT_ONCE // context)


def why_diverged(held_out_S: Tensor, best: float, chance: float) -> str:
    """Why a trial that was trained to its end has diverged; '' where it has not: it ends worse than chance, and much
    worse than it was, or holds all tokens equally likely everywhere. One that has hardly begun to learn is near chance
    too, but neither of these.

    Args:
        held_out_S: its last held-out loss of each sequence, nats per token, as the other two.
        best: the best row of its training curve.
        chance: of equally likely tokens, the logarithm of the vocabulary's size.

    >>> why_diverged(torch.tensor([6.2, 6.3]), 6.23, 6.238), why_diverged(torch.tensor([9.0]), 3.0, 6.238)
    ('', 'the held-out loss ended at 9.000 nats, above chance (6.238), after a training loss of 3.000')
    """
    if bool(((held_out_S - chance).abs() < DEAD_NATS).all()):
        return (
            f"every held-out sequence has the loss of equally likely tokens ({chance:.3f} nats): the model is dead; "
            "lower `train.lr`"
        )
    held_out = float(held_out_S.mean())
    if held_out < chance or held_out < best + DIVERGED_NATS:
        return ""
    return (
        f"the held-out loss ended at {held_out:.3f} nats, above chance ({chance:.3f}), after a training loss of "
        f"{best:.3f}"
    )
