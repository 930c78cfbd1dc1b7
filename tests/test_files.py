"""Atomic writes: readers see the old file or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from sparsemem import files


def test_text_and_json_read_back(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "naïve\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "naïve\r\n".encode()
    files.write_json(tmp_path / "a.json", {"x": [1, None, 0.1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None, 0.1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "result.json"
    files.write_text(path, "old")

    def half(file: BinaryIO) -> None:
        file.write(b"ne")
        raise failure

    with pytest.raises(type(failure)):
        files.write_atomically(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [float("-inf")]}])
def test_json_refuses_what_is_not_a_number_before_it_touches_the_file(tmp_path: Path, value: object) -> None:
    files.write_text(tmp_path / "a.json", "old")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == "old"


def test_the_new_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    """Temporary files are private; what is put in place follows the user's umask, so that a shared folder works."""
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert os.umask(before) == before


def test_damaged_files_are_set_aside_without_overwriting_earlier_ones(tmp_path: Path) -> None:
    names = []
    for content in ("first", "second"):
        (tmp_path / "result.json").write_text(content)
        names.append(files.set_aside(tmp_path / "result.json").name)
    assert names == ["result.json.corrupt-1", "result.json.corrupt-2"]
    assert (tmp_path / "result.json.corrupt-1").read_text() == "first"
    assert not (tmp_path / "result.json").exists()


KILLED_WHILE_WRITING = """
import os, signal, sys, pathlib
from sparsemem import files
def die(file):
    file.write(b"half"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(pathlib.Path(sys.argv[1]), die)
"""

KILLED_IN_ITS_SCRATCH = """
import os, signal, sys, pathlib
from sparsemem import files
with files.scratch_folder(pathlib.Path(sys.argv[1]), "scratch-") as folder:
    (folder / "deep").mkdir(); print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(path)]).returncode == -9
    assert [found.name.startswith(".result.json.") for found in tmp_path.iterdir()] == [True]

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        files.remove_temporaries(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1  # its own

    files.write_atomically(path, write)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_scratch_of_a_killed_process_goes_with_the_next_one(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_ITS_SCRATCH, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert killed.returncode == -9
    assert Path(killed.stdout.strip()).is_dir()
    with files.scratch_folder(tmp_path, "scratch-") as mine, files.scratch_folder(tmp_path, "scratch-") as other:
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_so_with_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"disk full \(No space left on device\): .*curve.csv") as raised:
        files.write_atomically(tmp_path / "curve.csv", fail)
    assert raised.value.errno == errno.ENOSPC
    files.or_warn(files.write_atomically, tmp_path / "curve.csv", fail)
    assert "warning: " in (said := capsys.readouterr().err)
    assert "disk full" in said
