"""What a study on one machine survives, with real processes. After each fault every trial is finished once and
`trials.csv` is, times aside, that of a run to which nothing happened; no process and no file is left over.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from machine import Audit, Driver, drivers, leftovers, small_disk, table, undisturbed, write_study
from soak import soak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes through /proc"),
]

both_engines = pytest.mark.parametrize("engine", ["local", "ray"])
Begin = Callable[..., Driver]
Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEMEM_CACHE", str(folder / "cache"))
        yield write_study(folder)


@pytest.fixture(scope="module")
def expected(study: Path) -> Rows:
    return undisturbed(study, study.parent / "undisturbed")


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Starts drivers, all with results in one folder."""
    (tmp_path / "runs").mkdir()
    with drivers() as start:
        yield lambda study, engine, **faults: start(study, engine, tmp_path / "runs", marks=tmp_path, **faults)


def ends_well(driver: Driver, expected: Rows) -> str:
    """Wait for a driver that must finish its study; what it said."""
    audit = Audit(driver.folder)
    while driver.process.poll() is None:
        audit.look()
        time.sleep(0.05)
    code, _, err = driver.end()
    assert code == 0, err
    assert table(driver.folder) == expected
    assert leftovers(driver.folder) == []
    assert driver.orphans() == []
    assert set(audit.look().values()) == {1}
    return err


# --- a trial's process ------------------------------------------------------------------------------------------------

MOMENTS = [
    *("half curve.csv", "step 30", "half checkpoint.pt", "after checkpoint.pt", "after checkpoint.previous.pt"),
    *("half val_losses.csv", "half result.json", "after result.json"),
]


