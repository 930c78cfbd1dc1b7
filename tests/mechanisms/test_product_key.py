"""Product-key memories: values, pre-values, virtual tables and projections against their formulas in float64, row by
row.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsemem.config import Model
from sparsemem.layers.feed_forward import FeedForward
from sparsemem.mechanisms.product_key.cost import retrieval_account
from sparsemem.mechanisms.product_key.layer import (
    SILU_SQUARE,
    ProductKeyMemory,
    ValueTable,
    product_key_account,
    projected_groups,
    row_parameters,
    row_stds,
)
from sparsemem.mechanisms.product_key.retrieval import top_score_moments
from sparsemem.parameter import initialize

WIDTH, KEYS = 16, (5, 4)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("pkm", {}),
    ("pkm", {"layers_per_table": 2, "value_dim": 6, "projection": "linear"}),
    ("memory_plus", {"value_dim": 8}),
    ("peer", {}),
    ("peer", {"shared_keys": False, "pre_value_dim": 4}),
    ("ultramem", {"value_dim": 8}),
    ("ultramem", {"value_dim": 4, "projection": "none"}),
    ("ultramem", {"value_dim": 6, "projection_per_table": False, "pre_values": "gelu"}),
    ("ultramem", {"value_dim": 6, "projection": "gated", "init": "flat"}),
    ("ultramem_v2", {"value_dim": 8, "pre_value_dim": 4}),
    ("ultramem_v2", {"value_dim": 6, "heads": 2, "virtual_tables": 9, "projection_per_table": True}),
]


def _config(pool: str, width: int = WIDTH, layers: int = 4, init_std: float = 0.3, **memory: Any) -> Model:
    fields = {"placement": "parallel", "heads": 2, "top_m": 4, "key_dim": 8}
    if pool == "ultramem_v2":
        fields["heads"] = 1
    return Model.model_validate(
        {"layers": layers, "width": width, "heads": 2, "init_std": init_std, pool: fields | memory}
    )


def _build(config: Model, pool: str, layer: int = 1, table: ValueTable | None = None) -> ProductKeyMemory:
    """One layer in float64, its values of the order of one, so that nothing is lost in a tolerance."""
    memory = ProductKeyMemory(config, pool, layer, KEYS, table or ValueTable(config, pool, KEYS, 4 * config.width))
    initialize(memory, seed=layer)
    for name, weight in memory.named_parameters():
        if name.startswith("table."):
            weight.data.normal_()
    return memory.double().eval()


def _input(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64)


def _weights(memory: nn.Module) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in memory.named_parameters()}


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _activation(kind: str, x: float) -> float:
    return {"none": 1.0, "linear": x, "gelu": x * 0.5 * (1 + math.erf(x / math.sqrt(2)))}[kind]


def _formula(memory: ProductKeyMemory, x_BTD: Tensor) -> np.ndarray:
    """Token by token, head by head, row by row; with the naive virtual tables `V_p = V W_p` where there are several."""
    addresses, scores, _ = memory.retrieval(x_BTD)
    config, weights = memory.memory, _weights(memory)
    values, pre_values = weights["table.values.rows_RC"], weights.get("table.pre_values.rows_RC")
    rows, width = values.shape
    groups = projected_groups(config)
    shuffle = memory.shuffle_A.tolist() if config.virtual_tables > 1 else list(range(rows))
    result = []
    for x, address_HM, score_HMG in zip(
        x_BTD.flatten(0, 1).numpy(), addresses.tolist(), scores.detach().numpy(), strict=True
    ):
        pooled = np.zeros((groups, width))
        for h in range(config.heads):
            for m in range(config.top_m):
                table, row = divmod(shuffle[address_HM[h][m]], rows)
                factor = 1.0
                if pre_values is not None:
                    factor = _activation(
                        config.pre_values, pre_values[row] @ (weights["pre_KD"] @ x if "pre_KD" in weights else x)
                    )
                for c in range(width):
                    core = c // (width // config.cores)
                    pooled[table if groups > 1 else 0, c] += score_HMG[h, m, core] * factor * values[row, c]
        y = pooled.flatten()
        if config.projection == "gated":
            y = y * _silu(weights["gate_WD"] @ x)
        result.append(y if config.projection == "none" else weights["out_DW"] @ y)
    return np.array(result).reshape(x_BTD.shape)


@pytest.mark.parametrize(("pool", "fields"), CASES)
def test_the_layer_equals_its_formula(pool: str, fields: dict[str, Any]) -> None:
    memory, x = _build(_config(pool, **fields), pool), _input()
    expected = _formula(memory, x)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(memory(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cores", [1, 2])
def test_pooling_each_virtual_table_apart_equals_the_naive_virtual_tables(cores: int) -> None:
    """UltraMem: `V~_p = V W_p` of N rows each, written out as E x N rows of the model's width (core g weights what
    slice g of V gives).
    """
    memory, x = _build(_config("ultramem", value_dim=8, cores=cores), "ultramem"), _input()
    addresses_SHM, scores_SHMG, _ = memory.retrieval(x)
    values_RC, out_DPC = memory.table.values.rows_RC, memory.out_DW.detach().view(WIDTH, 4, 8)
    virtual_GAD = torch.stack(
        [
            torch.cat([values_RC[:, part] @ out_DPC[:, p, part].T for p in range(4)])
            for part in torch.arange(8).chunk(cores)
        ]
    )
    read_GSHMD = virtual_GAD[:, memory.shuffle_A[addresses_SHM]]
    expected = (scores_SHMG.permute(3, 0, 1, 2).unsqueeze(-1) * read_GSHMD).sum((0, 2, 3)).view_as(x)
    torch.testing.assert_close(memory(x)[0], expected)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "fields"), CASES)
def test_gradients_are_finite_differences(pool: str, fields: dict[str, Any]) -> None:
    """Of the input entry by entry, of every parameter along a random direction; rows are chosen anew for each
    difference.
    """
    memory, x = _build(_config(pool, **fields), pool), _input(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: memory(x)[0], x, eps=1e-7, atol=1e-5)
    target, step = torch.randn(x.shape, dtype=torch.float64), 1e-6
    (memory(x)[0] * target).sum().backward()
    for name, weight in memory.named_parameters():
        direction = torch.randn_like(weight)
        found = []
        for sign in (1, -1):
            weight.data.add_(direction, alpha=sign * step)
            found.append((memory(x)[0] * target).sum().item())
            weight.data.sub_(direction, alpha=sign * step)
        assert weight.grad is not None, name
        along = float((weight.grad.to_dense() * direction).sum())
        assert (found[0] - found[1]) / (2 * step) == pytest.approx(along, rel=1e-5, abs=1e-6), name


def test_layers_that_share_a_table_add_their_gradients() -> None:
    config = _config("memory_plus", value_dim=8, layers=2)
    table = ValueTable(config, "memory_plus", KEYS, 64)
    layers = nn.ModuleList(_build(config, "memory_plus", layer, table) for layer in (1, 2))
    assert layers[0].table is layers[1].table
    assert sum("rows_RC" in name for name, _ in layers.named_parameters()) == 1
    assert product_key_account(config, "memory_plus", (KEYS,)).total == sum(
        weight.numel() for weight in layers.parameters()
    )

    x, gradients = _input(), []
    for chosen in ([layers[0]], [layers[1]], list(layers)):
        table.zero_grad()
        sum((layer(x)[0].square().sum() for layer in chosen), torch.zeros(())).backward()
        gradient = table.values.rows_RC.grad
        assert gradient is not None
        assert gradient.is_coalesced()
        gradients.append(gradient.to_dense())
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


@pytest.mark.parametrize("pool", ["pkm", "peer", "ultramem", "ultramem_v2"])
def test_autocast_stays_near_full_precision_and_trains(pool: str) -> None:
    memory, x = _build(_config(pool, value_dim=WIDTH), pool).float(), _input().float()
    exact = memory(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, auxiliary = memory(x)
        loss = y.square().sum() + (0 if auxiliary is None else auxiliary)
    loss.backward()
    assert (y - exact).norm() < 0.2 * exact.norm()  # near-equal scores may choose other rows
    assert all(weight.grad is not None and weight.grad.to_dense().isfinite().all() for weight in memory.parameters())
    assert memory.table.values.rows_RC.grad is not None
    assert memory.table.values.rows_RC.grad.dtype == torch.float32


# --- virtual tables and rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [4, 9])
def test_the_shuffle_gives_each_row_one_address_in_every_virtual_table(tables: int) -> None:
    config = _config("ultramem", value_dim=8, virtual_tables=tables)
    first, again, other = (_build(config, "ultramem", layer).shuffle_A for layer in (1, 1, 2))
    assert sorted(first.tolist()) == list(range(tables * 20))
    assert Counter((first % 20).tolist()) == dict.fromkeys(range(20), tables)
    assert Counter((first // 20).tolist()) == dict.fromkeys(range(tables), 20)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_shuffle_follows_from_the_layer_and_is_not_saved() -> None:
    memory = _build(_config("ultramem_v2"), "ultramem_v2", layer=3)
    assert "shuffle_A" not in memory.state_dict()
    assert memory.shuffle_A.tolist() == torch.randperm(80, generator=torch.Generator().manual_seed(3)).tolist()
    assert not hasattr(_build(_config("pkm"), "pkm"), "shuffle_A")


@pytest.mark.parametrize(("pool", "rate"), [("pkm", None), ("ultramem", (10.0, 1.0)), ("ultramem_v2", (4.0, 1.0))])
def test_rows_carry_their_learning_rate(pool: str, rate: tuple[float, float] | None) -> None:
    memory = _build(_config(pool), pool)
    rates = {
        name: weight.rate for name, weight in memory.named_parameters() if getattr(weight, "sparse_gradient", False)
    }
    assert set(rates.values()) == {rate}
    assert len(rates) == (2 if pool == "ultramem_v2" else 1)


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["pkm", "ultramem", "ultramem_v2"])
def test_usage_counts_what_evaluation_read_and_forgets_it(pool: str) -> None:
    memory, batches = _build(_config(pool), pool), [_input(), _input(1, 3)]
    memory.train()
    memory(_input())  # leaves no trace
    memory.eval()
    outputs, rows, first, last = [], Counter[int](), [], []
    for x in batches:
        outputs.append(memory(x)[0].flatten())
        addresses, scores, _ = memory.retrieval(x)
        for address in addresses.flatten().tolist():
            rows[int(memory.shuffle_A[address]) % 20 if hasattr(memory, "shuffle_A") else address] += 1
        first += scores[:, :, 0].sum(-1).flatten().tolist()
        last += scores[:, :, -1].sum(-1).flatten().tolist()
    usage, reads = memory.usage(), sum(rows.values())
    assert usage["coverage"] == len(rows) / 20
    assert usage["kl_uniform"] == pytest.approx(sum(n / reads * math.log(n / reads * 20) for n in rows.values()))
    assert usage["top1_score"] == pytest.approx(np.mean(first))
    assert usage["topm_score"] == pytest.approx(np.mean(last))
    assert usage["output_std"] == pytest.approx(torch.cat(outputs).std(correction=0).item())
    assert usage["singular_values"] == memory.retrieval.singular_values()
    assert memory.usage()["coverage"] == 0.0
    assert math.isnan(memory.usage()["output_std"])  # type: ignore[arg-type]


def test_usage_is_no_part_of_the_state() -> None:
    memory = _build(_config("ultramem_v2"), "ultramem_v2")
    before = set(memory.state_dict())
    memory(_input())
    assert set(memory.state_dict()) == before


# --- initial scale ----------------------------------------------------------------------------------------------------


def _silu_square(variance: float) -> float:
    """E[silu(g)^2] for g ~ N(0, variance), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    return float((weights * _silu(nodes * math.sqrt(variance)) ** 2).sum() / weights.sum())


