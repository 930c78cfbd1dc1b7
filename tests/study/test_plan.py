from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem import Study
from sparsemem.api import foresee
from sparsemem.config import ConfigError, Run, load_study
from sparsemem.results import COLUMNS, MEASURED
from sparsemem.study import jobs
from sparsemem.study.jobs import slots
from sparsemem.study.launch import find_engine
from sparsemem.study.plan import _interpolated, _makespan, describe, estimate_seconds, in_order, plan


def test_a_plan_has_the_columns_of_the_table_that_are_known_before_training(write_study: Callable[..., Path]) -> None:
    frame = Study.from_yaml(write_study(vary={"rho": [1.0, 0.5], "train.lr": [0.01, 0.02]})).plan()
    before = [name for name in COLUMNS if name not in (*MEASURED, "status")]
    assert list(frame.columns) == [*before, "share_engram", "train.lr", "tokens_per_active_param"]
    assert frame.tokens_per_active_param.tolist() == (frame.tokens / frame.active_params).tolist()
    assert frame.rho.tolist() == [1.0, 1.0, 0.5, 0.5]
    assert frame["train.lr"].tolist() == [0.01, 0.02, 0.01, 0.02]
    assert (frame.total_params - frame.active_params == frame.sparse_params).all()
    assert frame.budget_error_total.abs().max() < 0.05


def test_shares_are_those_of_the_integer_sizes_and_rho_is_the_one_asked_for(write_study: Callable[..., Path]) -> None:
    row = plan(load_study(write_study(vary={"rho": [0.5]})))[0].row()
    assert row["rho"] == 0.5
    assert row["share_moe"] + row["share_engram"] == pytest.approx(1)
    assert row["share_moe"] == pytest.approx(0.5, abs=0.03)


def test_varied_units_and_groups_come_out_as_plain_numbers(write_study: Callable[..., Path]) -> None:
    ladder = [
        {"total_params": "30k", "active_params": "7k", "tokens": tokens, "tolerance": "5%"} for tokens in ("4k", "16k")
    ]
    rows = [p.row() for p in plan(load_study(write_study(vary={"budget": ladder, "rho": [1.0]})))]
    assert [row["budget.tokens"] for row in rows] == [4000, 16000]
    assert [row["budget.total_params"] for row in rows] == [30000, 30000]


def test_tokens_for_each_active_parameter_are_planned_as_the_tokens_that_they_come_to(
    write_study: Callable[..., Path],
) -> None:
    sizes = {"total_params": "30k", "active_params": "7k", "tolerance": "5%"}
    written = load_study(
        write_study(budget=sizes, vary={"budget.tokens_per_active_param": [1, 2.5], "rho": [1.0, 0.5]})
    )
    tokens = load_study(write_study(budget=sizes, vary={"budget.tokens": [7000, "17.5k"], "rho": [1.0, 0.5]}))
    assert [p.row() for p in plan(written)] == [p.row() for p in plan(tokens)]
    assert [p.row()["budget.tokens"] for p in plan(written)] == [7000, 7000, 17500, 17500]
    words = describe(plan(written), None).splitlines()
    assert "tokens/P_act" in words[0]
    assert [line.split()[-2] for line in words[2:6]] == [f"{p.tokens_per_active_param:.3g}" for p in plan(written)]


def test_settings_that_a_share_does_not_use_make_no_new_trial(write_study: Callable[..., Path]) -> None:
    planned = plan(load_study(write_study(vary={"rho": [1.0, 0.5], "model.engram.heads": [1, 2]})))
    assert [(p.trial.rho, p.varied["model.engram.heads"]) for p in planned] == [(1.0, None), (0.5, 1), (0.5, 2)]


def test_the_dense_baseline_has_no_rho(write_study: Callable[..., Path]) -> None:
    row = plan(load_study(write_study(vary={"rho": ["dense"]})))[0].row()
    assert row["rho"] is None
    assert row["routed_experts"] == row["memory_rows"] == 0


def test_a_missed_budget_is_refused_with_its_point(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study(budget={"total_params": "30k", "active_params": "2k", "tokens": 4096}))
    with pytest.raises(ConfigError, match=r"budget.active_params.* 2,000.*raise it to.*rho=1.0"):
        plan(study)


