"""Where the rows of a memory live. Today: in the device of the model, updated only where they were read.

- Looking up: rows side by side (Engram, n-gram embedding).
- Pooling and dot products (product-key memories): a token reads many rows of one table and keeps their weighted sum, or
  each row's product with a vector. Neither holds more than some of the rows that were read, and the gradient of the
  table comes out summed by row, which spares the optimiser the sorting of what was read. A weighted sum's forward,
  backward and that sum by row, for 2048 tokens and 32 rows of 32 values each, take 3.2 ms of one core; with torch's
  `embedding_bag` 5.3 ms, by gathering and multiplying 8.2 ms.

Shape letters: B sequences, T positions, H tables (one for each order and head), R rows of all tables, C width of a row;
S tokens, M rows that a token reads, A reads (S x M), G slices of a row, P groups of reads, U distinct rows that were
read, N sums.
"""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsemem.counting import occurrences
from sparsemem.parameter import parameter

CPU_NUMBERS, GPU_NUMBERS = (
    2**18,
    2**26,
)  # in the rows that are multiplied at a time: on a CPU twice 1 MB, which stays in its cache


class Reads:
    """Which rows each token reads. What the sums need to know about their order is found once, for all tables of these
    rows.
    """

    def __init__(self, rows_SM: Tensor, groups_SM: Tensor | None = None, groups: int = 1) -> None:
        """
        Args:
            rows_SM: row numbers, int64; a token may read a row more than once.
            groups_SM: group of each read, below `groups`, which are pooled apart; None: one group.
        """
        self.tokens, self.groups = len(rows_SM), groups
        self.rows_A = rows_SM.flatten()
        token_S1 = torch.arange(self.tokens, device=rows_SM.device).unsqueeze(1)
        self.tokens_A = token_S1.expand_as(rows_SM).contiguous().flatten()
        self.first_S = token_S1.squeeze(1) * rows_SM.shape[1]
        self.places_A = self.tokens_A if groups_SM is None else (token_S1 * groups + groups_SM).flatten()

    @cached_property
    def by_place(self) -> tuple[Tensor | slice, Tensor]:
        """The reads in an order in which those of one token and group are neighbours, and where each token and group
        begins.
        """
        if self.groups == 1:
            return slice(None), self.first_S
        count_N = occurrences(self.places_A, self.tokens * self.groups)
        return self.places_A.int().argsort(stable=True), count_N.cumsum(0) - count_N

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct rows, the reads in an order in which those of one row are neighbours, and where
        each row begins.
        """
        return _runs(self.rows_A)


class MemoryTable(nn.Module):
    """Several tables of one row width, stored as one.

    The gradient of `rows_RC` is sparse: it holds the rows that were looked up, so that the optimiser's time does not
    grow with the rows that were not. `train.optim` recognises such parameters by their attribute `sparse_gradient`.
    """

    first_H: Tensor

    def __init__(self, rows: tuple[int, ...], width: int, std: float, rate: tuple[float, float] | None = None) -> None:
        """
        Args:
            rows: number of rows of each table.
            rate: factors of the learning rate at the start and at the end of training; None: `train.table_lr_factor`.
        """
        super().__init__()
        self.rows_RC = parameter(sum(rows), width, std=std)
        self.rows_RC.sparse_gradient = True  # type: ignore[attr-defined]
        self.rows_RC.rate = rate  # type: ignore[attr-defined]
        self.rows_RC.register_post_accumulate_grad_hook(_mark_coalesced)
        self.register_buffer("first_H", torch.tensor([0, *accumulate(rows[:-1])]), persistent=False)

    def forward(self, rows_BTH: Tensor) -> Tensor:
        """Row numbers (B, T, H), each counted within its own table -> the rows side by side, (B, T, H * C)."""
        return _Lookup.apply(self.rows_RC, rows_BTH + self.first_H).flatten(-2)

    def pool(self, reads: Reads, weights_SMG: Tensor) -> Tensor:
        """Sum over a token's reads of weight x row, for each group apart: (S, P, C). Slice g of a row is weighted by
        weight g.
        """
        weights_GA = weights_SMG.flatten(0, 1).T.contiguous().to(self.rows_RC.dtype)
        return _Pool.apply(self.rows_RC, weights_GA, reads).view(reads.tokens, reads.groups, -1)

    def dot(self, reads: Reads, x_SC: Tensor) -> Tensor:
        """Dot product of each row that a token reads with the token's vector: (S, M)."""
        return _Dot.apply(self.rows_RC, x_SC.contiguous().to(self.rows_RC.dtype), reads).view(reads.tokens, -1)


