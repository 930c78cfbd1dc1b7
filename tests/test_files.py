"""Atomic writes: readers see the old file or the new one, whatever happens in between."""

from __future__ import annotations

import json
import os
import stat
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
