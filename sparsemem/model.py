"""The decoder: blocks assembled from the model's config and the sizes that the budget solved, and the account of the whole.

Pre-norm blocks. The n-gram embedding changes what enters the first of them; Engram modules add to the residual stream at the entry of
their block, before attention; product-key memories stand in place of a block's feed-forward or beside it, fed by the same normed input.

Shape letters: B sequences, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import STEP_OVER_FORWARD, Account, always_active
from sparsemem.config import HASHED, MEMORY_POOLS, PRODUCT_KEY, Model
from sparsemem.layers.attention import Attention, attention_account, rotations
from sparsemem.layers.documents import documents
from sparsemem.layers.engram import EngramMemory, engram_account
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.layers.head import head_loss, head_losses
from sparsemem.layers.moe import MixtureOfExperts, moe_account
from sparsemem.layers.ngram_embedding import NgramEmbedding, ngram_embedding_account
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.layers.product import linear
from sparsemem.layers.product_key import ProductKeyMemory, ValueTable, product_key_account, row_parameters
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import initialize, parameter


@dataclass(frozen=True)
class Sizes:
    """The integers that a budget and shares come to (`budget.solve`)."""

    routed_experts: int
    """Routed experts of each MoE block; 0: all blocks are dense."""
    shared_width: int
    """Inner width of all shared experts of a block together; in the dense baseline, of its feed-forward."""
    tables: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Of each memory pool. Hashed: for every module the rows of its tables, in the order n-gram order, head. Product-key: for every table
    of values the numbers of row keys and column keys, whose product is its rows."""

    def rows(self, pool: str) -> int:
        """Rows of all tables of a pool."""
        return sum(map(math.prod if pool in PRODUCT_KEY else sum, self.tables.get(pool, ())))

    @property
    def memory_rows(self) -> int:
        """Rows of all tables."""
        return sum(map(self.rows, self.tables))