def test_the_scale_of_rows_is_the_published_formula() -> None:
    """UltraMemV2-227M/1.2B (MECHANISMS 3.5): 20 layers, h 768, top 32, Dv = Dp = 192; fewer keys."""
    fields = {"key_dim": 192, "top_m": 32, "value_dim": 192, "pre_value_dim": 192, "heads": 1}
    config = _config("ultramem_v2", width=768, layers=20, **fields)
    assert config.ultramem_v2 is not None
    spread = top_score_moments(config.ultramem_v2, (30, 30))[1]
    variance = math.sqrt(0.2 * 2 * 768 / (32 * 1 * (1 + spread**2) * 192 * 192 * 20))
    assert row_stds(config, "ultramem_v2", (30, 30), 2 * 768) == pytest.approx((math.sqrt(variance),) * 2)
    assert row_stds(_config("ultramem", layers=6, top_m=8), "ultramem", KEYS, 64)[0] == pytest.approx(
        math.sqrt(4 / (2 * 8 * 2 * 6))
    )
    assert row_stds(_config("pkm"), "pkm", KEYS, 64) == (0.02, 0.02)
    assert pytest.approx(_silu_square(0.4), abs=1e-6) == SILU_SQUARE


def _output_square(memory: ProductKeyMemory, tokens: int, seeds: int, cores: int) -> float:
    """Mean square of the output for inputs of unit variance, over `seeds` draws of all parameters and `cores` draws of
    the Tucker cores: a layer has one core a head, and its scale alone moves the variance by a third.
    """
    found = []
    for seed in range(seeds):
        initialize(memory, seed)
        for _ in range(cores):
            if memory.memory.tucker_rank:
                memory.retrieval.cores_GHRR.data.uniform_()
            x = nn.functional.rms_norm(
                torch.randn(1, tokens, memory.retrieval.query_FD.shape[1]), (memory.retrieval.query_FD.shape[1],)
            )
            with torch.no_grad():
                found.append(float(memory(x)[0].square().mean()))
    return float(np.mean(found))


