"""A trial's last word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsemem.failure import record_failure


def test_a_word_that_is_known_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    record_failure(tmp_path, "its disk was full", traceback="there")
    record_failure(tmp_path, "its process ended with exit code 1", unless_known=True)
    assert json.loads((tmp_path / "failure.json").read_text()) == {"status": "failed", "message": "its disk was full", "traceback": "there"}
    record_failure(tmp_path, "killed by signal 9", "out_of_memory")
    assert json.loads((tmp_path / "failure.json").read_text())["status"] == "out_of_memory"


@pytest.mark.parametrize("unless_known", [True, False])
def test_a_word_that_cannot_be_left_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], unless_known: bool) -> None:
    record_failure(tmp_path / ("long" * 100), "boo", unless_known=unless_known)
    assert "warning" in capsys.readouterr().err
