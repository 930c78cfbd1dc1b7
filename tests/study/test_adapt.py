"""What a user relies on when a study chooses its shares; with an engine that does not train."""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.fits.allocation import fit_allocation
from analysis.results import Results
from sparsemem.api import run_study
from sparsemem.config import ConfigError, Run, Trial, load_study
from sparsemem.failure import record_failure
from sparsemem.study import launch
from sparsemem.study.display.progress import headline, look
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger

LEFT = {"total_params": "60k", "active_params": "8k", "tokens": 4096, "tolerance": "5%"}


class Curve:
    """Writes the losses of a curve over rho with noise that follows from the trial alone."""

    def __init__(self, best: float = 0.4, noise: float = 0.002) -> None:
        self.best, self.noise = best, noise
        self.batches: list[list[float]] = []
        self.die_at = -1
        self.fail: set[float] = set()
        self.learns_nothing: set[float] = set()

    def __call__(self, jobs: Sequence[Job], run: Run) -> None:
        self.batches.append([])
        for job in reversed(jobs):  # whichever ends first
            trial = Trial.model_validate(yaml.safe_load((job.trial_folder / "trial.yaml").read_text()))
            rho = trial.rho or 0.0
            if sum(map(len, self.batches)) == self.die_at:
                raise KeyboardInterrupt
            self.batches[-1].append(rho)
            if rho in self.fail:
                record_failure(job.trial_folder, "boo")
                continue
            loss = (
                4
                + (rho - self.best) ** 2 / 2
                + 0.01 * trial.seed
                + self.noise * (zlib.crc32(trial.id.encode()) % 2000 / 1000 - 1)
            )
            if rho in self.learns_nothing:
                loss = math.log(trial.data.vocab_size) + 0.01 * trial.seed
            (job.trial_folder / "val_losses.csv").write_text(f"sequence,nats_per_token\n0,{loss}\n")
            result = {
                "trial_id": trial.id,
                "status": "finished",
                "val_loss": loss,
                "val_loss_se": 0.01,
                "val_bpb": loss / 2,
            }
            (job.trial_folder / "result.json").write_text(json.dumps(result | {"tokens": 4096, "seconds": 1.0}))


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> Curve:
    fake = Curve()
    monkeypatch.setattr(launch, "find_engine", lambda *engine: fake)
    monkeypatch.setattr("sparsemem.api._report", lambda folder, say: None)
    return fake


def run(file: Path, said: list[str] | None = None, results: str = "runs") -> Ledger:
    return run_study(load_study(file), file.parent, file.parent / results, say=([] if said is None else said).append)


def search(**fields: Any) -> dict[str, Any]:
    return {"search": "optimum", "tolerance": 0.1, **fields}


def table(ledger: Ledger) -> list[tuple[str, str, str]]:
    with open(ledger.folder / "trials.csv", newline="") as file:
        return [(row["trial_id"], row["rho"], row["val_loss"]) for row in csv.DictReader(file)]


def test_it_trains_where_the_optimum_is_unsure_and_stops_within_the_tolerance(
    write_study: Callable[..., Path], curve: Curve
) -> None:
    said: list[str] = []
    ledger = run(write_study(budget=LEFT, vary={"rho": search()}), said)
    assert sorted(set(curve.batches[0])) == [0, 0.25, 0.5, 0.75, 1]
    assert all(len(batch) == 2 and len(set(batch)) == 1 for batch in curve.batches[1:])  # one share, two seeds
    assert "within the tolerance 0.1" in said[-1]
    assert "95% interval of the best" in said[-1]
    assert len(table(ledger)) < 22
    assert load_study(ledger.folder / "study.yaml") == load_study(ledger.folder.parent.parent / "tiny.yaml")


def test_trials_that_learned_nothing_decide_no_more_than_in_the_report(
    write_study: Callable[..., Path], curve: Curve
) -> None:
    curve.learns_nothing = {1.0}
    said: list[str] = []
    ledger = run(write_study(budget=LEFT, vary={"rho": search(tolerance=0.2)}), said)
    finished = Results(ledger.folder).finished
    low, high = fit_allocation(finished).interval_of_best
    assert len(finished) == len(ledger.rows) - 2
    assert f"95% interval of the best {low:.2f} to {high:.2f}, within" in said[-1]


