"""Mixture of experts: DeepSeekMoE's shared and fine-grained routed experts (arXiv 2401.06066), dropless.

Tokens are sorted by expert and multiplied in groups, so every token reaches all of its top-k experts whatever the load.

- Gates: sigmoid affinities (DeepSeek-V3) or a softmax over experts (DeepSeekMoE, OLMoE).
- Balance: a bias added for the selection only and moved against the load (arXiv 2408.15664), an auxiliary loss, or both.
- A router z-loss (arXiv 2202.08906) keeps the logits small.

Shape letters: S tokens of the batch, D model width, E routed experts, K experts a token (top-k), A rows of assignments (S x K,
or some more), F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.counting import occurrences
from sparsemem.layers.best import best
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account, gated, gated_backward
from sparsemem.layers.product import fast, linear, product
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.parameter import parameter, residual_std

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.mechanisms.moe import MoE

WIDE, BUSY, STEP = 2**15, 128, 32  # numbers in an expert's first matrix, tokens an expert, rows by which a group grows: see `_Groups`
MOST_EXPERTS = {"cuda": 1023}  # of one grouped product: torch's kernel prepares them in one block of threads and refuses more


class MixtureOfExperts(SparseLayer):
    """Routed experts beside the shared ones.

    Buffers:
        bias_E: selection bias of loss-free balancing; not a trained parameter, not counted.
        load_E: assignments to each expert since `end_step` was last called; only training adds to it.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: Model, routed_experts: int, shared_width: int) -> None:
        super().__init__()
        self.config: MoE = config.pools["moe"]
        width, inner = config.width, self.config.expert_width
        out_std = residual_std(config.init_std, config.layers)
        self.router_ED = parameter(routed_experts, width, std=config.init_std)
        self.gate_up_EDF = parameter(routed_experts, width, 2 * inner, std=config.init_std)
        self.down_EFD = parameter(routed_experts, inner, width, std=out_std)
        self.shared = FeedForward(config, shared_width) if shared_width else None
        self.register_buffer("bias_E", torch.zeros(routed_experts))
        self.register_buffer("load_E", torch.zeros(routed_experts, dtype=torch.int64))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> the layer's output (B, T, D) and its weighted auxiliary loss, a scalar. Experts do not look at token ids."""
        x_SD = x_BTD.flatten(0, -2)
        gates_SK, experts_SK, auxiliary = self.route(x_SD)
        y_BTD = self.routed(x_SD, gates_SK, experts_SK).view_as(x_BTD)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), auxiliary

    def route(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of each token: gates (S, K), expert indices (S, K), weighted auxiliary loss."""
        with torch.autocast(x_SD.device.type, enabled=False):  # in bf16 near-equal affinities would tie
            dtype = torch.promote_types(x_SD.dtype, torch.float32)
            logits_SE = linear(x_SD.to(dtype), self.router_ED.to(dtype))
        affinity_SE = logits_SE.sigmoid() if self.config.gate == "sigmoid" else logits_SE.softmax(-1)
        _, experts_SK = best(affinity_SE.detach() + self.bias_E, self.config.top_k)
        gates_SK = affinity_SE.gather(-1, experts_SK)
        if self.config.normalize_gates:
            gates_SK = _normalized(gates_SK)
        load_E = parallel.total(occurrences(experts_SK.flatten(), logits_SE.shape[-1]))  # of the whole batch
        if self.training:
            self.load_E += load_E
        return gates_SK.to(x_SD.dtype), experts_SK, self._auxiliary(logits_SE, affinity_SE, load_E)

    def routed(self, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
        """Sum over each token's experts of gate times expert output, (S, D)."""
        device = x_SD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SD.dtype
        return _Experts.apply(x_SD.to(dtype), gates_SK.to(dtype), experts_SK, self.gate_up_EDF.to(dtype), self.down_EFD.to(dtype))

    @torch.no_grad()
    def end_step(self) -> None:
        """Move the selection bias one step against the load seen since the last call, then forget that load.

        `imbalance` keeps the largest load over the mean one, for the log: 1 is perfect balance.
        """
        load_E = self.load_E.float()
        self.imbalance = float(load_E.max() / load_E.mean())
        self.bias_E += self.config.bias_rate * torch.sign(load_E.mean() - load_E)
        self.load_E.zero_()

    def reads(self) -> Iterator[tuple[nn.Parameter, int]]:
        return ((weight, self.config.top_k) for weight in (self.gate_up_EDF, self.down_EFD))

    def _auxiliary(self, logits_SE: Tensor, affinity_SE: Tensor, load_E: Tensor) -> Tensor:
        loss = logits_SE.new_zeros(())
        if self.config.balance_loss:  # experts x sum of (share of assignments x mean probability); 1 when balanced
            probability_E = _normalized(affinity_SE).mean(0)
            loss = loss + self.config.balance_loss * load_E.numel() * torch.dot(load_E / load_E.sum(), probability_E)
        if self.config.z_loss:
            loss = loss + self.config.z_loss * logits_SE.logsumexp(-1).square().mean()
        return loss


def _normalized(affinity: Tensor) -> Tensor:
    """Divided by their sum; those that have underflowed, as sigmoids at logits of -90 do, count alike in place of 0/0."""
    affinity = affinity.clamp_min(1e-35)  # above the denormals, which may be flushed to zero
    return affinity / affinity.sum(-1, keepdim=True)


class _Experts(torch.autograd.Function):
    """y = sum over the token's experts of (gate inner) down, where inner = silu(x gate_up's first half) * (x gate_up's second half).

    Assignments are sorted by expert into consecutive rows. The gate multiplies the F inner values instead of the D outputs; with
    h = x gate_up and g = dy down^T: d gate = g . inner, d inner = gate g, and the products' own gradients from there. A row may stand for
    no assignment: it reads token 0 and has a gate of zero, so that nothing comes of it. Sums over a token's experts gather from its rows,
    which is faster than a scatter and has a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
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
        parts = zip(*groups.split(tokens_A, gates_A1), *groups.each(gate_up_EDF, down_EFD), hiddens, groups.ends, strict=True)
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
    """Rows of each expert, in the parts that are multiplied at once: all experts, by torch's grouped product, or one after the other.

    One after the other they go through oneDNN (`layers.product`), and what belongs to an expert stays in the cache of a core: faster where
    experts are wide and many tokens come to each, slower where they are narrow. It compiles a kernel for each number of rows: groups grow
    in steps so that these are few.
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
        return product(x, weight.T)
    return F.grouped_mm(x, weight, offs=ends_E) if len(x) else x.new_empty(0, weight.shape[-1])


def _weight_gradient(x: Tensor, gradient: Tensor, ends_E: Tensor | None) -> Tensor:
    """Of a part's experts: one, (1, ., .), or all."""
    if ends_E is None:
        return product(x.T, gradient.T).unsqueeze(0)
    if not len(x):
        return x.new_zeros(len(ends_E), x.shape[1], gradient.shape[1])
    into_weight = F.grouped_mm(x.T, gradient, offs=ends_E)
    return into_weight if x.device.type == "cpu" else _without_idle(into_weight, ends_E)


def _without_idle(into_weight: Tensor, ends_E: Tensor) -> Tensor:
    """Zero for an expert without rows. A Blackwell GPU leaves there what was in memory before (pytorch/pytorch, issue 172439)."""
    idle_E = ends_E == F.pad(ends_E[:-1], (1, 0))
    return into_weight.masked_fill_(idle_E.view(-1, 1, 1), 0.0)


class _Whole:
    """A tensor out of the parts. Each is copied to its place while the cache still holds it, and the next one takes its memory."""

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


def moe_account(config: Model, routed_experts: int, shared_width: int) -> Account:
    """Closed form of one layer: router and shared experts, which every token passes, and the routed experts."""
    experts: MoE = config.pools["moe"]
    expert = feed_forward_account(config.width, experts.expert_width)
    active = expert * experts.top_k
    routed = Account(expert.total * routed_experts, active.active, active.flops, active.active * BYTES_PER_PARAMETER)
    return always_active(config.width * routed_experts) + feed_forward_account(config.width, shared_width) + routed
