"""The closed forms against real tensors: every count a study reports is the count of what it trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsemem.accounting import Account, always_active
from sparsemem.config import Model
from sparsemem.config.model import MANY_STREAMS
from sparsemem.layers import streams
from sparsemem.mechanisms.hashed import distinct_primes
from sparsemem.model import Sizes, Transformer, count_model, memory_params

VOCABULARY, CONTEXT = 40, 32


def _model(**changes: Any) -> Model:
    fields: dict[str, Any] = {
        "layers": 3,
        "width": 16,
        "heads": 2,
        "init_std": 0.5,
        "moe": {"expert_width": 8, "top_k": 2},
    }
    return Model.model_validate(fields | changes)


def _sizes(config: Model, routed: int, shared: int, start: int = 11) -> Sizes:
    if not config.engram:
        return Sizes(routed, shared)
    tables, modules = len(config.engram.orders) * config.engram.heads, len(config.engram.layers)
    primes = distinct_primes(start, tables * modules)
    return Sizes(routed, shared, {"engram": tuple(primes[m * tables : (m + 1) * tables] for m in range(modules))})


@st.composite
def _anything(draw: st.DrawFn) -> tuple[Model, Sizes]:
    layers, heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4, 6]))
    top_k = draw(st.integers(1, 4))
    routed = draw(st.sampled_from([0, top_k, top_k + 1, top_k + 13]))
    moe = {
        "expert_width": 8 * draw(st.integers(1, 5)),
        "top_k": top_k,
        "leading_dense": draw(st.integers(0, layers - 1)),
        "gate": draw(st.sampled_from(["sigmoid", "softmax"])),
    }
    engram = None
    if routed and draw(st.booleans()):
        engram = {
            "layers": sorted(draw(st.sets(st.integers(1, layers), min_size=1))),
            "orders": sorted(draw(st.sets(st.integers(2, 5), min_size=1))),
            "heads": draw(st.integers(1, 3)),
            "row_dim": draw(st.integers(1, 6)),
            "bias": draw(st.booleans()),
            "conv": draw(st.booleans()),
            "conv_kernel": draw(st.integers(1, 5)),
        }
    config = _model(
        layers=layers,
        heads=heads,
        width=8 * heads * draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from([None, *(groups for groups in range(1, heads + 1) if heads % groups == 0)])),
        tie_embeddings=draw(st.booleans()),
        moe=moe,
        engram=engram,
    )
    return config, _sizes(config, routed, draw(st.integers(0 if routed else 1, 30)), start=draw(st.integers(2, 200)))


@settings(max_examples=60, deadline=None)
@given(_anything())
def test_a_whole_model_holds_exactly_what_the_account_says(drawn: tuple[Model, Sizes]) -> None:
    config, sizes = drawn
    with torch.device("meta"):
        model = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY, device="cpu"), separator=0)
    account = count_model(config, sizes, CONTEXT, VOCABULARY)
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    vocabulary = sum(weights.pop(name) for name in ("embedding", "head") if name in weights)
    rows = sum(count for name, count in weights.items() if name.endswith("rows_RC"))
    experts = sum(count for name, count in weights.items() if name.endswith(("gate_up_EDF", "down_EFD")))
    assert account.embedding_params == vocabulary
    assert account.total_params == sum(weights.values())
    engrams = sum(count for name, count in weights.items() if ".memory." in name)
    assert account.parts.get("engram", Account()).total == engrams
    assert rows == memory_params(config, sizes)
    expected = experts - (experts // sizes.routed_experts if sizes.routed_experts else 0) * (
        config.moe.top_k if config.moe else 0
    )
    assert account.parts.get("moe", Account()).idle == expected
    assert account.parts["backbone"].idle == 0
    assert account.sparse_params == account.total_params - account.active_params
    if account.sparse_params:
        assert account.share("moe") + account.share("engram") == pytest.approx(1)


@pytest.mark.parametrize("compression", [True, False])
def test_a_model_with_memory_builds_on_the_meta_device(compression: bool) -> None:
    """The docstring of `Transformer` promises it, and counting a 27B model needs it."""
    config = _model(engram={"layers": [2], "heads": 2, "row_dim": 4, "compression": compression})
    with torch.device("meta"):
        model = Transformer(
            config, _sizes(config, 4, 8, start=2_262_400), CONTEXT, torch.arange(VOCABULARY, device="cpu"), separator=0
        )
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("engram", [None, {"layers": [1, 3], "orders": [2, 3], "heads": 3, "row_dim": 4}])
def test_one_token_touches_what_counts_as_active(engram: dict[str, Any] | None) -> None:
    """By brute force: the parameters of experts and tables to which a single token's loss has a gradient."""
    config = _model(engram=engram, moe={"expert_width": 8, "top_k": 2, "leading_dense": 1})
    sizes = _sizes(config, 9, 8)
    model = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY), separator=0).initialize(0)
    model.loss(torch.tensor([[7]]), torch.tensor([[11]]), 1)[0].backward()
    touched = {"moe": 0, "engram": 0}
    for name, weight in model.named_parameters():
        gradient = weight.grad
        assert gradient is not None, name
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if name.endswith(("gate_up_EDF", "down_EFD", "rows_RC")):
            touched["engram" if name.endswith("rows_RC") else "moe"] += int((gradient != 0).sum())
    account = count_model(config, sizes, CONTEXT, VOCABULARY)
    experts = 2 * 2 * 3 * 16 * 8  # two blocks, top-2, three matrices
    assert touched == {"moe": experts, "engram": account.parts["engram"].sparse_bytes // 4 if engram else 0}
    assert account.memory_bytes_per_token == 4 * sum(touched.values())


def test_every_backbone_parameter_is_active() -> None:
    """Softmax gates without normalisation reach the whole router; a sequence longer than the convolution reaches every
    tap.
    """
    moe = {"expert_width": 8, "top_k": 2, "leading_dense": 1, "gate": "softmax", "normalize_gates": False}
    config = _model(engram={"layers": [2], "heads": 3, "row_dim": 4, "bias": True}, moe=moe, kv_heads=1)
    sizes = _sizes(config, 9, 8)
    model = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY), separator=0).initialize(0)
    for name, weight in model.named_parameters():
        if name.endswith("taps_KD"):
            weight.data.normal_()
    torch.manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY, (2, 4, CONTEXT))
    model.loss(tokens, targets, tokens.numel())[0].backward()
    pools = ("gate_up_EDF", "down_EFD", "rows_RC", "embedding", "head")
    gradients = [weight.grad for name, weight in model.named_parameters() if not name.endswith(pools)]
    touched = sum(int((gradient != 0).sum()) for gradient in gradients if gradient is not None)
    account = count_model(config, sizes, CONTEXT, VOCABULARY)
    assert touched == account.active_params - account.memory_bytes_per_token // 4


