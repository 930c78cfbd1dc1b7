"""Checkpoints: everything a trial needs to go on bit for bit. Written atomically, checked by digest, read without unpickling objects.

A file is the SHA-256 of the rest (32 bytes), then what `torch.save` wrote: torch itself does not notice a flipped bit in a tensor.
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


def save(path: Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, text, lists and mappings only: that is all `load` accepts."""
    payload = io.BytesIO()
    torch.save(state, payload)
    digest = hashlib.sha256(payload.getbuffer()).digest()
    write_atomically(path, lambda file: (file.write(digest), file.write(payload.getbuffer())))


def load(path: Path, trial_id: str, corpus: str, adopt: Callable[[dict[str, Any]], None]) -> bool:
    """Hand the state of this trial on this corpus (its digest) to `adopt`. Returns whether there was one to use.

    A checkpoint that cannot be used, or that `adopt` raises at, is named on stderr and set aside.
    """
    if not path.exists():
        return False
    try:
        content = path.read_bytes()
        digest, payload = content[:32], content[32:]
        if hashlib.sha256(payload).digest() != digest:
            raise ValueError("it is cut short or damaged")
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        if state["trial_id"] != trial_id:
            raise ValueError(f"it belongs to trial {state['trial_id']}")
        if state["corpus"] != corpus:
            raise ValueError(f"it was trained on the corpus {state['corpus']}, not {corpus}")
        adopt(state)
    except Exception as error:  # a checkpoint of other code fails in many ways; all of them mean: begin again
        aside = set_aside(path)
        print(f"{path}: not a usable checkpoint ({error}); set aside as {aside.name}, the trial starts again", file=sys.stderr)
        return False
    return True