@both_engines
def test_a_trial_killed_at_any_moment_changes_no_result(
    tmp_path: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    driver = begin(write_study(tmp_path, run={"max_failures": len(MOMENTS)}), engine, moments=MOMENTS)
    for _ in MOMENTS:
        process = driver.at(MOMENTS)
        assert process.kind == "trial"
        assert driver.kill(process)
        driver.wait_for(lambda pid=process.pid: not driver.carries(pid), "it lives on")
    ends_well(driver, expected)


@both_engines
def test_a_trial_that_is_killed_again_and_again_ends_as_failed_and_the_others_finish(
    tmp_path: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    """As by the kernel where memory runs out."""
    study = write_study(tmp_path, run={"max_failures": 1})
    driver = begin(study, engine)
    process, trial = driver.training()
    driver.kill(process)
    again = driver.wait_for(
        lambda: (found := driver.training())[0].pid != process.pid and found[1] == trial and found[0],
        "not started again",
    )
    driver.kill(again)
    code, _, err = driver.end()
    assert code == 1
    assert f"trial {trial.name} failed: " in err
    assert "killed" in json.loads((trial / "failure.json").read_text())["message"]
    assert {row["trial_id"]: row["status"] for row in table(driver.folder)} == {
        row["trial_id"]: "failed" if row["trial_id"] == trial.name else "finished" for row in expected
    }
    assert driver.orphans() == []
    ends_well(begin(study, engine), expected)


# --- the driver -------------------------------------------------------------------------------------------------------


@both_engines
def test_a_driver_killed_while_it_writes_leaves_a_folder_that_runs(
    study: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    moments = ["half study.yaml", "half data.json", "half trial.yaml", "half trials.csv"]
    for moment in moments:
        driver = begin(study, engine, moments=moments)
        process = driver.at([moment])
        assert process.kind == "driver"
        driver.kill(process)
        assert driver.orphans() == []
        driver.end()
    ends_well(begin(study, engine), expected)


@both_engines
def test_a_driver_interrupted_or_killed_while_it_trains_takes_its_processes_with_it(
    study: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    driver = begin(study, engine)
    driver.training()
    driver.process.send_signal(signal.SIGINT)
    code, _, err = driver.end()
    assert code == 130
    assert f"sparsemem run {study} --engine {engine}" in err
    assert driver.orphans() == []

    driver = begin(study, engine)
    driver.training()
    scratch = re.findall(r"/tmp/sparsemem-ray-\w+", " ".join(process.command for process in driver.processes()))
    assert bool(scratch) == (engine == "ray")
    driver.process.kill()
    second = begin(study, engine)  # at once: a worker that is still there is waited for
    assert driver.orphans() == []
    driver.end()
    ends_well(second, expected)
    assert not any(Path(folder).exists() for folder in scratch)


def test_of_two_drivers_one_is_refused_by_name_also_when_both_begin_at_once(
    study: Path, expected: Rows, begin: Begin
) -> None:
    both = [begin(study, "local"), begin(study, "local")]
    while not (
        trials := [(driver, process) for driver in both for process in driver.processes() if process.kind == "trial"]
    ):
        time.sleep(0.01)
    runs, trial = trials[0]
    runs.kill(trial, signal.SIGSTOP)  # or the study may be at its end before the other drivers are there
    for refused in (next(driver for driver in both if driver is not runs), begin(study, "local")):
        code, _, err = refused.end()
        assert code == 2, err
        assert f"is being run by process {runs.process.pid} on" in err
    runs.kill(trial, signal.SIGCONT)
    ends_well(runs, expected)


# --- Ray --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raylet", "gcs"])
def test_a_ray_that_is_killed_ends_the_driver_with_words_and_the_next_one_goes_on(
    study: Path, expected: Rows, begin: Begin, kind: str
) -> None:
    """Ray itself waits: for ever for a raylet, and a minute for its control store."""
    driver = begin(study, "ray")
    driver.training()
    (vital,) = (process for process in driver.processes() if process.kind == kind)
    driver.kill(vital)
    code, _, err = driver.end()
    assert code == 1
    assert "was killed; the same command goes on" in err
    assert driver.orphans() == []
    ends_well(begin(study, "ray"), expected)


# --- the disk and the clock -------------------------------------------------------------------------------------------


@both_engines
def test_a_full_disk_is_named_and_once_there_is_space_the_same_run_ends_alike(
    tmp_path: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    study = write_study(tmp_path, run={"max_failures": 0})
    with ExitStack() as held:
        try:
            held.enter_context(small_disk(tmp_path / "runs", "16m"))
        except PermissionError as error:
            pytest.skip(str(error))
        driver = begin(study, engine)
        driver.wait_for(lambda: list(driver.folder.glob("trials/*/checkpoint.pt")), "no checkpoint")
        with open(tmp_path / "runs" / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
            while ballast.write(bytes(4096)):
                pass
        code, _, err = driver.end()
        assert code == 1
        assert "disk full" in err
        assert driver.orphans() == []
        assert list(driver.folder.glob("trials/*/checkpoint*.pt"))
        (tmp_path / "runs" / "ballast").unlink()
        ends_well(begin(study, engine), expected)


@both_engines
def test_a_wall_clock_that_jumps_by_years_changes_nothing(
    study: Path, expected: Rows, begin: Begin, engine: str
) -> None:
    ends_well(begin(study, engine, clock=True), expected)


# --- all at once ------------------------------------------------------------------------------------------------------


@both_engines
def test_a_small_soak_ends_as_the_undisturbed_run(tmp_path: Path, engine: str) -> None:
    study = write_study(tmp_path, vary={"rho": [1.0, 0.5], "seed": [0, 1, 2, 3]})
    found = soak(
        study,
        engine,
        tmp_path / "runs",
        5.0 if engine == "local" else 9.0,
        0,
        undisturbed(study, tmp_path / "undisturbed"),
    )
    assert found["equal_to_undisturbed"]
    assert (found["finished"], found["twice"], found["lost"], found["processes_left"], found["files_left"]) == (
        8,
        0,
        0,
        0,
        [],
    )
    assert found["killed"] > 0
