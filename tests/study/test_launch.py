"""What a user relies on when a study is run, run again, extended, or refused; with an engine that does not train."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemem.api import run_study
from sparsemem.config import ConfigError, load_study
from sparsemem.failure import record_failure
from sparsemem.study import launch
from sparsemem.study.display.progress import look, overview
from sparsemem.study.display.watch import trial_log
from sparsemem.study.ledger import Ledger, study_lock


def run(file: Path, remarks: list[str] | None = None) -> Ledger:
    said: list[str] = [] if remarks is None else remarks
    return run_study(load_study(file), file.parent, file.parent / "runs", say=said.append)


def rows(file: Path) -> list[dict[str, str]]:
    with open(file.parent / "runs" / "tiny" / "trials.csv", newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_the_files_that_a_reader_expects(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    folder = run(file).folder
    assert [row["status"] for row in rows(file)] == ["finished"] * 3
    assert [row["rho"] for row in rows(file)] == ["1.0", "0.5", "0.0"]
    assert json.loads((folder / "data.json").read_text())["corpus"] == "files"
    kept = yaml.safe_load((folder / "study.yaml").read_text())
    assert {"sparsemem", "python", "torch", "ray", "platform", "git_commit", "git_dirty", "started", "data"} == set(
        kept["provenance"]
    )
    assert load_study(folder / "study.yaml") == load_study(file)
    for id_ in engine.ran:
        assert (folder / "trials" / id_ / "trial.yaml").exists()
    text = (folder / "study.yaml").read_text() + (folder / "data.json").read_text()
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_winners_and_searches_are_kept_with_the_study(
    write_study: Callable[..., Path], engine: Any, tmp_path: Path
) -> None:
    winners = [
        {"at": {"rho": rho}, "values": {"train.lr": lr, "train.warmup": lr}}
        for rho, lr in ((1.0, 0.02), (0.5, 0.03), (0.0, 0.03))
    ]
    (tmp_path / "winners.yaml").write_text(yaml.safe_dump({"study": "tiny", "winners": winners}))
    tune = {"search": {"train.lr": {"low": 0.001, "high": 0.1}, "train.schedule": {"choices": ["wsd"]}}, "per": ["rho"]}
    file = write_study(tune=tune, tuned="winners.yaml")
    (tmp_path / "runs" / "tiny" / "tune").mkdir(parents=True)  # a search came first
    folder = run(file).folder
    assert load_study(folder / "study.yaml") == load_study(file)
    assert [(row["train.lr"], row["tuned.train.warmup"]) for row in rows(file)] == [
        ("0.02", "0.02"),
        ("0.03", "0.03"),
        ("0.03", "0.03"),
    ]
    from analysis import load_trials, split_cells

    (cell,) = split_cells(load_trials(folder))  # each share has its own rate and warmup, and all are one curve
    assert cell.trials["rho"].tolist() == [1.0, 0.5, 0.0]


def test_a_driver_is_refused_whose_study_another_began_after_it_had_looked(
    write_study: Callable[..., Path], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study()
    prepare, folder = launch.prepare_corpora, file.parent / "runs" / "tiny"
    with ExitStack() as held:

        def meanwhile(*arguments: Any) -> Any:
            folder.mkdir(parents=True)
            held.enter_context(study_lock(folder))
            return prepare(*arguments)

        monkeypatch.setattr(launch, "prepare_corpora", meanwhile)
        with pytest.raises(ConfigError, match="is being run by process"):
            run(file)
    assert not (folder / "study.yaml").exists()


def test_running_again_trains_nothing_and_changes_nothing(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    before = files(run(file).folder)
    assert files(run(file).folder) == before
    assert len(engine.ran) == 3


def test_a_study_is_extended_by_editing_its_file(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    run(file)
    old = {row["trial_id"]: row for row in rows(file)}
    run(write_study(vary={"rho": [1.0, 0.7, 0.5, 0.0]}))
    assert len(engine.ran) == 4
    assert [row["rho"] for row in rows(file)] == ["1.0", "0.7", "0.5", "0.0"]
    assert all(old[row["trial_id"]] == row for row in rows(file) if row["trial_id"] in old)


def test_a_trial_that_is_no_longer_planned_keeps_its_folder(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    run(file)
    ledger = run(write_study(vary={"rho": [0.5]}))
    assert len(rows(file)) == 1
    assert len(list((ledger.folder / "trials").iterdir())) == 3


@pytest.mark.parametrize("damage", ["", '{"trial_id"', "[]", '{"trial_id": "0", "status": "finished"}', "NaN"])
def test_a_damaged_result_is_named_set_aside_and_its_trial_run_again(
    write_study: Callable[..., Path], engine: Any, damage: str
) -> None:
    file, said = write_study(), list[str]()
    folder = run(file).folder
    expected = rows(file)
    victim = folder / "trials" / engine.ran[1]
    (victim / "result.json").write_text(damage)
    assert Ledger.read(folder).counts() == {"finished": 2, "pending": 1}
    run(file, said)
    assert engine.ran[3:] == [victim.name]
    assert (victim / "result.json.corrupt-1").read_text() == damage
    assert any(str(victim / "result.json") in line and "corrupt-1" in line for line in said)
    assert rows(file) == expected


def test_a_result_without_a_finite_loss_is_damaged(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    engine.outcomes[0] = lambda folder: engine.finish(folder, val_loss=float("nan"))
    folder = run(file).folder
    run(file)
    assert engine.ran[3:] == engine.ran[:1]
    assert (folder / "trials" / engine.ran[0] / "result.json.corrupt-1").exists()


def test_a_damaged_description_is_written_again(write_study: Callable[..., Path], engine: Any) -> None:
    file, said = write_study(), list[str]()
    engine.outcomes[0] = lambda folder: record_failure(folder, "boo")
    folder = run(file).folder
    victim = folder / "trials" / engine.ran[0] / "trial.yaml"
    whole = victim.read_text()
    victim.write_text(whole[:40])
    run(file, said)
    assert victim.read_text() == whole
    assert any(str(victim) in line for line in said)


def test_states_are_told_apart(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study(vary={"rho": [1.0, 0.8, 0.6, 0.4, 0.2]})
    engine.outcomes = {
        0: lambda folder: engine.finish(folder, status="diverged", val_loss=99.0, why="it left"),
        1: lambda folder: record_failure(folder, "boo"),
        2: lambda folder: record_failure(folder, "too large", "out_of_memory"),
        3: lambda folder: (folder / "curve.csv").touch(),
        4: lambda folder: None,
    }
    ledger = run(file)
    assert [row["status"] for row in rows(file)] == ["diverged", "failed", "out_of_memory", "interrupted", "pending"]
    assert all(row["val_loss"] == "" for row in rows(file))
    assert [ledger.state(id_).message for id_ in engine.ran[:2]] == ["it left", "boo"]
    assert "it left" in overview(look(ledger))
    assert trial_log(ledger.folder, engine.ran[0]) == "diverged: it left"
    assert ledger.unfinished() == engine.ran[1:]
    engine.outcomes.clear()
    run(file)
    assert [row["status"] for row in rows(file)] == ["diverged"] + ["finished"] * 4


def test_a_pending_trial_is_looked_at_again_once_its_process_has_begun(
    write_study: Callable[..., Path], engine: Any
) -> None:
    file = write_study(vary={"rho": [0.5]})
    engine.outcomes[0] = lambda folder: None
    ledger = run(file)
    folder = ledger.trial_folder(engine.ran[0])
    os.utime(folder, (0, 0))  # long ago: from here on, a folder that has not changed is not read
    assert [ledger.counts(), ledger.counts()] == [{"pending": 1}] * 2
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ledger.counts() == {"running": 1}
    engine.finish(folder)
    assert ledger.counts() == {"finished": 1}


def test_a_folder_of_another_study_is_refused(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    run(file)
    (file.parent / "runs" / "tiny").rename(file.parent / "runs" / "other")
    with pytest.raises(ConfigError, match=r"holds the study 'tiny', not 'other'"):
        run(write_study("other.yaml", study="other"))
    study = load_study(write_study("inner.yaml", study="inner"))
    with pytest.raises(ConfigError, match=r"holds the study 'tiny', so it cannot hold the results of 'inner'"):
        run_study(study, file.parent, file.parent / "runs" / "other")
    (file.parent / "runs" / "tiny").mkdir()
    (file.parent / "runs" / "tiny" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="exists and holds no study"):
        run(file)


def test_what_is_refused_writes_nothing(write_study: Callable[..., Path], engine: Any, tmp_path: Path) -> None:
    for fields in (
        {"budget": {"total_params": "30k", "active_params": "2k", "tokens": 4096}},
        {"data": {"corpus": "files", "files": ["nothing/*.txt"], "vocab_size": 300, "context": 16}},
        {"run": {"cpus_per_trial": 4096}},
    ):
        with pytest.raises(ConfigError):
            run(write_study(**fields))
    assert not (tmp_path / "runs").exists()


def test_a_second_driver_is_refused_and_names_the_first(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    folder = run(file).folder
    with study_lock(folder), pytest.raises(ConfigError, match=rf"run by process {os.getpid()} on "):
        run(file)
    run(file)


def test_the_lock_of_a_killed_driver_is_free(tmp_path: Path) -> None:
    hold = "import sys, time, pathlib; from sparsemem.study.ledger import study_lock\n"
    hold += "with study_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(ConfigError, match=str(process.pid)), study_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with study_lock(tmp_path):
        pass


def test_an_interrupted_run_brings_the_table_up_to_date(write_study: Callable[..., Path], engine: Any) -> None:
    def interrupt(folder: Path) -> Any:
        (folder / "curve.csv").touch()
        raise KeyboardInterrupt

    file = write_study()
    engine.outcomes[1] = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(file)
    assert [row["status"] for row in rows(file)] == ["finished", "interrupted", "pending"]


def test_trials_may_vary_the_text_that_they_read(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study(vary={"rho": [1.0], "data.vocab_size": [300, 320]})
    folder = run(file).folder
    provenance = yaml.safe_load((folder / "study.yaml").read_text())["provenance"]
    assert len({entry["digest"] for entry in provenance["data"]}) == 2
    assert len(list(folder.glob("data*.json"))) == 2


def test_a_ledger_is_read_back_as_it_was_written(write_study: Callable[..., Path], engine: Any) -> None:
    file = write_study()
    folder = run(file).folder
    before = files(folder)
    Ledger.read(folder).write_table()
    assert files(folder) == before
    with pytest.raises(ConfigError, match="it holds those of tiny"):
        Ledger.read(folder.parent)
