"""Tuning: what a search leaves behind and what it survives; mostly with workers that compute losses in place of
training.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import optuna
import pytest
import yaml

from analysis.report import write_report
from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, Trial, Tune, Winner, load_study
from sparsemem.failure import record_failure
from sparsemem.study import launch
from sparsemem.study.jobs import Job
from sparsemem.study.plan import describe, plan
from sparsemem.study.tune import study as tune
from sparsemem.study.tune.search import _digest as search_digest
from sparsemem.study.tune.tuned import Outcome, describe_outcomes, movements

EVALUATIONS = 8
TUNE = {"search": {"train.lr": {"low": 1e-3, "high": 0.1, "log": True}}, "per": ["rho"], "trials": 6, "pruner": "none"}
VARY = {"rho": [1.0, 0.0], "seed": [0, 1]}


class FakeWorkers:
    """In place of training: the loss has its minimum at lr 0.004 with routed experts and at 0.02 with memory; above
    0.09 it diverges.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.most_at_once: Counter[float | None] = Counter()
        self.interrupt_after = math.inf
        self.fail: set[int] = set()
        """Starts that end in a failure."""
        self._done: dict[Job, int] = {}
        self._trials: dict[Job, Trial] = {}

    def __call__(self, run: Any) -> Self:
        self._done.clear()
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.clear()

    @property
    def free(self) -> int:
        return self.slots - len(self._done)

    def start(self, job: Job) -> None:
        assert self.free
        assert job not in self._done
        if len(self.started) >= self.interrupt_after:
            raise KeyboardInterrupt
        self._trials[job] = Trial.model_validate(yaml.safe_load((job.trial_folder / "trial.yaml").read_text()))
        self.started.append(job.trial_folder.name)
        self._done[job] = 0
        at_once = Counter(self._trials[job].rho for job in self._done)
        self.most_at_once |= at_once

    def stop(self, job: Job) -> None:
        del self._done[job]
        self.stopped.append(job.trial_folder.name)

    def ended(self, seconds: float) -> list[Job]:
        ended = []
        for job in list(self._done):
            self._done[job] += 1
            trial, done = self._trials[job], self._done[job]
            best = 0.004 if trial.rho else 0.02
            loss = 4 + math.log10(trial.train.lr / best) ** 2 + 1 / done
            row = f"{done},{trial.budget.tokens * done // EVALUATIONS},{loss},{loss:.9g}\n"
            with open(job.trial_folder / "curve.csv", "w" if done == 1 else "a") as curve:
                curve.write(("step,tokens,train_loss,val_loss\n" if done == 1 else "") + row)
            if done == EVALUATIONS:
                del self._done[job]
                ended.append(job)
                if len(self.started) - 1 in self.fail:
                    record_failure(job.trial_folder, "boo")
                else:
                    self._finish(job, loss if trial.train.lr < 0.09 else None)
        return ended

    def _finish(self, job: Job, loss: float | None) -> None:
        result = {"trial_id": job.trial_folder.name, "status": "diverged" if loss is None else "finished"}
        result |= {"val_loss": loss, "val_loss_se": 0.01, "val_bpb": loss and loss / 2}
        (job.trial_folder / "val_losses.csv").write_text(f"sequence,nats_per_token\n0,{loss}\n")
        (job.trial_folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    fake = FakeWorkers()
    monkeypatch.setattr(tune, "Workers", fake)
    monkeypatch.setattr(tune, "POLL_SECONDS", 0)
    monkeypatch.setattr("os.fsync", lambda handle: None)
    return fake


@pytest.fixture
def run(write_study: Callable[..., Path], tmp_path: Path) -> Callable[..., list[Outcome]]:
    """Tunes the tiny study; keywords replace fields of its block `tune`."""

    def search(results: str = "runs", said: list[str] | None = None, **fields: Any) -> list[Outcome]:
        study = load_study(write_study(vary=VARY, tune=TUNE | fields))
        return tune.tune_study(study, tmp_path, tmp_path / results, (said if said is not None else []).append)

    return search


def searches(folder: Path) -> dict[str, optuna.Study]:
    """As a user of Optuna opens them."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
    names = optuna.get_all_study_names(storage)
    return {name.partition(" [")[0]: optuna.load_study(study_name=name, storage=storage) for name in names}


def tried(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Point -> (place, rate, state, value) of what is done."""
    return {
        name: sorted(
            (t.user_attrs["place"], t.params["train.lr"], t.state.name, t.value)
            for t in study.trials
            if t.state.name != "FAIL"
        )
        for name, study in searches(folder).items()
    }


def test_each_point_has_its_own_winner_which_a_study_takes(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    outcomes = run(trials=12)
    folder = tmp_path / "runs" / "tiny" / "tune"
    rates = [outcome.winner.values["train.lr"] for outcome in outcomes if outcome.winner]
    assert rates == [pytest.approx(0.004, rel=0.5), pytest.approx(0.02, rel=0.5)]
    places = tried(folder)
    assert list(places) == ["rho=1.0", "rho=0.0"]
    first, other = places.values()
    assert first[0][:2] == other[0][:2] == (0, 0.01)  # the study's own rate
    assert [t[1] for t in first[:6]] == [t[1] for t in other[:6]]  # spread alike at both points
    assert [t[1] for t in first[6:]] != [t[1] for t in other[6:]]
    assert not (tmp_path / "runs" / "tiny" / "trials.csv").exists()

    file = write_study(vary=VARY, tuned="runs/tiny/tune/winners.yaml")
    planned = plan(load_study(file))
    assert [p.trial.train.lr for p in planned] == [rates[0], rates[0], rates[1], rates[1]]
    assert outcomes[0].winner is not None
    assert planned[0].trial.id == outcomes[0].winner.trial_id  # of the first seed
    assert planned[0].row()["train.lr"] == rates[0]
    assert "train.lr (tuned)" in describe(planned, None)
    assert not {p.trial.id for p in planned} & {p.trial.id for p in plan(load_study(write_study(vary=VARY)))}


def test_the_line_that_tune_prints_is_one_that_the_study_takes(
    write_study: Callable[..., Path],
    workers: FakeWorkers,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From another folder than the study's, and with a name that YAML would read as something else."""
    file = write_study(vary=VARY, tune=TUNE)
    elsewhere = tmp_path / "else: where #1"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["tune", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tuned:"))
    file.write_text(f"{file.read_text()}{line}\n", encoding="utf-8")
    assert next(p.tuned["train.lr"] for p in plan(load_study(file))) != 0.01


def test_a_study_takes_over_the_winners_that_tune_has_trained(
    run: Callable[..., list[Outcome]],
    workers: FakeWorkers,
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = run(trials=12)
    won = {str(outcome.winner.trial_id) for outcome in outcomes if outcome.winner}
    trained: list[str] = []
    monkeypatch.setattr(
        launch, "find_engine", lambda *a: lambda jobs, run: trained.extend(job.trial_folder.name for job in jobs)
    )
    study = load_study(write_study(vary=VARY, tuned="runs/tiny/tune/winners.yaml"))
    planned = {p.trial.id for p in plan(study)}
    judged_bad, said = sorted(won)[0], list[str]()
    record_failure(tmp_path / "runs/tiny/tune/trials" / judged_bad, "others were better", "pruned")
    ledger = run_study(study, tmp_path, tmp_path / "runs", say=said.append)
    assert set(trained) == planned - won | {judged_bad}
    (taken,) = won - {judged_bad}
    assert ledger.state(taken).status == "finished"
    assert any("1 of its trials were trained to their end by `sparsemem tune`" in line for line in said)
    other = load_study(write_study(vary=VARY, tuned="runs/tiny/tune/winners.yaml", study="other"))
    assert (
        run_study(other, tmp_path, tmp_path / "runs", say=said.append).counts()["finished"] == 0
    )  # its own tuning alone


def test_values_found_at_other_settings_are_told_by_plan_run_and_report(
    run: Callable[..., list[Outcome]],
    workers: FakeWorkers,
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(trials=1)
    monkeypatch.setattr(launch, "find_engine", lambda *a: lambda jobs, run: None)
    monkeypatch.setattr("sparsemem.study.plan.estimate_seconds", lambda planned, study: None)
    taken = {"tuned": "runs/tiny/tune/winners.yaml"}
    data = yaml.safe_load(write_study().read_text())["data"]
    for changed, told in (
        ({"vary": VARY}, ""),
        ({"vary": VARY | {"budget.tokens": [4096, 8192]}}, "4 of 8 .* `budget.tokens` 4096 there, 8192 here"),
        (
            {"vary": VARY, "data": data | {"files": ["corpus/0*"]}},
            r"4 of 4 .* `data.files` corpus/\*.txt there, corpus/0",
        ),
    ):
        study, said = load_study(file := write_study(study="other", **taken, **changed)), list[str]()
        shutil.rmtree(tmp_path / "runs" / "other", ignore_errors=True)
        folder = run_study(study, tmp_path, tmp_path / "runs", say=said.append).folder
        assert main(["plan", str(file)]) == 0
        for words in ("\n".join(said), capsys.readouterr().err, write_report(folder).read_text()):
            words = re.sub("</?code>", "`", words)
            assert re.search(f"Warning: {told}", words) if told else "at other settings" not in words


def test_a_winner_whose_model_is_to_be_kept_is_trained_by_the_study(
    run: Callable[..., list[Outcome]],
    workers: FakeWorkers,
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`tune` keeps no models."""
    won = {str(outcome.winner.trial_id) for outcome in run(trials=2) if outcome.winner}
    trained: list[str] = []
    monkeypatch.setattr(
        launch, "find_engine", lambda *a: lambda jobs, run: trained.extend(job.trial_folder.name for job in jobs)
    )
    file = write_study(vary=VARY, tuned="runs/tiny/tune/winners.yaml", run={"keep_models": True})
    run_study(load_study(file), tmp_path, tmp_path / "runs", say=lambda line: None)
    assert won <= set(trained)


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    undisturbed = run("undisturbed")
    expected = workers.started[:]
    workers.started.clear()
    for stop in (3, 4, 9):
        workers.interrupt_after = stop
        with pytest.raises(KeyboardInterrupt):
            run()
    workers.interrupt_after = math.inf
    assert run() == undisturbed
    assert workers.started == expected
    assert tried(tmp_path / "runs" / "tiny" / "tune") == tried(tmp_path / "undisturbed" / "tiny" / "tune")
    assert run() == undisturbed
    assert workers.started == expected
    run(trials=8)
    assert len(workers.started) == len(expected) + 4


def test_half_a_line_of_a_killed_driver_is_cut_off_and_a_damaged_journal_is_named(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    outcomes = run()
    journal = tmp_path / "runs" / "tiny" / "tune" / "journal.log"
    whole = journal.read_bytes()
    for left in (whole[:40], b"\n", b"\r\n", b"\n\n  \n", b" "):
        journal.write_bytes(whole + left)
        assert run() == outcomes
    journal.write_bytes(whole + b"\n")
    assert run(trials=7)[0].statuses["finished"] == 7  # written on after it
    whole = journal.read_bytes()
    journal.write_bytes(whole + b"\0\0\0\n")
    with pytest.raises(ConfigError, match=r"journal.log: not a journal of Optuna .* move it away"):
        run()
    journal.write_bytes(b"{}\n" + whole)
    with pytest.raises(ConfigError, match=r"journal.log: not a journal of Optuna .* move it away"):
        run()


def test_a_pruned_trial_is_stopped_and_stays_out_of_the_study(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    said: list[str] = []
    outcomes = run(pruner="asha", trials=10, said=said)
    folder = tmp_path / "runs" / "tiny" / "tune" / "trials"
    assert len(workers.stopped) == sum(outcome.statuses["pruned"] for outcome in outcomes) >= 6
    for id_ in workers.stopped:
        failure = json.loads((folder / id_ / "failure.json").read_text())
        assert failure["status"] == "pruned"
        with open(folder / id_ / "curve.csv", newline="") as curve:
            assert len(list(csv.DictReader(curve))) in (2, 4)  # a quarter or half of its evaluations
    assert sum("stopped at evaluation 2" in line for line in said) + sum(
        "stopped at evaluation 4" in line for line in said
    ) == len(workers.stopped)
    assert [outcome.winner is not None for outcome in outcomes] == [True, True]
    pruned = [t for study in searches(folder.parent).values() for t in study.trials if t.state.name == "PRUNED"]
    assert all(t.user_attrs["status"] == "pruned" and t.intermediate_values for t in pruned)


def test_hyperband_prunes_too(run: Callable[..., list[Outcome]], workers: FakeWorkers) -> None:
    run(pruner="hyperband", trials=12)
    assert workers.stopped


def test_a_diverged_trial_is_told_as_infinitely_bad(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    outcomes = run(search={"train.lr": {"choices": [0.01, 0.095]}}, per=[], trials=8)
    (study,) = searches(tmp_path / "runs" / "tiny" / "tune").values()
    assert {t.value == math.inf for t in study.trials if t.params["train.lr"] == 0.095} == {True}
    assert outcomes[0].winner is not None
    assert outcomes[0].winner.values == {"train.lr": 0.01}
    assert sum(outcomes[0].statuses.values()) == 8
    assert len(workers.started) == 2  # what was trained once serves every place that has its values


def test_a_point_without_a_finished_trial_has_no_winner(
    write_study: Callable[..., Path], workers: FakeWorkers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = TUNE | {"search": {"train.lr": {"low": 0.09, "high": 1}}, "trials": 2}
    file = write_study(vary=VARY, tune=block)
    assert main(["tune", str(file), "--results", str(tmp_path / "runs")]) == 1
    assert "no winner at rho=1.0: no trial finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"no winner for any trial; the file holds none at all"):
        load_study(write_study(vary=VARY, tuned="runs/tiny/tune/winners.yaml"))


def test_a_failed_trial_is_told_and_tried_again_by_the_next_run(
    write_study: Callable[..., Path], workers: FakeWorkers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = write_study(vary=VARY, tune=TUNE), ["--results", str(tmp_path / "runs"), "--json"]
    workers.fail = {2}
    assert main(["tune", str(file), *results]) == 1
    printed = capsys.readouterr()
    assert f"trial {workers.started[2]} failed: boo" in printed.err
    assert [point["statuses"].get("failed", 0) for point in json.loads(printed.out)] == [1, 0]
    assert main(["tune", str(file), *results]) == 0
    assert workers.started[12:] == [workers.started[2]]
    assert [sum(point["statuses"].values()) for point in json.loads(capsys.readouterr().out)] == [6, 6]


def test_several_slots_are_spread_over_the_points(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    alone = run("alone")
    workers.slots = 2
    workers.most_at_once.clear()
    assert run("together") == alone  # one trial at a time in each search: as reproducible as one slot
    assert dict(workers.most_at_once) == {1.0: 1, 0.0: 1}
    workers.slots = 5
    assert [sum(outcome.statuses.values()) for outcome in run("more")] == [6, 6]


def test_winners_at_an_edge_and_movements_are_said(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    search = {
        "train.lr": {"low": 1e-3, "high": 5e-3, "log": True},
        "train.batch_tokens": {"choices": ["256", 512, 1024]},
    }
    outcomes = run(search=search, trials=16)
    text = describe_outcomes(outcomes, load_study(tmp_path / "tiny.yaml").tune)  # type: ignore[arg-type]
    winners = [outcome.winner for outcome in outcomes if outcome.winner]
    assert "train.lr" in winners[1].edges  # 0.02 is out of range
    assert (
        f"warning: train.lr {winners[1].values['train.lr']} at rho=0.0 lies at the edge of what was searched (0.001 to "
        "0.005)" in text
    )
    assert "widen it and tune again: --set tune.search.train.lr.high=0.015" in text
    assert "Runs of another seed scatter more" in text
    assert [winner.seed for winner in winners] == [0, 0]
    assert (
        f"along rho: best train.lr between {winners[0].values['train.lr']} (rho=1.0) and "
        f"{winners[1].values['train.lr']} (rho=0.0)" in text
    )
    assert text.splitlines()[0].split()[:2] == ["rho", "trials"]
    assert all(winner.values["train.batch_tokens"] in (256, 512, 1024) for winner in winners)


def test_what_a_doubt_says_to_type_widens_that_end_and_nothing_else(write_study: Callable[..., Path]) -> None:
    search = {
        "train.lr": {"low": 1e-3, "high": 1e-2, "log": True},
        "train.warmup": {"low": 0.2, "high": 0.9},
        "train.final_lr": {"low": 0.5, "high": 1.0},
        "train.decay": {"low": 0.0, "high": 0.5},
    }
    file = write_study(vary=VARY, tune=TUNE | {"search": search})
    settings = load_study(file).tune
    assert settings
    values = {"train.lr": 0.00101, "train.warmup": 0.89, "train.final_lr": 1.0, "train.decay": 0.0}
    winner = Winner(at={"rho": 1.0}, values=values, val_loss=4.0, edges=tuple(search))
    near = {path: (value, value) for path, value in values.items()}
    text = describe_outcomes([Outcome({"rho": 1.0}, {"finished": 6}, winner, True, near)], settings)
    assert "1 is as far as this field goes" in text
    assert "0 is as far as this field goes" in text
    typed = [line.partition("--set ")[2] for line in text.splitlines() if "--set " in line]
    wider = load_study(file, dict(each.split("=") for each in typed)).tune
    assert wider
    expected = {
        "train.lr": settings.search["train.lr"].model_copy(update={"low": 0.000333333}),
        "train.warmup": settings.search["train.warmup"].model_copy(update={"high": 1.0}),
    }
    assert wider.search == settings.search | expected


def test_a_winner_that_learned_nothing_is_told(run: Callable[..., list[Outcome]], workers: FakeWorkers) -> None:
    search = {"train.lr": {"low": 1e-5, "high": 2e-4, "log": True}}  # losses from 5.68; equally likely tokens: 5.70
    outcomes = run(search=search, trials=4)
    text = describe_outcomes(outcomes, Tune.model_validate(TUNE | {"search": search}))
    assert [outcome.learned for outcome in outcomes] == [False, False]
    assert "warning: the best loss at rho=0.0 is that of equally likely tokens: its trials learned nothing" in text


@pytest.mark.parametrize(("frequencies", "told"), [(4.14, True), (4.16, False)])
def test_a_winner_that_knows_token_frequencies_alone_is_told(
    run: Callable[..., list[Outcome]],
    workers: FakeWorkers,
    monkeypatch: pytest.MonkeyPatch,
    frequencies: float,
    told: bool,
) -> None:
    monkeypatch.setattr("sparsemem.study.plan.corpora.token_frequency_loss", lambda tokens: frequencies)
    search = {"train.lr": {"choices": [0.004, 0.02]}}  # the best losses: 4.125
    text = describe_outcomes(run(search=search, trials=4), Tune.model_validate(TUNE | {"search": search}))
    alone = "warning: the best loss at rho=0.0 is not clearly below that of token frequencies alone (4.140 nats)"
    assert (alone in text) is told
    assert ("token frequencies" in text) is told


def test_winners_are_not_overwritten_without_a_word(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    run(trials=2)
    (written,) = tmp_path.rglob("winners.yaml")
    first = written.read_text(encoding="utf-8")
    said: list[str] = []
    again = run(trials=2, said=said)
    assert again
    assert not any("written anew" in line for line in said)
    run(trials=12, said=said)
    assert any("written anew with other values" in line for line in said)
    assert written.with_name("winners-before.yaml").read_text(encoding="utf-8") == first


def test_the_better_of_two_values_is_no_best(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    settings = load_study(tmp_path / "tiny.yaml").tune if (outcomes := run(trials=2)) else None
    assert settings
    text = describe_outcomes(outcomes, settings)
    for outcome in outcomes:
        assert outcome.winner
        assert outcome.winner.tried == {"train.lr": 2}
        assert outcome.winner.unbracketed == ("train.lr",)
        at = f"train.lr {outcome.winner.values['train.lr']} at rho={outcome.at['rho']}"
        assert (
            f"warning: {at} is the outermost of 2 values tried, so a better one may lie beyond; tune with more trials"
            in text
        )
    assert "--set tune.trials=4" in text
    assert "throughout" not in text
    assert [outcome.winner.unbracketed for outcome in run("more", trials=12) if outcome.winner] == [(), ()]


def test_movements_within_the_noise_are_called_that() -> None:
    def outcome(rho: float, rate: float, near: tuple[float, float]) -> Outcome:
        return Outcome({"rho": rho}, {"finished": 6}, winner(rho, rate), True, {"train.lr": near})

    def winner(rho: float, rate: float) -> Winner:
        return Winner(at={"rho": rho}, values={"train.lr": rate}, tried={"train.lr": 6})

    settings = Tune.model_validate(TUNE)
    apart = [outcome(1.0, 0.004, (0.003, 0.006)), outcome(0.0, 0.02, (0.01, 0.02))]
    assert movements(apart, settings, "train.lr") == [
        "along rho: best train.lr between 0.004 (rho=1.0) and 0.02 (rho=0.0), a factor of 5"
    ]
    tied = [outcome(1.0, 0.004, (0.003, 0.01)), outcome(0.0, 0.02, (0.008, 0.02))]
    assert movements(tied, settings, "train.lr")[0].endswith("overlap at all of them: no movement can be told")
    assert movements([apart[0], outcome(0.5, 0.004, (0.004, 0.004))], settings, "train.lr") == [
        "along rho: best train.lr is 0.004 throughout"
    ]


def test_what_is_searched_decides_which_trials_are_taken_up(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(trials=2)
    run(trials=2, search={"train.lr": {"low": 2e-3, "high": 0.1, "log": True}})
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "tiny" / "tune" / "journal.log"))
    )
    assert len(optuna.get_all_study_names(storage)) == 4
    (tmp_path / "corpus" / "00.txt").write_text("other words " * 2000)
    run(trials=3)  # on the tokens of before
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"its \d+ finished trials were trained on the corpus .*copy the folder"):
        run(trials=4)


def test_a_search_goes_on_under_a_version_with_a_new_field(write_study: Callable[..., Path]) -> None:
    class LaterTrial(Trial):
        new: int = 0

    class LaterTune(Tune):
        new: int = 0

    study = load_study(write_study(vary=VARY, tune=TUNE))
    assert study.tune is not None
    trial = study.trials()[0]
    now = search_digest(trial, study.tune)
    fields, settings = trial.model_dump(mode="json"), study.tune.model_dump(mode="json")
    assert search_digest(LaterTrial.model_validate(fields), LaterTune.model_validate(settings)) == now
    assert search_digest(LaterTrial.model_validate(fields | {"new": 1}), study.tune) != now


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tune": None}, "field `tune` is missing"),
        (
            {"tune": TUNE | {"search": {"train.batch_tokens": {"choices": [250]}}}},
            "must be a multiple of `data.context` 16",
        ),
        ({"tune": TUNE | {"search": {"train.schedule": {"choices": ["linear"]}}}}, "'linear'"),
        ({"tune": TUNE | {"search": {"train.batch_tokens": {"choices": [2**20]}}}}, "batch"),
        ({"run": {"cpus_per_trial": 4096}}, "lower it"),
    ],
)
def test_what_no_trial_can_have_is_refused_before_anything_is_written(
    write_study: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    words: str,
) -> None:
    file = write_study(**{"vary": VARY, "tune": TUNE} | fields)
    assert main(["tune", str(file), "--results", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# --- with real processes ----------------------------------------------------------------------------------------------


def _driver(file: Path, results: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparsemem", "tune", str(file), "--results", str(results), "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_a_real_search_trains_in_its_own_folders(write_study: Callable[..., Path], tmp_path: Path) -> None:
    file = write_study(vary={"rho": [1.0], "seed": [0, 1]}, tune=TUNE | {"trials": 2})
    process = _driver(file, tmp_path / "runs")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (point,) = json.loads(out)
    assert point["statuses"]["finished"] == 2
    assert "rho=1.0: lr 0.01 -> " in err
    trial = tmp_path / "runs" / "tiny" / "tune" / "trials" / point["winner"]["trial_id"]
    assert json.loads((trial / "result.json").read_text())["val_loss"] == point["winner"]["val_loss"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_driver_repeats_no_finished_trial(write_study: Callable[..., Path], tmp_path: Path) -> None:
    file = write_study(
        vary=VARY, tune=TUNE | {"trials": 4}, budget={"total_params": "30k", "active_params": "7k", "tokens": 20_000}
    )
    undisturbed = _driver(file, tmp_path / "undisturbed")
    out, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    trials = tmp_path / "runs" / "tiny" / "tune" / "trials"
    for results in (1, 4):
        process = _driver(file, tmp_path / "runs")
        deadline = time.monotonic() + 200
        while len(list(trials.glob("*/result.json"))) < results and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
        process.communicate()
    before = {path: path.stat().st_mtime_ns for path in trials.glob("*/result.json")}
    assert len(before) < 8
    resumed = _driver(file, tmp_path / "runs")
    again, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert again == out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(trials.glob("*/result.json"))) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bad_rate_is_stopped_before_its_end(write_study: Callable[..., Path], tmp_path: Path) -> None:
    budget = {"total_params": "30k", "active_params": "7k", "tokens": 200_000, "tolerance": "5%"}
    search = {"train.lr": {"low": 1e-6, "high": 0.02, "log": True}}
    file = write_study(
        vary={"rho": [1.0]}, tune=TUNE | {"trials": 5, "pruner": "asha", "search": search}, budget=budget
    )
    process = _driver(file, tmp_path / "runs")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    (point,) = json.loads(out)
    assert point["statuses"]["pruned"] >= 1
    for failure in (tmp_path / "runs" / "tiny" / "tune" / "trials").glob("*/failure.json"):
        assert json.loads(failure.read_text())["status"] == "pruned"
        assert not (failure.parent / "checkpoint.pt").exists()


@pytest.mark.skipif(not importlib.util.find_spec("optuna_dashboard"), reason="optuna-dashboard is not installed")
def test_optuna_dashboard_opens_the_journal(
    run: Callable[..., list[Outcome]], workers: FakeWorkers, tmp_path: Path
) -> None:
    run()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "optuna-dashboard"),
        str(tmp_path / "runs" / "tiny" / "tune" / "journal.log"),
    ]
    dashboard = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=10) as answer:
                    found = json.load(answer)["study_summaries"]
                break
            except OSError:
                assert dashboard.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert sorted(each["study_name"].partition(" [")[0] for each in found) == ["rho=0.0", "rho=1.0"]
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/studies/{found[0]['study_id']}?after=0", timeout=10
        ) as answer:
            trials = json.load(answer)["trials"]
        assert [trial["state"] for trial in trials] == ["Complete"] * TUNE["trials"]
    finally:
        dashboard.terminate()
        dashboard.wait()