def _grouped(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """FLOPs of the experts' grouped product, which torch's counter does not know: each row meets one
    expert's matrix.
    """
    return 2 * a_shape[0] * b_shape[1] * b_shape[2]


def _linear(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """The same of a product by oneDNN."""
    return 2 * math.prod(a_shape) * int(b_shape[0])


def _flops(config: Model, sizes: Sizes) -> float:
    """Of a forward pass under torch's counter, per token, over the causal triangle."""
    model = Transformer(config, sizes, CONTEXT, torch.arange(VOCABULARY), separator=0).initialize(0)
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten._grouped_mm: _grouped, torch.ops.mkldnn._linear_pointwise: _linear},
    )
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.arange(CONTEXT).unsqueeze(0))
    heads = config.heads * config.head_width
    beyond_the_triangle = config.layers * (4 * heads * CONTEXT - 2 * heads * (CONTEXT + 1))
    return counter.get_total_flops() / CONTEXT - beyond_the_triangle


@pytest.mark.parametrize("residual", MANY_STREAMS)
@pytest.mark.parametrize("fusion", [None, "after_mix", "per_branch"])
def test_flops_of_streams_equal_those_that_torch_counts(residual: str, fusion: str | None) -> None:
    """But for elementwise products: each write, and what a gated residual lets in, beside the two of Engram; and of
    what makes a matrix doubly stochastic, since no parameter is multiplied there.
    """
    engram = {"layers": [2], "heads": 2, "row_dim": 4, "fusion": fusion} if fusion else None
    config = _model(residual=residual, streams=3, engram=engram)
    sizes = _sizes(config, 4, 12)
    account, one = count_model(config, sizes, CONTEXT, VOCABULARY), 2 * config.stream_count * config.width
    sublayers, reads = 2 * config.layers, 2 * config.layers + (fusion == "after_mix")
    elementwise = one * (sublayers + reads * (residual == "gated"))
    elementwise += 2 * config.width * 5 * (config.stream_count if fusion == "per_branch" else bool(fusion))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "sinkhorn", lambda logits_AIJ: logits_AIJ)
        counted = _flops(config, sizes)
    assert counted + elementwise == account.flops_per_token_head / 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("routed", [0, 3, 12])
@pytest.mark.parametrize(
    "engram",
    [None, {"layers": [2, 3], "heads": 2, "row_dim": 4}, {"layers": [1], "heads": 1, "conv": False, "bias": True}],
)
def test_flops_equal_those_that_torch_counts(tied: bool, routed: int, engram: dict[str, Any] | None) -> None:
    """One forward pass under torch's counter. Known differences, stated and added back exactly:

    - torch's attention kernel multiplies all T keys for each query; the account counts the causal (T + 1) / 2;
    - the gate's dot product and the convolution's taps are elementwise products, which torch does not count.
    """
    wide = {"head_dim": 12, "kv_heads": 1} if tied else {}  # heads of another width than width / heads
    moe = {"expert_width": 8, "top_k": 2, "leading_dense": 1} | ({"dense_width": 20} if tied else {})
    config = _model(engram=engram if routed else None, tie_embeddings=tied, moe=moe, **wide)
    sizes = _sizes(config, routed, 12)
    account, width = count_model(config, sizes, CONTEXT, VOCABULARY), config.width
    elementwise = 0
    if config.engram:
        elementwise = (
            len(sizes.tables.get("engram", ())) * 2 * width * (1 + config.engram.conv_kernel * config.engram.conv)
        )
    assert _flops(config, sizes) + elementwise == account.flops_per_token_head / 3
    assert account.flops_per_token_head - account.flops_per_token == 3 * 2 * VOCABULARY * width


def test_a_step_costs_three_forward_passes() -> None:
    """Backward is two products for each of the forward's (Kaplan et al., arXiv 2001.08361, sec. 2.1): 6 FLOPs a
    parameter in all.
    """
    assert always_active(5).flops == 10
    config = _model()
    counter = FlopCounterMode(display=False)
    layer = torch.nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8, requires_grad=True)
    with counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 64 * 4
    account = count_model(config, _sizes(config, 4, 8), 1, 0)
    assert account.flops_per_token > 5.5 * account.active_params  # norms have no products


def test_accounts_add_and_multiply() -> None:
    one = Account(total=5, active=3, flops=7, sparse_bytes=11)
    assert one * 3 == one + one + one
    assert (one * 2).idle == 4
