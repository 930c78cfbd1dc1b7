"""Checkpoints: everything a trial needs to go on bit for bit. Written atomically, checked by digest, read without
unpickling objects.

Two generations are kept, so that a damaged file costs one interval and not the trial; on the disk that is twice a
checkpoint, never more. A file is the SHA-256 of the rest (32 bytes), then what `torch.save` wrote: torch itself does
not notice a flipped bit in a tensor.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsemem.files import set_aside, write_atomically
from sparsemem.train.allocator import is_out_of_memory

LAST, PREVIOUS = GENERATIONS = ("checkpoint.pt", "checkpoint.previous.pt")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, text, lists and mappings only: that is all `load` accepts.

    Raises:
        OSError: it cannot be written. What was the last checkpoint is the previous one then.
    """
    payload = io.BytesIO()
    torch.save(state, payload)
    digest = hashlib.sha256(payload.getbuffer()).digest()
    if (folder / LAST).exists():
        (folder / LAST).replace(
            folder / PREVIOUS
        )  # before the new one is written: there is never need for a third one's space
    write_atomically(folder / LAST, lambda file: (file.write(digest), file.write(payload.getbuffer())))


def load(folder: Path, trial_id: str, corpus: str, adopt: Callable[[dict[str, Any]], None]) -> bool:
    """Hand the latest usable state of this trial on this corpus (its digest) to `adopt`. Returns whether there was one.

    A checkpoint that cannot be used, or that `adopt` raises at, is named on stderr and set aside.

    Raises:
        Exception: want of memory (`allocator.is_out_of_memory`), or a disk that cannot be read at the moment; nothing
            is set aside.
    """
    for path in (folder / name for name in GENERATIONS):
        if not path.exists():
            continue
        try:
            adopt(_read(path, trial_id, corpus))
            return True
        except Exception as error:  # a checkpoint of other code fails in many ways; all of them mean: not this one
            if isinstance(error, OSError) or is_out_of_memory(error):  # says nothing of the checkpoint
                raise
            aside = set_aside(path)
            print(f"{path}: not a usable checkpoint ({error}); set aside as {aside.name}", file=sys.stderr)
    return False


def remove(folder: Path) -> None:
    """All generations, the older first: what is left by a kill in between is the latest."""
    for name in reversed(GENERATIONS):
        (folder / name).unlink(missing_ok=True)


def _read(path: Path, trial_id: str, corpus: str) -> dict[str, Any]:
    content = path.read_bytes()
    digest, payload = content[:32], content[32:]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("it is cut short or damaged")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if state["trial_id"] != trial_id:
        raise ValueError(f"it belongs to trial {state['trial_id']}")
    if state["corpus"] != corpus:
        raise ValueError(f"it was trained on the corpus {state['corpus']}, not {corpus}")
    return state