@pytest.mark.slow
def test_a_killed_search_goes_on_as_it_would_have(write_study: Callable[..., Path], curve: Curve) -> None:
    curve.noise = 0.05
    file = write_study(budget=LEFT, vary={"rho": search(tolerance=0.02, batch=2, max_trials=18)})
    whole = table(run(file, results="whole"))
    for killed_after in (3, 8, 4):
        curve.die_at = sum(map(len, curve.batches)) + killed_after
        with pytest.raises(KeyboardInterrupt):
            run(file)
    curve.die_at = -1
    assert table(run(file)) == whole
    curve.batches.clear()
    said: list[str] = []
    run(file, said)
    assert not curve.batches  # nothing is trained again
    assert "no trial is left of 18" in said[-1]


def test_an_optimum_at_the_end_ends_the_search_at_once(write_study: Callable[..., Path], curve: Curve) -> None:
    curve.best = -0.3
    said: list[str] = []
    assert len(table(run(write_study(budget=LEFT, vary={"rho": search()}), said))) == 10
    assert "0.00 to 0.00, within the tolerance" in said[-1]


def test_a_flat_curve_ends_at_the_most_trials_and_says_so(write_study: Callable[..., Path], curve: Curve) -> None:
    curve.noise = 2.0
    said: list[str] = []
    assert (
        len(table(run(write_study(budget=LEFT, vary={"rho": search(max_trials=13)}), said))) == 12
    )  # both seeds or none
    assert "not within the tolerance 0.1: no trial is left of 13" in said[-1]


def test_each_value_of_another_axis_has_a_search_of_its_own(write_study: Callable[..., Path], curve: Curve) -> None:
    said: list[str] = []
    file = write_study(budget=LEFT, vary={"rho": search(max_trials=12), "budget.tokens": [4096, 8192]})
    run(file, said)
    assert {line.partition(":")[0] for line in said if "search of rho" in line} == {
        f"search of rho, budget.tokens={tokens}" for tokens in (4096, 8192)
    }


def test_a_failed_trial_holds_its_search_until_it_is_run_again(write_study: Callable[..., Path], curve: Curve) -> None:
    file = write_study(budget=LEFT, vary={"rho": search()})
    curve.fail = {0.5}
    assert run(file).counts() == {"finished": 8, "failed": 2}
    assert len(curve.batches) == 1
    curve.fail = set()
    assert run(file).counts()["failed"] == 0
    assert curve.batches[1] == [0.5, 0.5]


def test_progress_says_how_many_trials_it_may_come_to(write_study: Callable[..., Path], curve: Curve) -> None:
    curve.fail = {0.5}
    ledger = run(write_study(budget=LEFT, vary={"rho": search(max_trials=14)}))
    assert headline(look(ledger), most=ledger.most_trials).startswith("8 of 10 trials (of at most 14) done")


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ({"rho": search(tolerance=0)}, "vary.rho.tolerance"),
        ({"rho": search(tolerance=1)}, "vary.rho.tolerance"),
        ({"rho": {"search": "optimum"}}, "`vary.rho.tolerance` is missing"),
        ({"rho": search(sedes=2)}, "did you mean `seeds`"),
        ({"rho": search(seeds=1)}, "vary.rho.seeds"),
        ({"rho": search(max_trials=9)}, "allow 10 or more"),
        ({"rho": search(search="minimum")}, "vary.rho.search"),
        ({"rho": search(), "seed": [0, 1]}, "`vary.seed` stands beside a search"),
        ({"rho": search(), "train.lr": [0.01]}, "`vary.train.lr` stands beside a search"),
        ({"rho": search(), "shares": [{"moe": 1.0}]}, "`vary.rho` stands beside `vary.shares`"),
        ({"seed": search()}, "only `vary.rho` can be searched"),
        ({"model.engram.row_dim": search()}, "only `vary.rho` can be searched"),
    ],
)
def test_a_search_that_cannot_be_is_refused(write_study: Callable[..., Path], vary: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_study(write_study(vary=vary))


def test_winners_by_rho_are_refused_beside_a_search(write_study: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "winners.yaml").write_text(
        yaml.safe_dump({"study": "tiny", "winners": [{"at": {"rho": 1.0}, "values": {"train.lr": 0.02}}]})
    )
    with pytest.raises(ConfigError, match="a search trains shares that have none"):
        load_study(write_study(vary={"rho": search()}, tuned="winners.yaml"))


@pytest.mark.slow
def test_it_trains_with_real_processes(write_study: Callable[..., Path]) -> None:
    file = write_study(budget=LEFT, vary={"rho": search(max_trials=12)})
    ledger = run_study(load_study(file), file.parent, file.parent / "runs", "local", say=lambda line: None)
    assert set(ledger.counts()) == {"finished"}
    assert len(ledger.rows) in (10, 12)
    assert "search" in (ledger.folder / "report.html").read_text()
