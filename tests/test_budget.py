"""Budgets: the sizes that `solve` returns meet P_tot, P_act and the share, and a refusal names what would
be feasible.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.budget import budget_errors, solve
from sparsemem.config import Budget, ConfigError, Model
from sparsemem.mechanisms import MEMORY_POOLS
from sparsemem.mechanisms.hashed import distinct_primes
from sparsemem.mechanisms.moe.layer import moe_account
from sparsemem.model import ModelAccount, Sizes, count_model

ENGRAM = {"layers": [2], "orders": [2, 3], "heads": 4, "row_dim": 8}
STUDY = {
    "layers": 3,
    "width": 64,
    "heads": 4,
    "moe": {"expert_width": 48, "top_k": 2, "shared_experts": 1},
}  # ARCHITECTURE.md's study
SHARES = [round(0.05 * step, 2) for step in range(21)]


def _model(rho: float | None, **changes: Any) -> Model:
    return Model.model_validate(STUDY | ({"engram": ENGRAM} if rho not in (1, None) else {}) | changes)


def _shares(rho: float | None) -> dict[str, float]:
    return {} if rho is None else {pool: share for pool, share in (("moe", rho), ("engram", 1 - rho)) if share}


def _budget(total: int = 1_240_000, active: int = 135_000, tolerance: float = 0.005) -> Budget:
    return Budget(total_params=total, active_params=active, tokens=1000, tolerance=tolerance)


def _solved(rho: float | None, budget: Budget, **changes: Any) -> tuple[Sizes, ModelAccount]:
    config = _model(rho, **changes)
    sizes = solve(config, budget, _shares(rho))
    return sizes, count_model(config, sizes, context=128, vocabulary=4096)


@pytest.mark.parametrize("rho", SHARES)
def test_every_share_of_the_study_meets_its_budget(rho: float) -> None:
    """P_tot within 0.5%, P_act within 1% (in fact 0.5%), the share within half an expert."""
    budget = _budget()
    sizes, account = _solved(rho, budget)
    total, active = budget_errors(_model(rho), account, budget)
    assert abs(total) <= 0.005
    assert abs(active) <= 0.005
    assert total == account.total_params / 1_240_000 - 1
    assert active == account.active_params / 135_000 - 1
    half_an_expert = 0.5 * 3 * 3 * 64 * 48 / (1_240_000 - 135_000)
    assert account.share("moe") == pytest.approx(rho, abs=1.02 * half_an_expert)
    assert sizes.routed_experts >= 2
    assert (sizes.memory_rows > 0) == (rho < 1)


def test_rho_one_is_pure_moe_and_rho_zero_has_no_idle_expert() -> None:
    pure, account = _solved(1, _budget())
    assert pure.tables == {}
    assert account.share("moe") == 1
    memory, account = _solved(0, _budget())
    assert memory.routed_experts == 2
    assert account.share("moe") == 0
    assert account.share("engram") == 1


def test_experts_and_rows_follow_the_share_and_the_shared_width_pays_for_the_memory() -> None:
    solved = [_solved(rho, _budget())[0] for rho in SHARES]
    experts, rows, widths = (
        [getattr(sizes, name) for sizes in solved] for name in ("routed_experts", "memory_rows", "shared_width")
    )
    assert experts == sorted(experts)
    assert rows == sorted(rows, reverse=True)
    assert widths[-1] > max(widths[:-1])  # without memory, its projections' part goes to the shared expert
    assert widths[:-1] == sorted(widths[:-1], reverse=True)  # a larger router leaves less


def test_equal_activated_parameters_are_equal_flops() -> None:
    """Iso-FLOP: within 1% of their mean across shares and the dense baseline."""
    flops = [_solved(rho, _budget())[1].flops_per_token for rho in [*SHARES, None]]
    mean = sum(flops) / len(flops)
    assert max(abs(value / mean - 1) for value in flops) < 0.01


def test_the_dense_baseline_has_the_activated_parameters_and_no_others() -> None:
    budget = _budget()
    sizes, account = _solved(None, budget)
    assert sizes.routed_experts == 0
    assert account.sparse_params == 0
    assert account.total_params == account.active_params == pytest.approx(135_000, rel=0.005)
    assert set(account.parts) == {"backbone"}
    assert max(map(abs, budget_errors(_model(None), account, budget))) <= 0.005


@pytest.mark.parametrize("layers", [[2], [1, 3], [1, 2, 3]])
@pytest.mark.parametrize("orders", [[2], [2, 3, 4]])
def test_tables_of_a_model_all_have_distinct_prime_sizes(layers: list[int], orders: list[int]) -> None:
    """Engram's released code: no two tables of a model, in whatever layer, have the same number of rows."""
    sizes, account = _solved(
        0.5, _budget(active=200_000), engram=ENGRAM | {"layers": layers, "orders": orders, "heads": 2}
    )
    assert [len(module) for module in sizes.tables["engram"]] == [2 * len(orders)] * len(layers)
    rows = [rows for module in sizes.tables["engram"] for rows in module]
    assert len(set(rows)) == len(rows)
    assert all(size > 1 and all(size % divisor for divisor in range(2, int(size**0.5) + 1)) for size in rows)
    assert rows == sorted(rows)
    assert abs(account.total_params / 1_240_000 - 1) <= 0.005


