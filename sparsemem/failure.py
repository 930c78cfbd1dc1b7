"""The last word of a trial that did not end well: `failure.json` in its folder, left by the trial itself or by what ran it."""

from __future__ import annotations

from pathlib import Path

from sparsemem.files import or_warn, write_json


def record_failure(trial_folder: Path, message: str, status: str = "failed", traceback: str = "", *, unless_known: bool = False) -> None:
    """Leave word of what went wrong; where that is impossible too, say so on stderr. Other trials go on.

    Args:
        status: `failed`, `out_of_memory`, `interrupted` or `pruned`.
        unless_known: keep a word that is there already, which was nearer to the cause.
    """

    def write() -> None:
        path = trial_folder / "failure.json"
        if not (unless_known and path.exists()):
            write_json(path, {"status": status, "message": message, "traceback": traceback})

    or_warn(write)
