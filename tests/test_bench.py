"""What the bench measures: equal activated parameters, turns, the rows that it says, and the fields of its lines."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsemem.bench import data, measure, memory, moe, profile, step, sweep
from sparsemem.bench import eval as evaluation
from sparsemem.cli import main
from sparsemem.config import MEMORY_POOLS, Model
from sparsemem.mechanisms.hashed import Hashed
from sparsemem.mechanisms.moe.layer import MixtureOfExperts
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import initialize
from sparsemem.train.optim import Optimizer

FIELDS = {"name", "shape", "threads", "device", "dtype", "median", "low", "high", "unit"}
TINY: dict[str, Any] = {
    "rounds": 3,
    "batch": (2, 16),
    "rows": 64,
    "model": {
        **{"layers": 1, "width": 16, "heads": 2},
        "moe": {"expert_width": 8, "top_k": 8},
        "engram": {"layers": [1], "heads": 2},
        "ngram_embedding": {},
        "pkm": {"placement": "parallel", "top_m": 4, "key_dim": 4},
        "memory_plus": {"placement": "parallel", "top_m": 4, "key_dim": 4},
        "peer": {"placement": "parallel", "top_m": 4, "key_dim": 4},
        "ultramem": {"top_m": 4, "key_dim": 4, "value_dim": 8},
        "ultramem_v2": {"top_m": 4, "key_dim": 4, "value_dim": 8, "pre_value_dim": 8},
    },
}

TINY_STEP: dict[str, Any] = {
    "data": {"vocab_size": 300, "context": 16},
    "model": {
        **{"layers": 2, "width": 16, "heads": 2},
        "moe": {"expert_width": 8, "top_k": 2},
        "engram": {"layers": [2], "heads": 2},
        "ultramem_v2": {"key_dim": 4, "top_m": 4, "value_dim": 4, "pre_value_dim": 4, "init": "flat"},
    },
    "budget": {"total_params": "40k", "active_params": "9k", "tokens": "1k", "tolerance": "5%"},
    "train": {"batch_tokens": 64, "lr": 0.01},
}


@pytest.fixture(autouse=True)
def _small_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No change to the process of the other tests, and no large product for the peak."""
    monkeypatch.setattr("sparsemem.bench.prepare_process", lambda threads: None)
    monkeypatch.setattr("sparsemem.train.step.prepare_process", lambda threads: None)
    monkeypatch.setattr(measure, "SIDE", 32)


def _fixed(spent: float, log: list[str], name: str) -> Callable[[], float]:
    def contender() -> float:
        log.append(name)
        return spent * len(log)

    return contender


def test_contenders_take_turns_and_the_first_two_rounds_do_not_count() -> None:
    log: list[str] = []
    seconds = measure.take_turns({"a": _fixed(1.0, log, "a"), "b": _fixed(10.0, log, "b")}, 2)
    assert log == ["a", "b"] * 4
    assert seconds == {"a": [5.0, 7.0], "b": [60.0, 80.0]}


def test_a_measurement_holds_median_and_quartiles_of_values_and_of_the_ratios_of_each_round() -> None:
    ours, theirs = [1.0, 2.0, 4.0], [2.0, 2.0, 2.0]
    row = measure.measurement("kind/a", "quick", ours, "ms", ratio_to_b=measure.over(ours, theirs))
    assert row == {
        **{"name": "kind/a", "shape": "quick", "threads": torch.get_num_threads(), "device": "cpu", "dtype": "fp32"},
        **{"median": 2.0, "low": 1.0, "high": 4.0, "unit": "ms", "ratio_to_b": 1.0, "ratio_to_b_range": [0.5, 2.0]},
    }
    assert measure.line(row).split() == [
        "kind/a",
        "quick",
        "2",
        "[1,",
        "4]",
        "ms",
        "ratio",
        "to",
        "b",
        "1.00",
        "[0.50,",
        "2.00]",
    ]


def test_speeds_are_over_each_rival_and_the_peak_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matrix_product", lambda place: 1e-6)  # 2 x 32^3 FLOPs in it
    rows = measure.speeds(
        measure.ON_CPU, "step", "quick", 100, {"a": lambda: 0.5, "b": lambda: 0.25}, {"a": 10}, ("b", "absent"), 3
    )
    a, b, peak = rows
    assert (a["median"], a["ratio_to_b"]) == (200, 0.5)
    assert a["share_of_peak"] == pytest.approx(200 * 10 / (2 * 32**3 / 1e-6), abs=1e-4)
    assert b["median"] == 400
    assert not {"share_of_peak", "ratio_to_b", "ratio_to_absent"} & b.keys()
    assert (peak["name"], peak["median"]) == ("peak/matrix-product", pytest.approx(65.536))


