"""What an error of Ray's means for the trial that it came of. It must not know studies.

What Ray says of an error names addresses, nodes and the command lines of other processes: nothing of it is kept but the
kind of the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemem.failure import record_failure
from sparsemem.results import TrialStatus
from sparsemem.study.remote.storage import StorageAway

LOST = (
    "NodeDiedError",
    "LocalRayletDiedError",
    "ActorUnschedulableError",
    "ActorPlacementGroupRemoved",
    "TaskPlacementGroupRemoved",
)
"""Errors of a node, which a trial is not to blame for."""
RAISED = "raised: "


@contextmanager
def each_error_ends_one_trial() -> Iterator[None]:
    """Let Tune take any error for the end of the one trial that it came of.

    Of its own accord it knows two kinds of errors only. At another, such as `OutOfMemoryError`, it ends the whole run
    by a RuntimeError while the trial is training, and loses the kind of the error where the trial has not begun.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager

    before = {name: getattr(RayActorManager, name) for name in ("_actor_task_failed", "_actor_start_failed")}

    def known(method: Callable[..., None]) -> Callable[..., None]:
        return lambda manager, exception, **subject: method(manager, exception=as_known(exception), **subject)

    try:
        for name, method in before.items():
            setattr(RayActorManager, name, known(method))
        yield
    finally:
        for name, method in before.items():
            setattr(RayActorManager, name, method)


def as_known(error: Exception) -> Exception:
    """An error of a kind that Tune knows, for one of another kind, which it names."""
    from ray.exceptions import RayActorError, RayTaskError

    return (
        error
        if isinstance(error, RayActorError | RayTaskError)
        else RayActorError("", f"{RAISED}{type(error).__name__}")
    )


def record_ending(trial_folder: Path, error: Any) -> bool:
    """Leave word of the error that a trial ended with. Returns whether it was its node's: then nothing is left."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):  # raised in the trial's process
        cause = error.cause
        ended_by = ((StorageAway, TrialStatus.INTERRUPTED), (MemoryError, TrialStatus.OUT_OF_MEMORY))
        status = next((status for kind, status in ended_by if isinstance(cause, kind)), TrialStatus.FAILED)
        record_failure(trial_folder, str(cause) or type(cause).__name__, status, unless_known=True)
        return False
    text = str(error)
    kind = text.removeprefix(RAISED) if text.startswith(RAISED) else ""
    if kind in LOST or "its node has died" in text:
        return True
    if kind == "OutOfMemoryError" or "running low on memory" in text:
        remedy = "let fewer trials run at once (`run.max_concurrent`, `run.memory_per_trial`) or choose a smaller model"
        record_failure(
            trial_folder, f"ended by Ray: the machine ran out of memory; {remedy}", TrialStatus.OUT_OF_MEMORY
        )
    elif kind or not isinstance(error, RayActorError):
        record_failure(trial_folder, f"ended by Ray: {kind or type(error).__name__}", unless_known=True)
    elif error.actor_init_failed:
        record_failure(trial_folder, f"its process could not begin: {text.strip().splitlines()[-1].strip()}")
    else:
        record_failure(trial_folder, "its process was killed (often: out of memory)")
    return False
