"""Published configurations come out of the same plan as every study: sweeps/published, solved and never trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sparsemem.config import ConfigError, Model, load_study
from sparsemem.mechanisms.product_key.fields import memory_layers
from sparsemem.model import Sizes, Transformer
from sparsemem.study.plan import PlannedTrial, plan
from sparsemem.study.plan.access import describe_access, memory_access

PUBLISHED = Path(__file__).parents[1] / "sweeps" / "published"


def _plan(name: str) -> PlannedTrial:
    (planned,) = plan(load_study(PUBLISHED / f"{name}.yaml"))
    return planned


@pytest.mark.parametrize(
    ("name", "total", "active", "tied"),
    [  # parameters as their papers print them; `tied`: the activated ones include the vocabulary's (MECHANISMS 3.5)
        ("olmoe-1b-7b", 6.71e9, 1.07e9, False),
        ("ultramem-v2-227m-1.2b", 1.18e9, 225e6, True),
        ("ultramem-v2-1b-7b", 6.70e9, 1079e6, True),
    ],
)
def test_published_parameter_counts(name: str, total: float, active: float, tied: bool) -> None:
    """OLMoE (arXiv 2409.02060) and UltraMemV2 (arXiv 2508.18756), within 1%."""
    account = _plan(name).account
    assert account.total_params == pytest.approx(total, rel=0.01)
    assert account.active_params + tied * account.embedding_params == pytest.approx(active, rel=0.01)


def test_olmoe_has_its_64_experts() -> None:
    assert _plan("olmoe-1b-7b").sizes.routed_experts == 64


def test_olmoe_has_its_weights_of_the_auxiliary_losses() -> None:
    """0.01 and 0.001 (MECHANISMS 4), of means over blocks: megablocks and OLMo-core divide by their number, and a model
    here adds up.
    """
    trial = _plan("olmoe-1b-7b").trial
    assert trial.model.moe is not None
    blocks = trial.model.layers - trial.model.moe.leading_dense
    assert (blocks * trial.model.moe.balance_loss, blocks * trial.model.moe.z_loss) == pytest.approx((0.01, 0.001))
    small = Model(layers=3, width=16, heads=2, moe=trial.model.moe.model_copy(update={"expert_width": 8, "top_k": 2}))
    model = Transformer(small, Sizes(4, 0), 8, torch.arange(30), separator=0).initialize(0)
    alone = []
    for layer in model.layers_of("moe"):
        layer.register_forward_hook(lambda _, __, output: alone.append(output[1].item()))
    auxiliary = model(torch.arange(8).unsqueeze(0))[1].item()
    assert auxiliary == pytest.approx(sum(alone), rel=1e-6)
    assert len(alone) == 3


@pytest.mark.parametrize(
    ("name", "pool", "keys", "width", "layers"),
    # released run scripts: `mem_knum`; half of `mlp_hidden_size`, which counts gate and up; blocks of `mem_insert_way`,
    # plus one
    [
        ("ultramem-v2-227m-1.2b", "ultramem_v2", 360, 2496, range(1, 21)),
        ("ultramem-227m-1.2b", "ultramem", 808, 2752, (3, 7, 11, 15)),
        ("memory-plus-227m-1.2b", "memory_plus", 1138, 3008, (5, 9, 13, 17)),
    ],
)
def test_the_sizes_of_the_released_scripts_follow(
    name: str, pool: str, keys: int, width: int, layers: Sequence[int]
) -> None:
    """To within 1%: of V2, the budget is the paper's, and its script's comes 0.6% lower."""
    planned = _plan(name)
    model = planned.trial.model
    for side in (side for table in planned.sizes.tables[pool] for side in table):
        assert side == pytest.approx(keys, rel=0.01)
    assert planned.sizes.shared_width == pytest.approx(width, rel=0.01)
    assert memory_layers(model, pool) == tuple(layers)
    assert getattr(model, pool).placement == "parallel"
    assert getattr(model, pool).value_rate == (4.0, 1.0)  # `mem_value_lr_times`, `mem_value_lr_max_steps_rate`
    assert getattr(model, pool).tucker_penalty == 0
    assert getattr(model, pool).query_per_rank is False


def test_the_published_keys_of_v2_1b_7b_follow_with_pre_values_of_512() -> None:
    """A finding: with the table's pre-values of 384, 528 keys a side hold 6.1B parameters; with 512 they
    come to 6.70B.
    """
    keys = {side for table in _plan("ultramem-v2-1b-7b").sizes.tables["ultramem_v2"] for side in table}
    assert keys == {528, 529}


def test_the_plan_shows_the_cost_of_the_index_and_the_bytes_read() -> None:
    """One row of UltraMemV2-227M by hand: 32 rows of 384 values in 20 layers; keys of 192 at two ranks, twice 360 a
    side.
    """
    (row,) = memory_access([_plan("ultramem-v2-227m-1.2b")])
    keys = sum(map(sum, _plan("ultramem-v2-227m-1.2b").sizes.tables["ultramem_v2"])) * 2 * 192 * 2
    assert row["row_bytes_1"] == 20 * 32 * 384 * 4
    assert row["row_bytes_64"] == row["row_bytes_1"]
    assert row["row_bytes_65536"] < row["row_bytes_1"] / 10  # every row is read at most once
    assert row["key_bytes_64"] == keys * 4 / 64
    assert row["key_flops"] == 2 * keys
    assert 0 < row["index_share"] < 1
    assert row["moe_bytes_1"] is None  # this study has no experts
    text = describe_access([row])
    assert "ultramem_v2" in text
    assert f"{row['index_share']:.1%}" in text


def test_bytes_of_experts_and_hashed_rows_stand_beside_each_other() -> None:
    planned = plan(
        load_study(
            PUBLISHED.parent / "simplex.yaml", {"vary.shares": [{"moe": 0.5, "engram": 0.25, "ultramem_v2": 0.25}]}
        )
    )
    values, engram = memory_access(planned[:1])
    assert [row["pool"] for row in (values, engram)] == ["ultramem_v2", "engram"]
    expert = 3 * 64 * 48 * 4
    assert values["moe_bytes_1"] == engram["moe_bytes_1"] == 3 * 2 * expert  # three layers, top-2
    assert values["moe_bytes_65536"] == 3 * 67 * expert / 65536  # all experts of the pure mixture, each once
    assert engram["row_bytes_1"] == 8 * 8 * 4
    assert engram["key_bytes_1"] == 0
    assert engram["index_share"] is None


# --- published mixtures of experts ------------------------------------------------------------------------------------

CASES = Path(__file__).parents[2] / "shared" / "data" / "cases" / "published"
# of those whose files lack what their model cards give: heads that are not width / heads, and a leading dense block
WIDTHS = {
    "qwen3-30b-a3b": {"model.head_dim": 128},
    "gpt-oss-20b": {"model.head_dim": 64},
    "deepseekmoe-16b": {"model.moe.dense_width": 10944},
}


@pytest.mark.skipif(not CASES.is_dir(), reason="the published configurations of ../shared/data are not here")
def test_published_mixtures_plan_to_their_experts_and_totals() -> None:
    expected = json.loads((CASES / "expected.json").read_text(encoding="utf-8"))
    for name, counts in expected.items():
        (planned,) = plan(load_study(CASES / f"{name}.yaml", WIDTHS.get(name, {})))
        account = planned.account
        assert (planned.sizes.routed_experts, planned.sizes.shared_width) == (counts["experts"], counts["shared"]), name
        assert (account.total_params, account.active_params, account.embedding_params) == tuple(
            counts[count] for count in ("total", "active", "emb")
        ), name


@pytest.mark.parametrize(
    ("name", "experts", "total", "active"),
    # as their model cards print them, embeddings included; gpt-oss-20b counts one of its two vocabulary matrices as
    # active
    [
        ("qwen3-30b-a3b", 128, 30.5e9, 3.3e9),
        ("gpt-oss-20b", 32, 20.9e9, 3.6e9),
    ],
)
def test_heads_of_a_width_of_their_own(name: str, experts: int, total: float, active: float) -> None:
    planned = _plan(name)
    account = planned.account
    read = account.embedding_params // (2 if name == "gpt-oss-20b" else 1)
    assert planned.sizes.routed_experts == experts
    assert account.total_params + account.embedding_params == pytest.approx(total, rel=0.002)
    assert account.active_params + read == pytest.approx(active, rel=0.02)


def test_a_head_of_another_width_is_named_where_the_model_misses_its_budget() -> None:
    text = (PUBLISHED / "qwen3-30b-a3b.yaml").read_text(encoding="utf-8")
    assert "head_dim" in text
    with pytest.raises(ConfigError, match=r"`model\.head_dim`, now `width` / `heads` = 64"):
        plan(load_study(PUBLISHED / "qwen3-30b-a3b.yaml", {"model.head_dim": None}))
    with pytest.raises(ConfigError, match=r"write heads: 40, 45, 48, 60, 72, 80, or the width of a head, head_dim: 44"):
        load_study(PUBLISHED / "gpt-oss-20b.yaml", {"model.head_dim": None})