@pytest.mark.parametrize("shape", memory.SHAPES)
def test_every_mechanism_activates_what_the_routed_experts_do(shape: str) -> None:
    config = Model.model_validate(memory.SHAPES[shape]["model"])
    sizes = memory.equal_sizes(config, memory.SHAPES[shape]["rows"])
    assert set(sizes) == {"moe", *MEMORY_POOLS}
    active = {pool: memory.layer_account(config, pool, each).active for pool, each in sizes.items()}
    assert list(active.values()) == pytest.approx([active["moe"]] * len(active), rel=0.01)


@pytest.mark.parametrize("pool", ["moe", *MEMORY_POOLS])
def test_the_layer_that_is_timed_holds_what_the_account_says(pool: str) -> None:
    config = Model.model_validate(TINY["model"])
    sizes = memory.equal_sizes(config, TINY["rows"])[pool]
    weights = list(memory.Layer(config, pool, sizes).parameters())
    tables = [weight for weight in weights if getattr(weight, "sparse_gradient", False)]
    active = sum(weight.numel() for weight in weights) - sum(table.numel() for table in tables)
    if pool == "moe":
        active -= (memory.ROUTED - 8) * 3 * 8 * 16  # experts beyond the top 8, three matrices of 8 x 16 each
    else:
        kind = getattr(config, pool)
        reads = len(kind.orders) * kind.heads if isinstance(MEMORY_POOLS[pool], Hashed) else kind.heads * kind.top_m
        active += reads * sum(table.shape[1] for table in tables)
    assert active == memory.layer_account(config, pool, sizes).active


@pytest.mark.parametrize("pooled", [False, True])
def test_an_update_changes_the_rows_that_were_read_and_no_other(pooled: bool) -> None:
    table = MemoryTable((40,), 4, std=0.02)
    initialize(table, seed=0)
    before_RC, rows_SM = table.rows_RC.detach().clone(), torch.randperm(40)[:12].view(4, 3)
    turn = memory._update(measure.ON_CPU, table, Optimizer(table, memory.TRAIN), rows_SM, pooled, other=torch.zeros(3))
    assert turn() > 0
    assert table.rows_RC.grad is None
    assert (table.rows_RC != before_RC).any(1).nonzero().flatten().tolist() == sorted(rows_SM.flatten().tolist())


def test_gathers_count_bytes_of_rows_and_copies_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "GATHER_READS", (4, 8))
    turns = {"pool": [4e-9] * 3, "random-read": [2e-9] * 3, "index_select": [8e-9] * 3, "copy": [1e-9] * 3}
    monkeypatch.setattr(memory, "take_turns", lambda contenders, number: {name: turns[name] for name in contenders})
    pool, read, select, copy = memory._gathers(measure.ON_CPU, rows=1000, width=2)
    assert [row["median"] for row in (pool, read, select)] == [64, 128, 32]  # 4 x 8 rows of 2 floats, 256 bytes
    assert copy["median"] == 8000  # 500 rows read, 500 written
    assert (pool["share_of_random_read"], pool["ratio_to_index_select"]) == (0.5, 2.0)


