"""Mixture of experts: DeepSeekMoE's shared and fine-grained routed experts (arXiv 2401.06066), dropless.

Tokens are sorted by expert and multiplied in groups, so every token reaches all of its top-k experts whatever the load.

- Gates: sigmoid affinities (DeepSeek-V3) or a softmax over experts (DeepSeekMoE, OLMoE).
- Balance: a bias added for the selection only and moved against the load (arXiv 2408.15664), an auxiliary loss, or both.
- A router z-loss (arXiv 2202.08906) keeps the logits small.

Shape letters: S tokens of the batch, D model width, E routed experts, K experts a token (top-k), A rows of assignments (S x K,
or some more), F inner width of an expert.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.config import Model, MoE
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account, gated, gated_backward
from sparsemem.layers.product import fast, linear, product
from sparsemem.parameter import parameter, residual_std

WIDE, BUSY, STEP = 2**15, 128, 32  # numbers in an expert's first matrix, tokens an expert, rows by which a group grows: see `_Groups`


class MixtureOfExperts(nn.Module):
    """Routed experts beside the shared ones.

    Buffers:
        bias_E: selection bias of loss-free balancing; not a trained parameter, not counted.
        load_E: assignments to each expert since `rebalance` was last called; only training adds to it.
    """

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, config: Model, routed_experts: int, shared_width: int) -> None:
        super().__init__()
        assert config.moe is not None
        self.config: MoE = config.moe
        width, inner = config.width, config.moe.expert_width
        out_std = residual_std(config.init_std, config.layers)
        self.router_ED = parameter(routed_experts, width, std=config.init_std)
        self.gate_up_EDF = parameter(routed_experts, width, 2 * inner, std=config.init_std)
        self.down_EFD = parameter(routed_experts, inner, width, std=out_std)
        self.shared = FeedForward(config, shared_width) if shared_width else None
        self.imbalance = math.nan
        self.register_buffer("bias_E", torch.zeros(routed_experts))
        self.register_buffer("load_E", torch.zeros(routed_experts, dtype=torch.int64))

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> the layer's output (B, T, D) and its weighted auxiliary loss, a scalar."""
        x_SD = x_BTD.flatten(0, -2)
        gates_SK, experts_SK, auxiliary = self.route(x_SD)
        y_BTD = self.routed(x_SD, gates_SK, experts_SK).view_as(x_BTD)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), auxiliary

    def route(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of each token: gates (S, K), expert indices (S, K), weighted auxiliary loss."""
        with torch.autocast(x_SD.device.type, enabled=False):  # in bf16 near-equal affinities would tie
            logits_SE = linear(x_SD.float(), self.router_ED.float())
        affinity_SE = logits_SE.sigmoid() if self.config.gate == "sigmoid" else logits_SE.softmax(-1)
        experts_SK = (affinity_SE.detach() + self.bias_E).topk(self.config.top_k, dim=-1).indices
        gates_SK = affinity_SE.gather(-1, experts_SK)
        if self.config.normalize_gates:
            gates_SK = gates_SK / gates_SK.sum(-1, keepdim=True)
        load_E = parallel.total(torch.bincount(experts_SK.flatten(), minlength=logits_SE.shape[-1]))  # of the whole batch
        if self.training:
            self.load_E += load_E
        return gates_SK.to(x_SD.dtype), experts_SK, self._auxiliary(logits_SE, affinity_SE, load_E)

    def routed(self, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
        """Sum over each token's experts of gate times expert output, (S, D)."""
        device = x_SD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SD.dtype
        return _Experts.apply(x_SD.to(dtype), gates_SK.to(dtype), experts_SK, self.gate_up_EDF.to(dtype), self.down_EFD.to(dtype))

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move the selection bias one step against the load seen since the last call, then forget that load.

        `imbalance` keeps the largest load over the mean one, for the log: 1 is perfect balance.
        """
        load_E = self.load_E.float()
        self.imbalance = float(load_E.max() / load_E.mean())
        self.bias_E += self.config.bias_rate * torch.sign(load_E.mean() - load_E)
        self.load_E.zero_()

    def _auxiliary(self, logits_SE: Tensor, affinity_SE: Tensor, load_E: Tensor) -> Tensor:
        loss = logits_SE.new_zeros(())
        if self.config.balance_loss:  # experts x sum of (share of assignments x mean probability); 1 when balanced
            probability_E = (affinity_SE / affinity_SE.sum(-1, keepdim=True)).mean(0)
            loss = loss + self.config.balance_loss * load_E.numel() * torch.dot(load_E / load_E.sum(), probability_E)
        if self.config.z_loss:
            loss = loss + self.config.z_loss * logits_SE.logsumexp(-1).square().mean()
        return loss


class _Experts(torch.autograd.Function):
    """y = sum over the token's experts of (gate inner) down, where inner = silu(x gate_up's first half) * (x gate_up's second half).

    Assignments are sorted by expert into consecutive groups of rows. The gate multiplies the F inner values instead of the D outputs; with
    h = x gate_up and g = dy down^T: d gate = g . inner, d inner = gate g, and the products' own gradients from there. A group may end in
    rows that stand for no assignment: they read token 0 and have a gate of zero, so that nothing comes of them. Sums over a token's
    experts gather from its rows, which is faster than a scatter and has a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
        groups, rows_SK, order, rows = _sort(experts_SK, gate_up_EDF)
        tokens_A = order.new_zeros(groups.rows).index_copy_(0, rows, order // experts_SK.shape[1])
        gates_A1 = gates_SK.new_zeros(groups.rows).index_copy_(0, rows, gates_SK.flatten()[order]).unsqueeze(-1)
        x_AD = x_SD.index_select(0, tokens_A)
        hidden_AF = groups.product(x_AD, gate_up_EDF)
        y_AD = groups.product(gated(hidden_AF).mul_(gates_A1), down_EFD)
        ctx.groups = groups
        ctx.save_for_backward(x_AD, hidden_AF, gates_A1, tokens_A, rows_SK, gate_up_EDF, down_EFD)
        return _gather_sum(y_AD, rows_SK)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        groups: _Groups = ctx.groups
        x_AD, hidden_AF, gates_A1, tokens_A, rows_SK, gate_up_EDF, down_EFD = ctx.saved_tensors
        gradient_AD = gradient_SD.index_select(0, tokens_A)
        inner_AF = gated(hidden_AF)
        into_scaled_AF = groups.product(gradient_AD, down_EFD.mT)
        into_gates_SK = (into_scaled_AF * inner_AF).sum(-1)[rows_SK]
        into_hidden_AF = gated_backward(into_scaled_AF.mul_(gates_A1), hidden_AF)
        into_down_EFD = groups.weight_gradient(inner_AF.mul_(gates_A1), gradient_AD)
        into_gate_up_EDF = groups.weight_gradient(x_AD, into_hidden_AF)
        into_x_SD = _gather_sum(groups.product(into_hidden_AF, gate_up_EDF.mT), rows_SK)
        return into_x_SD, into_gates_SK, None, into_gate_up_EDF, into_down_EFD


def _sort(experts_SK: Tensor, weight_EDF: Tensor) -> tuple[_Groups, Tensor, Tensor, Tensor]:
    """The groups; each assignment's row, (S, K); the assignments in the order of their experts, (A,), and their rows in that order."""
    chosen, (experts, D, F_) = experts_SK.flatten(), weight_EDF.shape
    order = chosen.argsort(stable=True)  # assignments of expert 0 first, then of expert 1, ...
    load_E, rows = torch.bincount(chosen, minlength=experts), torch.arange(chosen.numel(), device=chosen.device)
    if not (fast(weight_EDF) and D * F_ >= WIDE and chosen.numel() >= BUSY * experts):
        groups = _Groups(load_E.cumsum(0), chosen.numel(), apart=False)
    else:
        room_E = (load_E + STEP - 1) // STEP * STEP
        groups = _Groups(room_E.cumsum(0), int(room_E.sum()), apart=True)
        rows += ((room_E - load_E).cumsum(0) - (room_E - load_E)).repeat_interleave(load_E)
    return groups, torch.empty_like(order).scatter_(0, order, rows).view_as(experts_SK), order, rows


class _Groups:
    """Products of consecutive groups of rows, each with the matrix of its expert: all at once by torch's grouped product, or one by one.

    One by one they go through oneDNN (`layers.product`), which beats the grouped product by 1.4 where experts are wide and many tokens come
    to each, and loses where they are narrow. It compiles a kernel for each number of rows: groups grow in steps so that they are few.
    """

    def __init__(self, ends_E: Tensor, rows: int, apart: bool) -> None:
        self.rows, self.ends_E = rows, ends_E.to(torch.int32)
        self.slices = [slice(start, end) for start, end in pairwise([0, *ends_E.tolist()])] if apart else None

    def product(self, x_AD: Tensor, weight_EDF: Tensor) -> Tensor:
        """(A, F)."""
        if self.slices is None:
            return F.grouped_mm(x_AD, weight_EDF, offs=self.ends_E)
        result_AF = x_AD.new_empty(self.rows, weight_EDF.shape[-1])
        for rows, weight_DF in zip(self.slices, weight_EDF.unbind(0), strict=True):
            if rows.start < rows.stop:
                result_AF[rows] = product(x_AD[rows], weight_DF.T)
        return result_AF

    def weight_gradient(self, x_AD: Tensor, gradient_AF: Tensor) -> Tensor:
        """(E, D, F); zero for an expert without rows."""
        if self.slices is None:
            return F.grouped_mm(x_AD.T, gradient_AF, offs=self.ends_E)
        result_EDF = x_AD.new_zeros(len(self.slices), x_AD.shape[1], gradient_AF.shape[1])
        for rows, result_DF in zip(self.slices, result_EDF.unbind(0), strict=True):
            if rows.start < rows.stop:
                result_DF.copy_(product(x_AD[rows].T, gradient_AF[rows].T))
        return result_EDF


def _gather_sum(x_AD: Tensor, rows_SK: Tensor) -> Tensor:
    return x_AD.index_select(0, rows_SK.flatten()).view(*rows_SK.shape, -1).sum(1)


def moe_account(config: Model, routed_experts: int, shared_width: int) -> Account:
    """Closed form of one layer: router and shared experts, which every token passes, and the routed experts."""
    assert config.moe is not None
    expert = feed_forward_account(config.width, config.moe.expert_width)
    active = expert * config.moe.top_k
    routed = Account(expert.total * routed_experts, active.active, active.flops, active.active * BYTES_PER_PARAMETER)
    return always_active(config.width * routed_experts) + feed_forward_account(config.width, shared_width) + routed