@pytest.mark.parametrize("shared_experts", [1, 2, 3])
def test_the_shared_width_divides_into_the_shared_experts(shared_experts: int) -> None:
    sizes, _ = _solved(0.5, _budget(tolerance=0.02), moe=STUDY["moe"] | {"shared_experts": shared_experts})
    assert sizes.shared_width % shared_experts == 0


# --- what cannot be met -----------------------------------------------------------------------------------------------


def _named(error: ConfigError) -> tuple[str, int]:
    """The field that a refusal names, and the value that it says would be right."""
    field = re.search(r"field `budget\.(\w+)`", str(error))
    value = re.search(r"(?:nearest feasible value is|raise it to) ([\d,]+)", str(error))
    assert field, f"names no field of the budget: {error}"
    assert value, f"names no feasible value: {error}"
    return field[1], int(value[1].replace(",", ""))


@pytest.mark.parametrize(
    ("total", "active", "rho", "field"),
    [
        (1_240_000, 60_000, 1.0, "active_params"),  # attention alone takes 49,152
        (1_240_000, 60_000, 0.5, "active_params"),
        (1_240_000, 60_000, 0.0, "active_params"),
        (1_255_000, 135_000, 1.0, "total_params"),  # between two numbers of experts
        (145_000, 135_000, 1.0, "total_params"),  # less than half an expert is left: no idle expert, and 7% short
        (140_000, 135_000, 1.0, "total_params"),
        (135_000, 135_000, 0.5, "total_params"),
    ],
)
def test_a_budget_that_no_sizes_meet_is_refused_by_name(total: int, active: int, rho: float, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _solved(rho, _budget(total, active))
    assert _named(refused.value)[0] == field
    assert f"has the value { {'total_params': total, 'active_params': active}[field]:,}" in str(refused.value)


@settings(max_examples=80, deadline=None)
@given(
    total=st.integers(100_000, 3_000_000),
    active=st.integers(60_000, 300_000),
    rho=st.sampled_from([1.0, 0.9, 0.5, 0.1, 0.0, None]),
    width=st.sampled_from([8, 16, 48, 96]),
    shared_experts=st.integers(1, 2),
    tolerance=st.sampled_from([0.005, 0.02]),
)
def test_solve_meets_the_tolerance_or_names_a_feasible_value(
    total: int, active: int, rho: float | None, width: int, shared_experts: int, tolerance: float
) -> None:
    total = max(total, active)
    moe = {"expert_width": width, "top_k": 2, "shared_experts": shared_experts}
    wanted = {"total_params": total, "active_params": active}
    for _ in range(5):  # a remedy for one field may uncover another: each refusal leads on, and soon to sizes
        budget = _budget(wanted["total_params"], wanted["active_params"], tolerance)
        try:
            _, account = _solved(rho, budget, moe=moe)
        except ConfigError as refused:
            if share := re.search(r"field `shares\.moe` .* nearest feasible value is ([\d.]+)", str(refused)):
                rho = float(share[1].rstrip("."))  # experts too coarse for the share that was asked for
                continue
            name, value = _named(refused)
            assert value != wanted[name]
            wanted[name] = value
            wanted["total_params"] = max(wanted["total_params"], wanted["active_params"])
        else:
            target = budget.total_params if rho is not None else budget.active_params
            assert abs(account.total_params / target - 1) <= tolerance
            assert abs(account.active_params / budget.active_params - 1) <= tolerance
            assert rho is None or abs(account.share("moe") - rho) <= 0.02
            return
    pytest.fail(f"five remedies in a row were refused; the last: {wanted}")


def test_a_dense_baseline_out_of_reach_names_the_activated_parameters() -> None:
    """Its only budget is P_act: telling the user to change P_tot would change nothing."""
    moe = STUDY["moe"] | {"shared_experts": 2, "expert_width": 16}
    with pytest.raises(ConfigError) as refused:
        _solved(None, _budget(2_125_499, 66_251), moe=moe)
    name, value = _named(refused.value)
    assert name == "active_params"
    assert _solved(None, _budget(2_125_499, value), moe=moe)[1].active_params == pytest.approx(value, rel=0.005)


@pytest.mark.parametrize("total", [100_000, 500_000])
def test_without_shared_experts_the_remedies_lead_to_sizes(total: int) -> None:
    """Nothing can absorb the router then: P_act follows from P_tot, so it is P_act that the refusal must name."""
    wanted, moe = (
        {"total_params": total, "active_params": 60_000},
        STUDY["moe"] | {"shared_experts": 0, "expert_width": 16},
    )
    for _ in range(4):
        try:
            _solved(1, _budget(wanted["total_params"], wanted["active_params"]), moe=moe)
        except ConfigError as refused:
            name, value = _named(refused)
            wanted[name] = value
        else:
            return
    pytest.fail(f"four remedies in a row were refused; the last: {wanted}")


def test_memory_without_shared_experts_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"shared_experts.*set it to 1"):
        _solved(0.5, _budget(), moe=STUDY["moe"] | {"shared_experts": 0})


