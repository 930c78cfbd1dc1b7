"""Which models a study keeps, what its plan says of their size, and what becomes of those it did not keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemem import load_model
from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, Run, load_study
from sparsemem.study import launch
from sparsemem.study.engines.worker import run_job
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.pack import pack_study
from sparsemem.study.tune import study as tune
from sparsemem.trial_files import MODEL, MODEL_FILES, PACK, RECORDS

from .conftest import TINY

Write = Callable[..., Path]


def run(file: Path, said: list[str] | None = None) -> Ledger:
    return run_study(load_study(file), file.parent, file.parent / "runs", say=(said if said is not None else []).append)


SHORT = TINY["budget"] | {"tokens": 512}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An engine that trains in this process; returns the ids that it has trained."""
    ran: list[str] = []

    def train(jobs: Sequence[Job], run: Run) -> None:
        for job in jobs:
            ran.append(job.trial_folder.name)
            run_job(job, run)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(launch, "find_engine", lambda name, address: train)
    monkeypatch.setattr("sparsemem.api._report", lambda folder, say: None)
    return ran


def kept_in(ledger: Ledger) -> list[Any]:
    return [row["rho"] for row in ledger.rows if (ledger.trial_folder(row["trial_id"]) / MODEL).exists()]


# --- which ------------------------------------------------------------------------------------------------------------


def test_models_are_kept_as_the_study_says_and_nothing_else_changes(write_study: Write, here: list[str]) -> None:
    ledger = run(write_study(budget=SHORT, vary={"rho": [1.0, 0.5]}, run={"keep_models": [0.5]}))
    assert kept_in(ledger) == [0.5]
    assert load_study(ledger.folder / "study.yaml").run.keep_models == (0.5,)
    half = next(row["trial_id"] for row in ledger.rows if row["rho"] == 0.5)
    model = load_model(ledger.trial_folder(half))
    assert model.val_loss == ledger.state(half).result["val_loss"]
    assert {path.name for path in ledger.trial_folder(half).iterdir()} == {*RECORDS, *MODEL_FILES, "lock"}
    assert str(Path.home()) not in (ledger.trial_folder(half) / "config.json").read_text()
    pack_study(ledger.folder, lambda line: None)
    assert {path.name for path in ledger.trial_folder(half).iterdir()} == set(MODEL_FILES)
    assert load_model(ledger.trial_folder(half)).val_loss == model.val_loss


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (True, [1.0, 0.5, None]),
        (False, []),
        (["50%", 1], [1.0, 0.5]),
        (["dense"], [None]),
        (lambda ids: [ids[1]], [0.5]),
    ],
)
def test_trials_are_named_by_share_or_id(write_study: Write, keep: Any, kept: list[Any]) -> None:
    vary = {"rho": [1.0, 0.5, "dense"]}
    if callable(keep):
        keep = keep([trial.id for trial in load_study(write_study(vary=vary)).trials()])
    study = load_study(write_study(vary=vary, run={"keep_models": keep}))
    assert [trial.rho for trial in study.trials() if study.run.keeps(trial)] == kept


def test_an_id_of_digits_alone_is_an_id() -> None:
    assert Run.model_validate(yaml.safe_load("keep_models: [123456789012]")).keep_models == ("123456789012",)


def test_what_is_kept_is_no_part_of_a_trials_identity(write_study: Write) -> None:
    ids = [trial.id for trial in load_study(write_study()).trials()]
    assert [trial.id for trial in load_study(write_study(run={"keep_models": True})).trials()] == ids


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("yes please", "write true, false, or a list of shares"),
        ([], "write true, false, or a list of shares"),
        (0.5, "write true, false, or a list of shares"),
        ([1.5], "1.5 names no trial"),
        (["abc"], "'abc' names no trial"),
        ([True], "True names no trial"),
    ],
)
def test_what_names_no_trial_is_refused_by_its_field(write_study: Write, keep: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=r"field `run\.keep_models` has the value") as refused:
        load_study(write_study(run={"keep_models": keep}))
    assert said in str(refused.value)


@pytest.mark.parametrize("keep", [[0.25], ["0123456789ab"], ["dense"]])
def test_a_share_or_id_of_no_trial_is_refused_before_anything_is_written(
    write_study: Write, engine: Any, keep: Any
) -> None:
    file = write_study(run={"keep_models": keep})
    with pytest.raises(ConfigError, match=r"which no trial of this study has; its shares are 1, 0\.5, 0, and"):
        run(file)
    assert main(["plan", str(file)]) == 2
    assert not (file.parent / "runs").exists()


def test_a_search_may_yet_come_to_the_share(write_study: Write, engine: Any) -> None:
    file = write_study(vary={"rho": {"search": "optimum", "tolerance": 0.3, "seeds": 2}}, run={"keep_models": [0.34]})
    study = load_study(file)
    launch.check_kept(study, study.trials())


def test_tuning_keeps_no_model(write_study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def workers(run: Run) -> None:
        raise Seen(run.keep_models)

    monkeypatch.setattr(tune, "Workers", workers)
    file = write_study(run={"keep_models": True}, tune={"search": {"train.lr": {"choices": [0.01, 0.02]}}})
    with pytest.raises(Seen, match="False"):
        tune.tune_study(load_study(file), file.parent, file.parent / "runs")


# --- how large --------------------------------------------------------------------------------------------------------


def test_the_plan_says_how_large_they_are(
    write_study: Write, here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study(budget=SHORT, vary={"rho": [1.0, 0.5]}, run={"keep_models": [1.0]})
    ledger = run(file)
    written = sum(path.stat().st_size for path in ledger.folder.rglob(MODEL))
    assert main(["plan", str(file), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["kept_models"]
    assert planned["models"] == 1
    assert planned["bytes"] == planned["largest_bytes"] == pytest.approx(written, rel=0.1)
    assert main(["plan", str(file)]) == 0
    assert f"models kept: 1 of 2, {planned['bytes'] / 1e3:.4g} kB" in capsys.readouterr().out
    assert main(["plan", str(write_study())]) == 0
    assert "models kept" not in capsys.readouterr().out


# --- too late ---------------------------------------------------------------------------------------------------------


def test_a_trial_that_was_finished_before_is_not_trained_again_until_its_result_is_removed(
    write_study: Write, here: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = run(write_study(budget=SHORT, vary={"rho": [0.5]}))
    (id_,) = here
    result = ledger.state(id_).result
    said: list[str] = []
    file = write_study(budget=SHORT, vary={"rho": [0.5]}, run={"keep_models": True})
    run(file, said)
    assert here == [id_]
    assert f"1 trial finished before `run.keep_models` named them, so without a model: {id_}; they are not" in str(said)
    (line,) = [line for line in said if "rm " in line]
    monkeypatch.chdir(file.parent)
    main(["plan", str(file)])
    assert f"rm runs/tiny/trials/{id_}/result.json; then run the study" in capsys.readouterr().err
    Path(line.partition("rm ")[2].partition(";")[0]).unlink()  # what it says to type
    again = run(file, said := [])
    assert here == [id_, id_]
    assert again.state(id_).result["val_loss"] == result["val_loss"]
    assert load_model(again.trial_folder(id_)).val_loss == result["val_loss"]
    assert not any("rm " in line for line in said)


def test_of_packed_trials_it_says_another_way(write_study: Write, engine: Any) -> None:
    pack_study(run(write_study()).folder, lambda line: None)
    said: list[str] = []
    run(write_study(run={"keep_models": True}), said)
    assert not any("rm " in line for line in said)
    assert f"3 trials of these in {PACK}: run the study with --results and another folder" in str(said)
