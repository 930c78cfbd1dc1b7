"""A study looked at from another terminal."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, load_study
from sparsemem.failure import record_failure
from sparsemem.study.display import watch
from sparsemem.study.display.progress import TrialProgress, headline
from sparsemem.study.ledger import study_lock

TRIALS = [
    TrialProgress("aaaaaaaaaaaa", "rho 1.0, seed 0", "finished", "", 1000, 1000, 10.0, 1e3, 0.0, 3.5, 3600.0),
    TrialProgress("bbbbbbbbbbbb", "rho 0.5, seed 0", "pending", "", 0, 1000, 10.0, 0.0, 0.0, None, 0.0),
    TrialProgress(
        "cccccccccccc",
        "rho 0.4, seed 0",
        "failed",
        "no space left on the device\nat line 3",
        100,
        1000,
        10.0,
        1e3,
        0.0,
        None,
        0.0,
    ),
    TrialProgress("dddddddddddd", "rho 0.0, seed 0", "running", "", 500, 1000, 10.0, 1e3, 50.0, 4.25, 1800.0),
]


def lines(trials: list[TrialProgress], width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(watch.render(trials, width, height))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 140])
def test_a_screen_shows_what_runs_first_with_its_speed_and_time_left(width: int) -> None:
    shown = lines(TRIALS, width, 20)
    assert all(len(line) <= width for line in shown)
    assert "1.5 core-hours · best single run 3.5000 nats (rho 1.0, seed 0)" in " ".join(" ".join(shown).split())
    table = [line.split() for line in shown[[line.startswith("state") for line in shown].index(True) :]]
    assert [row[0] for row in table[1:5]] == ["running", "failed", "finished", "pending"]
    assert table[1] == ["running", "dddddd", "rho", "0.0,", "seed", "0", "50%", "50", "10", "s", "4.2500"]
    assert shown[-1] == "cccccc failed: no space left on the device"


def test_what_does_not_fit_the_screen_is_counted() -> None:
    shown = lines(TRIALS[:2] * 20, 120, 12)
    assert len(shown) <= 12
    assert shown[-1] == "and 33 more: 13 finished, 20 pending"


def test_a_study_that_has_ended_is_shown_once(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study()
    folder = run_study(load_study(file), file.parent, file.parent / "runs").folder
    assert main(["status", str(folder), "--watch"]) == 0
    assert "3 of 3 trials done" in capsys.readouterr().out


def test_a_study_is_watched_until_its_driver_ends(
    write_study: Callable[..., Path], engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_study()
    folder = run_study(load_study(file), file.parent, file.parent / "runs").folder
    monkeypatch.setattr(watch, "REFRESH_SECONDS", 0.01)
    watching = threading.Thread(target=watch.watch, args=(folder,))
    with study_lock(folder):
        watching.start()
        time.sleep(0.2)
        assert watching.is_alive()
    watching.join(10)
    assert not watching.is_alive()
    assert capsys.readouterr().out.count("3 of 3 trials done") == 2  # once at first, once at the end


def test_a_study_that_has_not_begun_is_waited_for(
    write_study: Callable[..., Path],
    engine: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "REFRESH_SECONDS", 0.01)
    watching = threading.Thread(target=watch.watch, args=(tmp_path / "runs" / "tiny",), daemon=True)
    watching.start()
    file = write_study()
    assert watching.is_alive()
    run_study(load_study(file), file.parent, file.parent / "runs")
    watching.join(10)
    assert not watching.is_alive()
    out, err = capsys.readouterr()
    assert "waiting for a study to begin" in err
    assert "3 of 3 trials done" in out


def test_ctrl_c_leaves_a_watch_without_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", interrupt)
    assert main(["status", str(tmp_path), "--watch"]) == 0


def test_a_failure_and_a_log_are_printed(
    write_study: Callable[..., Path], engine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(trial: Path) -> None:
        record_failure(trial, "its process ended with exit code 1")
        (trial / "log.txt").write_text("Traceback: boo\n")

    engine.outcomes = {0: fail}
    file = write_study()
    folder = run_study(load_study(file), file.parent, file.parent / "runs").folder
    assert main(["status", str(folder), "--log", engine.ran[0][:6]]) == 0
    assert capsys.readouterr().out == "failed: its process ended with exit code 1\n\nTraceback: boo\n"
    assert main(["status", str(folder), "--log", engine.ran[1]]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing is kept of this trial" in err
    assert main(["status", str(folder), "--log", "nonsense"]) == 2
    assert "has no trial 'nonsense'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="begins the ids of"):
        watch.trial_log(folder, "")


def test_a_headline_without_training_says_no_cost() -> None:
    assert "core-hours" not in headline(TRIALS[1:2])
