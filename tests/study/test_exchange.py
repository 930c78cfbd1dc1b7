"""Studies whose trials run on machines that share no disk with the driver: what arrives, and what survives."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from machine import Driver, table

from sparsemem import load_model
from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, Run, load_study
from sparsemem.study import launch
from sparsemem.study.engines.worker import run_job
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger
from sparsemem.study.remote import exchange, staging
from sparsemem.study.remote.storage import Storage, StorageAway
from sparsemem.train import loop

from .conftest import TINY, write_corpus

SLOW = {"total_params": "30k", "active_params": "7k", "tokens": 60_000, "tolerance": "5%"}  # a few seconds a trial
PATIENCE = 120.0


class Elsewhere:
    """An engine whose trials train in this process, as on a machine that knows neither the driver's folders nor its
    cache.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.ran: list[str] = []

    def __call__(self, jobs: Sequence[Job], run: Run) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEMEM_CACHE", str(self.cache))
            patch.setenv("OMP_NUM_THREADS", "1")
            for job in jobs:
                self.ran.append(job.trial_folder.name)
                study, tokens = job.trial_folder.parents[1].name, job.tokens_folder.name
                assert job.storage
                run_job(
                    Job(Path("/nowhere", study, "trials", self.ran[-1]), Path("/nowhere", tokens), job.storage), run
                )
        assert not list((self.cache / "scratch").iterdir())


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Elsewhere:
    engine = Elsewhere(tmp_path / "cache of the other machine")
    monkeypatch.setattr(launch, "find_engine", lambda name, address: engine)
    monkeypatch.setattr("sparsemem.api._report", lambda folder, say: None)
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(staging, "SEND_SECONDS", 0.01)
    monkeypatch.setattr(exchange, "FOLLOW_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "FIRST_PATIENCE_SECONDS", 0.5)
    return engine


def run(file: Path, results: str = "runs", said: list[str] | None = None) -> Ledger:
    return run_study(
        load_study(file), file.parent, file.parent / results, say=(said if said is not None else []).append
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results folder of the tiny study without a storage."""

    def here(jobs: Sequence[Job], run: Run) -> None:
        for job in jobs:
            run_job(job, run)

    base = tmp_path_factory.mktemp("undisturbed")
    write_corpus(base / "corpus")
    (base / "tiny.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(launch, "find_engine", lambda name, address: here)
        patch.setattr("sparsemem.api._report", lambda folder, say: None)
        return run(base / "tiny.yaml").folder


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Checkpoints after every step; `checkpoints(n)` ends the process, as it were, at the n-th step of all. Returns the
    steps taken.
    """
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_TIMES", 0)
    whole = loop.train_step

    def end_at(limit: int) -> list[int]:
        steps: list[int] = []

        def train_step(*arguments: Any) -> tuple[float, float]:
            steps.append(len(steps))
            if len(steps) == limit:
                raise KeyboardInterrupt
            time.sleep(0.03)
            return whole(*arguments)

        monkeypatch.setattr(loop, "train_step", train_step)
        return steps

    return end_at


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_a_study_over_a_storage_ends_as_one_without(
    write_study: Callable[..., Path], elsewhere: Elsewhere, undisturbed: Path, place: str
) -> None:
    file = write_study(run={"storage": place})
    ledger = run(file)
    assert table(ledger.folder) == table(undisturbed)
    there = Storage(place, "tiny").list()
    for id_ in elsewhere.ran:
        kept = {path.name for path in ledger.trial_folder(id_).iterdir()}
        assert kept - {"usage.csv"} == {
            "trial.yaml",
            "curve.csv",
            "val_losses.csv",
            "result.json",
        }  # use, where there is a memory
        assert {name.rpartition("/")[2] for name in there if f"/{id_}/" in name} == kept
    assert "driver.json" not in there
    run(file)
    assert len(elsewhere.ran) == 3


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_driver_on_another_machine_finds_what_was_trained(
    write_study: Callable[..., Path], elsewhere: Elsewhere, undisturbed: Path, place: str
) -> None:
    run(write_study(vary={"rho": [1.0, 0.5]}, run={"storage": place}))
    assert len(elsewhere.ran) == 2
    ledger = run(write_study(run={"storage": place}), "runs elsewhere")
    assert len(elsewhere.ran) == 3
    assert table(ledger.folder) == table(undisturbed)
    assert (ledger.trial_folder(elsewhere.ran[0]) / "trial.yaml").exists()


def test_the_result_of_a_trial_is_sent_after_all_else(
    write_study: Callable[..., Path], elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent, put = list[str](), Storage.put

    def recorded(self: Storage, path: Path, name: str) -> None:
        sent.append(path.name)
        put(self, path, name)

    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(exchange, "FOLLOW_SECONDS", 60.0)
    file = write_study(vary={"rho": [1.0]}, run={"storage": "shared"})  # relative to the study's file
    monkeypatch.setattr(Storage, "put", recorded)
    run(file)
    worker = sent[sent.index("curve.csv") : len(sent) - sent[::-1].index("result.json")]
    assert worker[-1] == "result.json"
    assert worker.count("result.json") == 1
    assert "val_losses.csv" in worker


def test_a_study_begun_without_a_storage_goes_on_with_one(
    write_study: Callable[..., Path], elsewhere: Elsewhere, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "runs" / "tiny")
    first, _, last = (row["trial_id"] for row in table(undisturbed))
    (tmp_path / "runs" / "tiny" / "trials" / last / "result.json").unlink()
    (tmp_path / "shared").mkdir()
    ledger = run(write_study(run={"storage": "shared"}))
    assert elsewhere.ran == [last]
    assert table(ledger.folder) == table(undisturbed)
    assert (
        tmp_path / "shared" / "tiny" / "trials" / first / "result.json"
    ).exists()  # for those who look from elsewhere


def test_trials_of_another_corpus_are_not_mixed_in(
    write_study: Callable[..., Path], elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    run(write_study(vary={"rho": [1.0]}, run={"storage": "shared"}))
    (tmp_path / "corpus" / "00.txt").write_text("other words " * 2000)
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "a new cache"))
    said: list[str] = []
    fetched = run(write_study(run={"storage": "shared"}), "a new machine", said)  # its tokens are in the storage
    assert any("goes on with the tokens that it began with" in line for line in said)
    assert len(fetched.texts()) == len(elsewhere.ran) - 2 == 1
    shutil.rmtree(tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    run(write_study(vary={"rho": [0.5]}, run={"storage": "shared"}), "another machine")
    with pytest.raises(ConfigError, match="were trained on the corpus"):
        run(write_study(run={"storage": "shared"}))


# --- what survives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("damage", [pytest.param("none", marks=pytest.mark.slow), "cut short"])
def test_a_trial_goes_on_elsewhere_from_its_checkpoint(
    write_study: Callable[..., Path],
    elsewhere: Elsewhere,
    undisturbed: Path,
    checkpoints: Callable[[int], list[int]],
    tmp_path: Path,
    place: str,
    damage: str,
) -> None:
    file = write_study(run={"storage": place})
    taken = checkpoints(12)
    with pytest.raises(KeyboardInterrupt):
        run(file)
    (id_,) = elsewhere.ran
    storage, name = Storage(place, "tiny"), f"trials/{id_}/checkpoint.pt"
    assert Ledger.read(tmp_path / "runs" / "tiny").state(id_).status == "interrupted"
    assert not list((tmp_path / "runs").rglob("checkpoint*"))
    whole = storage.read(name)
    if damage == "cut short":
        for generation in storage.list(f"trials/{id_}"):
            if "checkpoint" in generation:
                storage.write(generation, storage.read(generation)[:-1000])
    elsewhere.cache = tmp_path / "cache of a third machine"
    taken, said = checkpoints(-1), list[str]()
    ledger = run(file, said=said)
    assert table(ledger.folder) == table(undisturbed)
    steps = 3 * 16
    if damage == "none":
        assert len(taken) < steps
        assert not any("damaged" in line for line in said)
        assert not any("checkpoint" in name for name in storage.list())
    else:
        assert len(taken) == steps
        assert any(f"{name}.corrupt-1: a damaged checkpoint was found and set aside" in line for line in said)
        assert storage.read(f"{name}.corrupt-1") == whole[:-1000]


def test_a_damaged_result_in_a_storage_is_trained_again(
    write_study: Callable[..., Path], elsewhere: Elsewhere, undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    file = write_study(run={"storage": "shared"})
    run(file)
    (tmp_path / "shared" / "tiny" / "trials" / elsewhere.ran[1] / "val_losses.csv").write_text(
        "sequence,nats_per_token\n0,1.5\n"
    )
    ledger = run(file, "another machine")
    assert elsewhere.ran[3:] == elsewhere.ran[1:2]
    assert table(ledger.folder) == table(undisturbed)


def test_a_failed_trial_says_why_and_is_tried_again(
    write_study: Callable[..., Path], elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise ArithmeticError("no such luck")

    (tmp_path / "shared").mkdir()
    file = write_study(vary={"rho": [1.0]}, run={"storage": "shared"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", fail)
        with pytest.raises(ArithmeticError):
            run(file)
    state = Ledger.read(tmp_path / "runs" / "tiny").state(elsewhere.ran[0])
    assert (state.status, state.message) == ("failed", "no such luck")
    ledger = run(file)
    assert ledger.counts() == {"finished": 1}
    assert not list((tmp_path / "runs").rglob("failure.json"))
    assert not list((tmp_path / "shared").rglob("failure.json"))


def _at(taken: list[int], events: Mapping[int, Callable[[], object]]) -> Callable[..., tuple[float, float]]:
    """A training step before which, once so many have been taken, something happens."""
    step = loop.train_step

    def train_step(*arguments: Any) -> tuple[float, float]:
        events.get(len(taken), lambda: None)()
        return step(*arguments)

    return train_step


def test_a_storage_that_goes_away_while_training_is_made_up_for(
    write_study: Callable[..., Path],
    elsewhere: Elsewhere,
    undisturbed: Path,
    checkpoints: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    taken, (shared, away) = checkpoints(-1), (tmp_path / "shared", tmp_path / "unmounted")
    later = threading.Timer(1.0, lambda: away.rename(shared))
    monkeypatch.setattr(
        loop, "train_step", _at(taken, {3: lambda: shared.rename(away), 15: later.start})
    )  # the worker waits at the end
    shared.mkdir()
    ledger = run(write_study(vary={"rho": [1.0]}, run={"storage": "shared"}))
    assert [row["val_loss"] for row in table(ledger.folder)] == [table(undisturbed)[0]["val_loss"]]
    assert not away.exists()


def test_a_storage_that_stays_away_leaves_the_trial_to_go_on_later(
    write_study: Callable[..., Path],
    elsewhere: Elsewhere,
    undisturbed: Path,
    checkpoints: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    taken, (shared, away) = checkpoints(-1), (tmp_path / "shared", tmp_path / "unmounted")
    shared.mkdir()
    file = write_study(vary={"rho": [1.0]}, run={"storage": "shared"})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", _at(taken, {8: lambda: shared.rename(away)}))
        patch.setattr(staging, "Storage", functools.partial(Storage, patience=0.5))
        with pytest.raises(StorageAway):
            run(file)
    assert Ledger.read(tmp_path / "runs" / "tiny").counts() == {"interrupted": 1}
    assert not list((elsewhere.cache / "scratch").iterdir())
    away.rename(shared)
    taken = checkpoints(-1)
    assert table(run(file).folder)[0]["val_loss"] == table(undisturbed)[0]["val_loss"]
    assert len(taken) < 16


# --- who holds it, and who looks --------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_wherever_it_is_and_names_the_first(
    write_study: Callable[..., Path], elsewhere: Elsewhere, place: str, tmp_path: Path
) -> None:
    file, storage = write_study(run={"storage": place}), Storage(place, "tiny")
    storage.create()
    with (
        exchange.heartbeat(storage, "driver.json"),
        pytest.raises(ConfigError, match=rf"is being run by process {os.getpid()} on "),
    ):
        run(file)
    assert not (tmp_path / "runs").exists()
    assert not elsewhere.ran


def test_the_place_of_a_driver_that_was_killed_is_taken(
    write_study: Callable[..., Path], elsewhere: Elsewhere, tmp_path: Path
) -> None:
    (tmp_path / "shared" / "tiny").mkdir(parents=True)
    for left in ('{"process": 7, "machine": "gone", "beat": 7}', "{", ""):
        (tmp_path / "shared" / "tiny" / "driver.json").write_text(left)
        said = list[str]()
        run(write_study(vary={"rho": [1.0]}, run={"storage": "shared"}), said=said)
        assert any("process 7 on gone has not ended its run" in line for line in said) == ("gone" in left)
    assert len(elsewhere.ran) == 1


def test_a_storage_that_cannot_be_used_is_refused_and_nothing_written(
    write_study: Callable[..., Path], elsewhere: Elsewhere, tmp_path: Path
) -> None:
    nobody = "s3://bucket/x?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:9"
    for value in ("missing", str(tmp_path / "tiny.yaml"), "runs", nobody):
        if value == "runs":
            (tmp_path / "runs" / "tiny").mkdir(parents=True)
        with pytest.raises(ConfigError, match=r"`run\.storage` has the value"):
            run(write_study(run={"storage": value}))
        assert not list(tmp_path.rglob("trials.csv"))
    assert not elsewhere.ran


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_status_of_a_storage_is_that_of_its_study(
    write_study: Callable[..., Path],
    elsewhere: Elsewhere,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 1.1)  # an object store tells times to the second
    file = write_study(vary={"rho": [1.0, 0.5]}, run={"storage": place})
    folder = run(file).folder
    storage, (first, last) = Storage(place, "tiny"), elsewhere.ran
    storage.delete(f"trials/{last}/result.json")
    root, question, options = place.partition("?")
    address = f"{root}/tiny{question}{options}"
    for sign in (f"trials/{last}/beat.json", f"trials/{first}/beat.json"):
        storage.write(sign, b"of a worker that was killed")
    at = address if "://" in address else f"file://{address}"
    assert main(["status", at]) == 0
    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "finished" in shown[first]
    assert "interrupted" in shown[last]
    with exchange.heartbeat(storage, f"trials/{last}/beat.json"):
        assert main(["status", at]) == 0
        assert "1 running" in capsys.readouterr().out
    if "://" not in address:  # the folder itself is one that `status` reads
        assert main(["status", address]) == 0
        assert "1 of 2 trials done" in capsys.readouterr().out
    storage.delete(f"trials/{last}/beat.json")
    assert main(["status", at, "--watch"]) == 0
    assert main(["status", str(folder)]) == 0
    assert main(["status", at.replace("/tiny", "/other")]) == 2
    assert "holds no study" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_kept_model_arrives_with_its_result(
    write_study: Callable[..., Path], elsewhere: Elsewhere, place: str
) -> None:
    file = write_study(run={"storage": place, "keep_models": [0.5]})
    ledger = run(file)
    half = next(row["trial_id"] for row in ledger.rows if row["rho"] == 0.5)
    assert [path.parent.name for path in ledger.folder.rglob("model.safetensors")] == [half]
    assert load_model(ledger.trial_folder(half)).val_loss == ledger.state(half).result["val_loss"]
    root, question, options = place.partition("?")
    address = f"{root}/tiny{question}{options}"
    with exchange.mirrored(address if "://" in address else f"file://{address}") as folder:
        assert (folder / "trials" / half / "result.json").exists()
        assert not list(folder.rglob("model.safetensors"))  # an onlooker has no need of it


def test_names_from_a_storage_do_not_leave_the_results_folder(tmp_path: Path) -> None:
    names = [
        "../out.json",
        "trials/../../out.json",
        "/out.json",
        "trials/0123456789ab/../../../out.json",
        "trials/0123456789ab/a/b.csv",
    ]

    class Hostile(Storage):
        def list(self, folder: str = "") -> dict[str, tuple[int, int]]:
            return dict.fromkeys([*names, "trials/0123456789ab/curve.csv"], (1, 1))

        def get(self, name: str, path: Path) -> None:
            path.parent.mkdir(parents=True)
            path.write_text(name)

    (tmp_path / "results").mkdir()
    exchange.Follower(tmp_path / "results").pull(Hostile("/nowhere", "tiny"))
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [Path("results/trials/0123456789ab/curve.csv")]


# --- real processes ---------------------------------------------------------------------------------------------------


def _worker(job: Job, cache: Path) -> subprocess.Popen[bytes]:
    train = (
        "import sys; from pathlib import Path; from sparsemem.config import Run; from sparsemem.study.jobs import Job\n"
        "from sparsemem.study.engines.worker import run_job\n"
    )
    train += "run_job(Job(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]), Run())"
    command = [sys.executable, "-c", train, str(job.trial_folder), str(job.tokens_folder), str(job.storage)]
    return subprocess.Popen(command, env=os.environ | {"SPARSEMEM_CACHE": str(cache)})


@pytest.mark.slow
def test_two_workers_on_one_trial_leave_one_whole_result(
    write_study: Callable[..., Path], elsewhere: Elsewhere, tmp_path: Path
) -> None:
    jobs = list[Job]()
    (tmp_path / "shared").mkdir()
    file = write_study(run={"storage": "shared"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "find_engine", lambda name, address: lambda given, run: jobs.extend(given))
        run(file)
    workers = [_worker(jobs[0], tmp_path / cache) for cache in ("one", "one", "another")]
    assert [worker.wait(PATIENCE) for worker in workers] == [0, 0, 0]
    ledger = run(file)
    assert elsewhere.ran == [job.trial_folder.name for job in jobs[1:]]
    assert ledger.counts() == {"finished": 3}


def _trainer(driver: Driver, storage: Storage) -> int:
    """Wait until a trial is trained, as its beat and its curve in the storage tell; its process."""

    def there() -> int | None:
        for name in storage.list():
            with contextlib.suppress(
                FileNotFoundError, ProcessLookupError
            ):  # it has ended, or is left of one that was killed
                if (
                    name.endswith("/beat.json")
                    and storage.read(f"{PurePosixPath(name).parent}/curve.csv").count(b"\n") > 3
                ):
                    os.kill(process := json.loads(storage.read(name))["process"], 0)
                    return int(process)
        return None

    return int(driver.wait_for(there, "no trial started"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_drivers_and_workers_and_a_server_that_stops_change_nothing(
    write_study: Callable[..., Path],
    start: Callable[..., Driver],
    s3_server: tuple[subprocess.Popen[str], str],
    tmp_path: Path,
) -> None:
    server, options = s3_server
    uri = f"s3://bucket/{tmp_path.name}?{options}"
    assert start(write_study("here.yaml", budget=SLOW), "local", tmp_path / "undisturbed").end()[0] == 0
    study, runs, storage = write_study(budget=SLOW, run={"storage": uri}), tmp_path / "runs", Storage(uri, "tiny")

    driver = start(study, "local", runs)
    _trainer(driver, storage)
    driver.process.kill()  # its workers end with it
    assert driver.end()[0] == -signal.SIGKILL

    driver = start(study, "local", runs)
    os.kill(_trainer(driver, storage), signal.SIGKILL)
    server.send_signal(signal.SIGSTOP)
    time.sleep(60)
    server.send_signal(signal.SIGCONT)
    code, _, err = driver.end()
    assert code == 0, err
    assert table(runs / "tiny") == table(tmp_path / "undisturbed" / "tiny")
    assert not any("checkpoint" in name or "beat" in name or "driver" in name for name in storage.list())


@pytest.mark.slow
def test_ray_trains_over_a_storage_too(
    write_study: Callable[..., Path], start: Callable[..., Driver], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    code, _, err = start(write_study(run={"storage": "shared"}), "ray", tmp_path / "runs").end()
    assert code == 0, err
    assert table(tmp_path / "runs" / "tiny") == table(undisturbed)
    assert {path.name for path in tmp_path.rglob("trials/*/*")} <= {
        "trial.yaml",
        "curve.csv",
        "usage.csv",
        "val_losses.csv",
        "result.json",
    }
