"""How far a trial is, from its files (`trial_files`: its folder's, or those of a packed trial) and nothing else:

- `result.json` -> finished or diverged; it is written last, so its presence means that the rest is there.
- its lock is held, or its `beat.json` changes (a machine with another disk, see `exchange`) -> running.
- `failure.json` -> failed or out_of_memory.
- `curve.csv` or a checkpoint -> interrupted: it goes on from there.
- nothing -> pending.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsemem.locks import is_held
from sparsemem.results import FINAL, TrialStatus
from sparsemem.trial_files import TrialFiles

BEAT_SECONDS = 3.0
LOST_BEATS = 10  # a busy machine or store may miss some


@dataclass(frozen=True)
class State:
    """How far a trial is."""

    status: TrialStatus
    result: Mapping[str, Any] = field(default_factory=dict)
    """Of a final trial: its `result.json`."""
    message: str = ""
    """Why a trial failed or diverged."""


def has_heartbeat(path: Path) -> bool:
    """Whether a process on another machine renewed this file a moment ago."""
    try:
        return time.time() - path.stat().st_mtime < LOST_BEATS * BEAT_SECONDS
    except FileNotFoundError:
        return False


def read_state(files: TrialFiles, trial_id: str) -> State:
    folder = files.folder / "trials" / trial_id
    try:
        result = _result(files, trial_id)
        return State(TrialStatus(result["status"]), result, str(result.get("why", "")))
    except (OSError, ValueError):
        pass  # none yet, or not a whole one: `begin` sets that aside
    if is_held(folder / "lock") or has_heartbeat(folder / "beat.json"):
        return State(TrialStatus.RUNNING)
    try:
        failure = json.loads((folder / "failure.json").read_text(encoding="utf-8"))
        return State(TrialStatus(failure["status"]), message=str(failure["message"]))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError):
        return State(TrialStatus.FAILED, message="failure.json cannot be read")
    began = (folder / "curve.csv").exists() or any(folder.glob("checkpoint*.pt"))
    return State(TrialStatus.INTERRUPTED if began else TrialStatus.PENDING)


def _result(files: TrialFiles, trial_id: str) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError: it is not the whole result of this trial.
    """
    result = json.loads(files.read(trial_id, "result.json"))
    if not isinstance(result, dict) or result.get("status") not in FINAL:
        raise ValueError(f"its status is not one of {', '.join(FINAL)}")
    if result.get("trial_id") != trial_id:
        raise ValueError(f"it is that of trial {result.get('trial_id')}")
    for name in ("val_loss", "val_bpb"):
        value = result.get(name)
        if result["status"] == TrialStatus.FINISHED and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"its {name} is {value!r}")
    if result["status"] == TrialStatus.FINISHED:
        text = files.read(trial_id, "val_losses.csv").decode()
        losses = [
            float(loss) for loss in text.replace("\n", ",").split(",")[3::2]
        ]  # two columns; millions of lines in a large study
        if not losses or not math.isclose(math.fsum(losses) / len(losses), result["val_loss"], rel_tol=1e-6):
            raise ValueError("val_losses.csv beside it is not the one it was made from")
    return result
