"""Locks, with the system's and where the file system has none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from machine import table, write_study

from sparsemem import locks
from sparsemem.cli import main
from sparsemem.files import remove_temporaries, write_json

WITHOUT = "import errno, fcntl\ndef flock(file, how): raise OSError(errno.{number}, 'no locks')\nfcntl.flock = flock\n"


def without(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(file: Any, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.fixture(params=["system", "ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def number(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(locks, "RENEWED_SECONDS", 0.1)
    if request.param != "system":
        without(monkeypatch, getattr(errno, request.param))
    return str(request.param)


def test_a_lock_has_one_holder(number: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    with locks.locked(path):
        time.sleep(0.8)  # longer than a marker lasts that is not renewed
        assert locks.is_held(path)
        with pytest.raises(BlockingIOError), locks.locked(path, wait=False):
            pass
    assert not locks.is_held(path)
    with locks.locked(path, wait=False):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS"])
def test_the_marker_of_a_killed_process_is_taken_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = f"{WITHOUT.format(number=name)}import pathlib, time\nfrom sparsemem.locks import locked\n"
    hold += f"with locked(pathlib.Path({str(tmp_path / 'lock')!r})):\n    print('held', flush=True); time.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"held\n"
        without(monkeypatch, getattr(errno, name))
        assert locks.is_held(tmp_path / "lock")
        process.kill()
    with locks.locked(tmp_path / "lock", wait=False):
        assert locks.is_held(tmp_path / "lock")


def test_files_are_written_without_locks_and_those_of_others_stay(number: str, tmp_path: Path) -> None:
    (tmp_path / ".left.json.x.tmp").write_text("")
    write_json(tmp_path / "a.json", {"a": 1})
    remove_temporaries(tmp_path)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert (tmp_path / ".left.json.x.tmp").exists() == (number != "system")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_study_is_run_reported_and_shown_without_locks(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT.format(number="ENOLCK"))
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{root}", "SPARSEMEM_CACHE": str(tmp_path / "cache")}

    def sparsemem(*words: str) -> str:
        command = [sys.executable, "-m", "sparsemem", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sparsemem("run", str(study), "--results", str(tmp_path / "runs"), "--engine", engine)
    folder = next((tmp_path / "runs").iterdir())
    assert {row["status"] for row in table(folder)} == {"finished"}
    sparsemem("report", str(folder))
    assert "finished" in sparsemem("status", str(folder))
    assert not list(folder.rglob(".lock.held"))
    assert main(["report", str(folder)]) == 0
