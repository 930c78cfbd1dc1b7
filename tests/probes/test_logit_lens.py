"""The logit lens is what a softmax over all logits in float64 gives, and its last layer is the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.model import Transformer
from sparsemem.probes import logit_lens as module
from sparsemem.probes.logit_lens import logit_lens
from sparsemem.train.evaluate import sequence_losses

VOCABULARY, CONTEXT = 300, 16


@pytest.fixture(params=["dense", "engram"])
def model(request: pytest.FixtureRequest) -> Transformer:
    raw = {
        "data": {"vocab_size": VOCABULARY, "context": CONTEXT},
        "model": {
            "layers": 3,
            "width": 16,
            "heads": 2,
            "moe": {"expert_width": 8, "top_k": 2},
            "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4},
        },
        "budget": {"total_params": 16_000, "active_params": 8_500, "tokens": 1000, "tolerance": 0.1},
        "train": {"batch_tokens": 64, "lr": 1e-3},
        "shares": {"moe": 0.45, "engram": 0.55} if request.param == "engram" else {},
    }
    trial = Trial.model_validate(raw)
    made = Transformer(
        trial.model, solve(trial.model, trial.budget, trial.shares), CONTEXT, torch.arange(VOCABULARY), 0
    )
    with torch.no_grad():  # as if trained: predictions that differ between layers
        for weight in made.initialize(0).parameters():
            weight.mul_(3)
    return made.eval()


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (5, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[1, 3:6] = -1
    return tokens[:, :-1], targets


@torch.inference_mode()
def reference(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    """(S, L, 3) by probabilities of all layers at once in float64, from streams that hooks catch."""
    streams = list[Tensor]()
    hooks = [model.blocks[0].register_forward_pre_hook(lambda block, given: streams.append(given[0]))]
    hooks += [block.register_forward_hook(lambda block, given, left: streams.append(left[0])) for block in model.blocks]
    model(inputs)
    for hook in hooks:
        hook.remove()
    head = model.embedding if model.head is None else model.head
    found = []
    for stream in streams:
        x = stream.double()
        x = x / (x.square().mean(-1, keepdim=True) + model.norm.eps).sqrt() * model.norm.gain.double()
        found.append(torch.softmax(x @ head.double().T, -1))
    final, counts = found[-1], targets >= 0
    return torch.stack(
        [
            torch.stack(
                [
                    ((final * (final / layer).log()).sum(-1) * counts).sum(1),
                    ((layer * (layer / final).log()).sum(-1) * counts).sum(1),
                    (-layer.gather(2, targets.clamp(min=0)[..., None])[..., 0].log() * counts).sum(1),
                ],
                1,
            )
            for layer in found
        ],
        1,
    )


def lens(model: Transformer, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    sums, counts = zip(*logit_lens(model, inputs, targets, torch.float32), strict=True)
    return torch.cat(sums), torch.cat(counts)


def test_it_is_what_full_probabilities_in_float64_give(model: Transformer, text: tuple[Tensor, Tensor]) -> None:
    sums, counts = lens(model, *text)
    wanted = reference(model, *text)
    assert sums.shape == wanted.shape == (5, 4, 3)
    assert torch.allclose(sums, wanted, rtol=1e-5, atol=1e-4)
    assert counts.tolist() == [16, 13, 16, 16, 16]
    assert float(wanted[:, :-1, :2].min()) > 0.1  # layers do differ


def test_the_last_layer_is_the_model(model: Transformer, text: tuple[Tensor, Tensor]) -> None:
    sums, counts = lens(model, *text)
    assert sums[:, -1, :2].tolist() == [[0.0, 0.0]] * 5
    losses = sequence_losses(model, *text, torch.float32)
    assert torch.allclose(sums[:, -1, 2] / counts.double().mean(), losses, rtol=1e-6)


def test_logits_are_made_of_some_tokens_of_a_layer_at_a_time(
    model: Transformer, text: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = lens(model, *text)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr(module, "sequences_at_once", lambda context: 2)
    made, unembed = list[int](), model.unembed
    monkeypatch.setattr(model, "unembed", lambda x: made.append(len(x)) or unembed(x))
    parts, _ = lens(model, *text)
    assert max(made) == 7
    assert torch.allclose(parts, whole, rtol=1e-5, atol=1e-5)