def test_bench_memory_prints_one_measurement_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "SHAPES", {"tiny": TINY})
    for name, value in {
        "UPDATE_ROWS": (50, 500),
        "UPDATE_READS": (4, 2),
        "UPDATE_ROUNDS": 3,
        "CACHE_BYTES": 1000,
    }.items():
        monkeypatch.setattr(memory, name, value)
    for name, value in {"GATHER_TABLES": ((1000, 4),), "GATHER_READS": (4, 2), "GATHER_ROUNDS": 3}.items():
        monkeypatch.setattr(memory, name, value)
    assert main(["bench", "memory", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert all(row.keys() >= FIELDS and row["low"] <= row["median"] <= row["high"] for row in rows)
    found = {(row["name"], row["shape"]): row for row in rows}
    assert {f"layer/{pool}" for pool in ("moe", *MEMORY_POOLS)} <= {name for name, _ in found}
    assert all("ratio_to_moe_range" in found[f"layer/{pool}", "tiny"] for pool in MEMORY_POOLS)
    for kind, shape in (("looked-up", "0.0005Mx8"), ("pooled", "0.0005Mx16")):
        assert all("ratio_to_small" in found[f"update/{kind}-{which}", shape] for which in ("same", "spread"))
    assert "share_of_random_read" in found["gather/pool", "0.001Mx4"]
    assert err.count("bench memory: ") == 4


@pytest.fixture
def _tiny_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (step, data, evaluation):
        monkeypatch.setattr(module, "SHAPES", {"tiny": TINY_STEP})
        monkeypatch.setattr(module, "ROUNDS", {"tiny": 3})


def test_ways_of_dispatch_compute_the_same() -> None:
    config = Model.model_validate({"layers": 1, "width": 16, "heads": 2, "moe": {"expert_width": 8, "top_k": 2}})
    layer = MixtureOfExperts(config, 5, 0)
    initialize(layer, seed=0)
    x, target = torch.randn(2, 40, 16)
    gates, experts = torch.randn(40, 5).topk(2)
    found = {}
    for name, way in moe.WAYS.items():
        inputs = [x.clone().requires_grad_(), gates.clone().requires_grad_()]
        y = way(layer, *inputs, experts)
        found[name] = [y, *torch.autograd.grad(y, [*inputs, layer.gate_up_EDF, layer.down_EFD], target)]
    for name, values in found.items():
        for value, expected in zip(values, found["loop"], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_bench_moe_prints_each_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(moe, "SHAPES", {"tiny": TINY_STEP})
    assert main(["bench", "moe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*(f"experts/{way}" for way in moe.WAYS), "peak/matrix-product"]
    assert all("share of peak" in line for line in lines[:-1])


def test_a_profile_has_the_parts_of_a_step_and_their_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "SHAPES", {"tiny": TINY_STEP})
    assert main(["bench", "profile", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows][:2] == ["part/step", "part/attention"]
    assert len(rows) == 9
    assert rows[0]["share_of_step"] == 1
    assert all(row["median"] > 0 for row in rows)


@pytest.mark.usefixtures("_tiny_steps")
def test_bench_step_goes_without_transformers_and_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["bench", "step"]) == 0
    out, err = capsys.readouterr()
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["step/moe", "step/engram", "step/ultramem_v2", "step/dense", "peak/matrix-product"]
    assert out.splitlines()[1].count("ratio to dense") == out.splitlines()[1].count("ratio to moe") == 1
    assert "share of peak" in out
    assert "transformers is not installed" in err


@pytest.mark.usefixtures("_tiny_steps")
def test_bench_data_gives_shares_of_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(data, "TEXT_BYTES", 1000)
    monkeypatch.setattr(data, "TEXT_TOKENS", 1000)
    assert main(["bench", "data", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["data/batch", "data/hash", "data/tokenise"]
    assert all(row.keys() >= {*FIELDS, "share_of_step"} and row["median"] > 0 for row in rows)


@pytest.mark.usefixtures("_tiny_steps")
def test_bench_eval_compares_each_model_with_its_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 64)
    assert main(["bench", "eval", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [f"eval/{name}" for name in step.SHARES]
    assert all(row.keys() >= {*FIELDS, "ratio_to_training"} for row in rows)


def test_overhead_is_from_an_end_to_the_next_first_step_and_busy_what_lies_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots: trials from 0 to 10 and 0 to 12, then from 11 to 20 and from 14 to 20."""
    starts: dict[str, float] = {}

    def trained(*arguments: Any, **keywords: Any) -> Any:
        for name, (start, end) in {"a": (0, 10), "b": (0, 12), "c": (11, 20), "d": (14, 20)}.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "result.json").touch()
            os.utime(tmp_path / name / "result.json", (end, end))
            starts[name] = start
        return SimpleNamespace(trial_folder=lambda id_: tmp_path / id_)

    monkeypatch.setattr(sweep, "slots", lambda run: 2)
    monkeypatch.setattr(sweep, "measure_step", lambda *_, **__: 0.1)
    monkeypatch.setattr(sweep, "run_study", trained)
    monkeypatch.setattr(sweep, "_starts", lambda results: contextlib.nullcontext(starts))
    gaps, busy = sweep._trained(tmp_path / "study", "local", 3.0, 2)
    assert gaps == [1.0, 2.0]
    assert busy == pytest.approx((10 + 12 + 9 + 6) / 40)


def test_a_finished_study_of_the_bench_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ROUNDS", 2)
    assert len(sweep._resumed(sweep._write(tmp_path, {**sweep.HALF, "seed": [0, 1]}, 10_000))) == 2
