"""A study's trials in one file: every command finds in it what it found in folders, and no moment is a bad one to be
killed in.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import analysis.__main__
from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, load_study
from sparsemem.files import set_aside
from sparsemem.study import loggers
from sparsemem.study.display.diff import diff
from sparsemem.study.display.progress import look, overview
from sparsemem.study.ledger import Ledger, study_lock
from sparsemem.study.ledger.pack import pack_study
from sparsemem.study.plan import plan
from sparsemem.study.remote.exchange import Driver
from sparsemem.study.remote.storage import Storage
from sparsemem.trial_files import PACK, Records, TrialFiles, read_pack

from .conftest import finish

CURVE = "step,tokens,train_loss,val_loss\n8,2048,5.25,\n16,4096,5.125,5.3000000000000007\n"


def _train(folder: Path) -> None:
    (folder / "curve.csv").write_text(CURVE, encoding="utf-8")
    finish(folder)


def _fail(folder: Path) -> None:
    (folder / "failure.json").write_text('{"status": "failed", "message": "boo", "traceback": ""}', encoding="utf-8")


def _diverge(folder: Path) -> None:
    (folder / "curve.csv").write_text(CURVE, encoding="utf-8")
    result = {"trial_id": folder.name, "status": "diverged", "why": "the loss of step 7 is nan"}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _run(file: Path) -> Ledger:
    return run_study(load_study(file), file.parent, file.parent / "runs", say=lambda line: None)


def _pack(folder: Path, said: list[str] | None = None) -> str:
    return pack_study(folder, (said if said is not None else []).append)


def _records(folder: Path) -> Records:
    """What the folders hold, read without the reader under test."""
    return {
        own.name: {path.name: path.read_bytes() for path in own.iterdir() if path.name != "lock"}
        for own in (folder / "trials").iterdir()
    }


@pytest.fixture
def folder(write_study: Callable[..., Path], engine: Any) -> Path:
    """Results of the tiny study; its last trial diverged."""
    engine.outcomes = {0: _train, 1: _train, 2: _diverge}
    return _run(write_study()).folder


def _shown(folder: Path, file: Path) -> list[Any]:
    """What status, plan --diff, trials.csv and each trial's files say."""
    study, ledger = load_study(file), Ledger.read(folder)
    files = {
        id_: {name: ledger.files.read(id_, name) for name in ("trial.yaml", "curve.csv")}
        for id_ in ledger.files.begun()
    }
    return [overview(look(ledger)), diff(study, plan(study), folder), ledger.table(), files, ledger.counts()]


# --- both forms -------------------------------------------------------------------------------------------------------