# --- published sizes --------------------------------------------------------------------------------------------------


def _engram_27b(rows: int, routed: int = 55) -> ModelAccount:
    """30 layers, one leading dense, d 2560, top-6, experts 1536 wide [calc], memory in layers 2 and 15 (MECHANISMS 2.4,
    2.5).
    """
    engram = {"layers": [2, 15], "orders": [2, 3], "heads": 8, "row_dim": 80}
    moe = {"expert_width": 1536, "top_k": 6, "shared_experts": 2, "leading_dense": 1}
    config = Model.model_validate({"layers": 30, "width": 2560, "heads": 32, "moe": moe, "engram": engram})
    primes = distinct_primes(rows, 32)
    return count_model(
        config, Sizes(routed, 2 * 1536, {"engram": (primes[:16], primes[16:])}), context=4096, vocabulary=129_280
    )


@pytest.mark.parametrize(("rows", "billions"), [(2_262_400, 5.79), (7_239_680, 18.53)])
def test_published_memory_of_27b_and_40b(rows: int, billions: float) -> None:
    """arXiv 2601.07372, table 1: Engram-27B holds 5.7B in tables, Engram-40B 18.5B."""
    assert _engram_27b(rows).parts["engram"].idle / 1e9 == pytest.approx(billions, abs=0.005)


def test_published_share_of_27b() -> None:
    """rho = 74.3% for 55 of 72 routed experts (arXiv 2601.07372, table 1)."""
    account = _engram_27b(2_262_400)
    assert account.share("moe") == pytest.approx(0.743, abs=0.001)
    moved = _engram_27b(2_262_400, routed=72).parts["moe"].total - account.parts["moe"].total
    assert moved / 1e9 == pytest.approx(5.8, abs=0.1)  # 17 experts of 29 layers became the tables


@pytest.mark.parametrize(("experts", "at_rho_one", "rho"), [(46, 106, 0.400), (43, 99, 0.398)])
def test_published_numbers_of_experts_at_rho_of_forty_percent(experts: int, at_rho_one: int, rho: float) -> None:
    """Sec. 3.1, settings 1 and 2 with top-6 routing: rho = (E - 6) / (E0 - 6)."""
    config = _model(None, moe={"expert_width": 16, "top_k": 6})
    idle, all_idle = (moe_account(config, count, 16).idle for count in (experts, at_rho_one))
    assert idle / all_idle == pytest.approx(rho, abs=0.0005)


# --- several memories -------------------------------------------------------------------------------------------------

V2 = {"key_dim": 16, "top_m": 8, "value_dim": 16, "pre_value_dim": 16}
MEMORIES = {
    "engram": ENGRAM,
    "ngram_embedding": {"heads": 2},
    "ultramem_v2": V2,
    "pkm": {"key_dim": 8, "top_m": 8, "layers": [3]},
}