def test_the_released_start_is_louder_than_the_flat_one_by_its_output_projection() -> None:
    """Released code of UltraMemV2: projections of 1 / sqrt(inputs). At the shape of its 227M model, 20 times the flat
    start's.
    """
    fields = {"key_dim": 192, "top_m": 32, "value_dim": 192, "pre_value_dim": 192, "virtual_tables": 1}
    squares = {}
    for init in ("flat", "released"):
        config = _config("ultramem_v2", width=768, layers=20, init_std=0.0228, init=init, **fields)
        table = ValueTable(config, "ultramem_v2", (24, 24), 64)
        torch.manual_seed(0)
        squares[init] = _output_square(ProductKeyMemory(config, "ultramem_v2", 1, (24, 24), table), 32, 1, 1)
    assert math.sqrt(squares["released"] / squares["flat"]) == pytest.approx(
        192**-0.5 / (0.0228 / math.sqrt(2 * 20)), rel=0.05
    )


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_memory_and_feed_forward_start_with_the_output_variance_of_the_formula(width: int) -> None:
    """T = 0.032 x inner / h / L for the memory; the feed-forward, whose silu the formula takes as linear, has
    E[silu(g)^2] / 0.4 of it.
    """
    layers, inner = 4, 2 * width
    config = _config(
        "ultramem_v2",
        width=width,
        layers=layers,
        init_std=math.sqrt(2 / (5 * width)),
        key_dim=width // 4,
        value_dim=width // 4,
        pre_value_dim=width // 4,
        top_m=16,
    )
    target = 0.032 * inner / width / layers
    keys = (24, 24)
    memory = ProductKeyMemory(config, "ultramem_v2", 1, keys, ValueTable(config, "ultramem_v2", keys, inner))
    assert _output_square(memory, tokens=16, seeds=4, cores=40) == pytest.approx(target, rel=0.1)

    feed_forward, found = FeedForward(config, inner), []
    for seed in range(max(1, 512 // width)):
        initialize(feed_forward, seed)
        x = nn.functional.rms_norm(torch.randn(64, width), (width,))
        with torch.no_grad():
            found.append(float(feed_forward(x).square().mean()))
    assert np.mean(found) == pytest.approx(target * _silu_square(0.4) / 0.4, rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"pre_values": "none", "pre_value_dim": None},
        {"pre_value_dim": None},
        {"projection": "none", "value_dim": 64},
        {"projection": "none", "value_dim": 16, "projection_per_table": True},
        {"projection": "gated"},
        {"projection_per_table": True},
        {"tucker_rank": 0, "cores": 1, "query_per_rank": False},
    ],
)
def test_every_variant_of_the_variance_matched_memory_meets_the_same_target(fields: dict[str, Any]) -> None:
    matched = {"key_dim": 16, "value_dim": 16, "pre_value_dim": 16, "top_m": 8}
    config = _config("ultramem_v2", **({"width": 64} | matched | fields))
    memory = ProductKeyMemory(config, "ultramem_v2", 1, (24, 24), ValueTable(config, "ultramem_v2", (24, 24), 128))
    assert _output_square(memory, tokens=16, seeds=8, cores=16) == pytest.approx(0.032 * 2 / 4, rel=0.1)