class Block(nn.Module):
    """Engram (where configured), attention, then feed-forward and product-key memories, each added to the residual stream."""

    def __init__(
        self, config: Model, sizes: Sizes, layer: int, memory: EngramMemory | None, product_keys: dict[str, ProductKeyMemory]
    ) -> None:
        super().__init__()
        self.layer = layer
        self.memory = memory
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn: MixtureOfExperts | FeedForward | None
        if config.is_replaced(layer):
            self.ffn = None
        elif is_sparse(config, sizes, layer):
            self.ffn = MixtureOfExperts(config, sizes.routed_experts, sizes.shared_width)
        else:
            self.ffn = FeedForward(config, feed_forward_width(config, sizes, layer))
        self.product_keys = nn.ModuleDict(product_keys)
        self.skips = {pool: getattr(config, pool).skip for pool in product_keys}

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, documents_BT: Tensor | None, turns_2THK: Tensor, arrivals: dict[int, list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the residual stream and the block's auxiliary losses.

        Args:
            documents_BT: of the tokens, where a product-key memory asks for them.
            arrivals: block -> what memories add after it. This block takes out its own and puts in what it read for later ones.
        """
        if self.memory is not None:
            x_BTD = x_BTD + self.memory(x_BTD, tokens_BT)
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), turns_2THK)
        normed_BTD = self.ffn_norm(x_BTD)
        auxiliary = []
        for pool, memory in self.product_keys.items():
            y_BTD, loss = memory(normed_BTD, documents_BT)
            arrivals.setdefault(self.layer + self.skips[pool], []).append(y_BTD)
            auxiliary += [] if loss is None else [loss]
        if isinstance(self.ffn, MixtureOfExperts):
            y_BTD, loss = self.ffn(normed_BTD)
            x_BTD, auxiliary = x_BTD + y_BTD, [*auxiliary, loss]
        elif self.ffn is not None:
            x_BTD = x_BTD + self.ffn(normed_BTD)
        for y_BTD in arrivals.pop(self.layer, []):
            x_BTD = x_BTD + y_BTD
        return x_BTD, auxiliary


class Transformer(nn.Module):
    """A language model over a fixed vocabulary."""

    turns_2THK: Tensor

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
        grams = sizes.tables.get("ngram_embedding")
        self.ngrams = NgramEmbedding(config, grams[0], vocabulary, separator) if grams else None
        engrams = {
            layer: EngramMemory(config, layer, rows, canonical, separator)
            for layer, rows in zip(config.engram.layers if config.engram else (), sizes.tables.get("engram", ()), strict=False)
        }
        product_keys = _product_keys(config, sizes)
        self.separator, self.asks_for_documents = separator, any(k.conv_reset_at_document_end for k in config.product_keys.values())
        self.blocks = nn.ModuleList(
            Block(config, sizes, layer, engrams.get(layer), product_keys.get(layer, {})) for layer in range(1, config.layers + 1)
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else parameter(vocabulary, config.width, std=config.init_std)
        turns_2THK = rotations(context, config.heads, config.head_width, config.rope_theta, canonical.device)
        self.register_buffer("turns_2THK", turns_2THK, persistent=False)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) token ids -> logits (B, T, V) and the sum of the weighted auxiliary losses, a scalar."""
        x_BTD, auxiliary = self._trunk(tokens_BT)
        return linear(x_BTD, self._head), auxiliary

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, counted: int) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the first `counted` targets, in nats, and the auxiliary loss: both scalars to train on.

        Targets below 0 have no loss.
        """
        x_BTD, auxiliary = self._trunk(tokens_BT)
        return head_loss(x_BTD.flatten(0, 1)[:counted], self._head, targets_BT.flatten()[:counted]), auxiliary

    def losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of each position, (B, T) nats in fp32, 0 for targets below 0, without gradients."""
        return head_losses(self._trunk(tokens_BT)[0].flatten(0, 1), self._head, targets_BT.flatten()).view_as(targets_BT)

    @property
    def _head(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _trunk(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, (B, T, D), and the auxiliary loss."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        if self.ngrams is not None:
            x_BTD = self.ngrams(x_BTD, tokens_BT)
        auxiliary = x_BTD.new_zeros(())
        documents_BT = documents(tokens_BT, self.separator) if self.asks_for_documents else None
        arrivals: dict[int, list[Tensor]] = {}
        for block in self.blocks:
            x_BTD, losses = block(x_BTD, tokens_BT, documents_BT, self.turns_2THK[:, : tokens_BT.shape[1]], arrivals)
            auxiliary = sum(losses, auxiliary)
        return self.norm(x_BTD), auxiliary

    def initialize(self, seed: int) -> Transformer:
        """Draw all weights; see `parameter.initialize` for what two models of one seed share."""
        initialize(self, seed)
        return self

    def expert_layers(self) -> list[MixtureOfExperts]:
        """The MoE layers, first block first."""
        return [module for module in self.modules() if isinstance(module, MixtureOfExperts)]

    def memory_layers(self) -> dict[tuple[int, str], ProductKeyMemory]:
        """(1-based block, pool) -> each product-key memory, first block first."""
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        found = ((block.layer, pool, memory) for block in blocks for pool, memory in block.product_keys.items())
        return {(layer, pool): memory for layer, pool, memory in found if isinstance(memory, ProductKeyMemory)}


def usage_of(model: Transformer) -> Iterator[dict[str, Any]]:
    """What evaluation read of each memory since the last call, by `layer` (0: the n-gram embedding, before the first block) and `pool`."""
    if model.ngrams is not None:
        yield {"layer": 0, "pool": "ngram_embedding", **model.ngrams.usage()}
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.memory is not None:
            yield {"layer": block.layer, "pool": "engram", **block.memory.usage()}
        for pool, memory in block.product_keys.items():
            assert isinstance(memory, ProductKeyMemory)
            yield {"layer": block.layer, "pool": pool, **memory.usage()}


def _product_keys(config: Model, sizes: Sizes) -> dict[int, dict[str, ProductKeyMemory]]:
    """1-based block -> pool -> memory layer. Layers of one group read the same table."""
    found: dict[int, dict[str, ProductKeyMemory]] = {}
    for pool in config.product_keys:
        keys = [(rows, columns) for rows, columns in sizes.tables.get(pool, ())]
        tables = [ValueTable(config, pool, each, dense_width(config, sizes)) for each in keys]
        for number, layer in enumerate(config.memory_layers(pool) if tables else ()):
            place = number // config.layers_per_table(pool)
            found.setdefault(layer, {})[pool] = ProductKeyMemory(config, pool, layer, keys[place], tables[place])
    return found


# --- the account of a whole model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelAccount:
    """Closed-form counts of one model, part by part. Parameters of the vocabulary stand apart."""

    parts: dict[str, Account]
    """`backbone`, and one entry for each pool that the model holds: its sparse parameters and what serves them (router, projections)."""
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
    def memory_flops_share(self) -> float:
        """Memory's part of the blocks' forward FLOPs per token."""
        return sum(self.parts[pool].flops for pool in MEMORY_POOLS if pool in self.parts) / self._sum.flops

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a training step per token, without the LM head."""
        return self._sum.step_flops

    @property
    def flops_per_token_head(self) -> int:
        """The same with the LM head."""
        return self.flops_per_token + self.head_flops * STEP_OVER_FORWARD

    @property
    def memory_bytes_per_token(self) -> int:
        """Bytes of routed experts and rows that one token reads in the forward pass, alone in its batch."""
        return self._sum.sparse_bytes


def count_model(config: Model, sizes: Sizes, context: int, vocabulary: int) -> ModelAccount:
    """Closed form of everything `Transformer` holds."""
    backbone, experts = norm_account(config.width), Account()
    for layer in range(1, config.layers + 1):
        backbone += attention_account(config, context) + norm_account(config.width) * 2
        if is_sparse(config, sizes, layer):
            experts += moe_account(config, sizes.routed_experts, sizes.shared_width)
        elif not config.is_replaced(layer):
            backbone += feed_forward_account(config.width, feed_forward_width(config, sizes, layer))
    parts = {"backbone": backbone} | ({"moe": experts} if sizes.routed_experts else {})
    parts |= {pool: _memory_account(config, pool, tables) for pool, tables in sizes.tables.items()}
    vocabulary_params = vocabulary * config.width
    return ModelAccount(parts, vocabulary_params * (1 if config.tie_embeddings else 2), always_active(vocabulary_params).flops)


def count_tensors(model: Transformer) -> dict[str, tuple[int, int]]:
    """Parameters in all and activated ones of each part, by the tensors that a model holds, vocabulary aside."""
    total, idle = Counter[str](), Counter[str]()
    for name, weight in model.named_parameters():
        if name not in ("embedding", "head"):
            total[_part(model, name)] += weight.numel()
    reads = Counter[ValueTable]()
    for memory in model.memory_layers().values():
        reads[memory.table] += memory.memory.heads * memory.memory.top_m
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            experts = len(module.router_ED)
            idle["moe"] += (module.gate_up_EDF.numel() + module.down_EFD.numel()) // experts * (experts - module.config.top_k)
        elif isinstance(module, MemoryTable):
            rows, width = module.rows_RC.shape
            owner = model.get_submodule(name.rpartition(".")[0])
            read = reads[owner] if isinstance(owner, ValueTable) else len(module.first_H)
            idle[_part(model, name)] += max(rows - read, 0) * width
    return {part: (count, count - idle[part]) for part, count in total.items()}


def _part(model: Transformer, name: str) -> str:
    """The part of the account to which a parameter or module belongs, by its name."""
    place = name.split(".")
    if place[0] == "ngrams":
        return "ngram_embedding"
    if place[0] == "blocks" and place[2] == "memory":
        return "engram"
    if place[0] == "blocks" and place[2] == "product_keys":
        return place[3]
    return "moe" if place[0] == "blocks" and isinstance(model.get_submodule(".".join(place[:3])), MixtureOfExperts) else "backbone"


def check_account(config: Model, sizes: Sizes, model: Transformer | None = None) -> None:
    """
    Args:
        model: of these sizes; by default one is built without the memory of its tensors.

    Raises:
        RuntimeError: a closed form is not what the tensors hold.
    """
    if model is None:
        with torch.device("meta"):
            model = Transformer(config, sizes, context=1, canonical=torch.zeros(1, dtype=torch.int64, device="cpu"), separator=0)
    parts = count_model(config, sizes, context=1, vocabulary=0).parts
    stated, held = {part: (one.total, one.active) for part, one in parts.items()}, count_tensors(model)
    for part in stated.keys() | held.keys():
        if stated.get(part, (0, 0)) != held.get(part, (0, 0)):
            raise RuntimeError(
                f"the account of `{part}` states {stated.get(part)} parameters in all and activated, but its tensors hold "
                f"{held.get(part)}; mend the account, which stands beside the mechanism's code in `sparsemem/layers`, or report this"
            )


def _memory_account(config: Model, pool: str, tables: tuple[tuple[int, ...], ...]) -> Account:
    if pool == "engram":
        return engram_account(config, tables)
    if pool == "ngram_embedding":
        return ngram_embedding_account(config, tables[0])
    return product_key_account(config, pool, tuple((rows, columns) for rows, columns in tables))


def memory_params(config: Model, sizes: Sizes) -> int:
    """Parameters of the rows of all memories."""
    widths = {pool: getattr(config, pool).row_dim if pool in HASHED else row_parameters(config, pool) for pool in sizes.tables}
    return sum(sizes.rows(pool) * width for pool, width in widths.items())


def memory_rows_read(config: Model, sizes: Sizes) -> int:
    """Rows that one token reads, over all memories and layers."""
    hashed = sum(len(rows) for pool in HASHED for rows in sizes.tables.get(pool, ()))
    retrieved = ((pool, memory) for pool, memory in config.product_keys.items() if pool in sizes.tables)
    return hashed + sum(len(config.memory_layers(pool)) * memory.heads * memory.top_m for pool, memory in retrieved)


def is_sparse(config: Model, sizes: Sizes, layer: int) -> bool:
    """Whether the 1-based block holds routed experts."""
    leading = config.moe.leading_dense if config.moe else 0
    return sizes.routed_experts > 0 and layer > leading and not config.is_replaced(layer)


def dense_width(config: Model, sizes: Sizes) -> int:
    """Activated inner width of a feed-forward: all of a dense model's; with routed experts, of the shared and the top-k ones together."""
    return sizes.shared_width + (config.moe.top_k * config.moe.expert_width if config.moe and sizes.routed_experts else 0)


def feed_forward_width(config: Model, sizes: Sizes, layer: int) -> int:
    """Inner width of the dense feed-forward of this 1-based block; `moe.dense_width` holds beside routed experts only."""
    if config.moe and config.moe.dense_width and sizes.routed_experts and layer <= config.moe.leading_dense:
        return config.moe.dense_width
    return dense_width(config, sizes)
