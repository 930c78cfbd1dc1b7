"""A trial's last word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsemem.failure import record_failure


def test_a_word_that_is_known_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    record_failure(tmp_path, "its disk was full", traceback="there")
    record_failure(tmp_path, "its process ended with exit code 1", unless_known=True)
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "status": "failed",
        "message": "its disk was full",
        "traceback": "there",
    }
    record_failure(tmp_path, "killed by signal 9", "out_of_memory")
    assert json.loads((tmp_path / "failure.json").read_text())["status"] == "out_of_memory"


@pytest.mark.parametrize("unless_known", [True, False])
def test_a_word_that_cannot_be_left_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unless_known: bool
) -> None:
    record_failure(tmp_path / ("long" * 100), "boo", unless_known=unless_known)
    assert "warning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("disk full: '/home/ann b/runs/tiny/curve.csv'", "disk full: '.../curve.csv'"),
        ("cannot read /data/my-texts/a.txt: gone", "cannot read .../a.txt: gone"),
        ("file:///mnt/share/x", "file://.../x"),
        ("connect to 10.0.0.7:29500 or [fe80::1]:80", "connect to an address:29500 or [an address]:80"),
        (f"node {'0f' * 28}, pid=4711", "node an id, pid"),
        ("Process 4711 has 3 GiB", "Process has 3 GiB"),
        *(
            (text, text)
            for text in (
                "s3://bucket/studies/x.pt",
                "c10::Error in std::vector<int>::at",
                "trial d7f82a3099c8 at 3:20:00",
                "1/2",
            )
        ),
    ],
)
def test_nothing_of_the_machine_is_kept(tmp_path: Path, text: str, kept: str) -> None:
    record_failure(tmp_path, text, traceback=text)
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "status": "failed",
        "message": kept,
        "traceback": kept,
    }


def test_a_traceback_keeps_modules_and_the_machine_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-box-3")
    monkeypatch.setattr("sys.path", ["", "/opt/env/lib", "/opt/env/lib/site-packages"])
    record_failure(
        tmp_path, "gpu-box-3 is gone", traceback='File "/opt/env/lib/site-packages/torch/nn/module.py", line 7'
    )
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert failure["message"] == "this machine is gone"
    assert failure["traceback"] == 'File "torch/nn/module.py", line 7'
