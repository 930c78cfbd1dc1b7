"""The logit lens: what a model would predict if its head read the residual stream after each block (nostalgebraist
2020; definition as in Belrose et al. 2023, arXiv 2303.08112: through the final norm, without a learned translation).

Logits are made of some tokens of one layer at a time. A lens is biased in early layers, and what differs between two
architectures may be a change of basis: compare with a dense model and with other seeds.

Shape letters: S sequences, B of them at once, T positions, N tokens, D model width, V vocabulary, L layers: 0 is what
enters the first block, the last what leaves the last one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsemem.model import Transformer
from sparsemem.train.evaluate import sequences_at_once

LOGITS_AT_ONCE = 1 << 18  # numbers; more leave the cache
MEASURES = ("kl_final_layer", "kl_layer_final", "loss")
"""KL(final || layer), KL(layer || final), and the cross-entropy of the layer's own prediction."""


def logit_lens(
    model: Transformer, inputs_ST: Tensor, targets_ST: Tensor, precision: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """For some sequences in turn, the sums of `MEASURES` over their targets, (B, L, 3) float64 nats, and the number of
    targets (B,). Targets below 0 do not count.
    """
    device, at_once = model.embedding.device, sequences_at_once(inputs_ST.shape[1])
    for inputs_BT, targets_BT in zip(inputs_ST.split(at_once), targets_ST.split(at_once), strict=True):
        with torch.inference_mode(), torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            streams_LND = [each.flatten(0, 1) for each in model.residual_streams(inputs_BT.to(device))]
            targets_N = targets_BT.to(device).flatten()
            chunk = max(1, LOGITS_AT_ONCE // len(model.embedding))
            chunks = range(0, len(targets_N), chunk)
            parts = [_measures(model, streams_LND, targets_N, slice(first, first + chunk)) for first in chunks]
            sums_BL3 = torch.cat(parts).view(*targets_BT.shape, len(streams_LND), len(MEASURES)).sum(1)
        yield sums_BL3.cpu(), (targets_BT >= 0).sum(1)


def _measures(model: Transformer, streams_LND: list[Tensor], targets_N: Tensor, part: slice) -> Tensor:
    """Of each token of a part, (N, L, 3) float64; 0 where its target is below 0."""
    targets_N1 = targets_N[part].unsqueeze(1)
    final_NV = _log_probabilities(model, streams_LND[-1][part])
    final_probabilities_NV, found = final_NV.exp(), list[Tensor]()
    for number, stream_ND in enumerate(streams_LND):
        last = number == len(streams_LND) - 1
        layer_NV = final_NV if last else _log_probabilities(model, stream_ND[part])
        losses_N = -layer_NV.gather(1, targets_N1.clamp(min=0)).squeeze(1)
        forward_N = (final_probabilities_NV * (final_NV - layer_NV)).sum(1)
        backward_N = (layer_NV.exp() * (layer_NV - final_NV)).sum(1)
        found.append(torch.stack((forward_N, backward_N, losses_N), 1).double())
    return torch.stack(found, 1) * (targets_N1 >= 0).unsqueeze(2)


def _log_probabilities(model: Transformer, stream_ND: Tensor) -> Tensor:
    return model.unembed(stream_ND).float().log_softmax(1)