@pytest.mark.parametrize(
    ("field", "budget"),
    [
        ("active_params", {"total_params": "1.24M", "active_params": "100k"}),
        ("active_params", {"total_params": "1.24M", "active_params": "130k"}),
        ("active_params", {"total_params": "1.24M", "active_params": "141k", "tolerance": "0.05%"}),
        ("total_params", {"total_params": "170k", "active_params": "160k"}),
        ("total_params", {"total_params": "400k", "active_params": "160k", "tolerance": "0.1%"}),
    ],
)
def test_what_a_refused_budget_is_offered_serves_every_point(
    write_study: Callable[..., Path], field: str, budget: dict[str, object]
) -> None:
    """Three memories at one share need different least budgets; what is typed after the message must not be refused in
    its turn.
    """
    memories = {
        "engram": {"layers": [2], "orders": [2, 3], "heads": 4, "row_dim": 8},
        "ngram_embedding": {"orders": [2, 3], "heads": 4, "row_dim": 8},
        "ultramem_v2": {"layers": [2], "key_dim": 32, "heads": 1, "top_m": 8},
    }
    model = {
        "layers": 3,
        "width": 64,
        "heads": 4,
        "moe": {"expert_width": 48, "top_k": 2, "shared_experts": 1},
        **memories,
    }
    shares = [{"moe": 0.5, name: 0.5} for name in memories] + [{"moe": 1}]

    def refused(changed: dict[str, object], expert_width: int = 48) -> str:
        own = model | {"moe": {"expert_width": expert_width, "top_k": 2, "shared_experts": 1}}
        vary = {"shares": shares, "seed": [0, 1]}
        try:
            plan(
                load_study(
                    write_study(model=own, budget={"tokens": "8k", "tolerance": "1%"} | budget | changed, vary=vary)
                )
            )
        except ConfigError as error:
            return str(error)
        return ""

    words = refused({})
    if tolerance := re.search(r"no value near it serves every point: `budget.tolerance: ([\d.]+)` would do", words):
        assert refused({"tolerance": float(tolerance[1])}) == ""
        return
    (offer,) = set(re.findall(rf"field `budget\.{field}`.*?(?:raise it to|nearest feasible value is) (\d+)", words))
    assert f"field `budget.{field}`" not in refused({field: int(offer)})
    for width in set(re.findall(r"`model.moe.expert_width: (\d+)` would do", words)):
        assert refused({}, int(width)) == ""


def test_a_trial_of_few_steps_is_foreseen(write_study: Callable[..., Path]) -> None:
    budget = {"total_params": "30k", "active_params": "7k", "tolerance": "5%"}
    for tokens, said in ((300, True), (100_000, False)):
        study = load_study(write_study(budget=budget | {"tokens": tokens}, vary={"rho": [1.0, 0.5]}))
        lines = foresee(study, plan(study))
        assert (
            any(f"`budget.tokens` {tokens:,} make 2 steps of `train.batch_tokens` 256" in line for line in lines)
            is said
        )


def test_estimates_grow_with_the_tokens_and_share_the_slots(write_study: Callable[..., Path]) -> None:
    study = load_study(write_study(vary={"rho": [1.0, 0.0], "budget.tokens": ["10M", "40M"]}))
    planned = plan(study)
    estimate = estimate_seconds(planned, study)
    assert estimate is not None
    seconds, together = estimate
    assert seconds[1] > 3 * seconds[0]
    assert max(seconds) <= together <= sum(seconds)
    text = describe(planned, estimate)
    assert text.splitlines()[-1].startswith("4 trials, 100M tokens")


def test_slots_are_filled_in_order() -> None:
    assert _makespan([4, 1, 1, 1], slots=2) == 4
    assert _makespan([1, 1, 1], slots=1) == 3
    assert _interpolated(1, {0: 1.0, 2: 3.0}) == 2.0


def test_a_machine_without_room_for_one_trial_is_refused(write_study: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"run.cpus_per_trial.* 4096.*lower it"):
        slots(load_study(write_study(run={"cpus_per_trial": 4096})).run)
    with pytest.raises(ConfigError, match=r"run.*gpus_per_trial.*1.5.*whole number"):
        load_study(write_study(run={"gpus_per_trial": 1.5}))
    with pytest.raises(ConfigError, match="ray, local"):
        find_engine("slurm")


