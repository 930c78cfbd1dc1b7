"""The decoder: blocks assembled from the model's config and the sizes that the budget solved, and the account of the whole.

Pre-norm blocks. Engram modules add to the residual stream at the entry of their block, before attention.

Shape letters: B sequences, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import STEP_OVER_FORWARD, Account, always_active
from sparsemem.config import Model
from sparsemem.layers.attention import Attention, attention_account, rotations
from sparsemem.layers.engram import EngramMemory, engram_accounts
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.layers.moe import MixtureOfExperts, moe_accounts
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.parameter import initialize, parameter


@dataclass(frozen=True)
class Sizes:
    """The integers that a budget and shares come to (`budget.solve`)."""

    routed_experts: int
    """Routed experts of each MoE block; 0: all blocks are dense."""
    shared_width: int
    """Inner width of all shared experts of a block together; in the dense baseline, of its feed-forward."""
    engram_rows: tuple[tuple[int, ...], ...] = ()
    """Rows of each table, for each Engram module in the order of `model.engram.layers`; empty: no Engram."""

    @property
    def memory_rows(self) -> int:
        """Rows of all tables."""
        return sum(map(sum, self.engram_rows))


class Block(nn.Module):
    """Memory (where configured), attention, then experts or a dense feed-forward, each added to the residual stream."""

    def __init__(self, config: Model, sizes: Sizes, layer: int, memory: EngramMemory | None) -> None:
        super().__init__()
        self.memory = memory
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn: MixtureOfExperts | FeedForward
        if is_sparse(config, sizes, layer):
            self.ffn = MixtureOfExperts(config, sizes.routed_experts, sizes.shared_width)
        else:
            self.ffn = FeedForward(config, dense_width(config, sizes))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, angles_TK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the residual stream and the block's auxiliary loss, None for a dense block."""
        if self.memory is not None:
            x_BTD = x_BTD + self.memory(x_BTD, tokens_BT)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles_TK)
        normed_BTD = self.ffn_norm(x_BTD)
        if isinstance(self.ffn, FeedForward):
            return x_BTD + self.ffn(normed_BTD), None
        y_BTD, auxiliary = self.ffn(normed_BTD)
        return x_BTD + y_BTD, auxiliary


class Transformer(nn.Module):
    """A language model over a fixed vocabulary."""

    angles_TK: Tensor

    def __init__(self, config: Model, sizes: Sizes, context: int, canonical: Tensor, separator: int) -> None:
        """
        Args:
            canonical: (V,) raw token id -> canonical id (`data.canonical`); its length is the vocabulary's size.
            separator: token id that ends a document.

        The weights are uninitialised until `initialize(seed)`, so that a model may be built on the meta device.
        """
        super().__init__()
        vocabulary = len(canonical)
        self.embedding = parameter(vocabulary, config.width, std=config.init_std)
        memories = {
            layer: EngramMemory(config, layer, rows, canonical, separator)
            for layer, rows in zip(config.engram.layers if config.engram else (), sizes.engram_rows, strict=False)
        }
        self.blocks = nn.ModuleList(Block(config, sizes, layer, memories.get(layer)) for layer in range(1, config.layers + 1))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else parameter(vocabulary, config.width, std=config.init_std)
        angles_TK = rotations(context, config.width // config.heads, config.rope_theta, canonical.device)
        self.register_buffer("angles_TK", angles_TK, persistent=False)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) token ids -> logits (B, T, V) and the sum of the weighted auxiliary losses, a scalar."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        auxiliary = x_BTD.new_zeros(())
        for block in self.blocks:
            x_BTD, loss = block(x_BTD, tokens_BT, self.angles_TK[: tokens_BT.shape[1]])
            auxiliary = auxiliary if loss is None else auxiliary + loss
        return F.linear(self.norm(x_BTD), self.embedding if self.head is None else self.head), auxiliary

    def losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each position, (B, T) nats in fp32, and the auxiliary loss."""
        logits_BTV, auxiliary = self(tokens_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none").view_as(targets_BT), auxiliary

    def initialize(self, seed: int) -> Transformer:
        """Draw all weights; see `parameter.initialize` for what two models of one seed share."""
        initialize(self, seed)
        return self

    def expert_layers(self) -> list[MixtureOfExperts]:
        """The MoE layers, first block first."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]


# --- the account of a whole model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelAccount:
    """Closed-form counts of one model, part by part. Parameters of the vocabulary stand apart."""

    parts: dict[str, Account]
    """`backbone`, and one entry for each pool of sparse parameters that the model holds (`moe`, `engram`)."""
    embedding_params: int
    """Vocabulary embedding and LM head."""
    head_flops: int

    @property
    def _sum(self) -> Account:
        return sum(self.parts.values(), Account())

    @property
    def total_params(self) -> int:
        return self._sum.total

    @property
    def active_params(self) -> int:
        return self._sum.active

    @property
    def sparse_params(self) -> int:
        """P_sparse = P_tot - P_act."""
        return self._sum.idle

    def share(self, pool: str) -> float:
        """Share of P_sparse that a pool holds; `share("moe")` is rho."""
        return self.parts[pool].idle / self.sparse_params if pool in self.parts and self.sparse_params else 0.0

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a training step per token, without the LM head."""
        return self._sum.flops * STEP_OVER_FORWARD

    @property
    def flops_per_token_head(self) -> int:
        """The same with the LM head."""
        return (self._sum.flops + self.head_flops) * STEP_OVER_FORWARD

    @property
    def memory_bytes_per_token(self) -> int:
        """Bytes of routed experts and rows that one token reads in the forward pass, alone in its batch."""
        return self._sum.sparse_bytes


def count_model(config: Model, sizes: Sizes, context: int, vocabulary: int) -> ModelAccount:
    """Closed form of everything `Transformer` holds."""
    backbone, routed, rows = norm_account(config.width), Account(), Account()
    for layer in range(1, config.layers + 1):
        backbone += attention_account(config, context) + norm_account(config.width) * 2
        if is_sparse(config, sizes, layer):
            common, experts = moe_accounts(config, sizes.routed_experts, sizes.shared_width)
            backbone, routed = backbone + common, routed + experts
        else:
            backbone += feed_forward_account(config.width, dense_width(config, sizes))
    for module_rows in sizes.engram_rows:
        common, memory = engram_accounts(config, module_rows)
        backbone, rows = backbone + common, rows + memory
    parts = {"backbone": backbone}
    if sizes.routed_experts:
        parts["moe"] = routed
    if sizes.engram_rows:
        parts["engram"] = rows
    vocabulary_params = vocabulary * config.width
    return ModelAccount(parts, vocabulary_params * (1 if config.tie_embeddings else 2), always_active(vocabulary_params).flops)


def is_sparse(config: Model, sizes: Sizes, layer: int) -> bool:
    """Whether the 1-based block holds routed experts."""
    return sizes.routed_experts > 0 and layer > config.moe.leading_dense


def dense_width(config: Model, sizes: Sizes) -> int:
    """Inner width of a dense block: all of the dense baseline's; in a leading dense block, that of the experts it stands for."""
    return sizes.shared_width + (config.moe.top_k * config.moe.expert_width if sizes.routed_experts else 0)