def _with_memories(
    shares: dict[str, float], active: int = 260_000, **changes: Any
) -> tuple[Model, Budget, Sizes, ModelAccount]:
    config = Model.model_validate(STUDY | {pool: MEMORIES[pool] for pool in shares if pool != "moe"} | changes)
    budget = _budget(total=2_600_000, active=active)
    sizes = solve(config, budget, shares)
    return config, budget, sizes, count_model(config, sizes, context=128, vocabulary=4096)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=5, max_size=5).filter(any))
def test_any_pool_may_take_any_share(parts: list[int]) -> None:
    """P_tot and P_act within 0.5% and every share within 0.02, over points of the simplex of five pools."""
    shares = {pool: part / sum(parts) for pool, part in zip(("moe", *MEMORIES), parts, strict=True) if part}
    config, budget, sizes, account = _with_memories(shares)
    assert max(map(abs, budget_errors(config, account, budget))) <= 0.005
    assert {pool: account.share(pool) for pool in shares} == pytest.approx(shares, abs=0.02)
    assert set(sizes.tables) == shares.keys() - {"moe"}


def test_a_memory_may_hold_all_sparse_parameters_of_a_model_without_experts() -> None:
    """UltraMemV2's own setting: every block has a dense feed-forward, whose width P_act decides."""
    config, _, sizes, account = _with_memories({"ultramem_v2": 1.0}, moe=None)
    assert sizes.routed_experts == 0
    assert account.share("ultramem_v2") == 1
    assert account.active_params == pytest.approx(260_000, rel=0.005)
    assert config.moe is None


def test_keys_are_spread_evenly_over_tables_and_sides() -> None:
    tables = _with_memories({"ultramem_v2": 1.0}, moe=None)[2].tables["ultramem_v2"]
    counts = [side for table in tables for side in table]
    assert len(tables) == 3
    assert max(counts) - min(counts) <= 1


def test_layers_that_share_a_table_hold_its_rows_once() -> None:
    alone = _with_memories({"ultramem_v2": 1.0}, moe=None)[2]
    shared = _with_memories({"ultramem_v2": 1.0}, moe=None, ultramem_v2=V2 | {"layers_per_table": "all"})[2]
    assert len(shared.tables["ultramem_v2"]) == 1
    assert shared.memory_rows == pytest.approx(alone.memory_rows, rel=0.02)


@pytest.mark.parametrize("rows", [4096, 8192, 2**20])
def test_a_memory_of_given_rows_comes_on_top_of_the_budget(rows: int) -> None:
    backbone = _with_memories({"moe": 1.0})[2]
    config, budget, sizes, account = _with_memories(
        {"moe": 1.0}, engram=ENGRAM | {"rows": rows}, ultramem_v2=V2 | {"rows": rows}
    )
    assert (sizes.routed_experts, sizes.shared_width) == (backbone.routed_experts, backbone.shared_width)
    assert sizes.tables["engram"] == (distinct_primes(rows, 8),)
    assert [a * b for a, b in sizes.tables["ultramem_v2"]] == [rows] * 3
    assert max(map(abs, budget_errors(config, account, budget))) <= 0.005
    assert account.total_params > 2_600_000 + rows


def test_layers_of_one_table_cannot_touch_more_rows_than_it_holds() -> None:
    """Three layers reading 96 rows each of one table of at least 288: P_sparse stays what the table holds
    beside them.
    """
    memory = {"placement": "parallel", "heads": 1, "top_m": 96, "key_dim": 8, "value_dim": 8}
    config = Model.model_validate(STUDY | {"memory_plus": memory})
    sizes = solve(config, _budget(total=275_000, active=270_000, tolerance=0.02), {"memory_plus": 1.0})
    assert sizes.memory_rows >= 288
    on_top = Model.model_validate(STUDY | {"memory_plus": memory | {"rows": 100}})
    account = count_model(on_top, solve(on_top, _budget(), {}), context=128, vocabulary=4096)
    assert account.parts["memory_plus"].idle == 0


def test_a_memory_without_an_initial_scale_is_refused_by_name() -> None:
    """Reading nearly every row, the mean over positive and negative scores is zero or below."""
    fields = {"key_dim": 8, "rows": 256, "top_m": 256, "value_dim": 16, "pre_value_dim": 16, "virtual_tables": 1}
    config = Model.model_validate(STUDY | {"ultramem_v2": fields})
    with pytest.raises(ConfigError, match=r"`model\.ultramem_v2\.top_m` has the value 256: .* set `init: flat`"):
        MEMORY_POOLS["ultramem_v2"].check_start(config, solve(config, _budget(), {}))
