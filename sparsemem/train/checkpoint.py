"""Checkpoints: everything a trial needs to go on bit for bit. Written atomically, read without unpickling objects."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from sparsemem.files import set_aside, write_atomically


def save(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, text, lists and mappings only: that is all `load` accepts."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, trial_id: str, corpus: str) -> dict[str, Any] | None:
    """The state of this trial on this corpus (its digest), or None where there is none to use.

    A checkpoint that cannot be used is named on stderr and set aside.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["trial_id"] != trial_id:
            raise ValueError(f"it belongs to trial {state['trial_id']}")
        if state["corpus"] != corpus:
            raise ValueError(f"it was trained on the corpus {state['corpus']}, not {corpus}")
    except Exception as error:  # torch reports damage by many kinds of error; all of them mean: begin again
        aside = set_aside(path)
        print(f"{path}: not a usable checkpoint ({error}); set aside as {aside.name}, the trial starts again", file=sys.stderr)
        return None
    return dict(state)
