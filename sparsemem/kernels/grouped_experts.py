"""The experts that each token has chosen, dropless: tokens are sorted by expert and multiplied in groups.

Shape letters: S tokens, D model width, E experts, K experts a token, A rows of assignments (S x K, or some more), F
inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.counting import occurrences
from sparsemem.kernels import REFERENCE
from sparsemem.kernels.matmul import fast, matmul
from sparsemem.kernels.swiglu import gated, gated_backward, swiglu_reference

WIDE, BUSY, STEP = (
    2**15,
    128,
    32,
)  # numbers in an expert's first matrix, tokens an expert, rows by which a group grows: see `_Groups`
MOST_EXPERTS = {
    "cuda": 1023
}  # of one grouped product: torch's kernel prepares them in one block of threads and refuses more


def grouped_experts(
    x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor
) -> Tensor:
    """Sum over each token's experts of gate * SwiGLU expert(x): (S, D).

    Args:
        experts_SK: which experts.
        gate_up_EDF: (E, D, 2F), gate first.
    """
    form = grouped_experts_reference if REFERENCE else _Experts.apply
    return form(x_SD, gates_SK, experts_SK, gate_up_EDF, down_EFD)


def grouped_experts_reference(
    x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor
) -> Tensor:
    y_SD = torch.zeros_like(x_SD)
    for expert, (gate_up_DF, down_FD) in enumerate(zip(gate_up_EDF, down_EFD, strict=True)):
        tokens, place = (experts_SK == expert).nonzero(as_tuple=True)
        own = swiglu_reference(x_SD[tokens] @ gate_up_DF) @ down_FD
        y_SD = y_SD.index_add(0, tokens, own * gates_SK[tokens, place].unsqueeze(-1))
    return y_SD


class _Experts(torch.autograd.Function):
    """y = sum over the token's experts of (gate inner) down, where inner = silu(x gate_up's first half) * (x gate_up's
    second half).

    Assignments are sorted by expert into consecutive rows. The gate multiplies the F inner values instead of the D
    outputs; with h = x gate_up and g = dy down^T: d gate = g . inner, d inner = gate g, and the products' own gradients
    from there. A row may stand for no assignment: it reads token 0 and has a gate of zero, so that nothing comes of it.
    Sums over a token's experts gather from its rows, which is faster than a scatter and has a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor
    ) -> Tensor:
        order, rows_A, groups = _sort(experts_SK.flatten(), gate_up_EDF)
        rows_SK = torch.empty_like(order).scatter_(0, order, rows_A).view_as(experts_SK)
        tokens_A = order.new_zeros(groups.rows).index_copy_(0, rows_A, order // experts_SK.shape[1])
        gates_A1 = gates_SK.new_zeros(groups.rows).index_copy_(0, rows_A, gates_SK.flatten()[order]).unsqueeze(-1)
        hiddens, y_AD = [], _Whole(groups.rows)
        parts = zip(*groups.split(tokens_A, gates_A1), *groups.each(gate_up_EDF, down_EFD), groups.ends, strict=True)
        for tokens, gates, gate_up, down, ends in parts:
            hiddens.append(_product(x_SD.index_select(0, tokens), gate_up, ends))
            y_AD.take(_product(gated(hiddens[-1]).mul_(gates), down, ends))
        ctx.groups = groups
        ctx.save_for_backward(x_SD, gates_A1, tokens_A, rows_SK, gate_up_EDF, down_EFD, *hiddens)
        return _gather_sum(y_AD.tensor, rows_SK)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        groups: _Groups = ctx.groups
        x_SD, gates_A1, tokens_A, rows_SK, gate_up_EDF, down_EFD, *hiddens = ctx.saved_tensors
        into_x_AD, into_gates_A = _Whole(groups.rows), _Whole(groups.rows)
        into_gate_up_EDF, into_down_EFD = _Whole(len(gate_up_EDF)), _Whole(len(down_EFD))
        parts = zip(
            *groups.split(tokens_A, gates_A1), *groups.each(gate_up_EDF, down_EFD), hiddens, groups.ends, strict=True
        )
        for tokens, gates, gate_up, down, hidden, ends in parts:
            gradient, (gate, up) = gradient_SD.index_select(0, tokens), hidden.chunk(2, dim=-1)
            activated = F.silu(gate)
            inner = activated * up
            into_scaled = _product(gradient, down.mT, ends)
            into_gates_A.take((into_scaled * inner).sum(-1))
            into_hidden = gated_backward(into_scaled.mul_(gates), hidden, activated)
            into_down_EFD.take(_weight_gradient(inner.mul_(gates), gradient, ends))
            into_gate_up_EDF.take(_weight_gradient(x_SD.index_select(0, tokens), into_hidden, ends))
            into_x_AD.take(_product(into_hidden, gate_up.mT, ends))
        into_x_SD, into_gates_SK = _gather_sum(into_x_AD.tensor, rows_SK), into_gates_A.tensor[rows_SK]
        return into_x_SD, into_gates_SK, None, into_gate_up_EDF.tensor, into_down_EFD.tensor


def _sort(chosen_A: Tensor, weight_EDF: Tensor) -> tuple[Tensor, Tensor, _Groups]:
    """The assignments in the order of their experts, their rows in that order, and the groups of rows."""
    experts, D, inner = weight_EDF.shape
    order = chosen_A.argsort(stable=True)  # assignments of expert 0 first, then of expert 1, ...
    load_E, rows_A = occurrences(chosen_A, experts), torch.arange(chosen_A.numel(), device=chosen_A.device)
    one_by_one = fast(weight_EDF) and D * inner >= WIDE and chosen_A.numel() >= BUSY * experts
    if not one_by_one and weight_EDF.dtype != torch.float64:  # which torch's grouped product does not take
        return order, rows_A, _together(load_E, chosen_A.numel())
    room_E = (load_E.clamp(min=1) + STEP - 1) // STEP * STEP
    free_E = room_E - load_E
    rows_A += (free_E.cumsum(0) - free_E).repeat_interleave(load_E)
    return order, rows_A, _Groups(room_E.tolist(), [None] * experts)


def _together(load_E: Tensor, rows: int) -> _Groups:
    """All experts at once, or as many as the device multiplies at once."""
    parts = load_E.split(MOST_EXPERTS.get(load_E.device.type, len(load_E)))
    sizes = [rows] if len(parts) == 1 else torch.stack([part.sum() for part in parts]).tolist()
    return _Groups(sizes, [part.cumsum(0).to(torch.int32) for part in parts])


@dataclass(frozen=True)
class _Groups:
    """Rows of each expert, in the parts that are multiplied at once: all experts, by torch's grouped product, or one
    after the other.

    One after the other they go through oneDNN (`kernels.matmul`), and what belongs to an expert stays in the cache of a
    core: faster where experts are wide and many tokens come to each, slower where they are narrow. It compiles a kernel
    for each number of rows: groups grow in steps so that these are few.
    """

    sizes: list[int]
    """Rows of each part."""
    ends: Sequence[Tensor | None]
    """Of each part: where the rows of each of its experts end, int32; None: it is one expert."""

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def split(self, *of_rows: Tensor) -> Iterator[Sequence[Tensor]]:
        return (rows.split(self.sizes) for rows in of_rows)

    def each(self, *weights: Tensor) -> Iterator[Sequence[Tensor]]:
        if self.ends[0] is None:
            return (weight.unbind(0) for weight in weights)
        return (weight.split([len(ends) for ends in self.ends if ends is not None]) for weight in weights)


def _product(x: Tensor, weight: Tensor, ends_E: Tensor | None) -> Tensor:
    """Rows of a part times the matrix of their expert."""
    if ends_E is None:
        return matmul(x, weight.T)
    return F.grouped_mm(x, weight, offs=ends_E) if len(x) else x.new_empty(0, weight.shape[-1])


def _weight_gradient(x: Tensor, gradient: Tensor, ends_E: Tensor | None) -> Tensor:
    """Of a part's experts: one, (1, ., .), or all."""
    if ends_E is None:
        return matmul(x.T, gradient.T).unsqueeze(0)
    if not len(x):
        return x.new_zeros(len(ends_E), x.shape[1], gradient.shape[1])
    into_weight = F.grouped_mm(x.T, gradient, offs=ends_E)
    return into_weight if x.device.type == "cpu" else _without_idle(into_weight, ends_E)


def _without_idle(into_weight: Tensor, ends_E: Tensor) -> Tensor:
    """Zero for an expert without rows. A Blackwell GPU leaves there what was in memory before (pytorch/pytorch, issue
    172439).
    """
    idle_E = ends_E == F.pad(ends_E[:-1], (1, 0))
    return into_weight.masked_fill_(idle_E.view(-1, 1, 1), 0.0)


class _Whole:
    """A tensor out of the parts. Each is copied to its place while the cache still holds it, and the next one takes its
    memory.
    """

    def __init__(self, length: int) -> None:
        """`length`: of the first dimension."""
        self.tensor = torch.empty(0)
        self._length, self._taken = length, 0

    def take(self, part: Tensor) -> None:
        """What comes next along the first dimension."""
        if len(part) == self._length:
            self.tensor, self._taken = part, self._length  # parts without rows may follow
            return
        if not self._taken:
            self.tensor = part.new_empty(self._length, *part.shape[1:])
        self.tensor[self._taken : self._taken + len(part)] = part
        self._taken += len(part)


def _gather_sum(x_AD: Tensor, rows_SK: Tensor) -> Tensor:
    return F.embedding_bag(rows_SK, x_AD, mode="sum")
