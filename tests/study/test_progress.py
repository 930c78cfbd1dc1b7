from __future__ import annotations

from pathlib import Path

import pytest

from sparsemem.results import COLUMNS, MEASURED
from sparsemem.study.display.progress import headline, look, overview, seconds_left
from sparsemem.study.ledger import Ledger, study_lock
from sparsemem.study.text import table

CURVE = "step,tokens,train_loss,val_loss,lr,grad_norm,expert_load_max,tokens_per_second,seconds\n"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Four trials of 1,000 tokens: one finished, one running at 50 tokens/s and half done, one failed, one pending."""
    names = [name for name in COLUMNS if name not in (*MEASURED, "status")]
    given = {"seed": 0, "tokens": 1000, "flops_per_token_head": 10.0}
    rows = [
        dict.fromkeys(names, 0) | given | {"trial_id": id_, "rho": rho}
        for id_, rho in zip("abcd", (1.0, 0.5, 0.0, None), strict=True)
    ]
    for row in rows[:3]:
        (tmp_path / "trials" / str(row["trial_id"])).mkdir(parents=True)
    result = '{"trial_id": "a", "status": "finished", "val_loss": 3.5, "val_bpb": 1.5, "tokens": 1000, "seconds": 10}'
    (tmp_path / "trials" / "a" / "result.json").write_text(result)
    (tmp_path / "trials" / "a" / "val_losses.csv").write_text("sequence,nats_per_token\n0,3.25\n1,3.75\n")
    (tmp_path / "trials" / "b" / "curve.csv").write_text(CURVE + "1,250,5,4.5,,,,50,5\n2,500,4,,,,,50,10\n")
    (tmp_path / "trials" / "c" / "failure.json").write_text('{"status": "failed", "message": "boo\\nat line 3"}')
    return Ledger(tmp_path, rows)


def test_progress_is_read_from_the_files_of_the_trials(ledger: Ledger) -> None:
    with study_lock(ledger.trial_folder("b")):  # a worker holds its trial's lock in the same way
        trials = look(ledger)
    assert [trial.status for trial in trials] == ["finished", "running", "failed", "pending"]
    assert [trial.tokens_done for trial in trials] == [1000, 500, 0, 0]
    assert [trial.loss for trial in trials] == [3.5, 4.5, None, None]
    line = headline(trials, slots=1)
    assert line.startswith("1 of 4 trials done · 1 running · 2 left · 1 failed · 50 tokens/s · about ")
    assert line.endswith("best single run 3.5000 nats (rho 1.0)")
    assert "rho dense" in overview(trials)
    assert "boo" in overview(trials)


def test_time_left_is_the_work_left_over_the_speed_so_far(ledger: Ledger) -> None:
    with study_lock(ledger.trial_folder("b")):
        trials = look(ledger)
    steps = (500 + 1000 + 1000) / 75  # the finished trial ran at 100 tokens/s, the running one at 50
    starts = 2 * 4
    assert seconds_left(trials, slots=1) == pytest.approx(steps + starts)
    assert seconds_left(trials, slots=2) == pytest.approx((steps + starts) / 2)
    assert seconds_left(trials[:1], slots=1) is None


def test_a_worker_without_its_lock_is_interrupted(ledger: Ledger) -> None:
    assert ledger.state("b").status == "interrupted"


def test_tables_line_up() -> None:
    assert table(["trial", "loss"], [["a", "3.25"], ["bcd", "10"]]).splitlines() == [
        "trial  loss",
        "-----  ----",
        "a      3.25",
        "bcd      10",
    ]
