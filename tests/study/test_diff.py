"""What an edited study keeps, adds and leaves behind is known before it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsemem import Study
from sparsemem.cli import main
from sparsemem.config import load_study
from sparsemem.study.display.diff import describe_diff, diff
from sparsemem.study.plan import plan


def half_trained(folder: Path) -> None:
    (folder / "curve.csv").write_text("step,tokens,seconds\n8,2048,1.5\n", encoding="utf-8")


@pytest.fixture
def runs(write_study: Callable[..., Path], engine: Any, tmp_path: Path) -> Path:
    """Results of the tiny study: two trials finished, the third (rho 0) trained by half."""
    engine.outcomes[2] = half_trained
    Study.from_yaml(write_study()).run(results=tmp_path / "runs", engine="local")
    return tmp_path / "runs"


def compared(path: Path, folder: Path) -> dict[str, Any]:
    study = load_study(path)
    return diff(study, plan(study), folder)


def test_an_unchanged_study_keeps_all_it_has(write_study: Callable[..., Path], runs: Path) -> None:
    found = compared(write_study(), runs / "tiny")
    assert [(trial["rho"], trial["state"], trial["done"]) for trial in found["trials"]] == [
        (1.0, "finished", 1.0),
        (0.5, "finished", 1.0),
        (0.0, "partly trained", 0.5),
    ]
    assert found["study"] == {}
    assert describe_diff(found).splitlines()[-1] == f"{runs / 'tiny'}: 2 finished, 1 partly trained"


def test_an_edited_study_says_in_what_its_new_trials_differ_and_agrees_with_what_run_then_does(
    write_study: Callable[..., Path], runs: Path, engine: Any
) -> None:
    path = write_study(vary={"rho": [1.0, 0.25], "train.lr": [0.01, 0.02]}, run={"max_failures": 7})
    found = compared(path, runs / "tiny")
    assert [(trial["rho"], trial["train.lr"], trial["state"]) for trial in found["trials"]] == [
        (1.0, 0.01, "finished"),
        (1.0, 0.02, "new"),
        (0.25, 0.01, "new"),
        (0.25, 0.02, "new"),
        (0.5, 0.01, "no longer planned"),
        (0.0, 0.01, "no longer planned"),
    ]
    by_point = {(trial["rho"], trial["train.lr"]): trial for trial in found["trials"]}
    assert by_point[1.0, 0.02]["changes"] == {"train.lr": (0.01, 0.02)}
    assert by_point[1.0, 0.02]["nearest"] == by_point[1.0, 0.01]["trial_id"]
    assert set(by_point[0.25, 0.02]["changes"]) == {"rho", "train.lr"}
    assert found["study"]["run.max_failures"] == (2, 7)
    assert "vary.train.lr" in found["study"]
    assert "train.lr 0.01 -> 0.02 (than " in describe_diff(found)

    engine.ran.clear()
    Study.from_yaml(path).run(results=runs, engine="local")
    assert engine.ran == [trial["trial_id"] for trial in found["trials"] if trial["state"] == "new"]


def test_the_command_prints_it_in_words_and_as_json(
    write_study: Callable[..., Path], runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(vary={"rho": [0.5]})
    monkeypatch.chdir(runs.parent)
    assert main(["plan", str(path), "--diff"]) == 0  # in runs/tiny, without being told
    assert "1 finished, 2 no longer planned" in capsys.readouterr().out
    assert main(["plan", str(path), "--json", "--diff", str(runs / "tiny")]) == 0
    states = [trial["state"] for trial in json.loads(capsys.readouterr().out)["diff"]["trials"]]
    assert states == ["finished", "no longer planned", "no longer planned"]


def test_no_results_are_named_as_such(
    write_study: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["plan", str(write_study()), "--diff", str(tmp_path)]) == 2
    assert f"--diff needs the results of a study, and {tmp_path} holds none" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["plan", str(write_study()), "--diff"]) == 2
    words = (
        "tiny has not been run yet: runs/tiny and results/tiny hold none; train it by `sparsemem run`, leave out --diff"
    )
    assert words in capsys.readouterr().err


def test_a_damaged_description_is_no_candidate(write_study: Callable[..., Path], runs: Path) -> None:
    for path in (runs / "tiny").glob("trials/*/trial.yaml"):
        path.write_text("half: [", encoding="utf-8")
    found = compared(write_study(vary={"rho": [0.25]}), runs / "tiny")
    assert [trial["state"] for trial in found["trials"]] == ["new", *["no longer planned"] * 3]
    assert "changes" not in found["trials"][0]
    assert describe_diff(found)
