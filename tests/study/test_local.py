"""Processes of the local engine: what they come to, and who dies with whom. Only processes that a test started are
ended, by their id.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsemem.config import Run
from sparsemem.study.engines.local import Workers, _devices
from sparsemem.study.jobs import Job

PATIENCE = 120.0
ENDLESS = {"total_params": "30k", "active_params": "7k", "tokens": "1B", "tolerance": "5%"}

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(Run(max_failures=0)) as found:
        yield found


def _until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def _end(workers: Workers) -> list[Job]:
    return list(_until(lambda: workers.ended(0.1)))


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _trained(job: Job) -> Any:
    """Wait until its process trains."""
    return _until((job.trial_folder / "curve.csv").exists)


def _failure(job: Job) -> str:
    return str(json.loads((job.trial_folder / "failure.json").read_text())["message"])


def test_trials_are_forked_one_after_another_from_a_process_with_one_thread(
    workers: Workers, make_job: Callable[..., Job]
) -> None:
    server, first, second = workers._process.pid, make_job("first"), make_job("second")
    workers.start(first)
    _trained(first)
    (process,) = _children(server)
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1
    assert _end(workers) == [first]
    workers.start(second)
    _trained(second)
    assert _children(server) != [process]
    assert _end(workers) == [second]
    results = [json.loads((job.trial_folder / "result.json").read_text()) for job in (first, second)]
    assert results[0]["val_loss"] == results[1]["val_loss"]
    assert not (first.trial_folder / "log.txt").exists()


def test_a_diverged_trial_is_a_result(workers: Workers, make_job: Callable[..., Job]) -> None:
    job = make_job(train={"batch_tokens": 256, "lr": 1e35, "warmup": 0})
    workers.start(job)
    assert _end(workers) == [job]
    assert json.loads((job.trial_folder / "result.json").read_text())["status"] == "diverged"
    assert not (job.trial_folder / "failure.json").exists()


def test_a_trial_that_fails_leaves_word_and_its_log_and_the_next_one_trains(
    workers: Workers, make_job: Callable[..., Job]
) -> None:
    broken, unreadable, sound = make_job("broken"), make_job("unreadable"), make_job("sound")
    (broken.trial_folder / "result.json").mkdir()
    (unreadable.trial_folder / "trial.yaml").write_text("seed: -1")
    for job in (broken, unreadable, sound):
        workers.start(job)
        assert _end(workers) == [job]
    assert "Is a directory" in _failure(broken)
    assert "Is a directory" in (broken.trial_folder / "log.txt").read_text()
    assert _failure(unreadable) == "its process ended with exit code 1; log.txt in its folder says more"
    assert "seed" in (unreadable.trial_folder / "log.txt").read_text()
    assert (sound.trial_folder / "result.json").exists()


def test_a_killed_trial_is_named_with_its_signal(workers: Workers, make_job: Callable[..., Job]) -> None:
    job = make_job(budget=ENDLESS)
    workers.start(job)
    _trained(job)
    os.kill(_children(workers._process.pid)[0], signal.SIGKILL)
    assert _end(workers) == [job]
    assert _failure(job) == "killed by signal 9 (often: out of memory)"


@pytest.mark.slow
def test_a_failing_trial_is_started_again_so_often(make_job: Callable[..., Job]) -> None:
    job = make_job()
    (job.trial_folder / "result.json").mkdir()
    with Workers(Run(max_failures=2)) as workers:
        workers.start(job)
        assert _end(workers) == [job]
    assert (job.trial_folder / "log.txt").read_text().count("Traceback") >= 3


def test_a_stopped_trial_is_gone_when_the_call_returns_and_its_slot_is_free(
    workers: Workers, make_job: Callable[..., Job]
) -> None:
    job, free = make_job(budget=ENDLESS), workers.free
    workers.start(job)
    _trained(job)
    (process,) = _children(workers._process.pid)
    workers.stop(job)
    assert not _alive(process)
    assert workers.free == free
    assert workers.ended(0.0) == []


def test_leaving_ends_every_process(make_job: Callable[..., Job]) -> None:
    job = make_job(budget=ENDLESS)
    with Workers(Run()) as workers:
        server = workers._process.pid
        workers.start(job)
        _trained(job)
        (process,) = _children(server)
    assert not _alive(server)
    assert not _alive(process)


@pytest.mark.slow
def test_a_killed_server_takes_its_trials_with_it_and_they_are_started_again(make_job: Callable[..., Job]) -> None:
    job = make_job(budget=ENDLESS)
    with Workers(Run(max_failures=1)) as workers:
        workers.start(job)
        _trained(job)
        server = workers._process.pid
        (process,) = _children(server)
        os.kill(server, signal.SIGKILL)
        assert workers.ended(PATIENCE) == []
        assert _until(lambda: not _alive(process))
        assert _until(lambda: _children(workers._process.pid)) != [process]
        os.kill(workers._process.pid, signal.SIGKILL)
        assert workers.ended(PATIENCE) == [job]
        assert _failure(job) == "the process that starts trials was killed by signal 9, and this one with it"


def test_a_server_that_cannot_start_is_an_error(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    with Workers(Run()) as workers:
        workers.start(make_job())
        with pytest.raises(ChildProcessError, match="exit code 1"):
            _end(workers)


@pytest.mark.slow
def test_everything_dies_with_a_driver_that_is_killed(make_job: Callable[..., Job]) -> None:
    job = make_job(budget=ENDLESS)
    code = "import sys, pathlib; from sparsemem.study.jobs import Job\n"
    code += "from sparsemem.study.engines.local import run_trials\n"
    code += "from sparsemem.config import Run; run_trials([Job(*map(pathlib.Path, sys.argv[1:]))], Run())"
    driver = subprocess.Popen([sys.executable, "-c", code, str(job.trial_folder), str(job.tokens_folder)])
    _trained(job)
    (server,) = _children(driver.pid)
    (process,) = _children(server)
    assert os.getsid(process) != os.getsid(driver.pid)  # Ctrl-C in the driver's terminal reaches the driver alone
    driver.kill()
    driver.wait()
    assert _until(lambda: not _alive(server) and not _alive(process))


def test_gpus_are_granted_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [_devices(0.25, slot) for slot in range(8)] == ["0"] * 4 + ["1"] * 4
    assert [_devices(2, slot) for slot in range(2)] == ["0,1", "2,3"]
    assert _devices(0, 3) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [_devices(2, slot) for slot in range(2)] == ["4,5", "6,7"]