def test_slots_are_what_processors_memory_gpus_and_the_study_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "processors", lambda: 16)
    monkeypatch.setattr(jobs, "memory", lambda: 64 * 10**9)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert slots(Run()) == 16
    assert slots(Run(cpus_per_trial=3)) == 5
    assert slots(Run.model_validate({"memory_per_trial": "20G"})) == 3
    assert slots(Run(max_concurrent=7)) == 7
    assert slots(Run(gpus_per_trial=0.5)) == 8
    assert slots(Run(gpus_per_trial=2)) == 2
    with pytest.raises(
        ConfigError, match=r"run.memory_per_trial.* 65,000,000,000: this machine offers 64,000,000,000 bytes; lower it"
    ):
        slots(Run.model_validate({"memory_per_trial": "65G"}))


def test_a_batch_with_fewer_sequences_than_gpus_is_refused(write_study: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"run.gpus_per_trial.* 32, but a batch .* 256 has 16 sequences"):
        plan(load_study(write_study(run={"gpus_per_trial": 32})))


def test_the_longest_trials_start_first_unless_the_study_says_otherwise(write_study: Callable[..., Path]) -> None:
    budget = {"total_params": "30k", "active_params": "7k", "tolerance": "5%"}
    vary = {"budget": [budget | {"tokens": tokens} for tokens in (1024, 4096)], "seed": [0, 1]}
    planned = plan(load_study(write_study(vary=vary, rho=0.5)))
    assert [(p.trial.budget.tokens, p.trial.seed) for p in in_order(planned, Run())] == [
        (4096, 0),
        (4096, 1),
        (1024, 0),
        (1024, 1),
    ]
    assert in_order(planned, Run(priority="as-planned")) == planned


def test_a_step_too_large_to_try_has_no_estimate() -> None:
    """The published configurations are planned on machines that could never hold them."""
    study = load_study(Path(__file__).parents[2] / "sweeps" / "published" / "olmoe-1b-7b.yaml")
    planned = plan(study)
    assert estimate_seconds(planned, study) is None
    assert "cannot be estimated" in describe(planned, None)


def test_a_study_that_misses_its_flops_is_refused_before_training(write_study: Callable[..., Path]) -> None:
    budget = {"total_params": "30k", "active_params": "7k", "tokens": 4096, "tolerance": "5%", "flops_per_token": "1M"}
    with pytest.raises(
        ConfigError, match=r"`budget.flops_per_token` has the value 1,000,000, but these sizes come to \d\d,\d\d\d"
    ):
        plan(load_study(write_study(budget=budget)))


@pytest.mark.parametrize("kind", ["simplex", "slots", "density", "ladder", "memories"])
def test_what_the_named_analysis_cannot_read_is_refused_before_training_with_the_kinds_that_can(
    write_study: Callable[..., Path], kind: str
) -> None:
    study = load_study(write_study(vary={"rho": [1.0, 0.5], "seed": [0, 1]}), {"analysis": kind})
    with pytest.raises(ConfigError, match=rf"field `analysis` has the value '{kind}', .*\(`analysis: allocation`"):
        foresee(study, plan(study))


def test_memories_at_too_few_shares_for_a_curve_are_told_of_the_kind_that_compares_them(
    write_study: Callable[..., Path],
) -> None:
    shares = [{"moe": 0.5, "engram": 0.5}, {"moe": 0.5, "ngram_embedding": 0.5}]
    study = load_study(write_study(vary={"shares": shares}), {"model.ngram_embedding": {"row_dim": 4, "heads": 1}})
    assert any("`analysis: memories` reports their differences" in line for line in foresee(study, plan(study)))
    alone = load_study(write_study(vary={"rho": [1.0, 0.5]}))
    assert foresee(alone, plan(alone)) == [
        "1 of 1 curves have fewer than 4 shares, so no optimum will be fitted to them; plan 4 shares or more."
    ]
    compared = study.model_copy(update={"analysis": "memories"})
    assert not any("fewer than" in line for line in foresee(compared, plan(compared)))
