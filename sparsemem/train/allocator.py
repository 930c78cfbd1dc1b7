"""Memory that a process asks for: kept once it is freed, and told apart from other failures where there is none."""

from __future__ import annotations

import ctypes
import platform

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc malloc.h
_NEVER = 2**31 - 1
CONTEXT_BYTES = (
    600 * 2**20
)  # of a process on a GPU, outside torch's allocator: 0.3 to 0.5 GB with what is loaded as it is needed


def keep_freed_memory() -> None:
    """Serve large blocks from the heap and never shrink it. Does nothing where the C library is not glibc.

    On Linux, glibc otherwise hands every large tensor back to the kernel and faults it in anew: measured on the quick
    study's step (docs/LOG.md), 10.2k tokens/s before, 14.8k after, on one thread.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)


def is_out_of_memory(error: Exception) -> bool:
    """Of the processor or of a GPU. On a CPU, and outside torch's own allocator on a GPU, the text of a RuntimeError
    alone says so.
    """
    texts = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


def claim_gpus(number: int, share: float) -> None:
    """Make sure that torch sees so many GPUs, and take no more of one than a share of its memory.

    Args:
        share: of one GPU; 1: all of it. The CUDA context counts, which torch's own limit leaves out (pytorch/pytorch,
            issue 58466).

    Raises:
        RuntimeError: there are fewer.
        ValueError: the share does not even hold a context.
    """
    seen = torch.cuda.device_count()
    if seen < number:
        why = "" if torch.version.cuda else ": this build has no CUDA"
        raise RuntimeError(
            f"the trial takes {number} GPU{'s' * (number > 1)}, but PyTorch {torch.__version__} sees {seen} here{why}; "
            "install a CUDA build of PyTorch for the workers, or train on the processor with `run.gpus_per_trial: 0`"
        )
    if share < 1:
        total = torch.cuda.get_device_properties(0).total_memory
        if share * total <= CONTEXT_BYTES:
            raise ValueError(
                f"field `run.gpus_per_trial` has the value {share:g}: of {total:,} bytes that is less than a CUDA "
                f"context takes, about {CONTEXT_BYTES:,}; raise it"
            )
        torch.cuda.set_per_process_memory_fraction(share - CONTEXT_BYTES / total)
