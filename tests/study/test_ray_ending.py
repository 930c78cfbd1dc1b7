"""Whatever Ray raises for one trial ends that trial only, and nothing of what Ray says of the machine is kept."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from machine import Driver, table

exceptions = pytest.importorskip("ray.exceptions")

from sparsemem.study.engines.ray_ending import LOST, as_known, each_error_ends_one_trial, record_ending  # noqa: E402

NODE = "b48bc716279edf365b7e5e8b0f20d361a5bf011665eca9bc07591517"
SAID = f"killed on the node (IP: 10.20.30.40, ID: {NODE}), pid=4711, python -m secret /home/ann/project"
ERRORS = [
    exceptions.OutOfMemoryError(SAID),
    exceptions.NodeDiedError(SAID),
    exceptions.RuntimeEnvSetupError(SAID),
    exceptions.ActorUnschedulableError(SAID),
    exceptions.OwnerDiedError(NODE, None, SAID),
    exceptions.ObjectLostError(NODE, None, SAID),
    exceptions.WorkerCrashedError(),
    exceptions.LocalRayletDiedError(),
    exceptions.RaySystemError(SAID),
    exceptions.ActorPlacementGroupRemoved(),
    ValueError(SAID),  # an answer that cannot be read
]
by_kind = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@by_kind
@pytest.mark.parametrize("moment", ["_actor_task_failed", "_actor_start_failed"])
def test_tune_takes_any_error_for_the_end_of_one_trial(error: Exception, moment: str) -> None:
    """In both of the moments in which an error reaches it: while a trial's process begins, and while it trains."""
    from ray.air.execution._internal.actor_manager import RayActorManager

    seen: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, exception: seen.append(exception))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=None)
    manager: Any = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    before = getattr(RayActorManager, moment)
    with each_error_ends_one_trial():
        subject = {"tracked_actor_task": task} if moment == "_actor_task_failed" else {"tracked_actor": actor}
        getattr(RayActorManager, moment)(manager, exception=error, **subject)  # as Ray calls them
    assert getattr(RayActorManager, moment) is before
    assert [type(each) for each in seen] == [exceptions.RayActorError]


@by_kind
def test_the_kind_of_an_error_is_kept_and_nothing_of_the_machine(error: Exception, tmp_path: Path) -> None:
    lost = record_ending(tmp_path, pickle.loads(pickle.dumps(as_known(error))))  # Tune keeps it so
    assert lost == (type(error).__name__ in LOST)
    if lost:
        assert not (tmp_path / "failure.json").exists()
        return
    text = (tmp_path / "failure.json").read_text()
    failure = json.loads(text)
    assert failure["status"] == ("out_of_memory" if isinstance(error, exceptions.OutOfMemoryError) else "failed")
    assert failure["status"] == "out_of_memory" or type(error).__name__ in failure["message"]
    assert not re.search(rf"10\.20|{NODE}|4711|secret|ann", text)


@pytest.mark.parametrize(
    ("cause", "status", "message"),
    [(MemoryError("no room"), "out_of_memory", "no room"), (AssertionError(), "failed", "AssertionError")],
)
def test_an_error_of_the_trials_own_is_told_in_its_words(
    tmp_path: Path, cause: Exception, status: str, message: str
) -> None:
    error = exceptions.RayTaskError("step", SAID, cause, pid=4711, ip="10.20.30.40")
    assert not record_ending(tmp_path, error)
    assert json.loads((tmp_path / "failure.json").read_text()) == {
        "status": status,
        "message": message,
        "traceback": "",
    }


def test_a_process_that_could_not_begin_says_why(tmp_path: Path) -> None:
    error = exceptions.RayActorError(
        NODE, f"{SAID}\nModuleNotFoundError: No module named 'sparsemem'\n", actor_init_failed=True
    )
    record_ending(tmp_path, error)
    message = json.loads((tmp_path / "failure.json").read_text())["message"]
    assert message == "its process could not begin: ModuleNotFoundError: No module named 'sparsemem'"


@pytest.mark.slow
def test_a_memory_monitor_that_kills_ends_its_trials_only(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    code, _, err = start(write_study(run={"max_failures": 0}), "ray", tmp_path / "runs").end()
    assert code == 1
    assert "Traceback" not in err
    folder = tmp_path / "runs" / "tiny"
    assert {row["status"] for row in table(folder)} == {"out_of_memory"}
    assert all(
        re.search(r"the machine ran out of memory; let fewer", path.read_text())
        for path in folder.glob("trials/*/failure.json")
    )
