"""Mixture of experts: DeepSeekMoE's shared and fine-grained routed experts (arXiv 2401.06066), dropless.

Tokens are sorted by expert and multiplied in groups, so every token reaches all of its top-k experts whatever the load.

- Gates: sigmoid affinities (DeepSeek-V3) or a softmax over experts (DeepSeekMoE, OLMoE).
- Balance: a bias added for the selection only and moved against the load (arXiv 2408.15664), an auxiliary loss, or
  both.
- A router z-loss (arXiv 2202.08906) keeps the logits small.

Shape letters: S tokens of the batch, D model width, E routed experts, K experts a token (top-k), A rows of assignments
(S x K, or some more), F inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsemem import parallel
from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.counting import occurrences
from sparsemem.kernels.grouped_experts import grouped_experts
from sparsemem.kernels.matmul import linear
from sparsemem.kernels.topk import topk
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.parameter import parameter, residual_std

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.mechanisms.moe import MoE


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
        """(B, T, D) -> the layer's output (B, T, D) and its weighted auxiliary loss, a scalar. Experts do not look at
        token ids.
        """
        x_SD = x_BTD.flatten(0, -2)
        gates_SK, experts_SK, auxiliary = self.route(x_SD)
        y_BTD = self.routed(x_SD, gates_SK, experts_SK).view_as(x_BTD)
        if not self.training:
            self.note(experts_SK, y_BTD)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), auxiliary

    def without(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """The shared experts alone."""
        return super().without(x_BTD, tokens_BT) if self.shared is None else self.shared(x_BTD)

    def route(self, x_SD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of each token: gates (S, K), expert indices (S, K), weighted auxiliary loss."""
        with torch.autocast(x_SD.device.type, enabled=False):  # in bf16 near-equal affinities would tie
            dtype = torch.promote_types(x_SD.dtype, torch.float32)
            logits_SE = linear(x_SD.to(dtype), self.router_ED.to(dtype))
        affinity_SE = logits_SE.sigmoid() if self.config.gate == "sigmoid" else logits_SE.softmax(-1)
        _, experts_SK = topk(affinity_SE.detach() + self.bias_E, self.config.top_k)
        gates_SK = affinity_SE.gather(-1, experts_SK)
        if self.config.normalize_gates:
            gates_SK = _normalized(gates_SK)
        load_E = parallel.all_reduce(occurrences(experts_SK.flatten(), logits_SE.shape[-1]))  # of the whole batch
        if self.training:
            self.load_E += load_E
        return gates_SK.to(x_SD.dtype), experts_SK, self._auxiliary(logits_SE, affinity_SE, load_E)

    def routed(self, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
        """Sum over each token's experts of gate times expert output, (S, D)."""
        device = x_SD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SD.dtype
        return grouped_experts(
            x_SD.to(dtype), gates_SK.to(dtype), experts_SK, self.gate_up_EDF.to(dtype), self.down_EFD.to(dtype)
        )

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
    """Divided by their sum; those that have underflowed, as sigmoids at logits of -90 do, count alike in
    place of 0/0.
    """
    affinity = affinity.clamp_min(1e-35)  # above the denormals, which may be flushed to zero
    return affinity / affinity.sum(-1, keepdim=True)


def moe_account(config: Model, routed_experts: int, shared_width: int) -> Account:
    """Closed form of one layer: router and shared experts, which every token passes, and the routed experts."""
    experts: MoE = config.pools["moe"]
    expert = feed_forward_account(config.width, experts.expert_width)
    active = expert * experts.top_k
    routed = Account(expert.total * routed_experts, active.active, active.flops, active.active * BYTES_PER_PARAMETER)
    return always_active(config.width * routed_experts) + feed_forward_account(config.width, shared_width) + routed
