"""The assembled decoder: what it computes, that it cannot see ahead, and what models of one seed share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsemem.config import Model
from sparsemem.mechanisms import EXPERTS
from sparsemem.mechanisms.hashed import distinct_primes
from sparsemem.model import Sizes, Transformer

VOCABULARY, CONTEXT, SEPARATOR = 48, 24, 3
ENGRAM = {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4, "init_std": 0.5}


def _build(
    routed: int = 6,
    shared: int = 12,
    engram: dict[str, Any] | None = ENGRAM,
    start: int = 97,
    seed: int = 0,
    **changes: Any,
) -> Transformer:
    fields: dict[str, Any] = {
        "layers": 3,
        "width": 16,
        "heads": 2,
        "init_std": 0.3,
        "moe": {"expert_width": 8, "top_k": 2},
    }
    config = Model.model_validate(fields | {"engram": engram} | changes)
    tables_of: dict[str, Any] = {}
    if config.engram:
        tables = len(config.engram.orders) * config.engram.heads
        primes = distinct_primes(start, tables * len(config.engram.layers))
        tables_of = {"engram": tuple(primes[at : at + tables] for at in range(0, len(primes), tables))}
    canonical = torch.arange(VOCABULARY) * 5 % 37
    model = Transformer(config, Sizes(routed, shared, tables_of), CONTEXT, canonical, SEPARATOR).initialize(seed)
    for name, weight in model.named_parameters():
        if name.endswith("taps_KD"):
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    return model


def _tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, CONTEXT), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "engram",
    [None, ENGRAM, ENGRAM | {"layers": [1, 3], "orders": [2, 3, 4]}, ENGRAM | {"reset_at_document_end": False}],
)
@pytest.mark.parametrize("replacement", [0, SEPARATOR])
@pytest.mark.parametrize("changes", [{}, {"moe": {"expert_width": 8, "top_k": 2, "leading_dense": 1}, "kv_heads": 1}])
def test_a_token_changes_no_logits_before_it(
    engram: dict[str, Any] | None, replacement: int, changes: dict[str, Any]
) -> None:
    model, tokens = _build(engram=engram, **changes).eval(), _tokens()
    logits = model(tokens)[0]
    for t in (0, 1, 5, CONTEXT - 1):
        changed = tokens.clone()
        changed[:, t] = torch.where(tokens[:, t] == replacement, 7, replacement)
        other = model(changed)[0]
        torch.testing.assert_close(other[:, :t], logits[:, :t], rtol=1e-4, atol=1e-4)
        assert (other[:, t] - logits[:, t]).abs().max() > 1e-2


def test_sequences_of_a_batch_do_not_see_each_other_and_may_be_short() -> None:
    model, tokens = _build().eval(), _tokens(3)
    logits = model(tokens)[0]
    torch.testing.assert_close(model(tokens[1:2])[0], logits[1:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens[:, :5])[0], logits[:, :5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_its_parts_in_order(tied: bool) -> None:
    """Memory at block entry, before attention (Engram sec. 2); pre-norm; the final norm before the head."""
    model, tokens = _build(tie_embeddings=tied).eval(), _tokens()
    x = model.embedding[tokens]
    for layer, block in enumerate(model.blocks, start=1):
        assert hasattr(block, "memory") == (layer == 2)
        if layer == 2:
            x = x + block.memory(x, tokens)
        x = x + block.attention(block.attention_norm(x), model.cos_sin_2THK)
        x = x + block.ffn(block.ffn_norm(x))[0]
    head = model.embedding if tied else model.head
    assert head is not None
    torch.testing.assert_close(model(tokens)[0], model.norm(x) @ head.T)
    assert (model.head is None) == tied


def test_losses_are_the_negative_log_probabilities_of_the_targets() -> None:
    model, tokens = _build().eval(), _tokens()
    targets = tokens.roll(-1, 1)
    losses = model.losses(tokens, targets)
    probabilities = model(tokens)[0].double().softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(losses.double(), -probabilities.log(), rtol=1e-4, atol=1e-5)
    assert losses.shape == tokens.shape
    assert model.loss(tokens, targets, 7)[0].item() == pytest.approx(losses.flatten()[:7].mean().item(), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("reset", [False, True])
def test_a_memory_is_told_where_documents_end(reset: bool) -> None:
    """Without attention, which reads across documents in any case, the last document's logits then depend
    on it alone.
    """
    memory = {
        "layers": [2],
        "placement": "parallel",
        "top_m": 2,
        "key_dim": 4,
        "value_dim": 4,
        "conv_reset_at_document_end": reset,
    }
    config = Model.model_validate({"layers": 3, "width": 16, "heads": 2, "init_std": 0.3, "ultramem": memory})
    model = (
        Transformer(config, Sizes(0, 12, {"ultramem": ((7, 5),)}), CONTEXT, torch.arange(VOCABULARY), SEPARATOR)
        .initialize(0)
        .eval()
    )
    for name, weight in model.named_parameters():
        if name.endswith("taps_JD"):
            weight.normal_()
        elif name.endswith("project_out"):
            weight.zero_()
    tokens = _tokens().where(_tokens() != SEPARATOR, 7)
    tokens[:, 9] = SEPARATOR
    other = tokens.clone()
    other[:, :9] = 11
    assert torch.equal(model(tokens)[0][:, 10:], model(other)[0][:, 10:]) == reset


def test_the_auxiliary_losses_of_all_layers_are_summed() -> None:
    moe = {"expert_width": 8, "top_k": 2, "balance_loss": 0.1, "z_loss": 0.2, "leading_dense": 1}
    model, tokens = _build(moe=moe).eval(), _tokens()
    seen = []
    for layer in model.layers_of("moe"):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output[1].detach()))
    auxiliary = model(tokens)[1]
    assert len(seen) == 2
    torch.testing.assert_close(auxiliary, sum(seen, torch.zeros(())))
    assert _build()(tokens)[1].item() == 0


@pytest.mark.parametrize("leading_dense", [0, 1, 2])
def test_dense_blocks_stand_where_the_config_puts_them(leading_dense: int) -> None:
    """A leading dense block is as wide as the experts a token would have passed there, so its activated count is the
    same.
    """
    moe = {"expert_width": 8, "top_k": 2, "leading_dense": leading_dense}
    model = _build(moe=moe)
    assert len(model.layers_of("moe")) == 3 - leading_dense
    for block in list(model.blocks)[:leading_dense]:
        assert block.ffn.down.shape[0] == 12 + 2 * 8


def test_the_dense_baseline_has_no_experts_and_no_memory() -> None:
    model = _build(routed=0, shared=40, engram=None)
    assert model.layers_of("moe") == []
    assert all(block.ffn.down.shape[0] == 40 and not hasattr(block, "memory") for block in model.blocks)
    bare = Model.model_validate({"layers": 1, "width": 8, "heads": 1, "moe": {"expert_width": 8, "top_k": 2}})
    assert EXPERTS.activated_width(bare, Sizes(0, 40)) == 40


def test_models_of_one_seed_start_from_the_same_weights_whatever_their_share() -> None:
    """The paired design: between shares, what both models hold starts alike; only experts and rows are added at the
    end.
    """
    many, few, none = _build(9, 12, None), _build(5, 12, start=97), _build(2, 12, start=211)
    weights = [dict(model.named_parameters()) for model in (many, few, none)]
    for name, weight in weights[0].items():
        for other in (weights[1][name], weights[2][name]):
            shared = min(len(weight), len(other))
            assert torch.equal(weight[:shared], other[:shared]), name
            assert weight.shape == other.shape or name.endswith(("router_ED", "gate_up_EDF", "down_EFD"))
    table = "blocks.1.memory.table.rows_RC"
    shorter = len(weights[1][table])
    assert torch.equal(weights[2][table][:shorter], weights[1][table])


def test_another_seed_starts_elsewhere() -> None:
    first, second = (dict(_build(seed=seed).named_parameters()) for seed in (0, 1))
    for name, weight in first.items():
        constant = bool((weight == weight.flatten()[0]).all())
        assert constant or name.endswith("taps_KD") or not torch.equal(weight, second[name]), name


def test_a_fresh_model_predicts_nearly_uniformly() -> None:
    """With the default scale of 0.02 the first loss is the logarithm of the vocabulary."""
    model = _build(init_std=0.02, engram=ENGRAM | {"init_std": 0.02})
    tokens = _tokens(8)
    assert model.losses(tokens, tokens.roll(-1, 1)).mean().item() == pytest.approx(3.871, abs=0.05)  # ln 48


@pytest.mark.parametrize("engram", [None, ENGRAM])
def test_bf16_autocast_stays_near_fp32(engram: dict[str, Any] | None) -> None:
    model, tokens = _build(engram=engram, init_std=0.1).eval(), _tokens(4)
    exact = model.losses(tokens, tokens.roll(-1, 1)).mean().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = model.loss(tokens, tokens.roll(-1, 1), tokens.numel())
        assert model.losses(tokens, tokens.roll(-1, 1)).mean().item() == pytest.approx(rough.item(), rel=1e-4)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact, rel=0.01)
    rough.backward()
    assert all(weight.grad is not None for weight in model.parameters())