# --- sums and products over reads, and each other's gradients ---------------------------------------------------------


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RC: Tensor, rows_BTH: Tensor) -> Tensor:
        ctx.save_for_backward(rows_BTH)
        ctx.shape = table_RC.shape
        return F.embedding(rows_BTH, table_RC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, None]:
        (rows_BTH,) = ctx.saved_tensors
        rows_U, order_A, first_U = _runs(rows_BTH.flatten())
        sums_UC = F.embedding_bag(order_A, grad_BTHC.flatten(0, -2), first_U, mode="sum")
        return _coalesced(rows_U, sums_UC, ctx.shape), None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RC: Tensor, weights_GA: Tensor, reads: Reads) -> Tensor:
        ctx.save_for_backward(table_RC, weights_GA)
        ctx.reads = reads
        order_A, first_N = reads.by_place
        return _weighted_sums(table_RC, reads.rows_A[order_A], weights_GA[:, order_A], first_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, Tensor, None]:
        (table_RC, weights_GA), reads = ctx.saved_tensors, ctx.reads
        grad_NC = grad_NC.contiguous()
        grad_weights_GA = _products(table_RC, reads.rows_A, grad_NC, reads.places_A, len(weights_GA))
        return _table_gradient(table_RC, reads, grad_NC, reads.places_A, weights_GA), grad_weights_GA, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_RC: Tensor, x_SC: Tensor, reads: Reads) -> Tensor:
        ctx.save_for_backward(table_RC, x_SC)
        ctx.reads = reads
        return _products(table_RC, reads.rows_A, x_SC, reads.tokens_A, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1A: Tensor) -> tuple[Tensor, Tensor, None]:
        (table_RC, x_SC), reads = ctx.saved_tensors, ctx.reads
        grad_x_SC = _weighted_sums(table_RC, reads.rows_A, grad_1A, reads.first_S)
        return _table_gradient(table_RC, reads, x_SC, reads.tokens_A, grad_1A), grad_x_SC, None


def _weighted_sums(source_RC: Tensor, rows_A: Tensor, weights_GA: Tensor, first_N: Tensor) -> Tensor:
    """Sum over neighbouring reads of weight x row, (N, C); sum n begins at read `first_N[n]`."""
    G, A = weights_GA.shape
    first_GN = first_N + A * torch.arange(G, device=first_N.device).unsqueeze(1)
    narrow, rows_GA = source_RC.view(len(source_RC) * G, -1), _slices(rows_A, G)
    sums_GNC = F.embedding_bag(
        rows_GA.flatten(), narrow, first_GN.flatten(), per_sample_weights=weights_GA.flatten(), mode="sum"
    )
    return sums_GNC.view(G, len(first_N), -1).transpose(0, 1).flatten(1)


def _products(source_RC: Tensor, rows_A: Tensor, other_NC: Tensor, places_A: Tensor, slices: int) -> Tensor:
    """Dot product of each row that is read with its place's vector, slice by slice: (G, A)."""
    reads = max(1, (CPU_NUMBERS if source_RC.device.type == "cpu" else GPU_NUMBERS) // source_RC.shape[1])
    products = []
    for rows, places in zip(rows_A.split(reads), places_A.split(reads), strict=True):
        products.append(
            source_RC.index_select(0, rows).mul_(other_NC.index_select(0, places)).view(len(rows), slices, -1).sum(-1)
        )
    return torch.cat(products).T


def _slices(rows_A: Tensor, slices: int) -> Tensor:
    """Slices of rows are rows of a narrower table: their numbers, (G, A)."""
    return (
        rows_A.unsqueeze(0)
        if slices == 1
        else rows_A * slices + torch.arange(slices, device=rows_A.device).unsqueeze(1)
    )


def _table_gradient(table_RC: Tensor, reads: Reads, other_NC: Tensor, places_A: Tensor, weights_GA: Tensor) -> Tensor:
    """Sum over a row's reads of weight x its place's vector, for the rows that were read: sparse and coalesced."""
    rows_U, order_A, first_U = reads.by_row
    sums_UC = _weighted_sums(other_NC, places_A[order_A], weights_GA[:, order_A], first_U)
    return _coalesced(rows_U, sums_UC, table_RC.shape)


def _runs(rows_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct rows, the reads in an order in which those of one row are neighbours, and where each row begins."""
    sorted_A, order_A = rows_A.int().sort(stable=True)
    rows_U, count_U = torch.unique_consecutive(sorted_A, return_counts=True)
    return rows_U.long(), order_A, count_U.cumsum(0) - count_U


def _coalesced(rows_U: Tensor, values_UC: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows_U.unsqueeze(0), values_UC, shape, is_coalesced=True, check_invariants=False)


def _mark_coalesced(table_RC: Tensor) -> None:
    """A gradient that autograd takes over forgets that it is coalesced (rising rows, none twice); the optimiser would
    sort it again.
    """
    gradient = table_RC.grad
    if gradient is None or not gradient.is_sparse:
        return
    rows_1U = gradient._indices()
    if bool((rows_1U[0, 1:] > rows_1U[0, :-1]).all()):
        table_RC.grad = _coalesced(rows_1U[0], gradient._values(), gradient.shape)
