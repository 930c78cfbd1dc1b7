"""A process that trains one trial after another is made as new in between: nothing of a trial may show in the next
one's result.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import torch

_RANDOM_STATE = torch.get_rng_state()  # of a new process


def make_as_new() -> None:
    """Hand freed memory back, forget the largest memory so far (on Linux), and take the random state of a
    new process.
    """
    torch.set_rng_state(_RANDOM_STATE)
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
