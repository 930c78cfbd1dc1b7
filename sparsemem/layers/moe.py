"""Mixture of experts: DeepSeekMoE's shared and fine-grained routed experts (arXiv 2401.06066), dropless.

Tokens are sorted by expert and multiplied in groups, so every token reaches all of its top-k experts whatever the load.

- Gates: sigmoid affinities (DeepSeek-V3) or a softmax over experts (DeepSeekMoE, OLMoE).
- Balance: a bias added for the selection only and moved against the load (arXiv 2408.15664), an auxiliary loss, or both.
- A router z-loss (arXiv 2202.08906) keeps the logits small.

Shape letters: S tokens of the batch, D model width, E routed experts, K experts a token (top-k), A = S x K assignments, F inner width of
an expert.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.config import Model, MoE
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account, gated, gated_backward
from sparsemem.layers.product import linear
from sparsemem.parameter import parameter, residual_std


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

    Assignments are sorted by expert, so that each product is one of consecutive groups. The gate multiplies the F inner values instead of
    the D outputs; with h = x gate_up and g = dy down^T: d gate = g . inner, d inner = gate g, and the products' own gradients from there.
    Sums over a token's experts gather by the inverse order, which is faster than a scatter and has a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
        S, K = gates_SK.shape
        chosen = experts_SK.flatten()
        order = chosen.argsort(stable=True)  # assignments of expert 0 first, then of expert 1, ...
        back_SK = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device)).view(S, K)
        ends_E = torch.bincount(chosen, minlength=len(down_EFD)).cumsum(0).to(torch.int32)
        gates_A1 = gates_SK.flatten()[order].unsqueeze(-1)
        x_AD = x_SD.index_select(0, order // K)
        hidden_AF = F.grouped_mm(x_AD, gate_up_EDF, offs=ends_E)
        y_AD = F.grouped_mm(gated(hidden_AF).mul_(gates_A1), down_EFD, offs=ends_E)
        ctx.save_for_backward(x_AD, hidden_AF, gates_A1, order, back_SK, ends_E, gate_up_EDF, down_EFD)
        return _gather_sum(y_AD, back_SK)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        x_AD, hidden_AF, gates_A1, order, back_SK, ends_E, gate_up_EDF, down_EFD = ctx.saved_tensors
        gradient_AD = gradient_SD.index_select(0, order // back_SK.shape[1])
        inner_AF = gated(hidden_AF)
        into_scaled_AF = F.grouped_mm(gradient_AD, down_EFD.mT, offs=ends_E)
        into_gates_SK = (into_scaled_AF * inner_AF).sum(-1)[back_SK]
        into_hidden_AF = gated_backward(into_scaled_AF.mul_(gates_A1), hidden_AF)
        into_down_EFD = F.grouped_mm(inner_AF.mul_(gates_A1).T, gradient_AD, offs=ends_E)
        into_gate_up_EDF = F.grouped_mm(x_AD.T, into_hidden_AF, offs=ends_E)
        into_x_SD = _gather_sum(F.grouped_mm(into_hidden_AF, gate_up_EDF.mT, offs=ends_E), back_SK)
        return into_x_SD, into_gates_SK, None, into_gate_up_EDF, into_down_EFD


def _gather_sum(x_AD: Tensor, back_SK: Tensor) -> Tensor:
    return x_AD.index_select(0, back_SK.flatten()).view(*back_SK.shape, -1).sum(1)


def moe_account(config: Model, routed_experts: int, shared_width: int) -> Account:
    """Closed form of one layer: router and shared experts, which every token passes, and the routed experts."""
    assert config.moe is not None
    expert = feed_forward_account(config.width, config.moe.expert_width)
    active = expert * config.moe.top_k
    routed = Account(expert.total * routed_experts, active.active, active.flops, active.active * BYTES_PER_PARAMETER)
    return always_active(config.width * routed_experts) + feed_forward_account(config.width, shared_width) + routed