def test_commands_find_in_a_pack_what_they_found_in_folders(
    folder: Path, write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edited = write_study("edited.yaml", vary={"rho": [1.0, 0.5], "train.lr": [0.01, 0.02]})
    before, records = _shown(folder, edited), _records(folder)
    assert main(["pack", str(folder)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / PACK}: 11 files of 3 trials, ")
    assert not (folder / "trials").exists()
    assert TrialFiles(folder).packed == records
    assert _shown(folder, edited) == before
    assert main(["status", str(folder), "--log", engine.ran[2]]) == 0
    assert capsys.readouterr().out == "diverged: the loss of step 7 is nan\n"


def test_a_packed_study_is_extended_by_folders_which_a_second_packing_adds(
    folder: Path, write_study: Callable[..., Path], engine: Any
) -> None:
    _pack(folder)
    first, ran = (folder / PACK).read_bytes(), list(engine.ran)
    ledger = _run(write_study(vary={"rho": [1.0, 0.5, 0.0, 0.25]}))
    (new,) = engine.ran[len(ran) :]
    assert [path.name for path in (folder / "trials").iterdir()] == [new]
    assert ledger.counts() == {"finished": 3, "diverged": 1}
    assert (folder / PACK).read_bytes() == first
    records = {**TrialFiles(folder).packed, **_records(folder)}
    assert "1 trials, " in _pack(folder)
    assert TrialFiles(folder).packed == records
    assert len(records) == 4
    _run(write_study(vary={"rho": [1.0, 0.5, 0.0, 0.25]}))
    assert len(engine.ran) == len(ran) + 1


def test_packing_again_leaves_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "tiny"
    for path in sorted((path for path in folder.rglob("*") if path.is_file()), reverse=True):
        (other / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, other / path.relative_to(folder))
    _pack(folder)
    _pack(other)
    once = (folder / PACK).read_bytes()
    assert (other / PACK).read_bytes() == once
    assert "holds all 3 finished trials already" in _pack(folder)
    assert (folder / PACK).read_bytes() == once


def test_trackers_are_told_of_packed_trials(
    folder: Path, write_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    class Tracker:
        def __init__(self, trial: Any) -> None:
            pass

        def rows(self, rows: Any) -> None:
            told.append(rows[-1][1]["train_loss"])

        def end(self, status: str, step: int, numbers: dict[str, float]) -> None:
            told.append(status)

    monkeypatch.setitem(loggers.TRACKERS, "tensorboard", Tracker)
    _pack(folder)
    planned = plan(load_study(write_study()))
    ledger = Ledger(folder, [p.row() for p in planned])
    loggers._Follower("tensorboard", ledger, {p.trial.id: p.trial for p in planned}).look(last=True)
    assert told == [5.125, "finished", 5.125, "finished", 5.125, "diverged"]


def test_a_storage_gets_the_folders_of_packed_trials(folder: Path, tmp_path: Path) -> None:
    records, shared = _records(folder), tmp_path / "shared"
    shared.mkdir()
    _pack(folder)
    storage = Storage(str(shared), "tiny")
    storage.create()
    Driver(storage, Ledger.read(folder)).send([], {}, lambda line: None)
    assert _records(shared / "tiny") == records
    (shared / "tiny" / "driver.json").touch()
    with pytest.raises(ConfigError, match="is the study's place in a storage"):
        _pack(shared / "tiny")


# --- what is left alone, and what is refused --------------------------------------------------------------------------


def test_only_what_ended_is_packed_and_the_rest_is_named(write_study: Callable[..., Path], engine: Any) -> None:
    engine.outcomes = {0: _train, 1: _fail, 2: lambda folder: None}
    folder = _run(write_study()).folder
    (folder / "trials" / engine.ran[0] / "log.txt").write_text("said")
    said: list[str] = []
    _pack(folder, said)
    assert said == [f"{folder}: 1 failed, 1 pending: not packed; {engine.ran[1]}, {engine.ran[2]}"]
    assert set(TrialFiles(folder).packed) == {engine.ran[0]}
    assert {path.name for path in (folder / "trials" / engine.ran[0]).iterdir()} == {"log.txt"}
    assert (folder / "trials" / engine.ran[1] / "failure.json").exists()
    engine.outcomes = {}
    assert _run(write_study()).counts() == {"finished": 3}
    assert len(engine.ran) == 5


def test_a_study_without_a_finished_trial_is_refused(write_study: Callable[..., Path], engine: Any) -> None:
    engine.outcomes = dict.fromkeys(range(3), _fail)
    with pytest.raises(ConfigError, match="none of its trials is finished, so there is nothing to pack"):
        _pack(_run(write_study()).folder)


@pytest.mark.parametrize("lock", ["", "trials/{0}"])
def test_a_study_that_is_being_run_is_refused(
    folder: Path, lock: str, engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _records(folder)
    with study_lock(folder / lock.format(engine.ran[0])):
        assert main(["pack", str(folder)]) == 2
    assert f"{folder / lock.format(engine.ran[0])}: is being" in capsys.readouterr().err
    assert _records(folder) == before
    assert not (folder / PACK).exists()


def test_a_folder_that_may_not_be_written_is_named_with_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path, wait: bool) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("sparsemem.study.ledger.locked", refused)
    assert main(["pack", str(folder)]) == 1
    said = capsys.readouterr().err
    assert (
        f"Permission denied: '{folder / 'lock'}'; what was finished is kept; this user must be let write there" in said
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(CURVE[:-25].encode(), "is cut off or empty"), (b"", "is cut off or empty"), (b"step\n\xff\n", "cannot be read")],
)
def test_a_damaged_file_is_not_packed(folder: Path, engine: Any, content: bytes, message: str) -> None:
    path = folder / "trials" / engine.ran[1] / "curve.csv"
    path.write_bytes(content)
    before = _records(folder)
    with pytest.raises(ConfigError, match=f"{engine.ran[1]}/curve.csv: {message}"):
        _pack(folder)
    assert _records(folder) == before
    assert not (folder / PACK).exists()


def test_an_empty_description_is_not_packed(folder: Path, engine: Any) -> None:
    (folder / "trials" / engine.ran[1] / "trial.yaml").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{engine.ran[1]}/trial.yaml: is cut off or empty"):
        _pack(folder)
    assert not (folder / PACK).exists()


def test_another_file_than_that_in_the_pack_is_refused(folder: Path, engine: Any) -> None:
    kept = folder.parent / "kept"
    shutil.copytree(folder / "trials", kept)
    _pack(folder)
    shutil.copytree(kept, folder / "trials")
    assert "holds all 3" in _pack(folder)  # a merge brought them back
    assert not (folder / "trials").exists()
    shutil.copytree(kept, folder / "trials")
    (folder / "trials" / engine.ran[0] / "curve.csv").write_text(CURVE.replace("5.125", "5.1"))
    with pytest.raises(
        ConfigError, match=rf"{engine.ran[0]}/curve.csv: is another file than that of this trial in {PACK}"
    ):
        _pack(folder)
    assert len(_records(folder)) == 3


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda raw: b"", lambda raw: raw[:-40], lambda raw: raw[:300] + b"?" + raw[301:], lambda raw: b"text\n"]
)
def test_a_damaged_pack_is_refused_by_name(
    folder: Path,
    write_study: Callable[..., Path],
    engine: Any,
    damage: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    _pack(folder)
    path, ran = folder / PACK, len(engine.ran)
    path.write_bytes(damage(path.read_bytes()))
    left, file = path.read_bytes(), str(write_study())
    for command in (
        ["pack", str(folder)],
        ["status", str(folder)],
        ["report", str(folder)],
        ["plan", file, "--diff", str(folder)],
        ["run", file, "--results", str(folder.parent)],
    ):
        assert main(command) == 2, command
        said = capsys.readouterr().err
        assert f"{path}: is damaged (" in said, command
        assert f"`git checkout -- {path}`" in said
    assert analysis.__main__.main([str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: is damaged (")
    assert len(engine.ran) == ran
    assert path.read_bytes() == left


def test_no_damaged_byte_changes_what_is_read(folder: Path, tmp_path: Path) -> None:
    _pack(folder)
    raw, records, path = (folder / PACK).read_bytes(), TrialFiles(folder).packed, tmp_path / PACK
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")  # from here on the sizes, of which one says 3 rows
    flips = [(place, 1 << place % 8) for place in range(0, end, 9)] + [(place, 2) for place in range(end, len(raw))]
    refused = 0
    for place, bit in flips:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
        try:
            assert read_pack(path) == records
        except ConfigError:
            refused += 1
    assert refused > len(flips) / 2


def test_files_that_are_packed_while_they_are_looked_for_are_found(
    folder: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, read = TrialFiles(folder), Path.read_bytes
    assert files.packed == {}

    def packed_first(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read)
        _pack(folder)
        return path.read_bytes()

    monkeypatch.setattr(Path, "read_bytes", packed_first)
    assert files.read(engine.ran[0], "curve.csv").decode() == CURVE


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_the_study_whole(
    folder: Path, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    file = write_study()
    expected, records = _shown(folder, file), _records(folder)
    for moment in range(200):
        copy, steps = tmp_path / f"{moment}" / "tiny", [moment]
        shutil.copytree(folder, copy)

        def counted(whole: Callable[..., Any], steps: list[int] = steps) -> Callable[..., Any]:
            def step(*arguments: Any, **named: Any) -> Any:
                steps[0] -= 1
                if steps[0] == -1:
                    raise Killed
                return whole(*arguments, **named)

            return step

        with pytest.MonkeyPatch.context() as patch:
            for place, name in ((os, "fsync"), (os, "replace"), (os, "chmod"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(place, name, counted(getattr(place, name)))
            try:
                _pack(copy)
            except Killed:
                pass
            else:
                break
        found = TrialFiles(copy)
        assert {id_: {name: found.read(id_, name) for name in own} for id_, own in records.items()} == records
        if moment % 8 == 0:
            shown = _shown(copy, file)
            assert [shown[0], *shown[2:]] == [expected[0], *expected[2:]]
        _pack(copy)
        assert TrialFiles(copy).packed == records
        assert {path.name for path in copy.iterdir()} == {"study.yaml", "data.json", "trials.csv", "lock", PACK}
    assert moment > 15


def test_a_disk_that_gives_back_something_else_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _records(folder)
    monkeypatch.setattr("sparsemem.study.ledger.pack.read_pack", lambda path: {**read_pack(path), "more": {}})
    with pytest.raises(OSError, match="does not read back as it was written, so nothing was packed"):
        _pack(folder)
    assert _records(folder) == before
    assert not (folder / PACK).exists()


def test_a_checkpoint_that_a_kill_left_goes_with_the_next_run(
    folder: Path, write_study: Callable[..., Path], engine: Any
) -> None:
    (left := folder / "trials" / engine.ran[0] / "checkpoint.pt").write_bytes(b"tensors")
    aside = folder / "trials" / engine.ran[1] / "result.json"
    shutil.copyfile(aside, aside.with_name("curve.csv.old"))
    set_aside(aside.with_name("curve.csv.old"))
    _pack(folder)
    assert left.exists()
    _run(write_study())
    assert not left.exists()
    assert [path.name for path in (folder / "trials").rglob("*") if path.is_file()] == ["curve.csv.old.corrupt-1"]
