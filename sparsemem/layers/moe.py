"""Mixture of experts: DeepSeekMoE's shared and fine-grained routed experts (arXiv 2401.06066), dropless.

Tokens are sorted by expert and multiplied in groups, so every token reaches all of its top-k experts whatever the load.

- Gates: sigmoid affinities (DeepSeek-V3) or a softmax over experts (DeepSeekMoE, OLMoE).
- Balance: a bias added for the selection only and moved against the load (arXiv 2408.15664), an auxiliary loss, or both.
- A router z-loss (arXiv 2202.08906) keeps the logits small.

Shape letters: S tokens of the batch, D model width, E routed experts, K experts a token (top-k), F inner width of an expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.config import Model, MoE
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account, gated
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
            logits_SE = F.linear(x_SD.float(), self.router_ED.float())
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
        S, K = experts_SK.shape
        chosen = experts_SK.flatten()
        order = chosen.argsort(stable=True)  # assignments of expert 0 first, then of expert 1, ...
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        ends_E = torch.bincount(chosen, minlength=self.router_ED.shape[0]).cumsum(0).to(torch.int32)
        dtype = torch.get_autocast_dtype(x_SD.device.type) if torch.is_autocast_enabled(x_SD.device.type) else x_SD.dtype
        x_AD = _Permute.apply(x_SD.to(dtype).repeat_interleave(K, dim=0), order, back)
        inner_AF = gated(F.grouped_mm(x_AD, self.gate_up_EDF.to(dtype), offs=ends_E))
        y_AD = F.grouped_mm(inner_AF, self.down_EFD.to(dtype), offs=ends_E)
        return (_Permute.apply(y_AD, back, order).view(S, K, -1) * gates_SK.to(dtype).unsqueeze(-1)).sum(1)

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


class _Permute(torch.autograd.Function):
    """Reorder rows; the gradient gathers by the inverse order, which is faster than a scatter and sums in a fixed order."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad[back], None, None


def moe_account(config: Model, routed_experts: int, shared_width: int) -> Account:
    """Closed form of one layer: router and shared experts, which every token passes, and the routed experts."""
    assert config.moe is not None
    expert = feed_forward_account(config.width, config.moe.expert_width)
    active = expert * config.moe.top_k
    routed = Account(expert.total * routed_experts, active.active, active.flops, active.active * BYTES_PER_PARAMETER)
    return always_active(config.width * routed_experts) + feed_forward_account(config.width, shared_width) + routed
