"""Ranks: processes with the same weights that train one trial together, each on its part of every batch. A process
alone is one rank.

A divided batch keeps its meaning: whatever a single process sums over the batch (gradients, experts' loads, batch
statistics) is summed over the ranks too. That the sums are taken in another order is the only difference. It must not
know models.

Shape letters: R rows of a table, C width of a row, U rows that were read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(days=1)  # the first rank evaluates and saves alone; that a rank has died is noticed otherwise

_ranks, _rank = 1, 0
_sharded = False


@contextmanager
def process_group(rendezvous: Path, rank: int, ranks: int, device: torch.device) -> Iterator[None]:
    """Be one of several ranks, all on this machine; traffic stays on loopback.

    Args:
        meeting: a file that does not exist yet, through which they find each other.
        device: of this rank alone.
    """
    global _ranks, _rank
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store = dist.FileStore(str(rendezvous), ranks)  # type: ignore[attr-defined]
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    _ranks, _rank = ranks, rank
    try:
        yield
    finally:
        _ranks, _rank = 1, 0
        dist.destroy_process_group()


def ranks() -> int:
    return _ranks


def rank() -> int:
    """0 is the first: it alone evaluates and writes files."""
    return _rank


def broadcast(number: int, device: torch.device) -> int:
    """The first rank's number."""
    told = torch.tensor(number, device=device)
    if _ranks > 1:
        dist.broadcast(told, src=0)
    return int(told)


@contextmanager
def shard(rows: int) -> Iterator[slice]:
    """This rank's part of a batch of so many rows; inside, `all_reduce` and `all_reduce_gradients` sum over the ranks.

    A batch of fewer rows than ranks, as a last one may be, is trained whole by each.
    """
    global _sharded
    _sharded = 1 < _ranks <= rows
    try:
        yield slice(rows * _rank // _ranks, rows * (_rank + 1) // _ranks) if _sharded else slice(0, rows)
    finally:
        _sharded = False


def is_sharded() -> bool:
    return _sharded


def all_reduce(part: Tensor) -> Tensor:
    """Sum over the parts of a divided batch, alike in every rank; gradients flow back to every part."""
    return _Total.apply(part) if _sharded else part


def all_reduce_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the parts of a divided batch: dense ones in one go, sparse ones row by row."""
    if not _sharded:
        return
    held = [weight for weight in weights if weight.grad is not None]
    dense = [weight.grad for weight in held if weight.grad is not None and not weight.grad.is_sparse]
    flat = torch.cat([gradient.flatten() for gradient in dense])
    dist.all_reduce(flat)
    for gradient, part in zip(dense, flat.split([gradient.numel() for gradient in dense]), strict=True):
        gradient.copy_(part.view_as(gradient))
    for weight in held:
        if weight.grad is not None and weight.grad.is_sparse:
            weight.grad = _summed(weight.grad.coalesce())


def _summed(gradient_RC: Tensor) -> Tensor:
    """Sum of sparse gradients, coalesced. Rows are gathered in the order of the ranks, so that every rank adds them up
    alike.
    """
    rows_U, values_UC = gradient_RC.indices()[0], gradient_RC.values()
    own = torch.tensor([len(rows_U)], device=rows_U.device)
    counts = [torch.empty_like(own) for _ in range(_ranks)]
    dist.all_gather(counts, own)
    most = max(int(count) for count in counts)
    rows, values = (
        torch.cat([each[: int(count)] for each, count in zip(_gathered(part, most), counts, strict=True)])
        for part in (rows_U, values_UC)
    )
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, gradient_RC.shape, check_invariants=False).coalesce()


def _gathered(part: Tensor, length: int) -> list[Tensor]:
    """The part of every rank, each filled up to so many rows."""
    padded = part.new_zeros(length, *part.shape[1:])
    padded[: len(part)] = part
    gathered = [torch.empty_like(padded) for _ in range(_ranks)]
    dist.all_gather(gathered, padded)
    return gathered


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        whole = grad.clone()
        dist.all_reduce(whole)
        return whole
