"""Both engines with real processes; what they survive is in `tests/faults`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import Driver, table

from sparsemem.cli import main

both_engines = pytest.mark.parametrize("engine", ["local", "ray"])


@both_engines
def test_a_study_runs_and_prints_its_trials(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path, engine: str
) -> None:
    code, out, err = start(write_study(vary={"rho": [1.0, 0.0]}), engine, tmp_path / "runs").end()
    assert code == 0, err
    assert out.splitlines()[0].split()[:2] == ["trial", "rho"]
    assert "2 of 2 trials done" in err
    assert str(tmp_path / "runs" / "tiny" / "report.html") in out
    assert (tmp_path / "runs" / "tiny" / "report.html").exists()
    assert [row["status"] for row in table(tmp_path / "runs" / "tiny")] == ["finished"] * 2


def test_a_ray_that_does_not_start_is_said_and_nothing_is_lost(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def time_out(**arguments: Any) -> None:
        raise Exception("the node timed out")

    monkeypatch.setattr("ray.init", time_out)
    results = tmp_path / "runs"
    assert main(["run", str(write_study()), "--results", str(results)]) == 1
    assert "Ray did not start (the node timed out); run again" in capsys.readouterr().err
    assert {row["status"] for row in table(results / "tiny")} == {"pending"}


@pytest.mark.slow
@both_engines
def test_a_trial_that_keeps_failing_is_reported_and_the_others_finish(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path, engine: str
) -> None:
    study, runs = write_study(run={"max_failures": 1}), tmp_path / "runs"
    driver = start(study, engine, runs)
    _, trial = driver.training()
    (trial / "result.json").mkdir()  # a result can be written nowhere
    code, out, err = driver.end()
    assert code == 1
    assert "failed" in out
    assert f"trial {trial.name} failed:" in err
    assert sorted(row["status"] for row in table(runs / "tiny")) == ["failed", "finished", "finished"]
    (trial / "result.json").rmdir()
    assert start(study, engine, runs).end()[0] == 0
    assert [row["status"] for row in table(runs / "tiny")] == ["finished"] * 3


@pytest.mark.slow
def test_a_study_begun_with_one_engine_is_ended_with_the_other(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    assert start(write_study(vary={"rho": [1.0]}), "local", runs).end()[0] == 0
    first = table(runs / "tiny")
    study = write_study(vary={"rho": [1.0, 0.5]})
    assert start(study, "ray", runs).end()[0] == 0
    (alone,), both = first, table(runs / "tiny")
    assert {name: both[0][name] for name in alone} == alone  # the wider study has a column more: the memory's share
    assert both[0].keys() - alone.keys() <= {"share_engram"}
    assert len(yaml.safe_load((runs / "tiny" / "study.yaml").read_text())["provenance"]["data"]) == 1