# --- accounts ---------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from(CASES),
    width=st.sampled_from([16, 32]),
    heads=st.sampled_from([1, 2, 4]),
    top_m=st.integers(1, 6),
    norm=st.sampled_from(["none", "batch", "layer"]),
    together=st.sampled_from([1, 2, 4]),
    first=st.tuples(st.integers(3, 6), st.integers(3, 6)),
)
def test_the_account_counts_the_tensors(
    case: tuple[str, dict[str, Any]],
    width: int,
    heads: int,
    top_m: int,
    norm: str,
    together: int,
    first: tuple[int, int],
) -> None:
    pool, given = case
    fields = given | {"layers_per_table": together}
    fields |= {
        "heads": 2 if fields.get("shared_query", pool == "ultramem") else heads,
        "top_m": top_m,
        "norm": norm,
        "init": "flat",
    }
    if fields.get("projection") == "none":
        fields["value_dim"] = width // 4
    config = _config(pool, width=width, **fields)
    tables = tuple((first[0] + i, first[1]) for i in range(4 // together))
    with torch.device("meta"):
        shared = [ValueTable(config, pool, keys, 64) for keys in tables]
        layers = nn.ModuleList(
            ProductKeyMemory(config, pool, 1 + i, tables[i // together], shared[i // together]) for i in range(4)
        )
    weights = dict(layers.named_parameters())
    assert all(weight.is_meta for weight in weights.values())
    rows = sum(weight.numel() for weight in weights.values() if getattr(weight, "sparse_gradient", False))
    others = sum(weight.numel() for weight in weights.values()) - rows
    memory, account = getattr(config, pool), product_key_account(config, pool, tables)
    read = 4 * memory.heads * top_m * row_parameters(config, pool)
    assert rows == sum(map(math.prod, tables)) * row_parameters(config, pool)
    assert account.total == rows + others
    touched = sum(min(together * memory.heads * top_m, math.prod(keys)) for keys in tables) * row_parameters(
        config, pool
    )
    assert account.active == touched + others
    assert account.sparse_bytes == 4 * read


def test_flops_of_one_layer_are_those_of_its_products() -> None:
    """V2 by hand: pre-projection, a dot product and a sum for each row that is read, output projection, beside the
    retrieval.
    """
    with_memory = _config("ultramem_v2", layers=1, value_dim=8, pre_value_dim=4, top_m=4)
    assert with_memory.ultramem_v2 is not None
    retrieval = retrieval_account(with_memory, with_memory.ultramem_v2, KEYS)
    account = product_key_account(with_memory, "ultramem_v2", (KEYS,))
    assert account.flops - retrieval.flops == 2 * WIDTH * 4 + 4 * (2 * 4 + 2 * 8) + 2 * 8 * WIDTH
    assert product_key_account(with_memory, "ultramem_v2", ()).total == 0
