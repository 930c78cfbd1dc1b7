"""The decoder: blocks assembled from the model's config and the sizes that the budget solved, and the account of the
whole.

Blocks of attention and a feed-forward, pre-norm or on several residual streams (`layers.streams`). The layers of the
mechanisms stand at the places that these name (`mechanisms.Placed`): at the vocabulary embedding, at the entry of a
block, as its feed-forward or beside it. Which mechanisms there are is not known here.

Shape letters: B sequences, T positions, N residual streams, D model width, V vocabulary. `x` without letters is
(B, T, D) with one stream and (B, T, N, D) with several.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemem.accounting import STEP_OVER_FORWARD, Account, always_active
from sparsemem.config import Model
from sparsemem.kernels.cross_entropy import head_loss, head_losses
from sparsemem.kernels.matmul import linear
from sparsemem.kernels.rotary import rotations
from sparsemem.layers.attention import Attention, attention_account
from sparsemem.layers.feed_forward import FeedForward, feed_forward_account
from sparsemem.layers.norm import RMSNorm, norm_account
from sparsemem.layers.streams import connection, connection_account, expanded, read, write
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, POOLS, Placed, Tables, Vocabulary
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.parameter import initialize, parameter


@dataclass(frozen=True)
class Sizes:
    """The integers that a budget and shares come to (`budget.solve`)."""

    routed_experts: int
    """Routed experts of each MoE block; 0: all blocks are dense."""
    shared_width: int
    """Inner width of all shared experts of a block together; in the dense baseline, of its feed-forward."""
    tables: Mapping[str, Tables] = field(default_factory=dict)
    """Of each memory pool, in the order of its mechanism."""

    @property
    def pools(self) -> tuple[str, ...]:
        """Pools that the model holds, routed experts first."""
        return (*((EXPERTS.name,) if self.routed_experts else ()), *self.tables)

    def of(self, pool: str) -> Tables:
        """The tables of a pool; of the experts, their number."""
        return ((self.routed_experts,),) if pool == EXPERTS.name else self.tables[pool]

    def rows(self, pool: str) -> int:
        """Rows of all tables of a memory."""
        return MEMORY_POOLS[pool].rows(self.tables.get(pool, ()))

    @property
    def memory_rows(self) -> int:
        """Rows of all tables."""
        return sum(map(self.rows, self.tables))


class Block(nn.Module):
    """What stands at the entry, attention, then feed-forward and what stands beside it, each added to the residual.

    With several streams, a layer at the entry reads what attention would read and adds to all streams alike, unless it
    is one for each stream. Layers beside the feed-forward are fed what it is fed; where they arrive, they write as the
    feed-forward of that block.
    """

    def __init__(self, config: Model, sizes: Sizes, block: int, placed: Sequence[Placed]) -> None:
        """
        Args:
            block: 1-based.
            placed: the layers of this block.
        """
        super().__init__()
        self.number = block
        at_entry, as_ffn, beside = (
            [each for each in placed if each.at == at] for at in ("entry", "feed_forward", "beside")
        )
        self._entry = list(zip(_attach(self, at_entry), [each.per_stream for each in at_entry], strict=True))
        self.attention_streams, self.ffn_streams = (connection(config, 2 * block - 2 + place) for place in range(2))
        own_norm = [
            None if through and through.norms else RMSNorm(config.width, config.norm_eps)
            for through in (self.attention_streams, self.ffn_streams)
        ]
        self.attention_norm = own_norm[0]
        self.attention = Attention(config)
        self.ffn_norm = own_norm[1]
        if not _attach(self, as_ffn):
            self.ffn = (
                None if block in config.replaced else FeedForward(config, EXPERTS.dense_width(config, sizes, block))
            )
        self._beside = _attach(self, beside)
        self._skips = [each.skip for each in beside]

    def forward(
        self, x: Tensor, tokens_BT: Tensor, cos_sin_2THK: Tensor, arrivals: dict[int, list[Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the residual and the block's auxiliary losses.

        Args:
            arrivals: block -> what layers add after it. This block takes out its own and puts in what it read for later
                ones.
        """
        auxiliary: list[Tensor] = []
        for layer, per_stream in self._entry:
            if per_stream or self.attention_streams is None:
                x = x + _output(layer(x, tokens_BT), auxiliary)
            else:
                x = x + _output(layer(self.attention_streams.mixed(x), tokens_BT), auxiliary).unsqueeze(2)
        read_BTD, weights = read(self.attention_streams, self.attention_norm, x)
        x = write(self.attention_streams, x, [self.attention(read_BTD, cos_sin_2THK)], weights)
        read_BTD, weights = read(self.ffn_streams, self.ffn_norm, x)
        for layer, skip in zip(self._beside, self._skips, strict=True):
            arrivals.setdefault(self.number + skip, []).append(_output(layer(read_BTD, tokens_BT), auxiliary))
        outputs_BTD = arrivals.pop(self.number, [])
        if isinstance(self.ffn, FeedForward):
            outputs_BTD = [self.ffn(read_BTD), *outputs_BTD]
        elif self.ffn is not None:
            outputs_BTD = [_output(self.ffn(read_BTD, tokens_BT), auxiliary), *outputs_BTD]
        return write(self.ffn_streams, x, outputs_BTD, weights), auxiliary


def _attach(owner: nn.Module, placed: Sequence[Placed]) -> tuple[SparseLayer, ...]:
    """Make each layer a submodule by its path; they are returned."""
    for each in placed:
        inside, (*groups, name) = owner, each.path.split(".")
        for group in groups:
            if not hasattr(inside, group):
                inside.add_module(group, nn.Module())
            inside = inside.get_submodule(group)
        inside.add_module(name, each.layer)
    return tuple(each.layer for each in placed)


def _output(returned: Tensor | tuple[Tensor, Tensor | None], auxiliary: list[Tensor]) -> Tensor:
    """What a layer adds; its auxiliary loss goes to the list."""
    if isinstance(returned, Tensor):
        return returned
    output, loss = returned
    auxiliary += [] if loss is None else [loss]
    return output


class Transformer(nn.Module):
    """A language model over a fixed vocabulary."""

    cos_sin_2THK: Tensor

    def __init__(self, config: Model, sizes: Sizes, context: int, canonical: Tensor, separator: int) -> None:
        """
        Args:
            canonical: (V,) raw token id -> canonical id (`data.canonical`); its length is the vocabulary's size.
            separator: token id that ends a document.

        The weights are uninitialised until `initialize(seed)`, so that a model may be built on the meta device.
        """
        super().__init__()
        self.streams = config.stream_count
        vocabulary = len(canonical)
        known = Vocabulary(canonical, separator)
        self._placed = [(pool, each) for pool in sizes.pools for each in POOLS[pool].build(config, sizes, known)]
        self.embedding = parameter(vocabulary, config.width, std=config.init_std)
        in_block: dict[int, list[Placed]] = {block: [] for block in range(config.layers + 1)}
        for _, each in self._placed:
            in_block[each.block].append(each)
        self._at_embedding = _attach(self, in_block.pop(0))
        self.blocks = nn.ModuleList(Block(config, sizes, block, placed) for block, placed in in_block.items())
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else parameter(vocabulary, config.width, std=config.init_std)
        cos_sin_2THK = rotations(context, config.heads, config.head_width, config.rope_theta, canonical.device)
        self.register_buffer("cos_sin_2THK", cos_sin_2THK, persistent=False)

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
        return head_losses(self._trunk(tokens_BT)[0].flatten(0, 1), self._head, targets_BT.flatten()).view_as(
            targets_BT
        )

    def residual_streams(self, tokens_BT: Tensor) -> list[Tensor]:
        """What enters the first block and what leaves each, all (B, T, D), before the final norm; of several streams
        their mean, which is what the head reads.
        """
        seen: list[Tensor] = []
        self._trunk(tokens_BT, seen)
        return seen

    def unembed(self, x_ND: Tensor) -> Tensor:
        """Logits (N, V) of a residual stream: the final norm, then the head."""
        return linear(self.norm(x_ND), self._head)

    @property
    def _head(self) -> Tensor:
        return self.embedding if self.head is None else self.head

    def _trunk(self, tokens_BT: Tensor, seen: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """What the head reads, (B, T, D), and the auxiliary loss.

        Args:
            seen: receives the residual stream before the first block and after each.
        """
        x_BTD = F.embedding(tokens_BT, self.embedding)
        losses: list[Tensor] = []
        for layer in self._at_embedding:
            x_BTD = _output(layer(x_BTD, tokens_BT), losses)
        auxiliary = sum(losses, x_BTD.new_zeros(()))
        arrivals: dict[int, list[Tensor]] = {}
        if seen is not None:
            seen.append(x_BTD)
        x = expanded(x_BTD, self.streams) if self.streams > 1 else x_BTD
        for block in self.blocks:
            x, losses = block(x, tokens_BT, self.cos_sin_2THK[:, : tokens_BT.shape[1]], arrivals)
            auxiliary = sum(losses, auxiliary)
            if seen is not None:
                seen.append(self._collapsed(x))
        return self.norm(self._collapsed(x)), auxiliary

    def _collapsed(self, x: Tensor) -> Tensor:
        """The residual as the head reads it, (B, T, D)."""
        return x.mean(2) if self.streams > 1 else x

    def initialize(self, seed: int) -> Transformer:
        """Draw all weights; see `parameter.initialize` for what two models of one seed share."""
        initialize(self, seed)
        return self

    def layers_of(self, *pools: str) -> list[SparseLayer]:
        """The layers of these mechanisms, by default of all, each one's first block first."""
        return [each.layer for pool, each in self._placed if not pools or pool in pools]


def usage_of(model: Transformer) -> Iterator[dict[str, Any]]:
    """What evaluation read of each memory since the last call, by `layer` (0: before the first block) and `pool`."""
    for pool, block, layer in placed_layers(model):
        if layer.rows:
            yield {"layer": block, "pool": pool, **layer.usage()}


def placed_layers(model: Transformer) -> Iterator[tuple[str, int, SparseLayer]]:
    """Pool, block (0: before the first) and layer of each layer of a mechanism, in the order of the model."""
    order = {"embedding": 0, "entry": 1, "feed_forward": 2, "beside": 3}
    for pool, each in sorted(model._placed, key=lambda one: (one[1].block, order[one[1].at])):
        yield pool, each.block, each.layer


# --- the account of a whole model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelAccount:
    """Closed-form counts of one model, part by part. Parameters of the vocabulary stand apart."""

    parts: dict[str, Account]
    """`backbone`, and one entry for each pool that the model holds: its sparse parameters and what serves them (router,
    projections).
    """
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
        """Share of P_sparse that a pool holds; that of the routed experts is rho."""
        return self.parts[pool].idle / self.sparse_params if pool in self.parts and self.sparse_params else 0.0

    @property
    def memory_flops_share(self) -> float:
        """Memory's part of the blocks' forward FLOPs per token."""
        return sum(part.flops for pool, part in self.parts.items() if pool in MEMORY_POOLS) / self._sum.flops

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
    backbone, with_experts = norm_account(config.width), EXPERTS.blocks(config, sizes)
    for block in range(1, config.layers + 1):
        backbone += attention_account(config, context) + connection_account(config) * 2
        if block not in config.replaced and block not in with_experts:
            backbone += feed_forward_account(config.width, EXPERTS.dense_width(config, sizes, block))
    parts = {"backbone": backbone} | {pool: POOLS[pool].account(config, sizes) for pool in sizes.pools}
    vocabulary_params = vocabulary * config.width
    return ModelAccount(
        parts, vocabulary_params * (1 if config.tie_embeddings else 2), always_active(vocabulary_params).flops
    )


def count_tensors(model: Transformer) -> dict[str, tuple[int, int]]:
    """Parameters in all and activated ones of each part, by the tensors that a model holds, vocabulary aside."""
    total, idle, reads = Counter[str](), Counter[str](), Counter[nn.Parameter]()
    owner = owners(model)
    for name, weight in model.named_parameters():
        if name not in ("embedding", "head"):
            total[owner.get(weight, "backbone")] += weight.numel()
    for layer in model.layers_of():
        for weight, count in layer.reads():
            reads[weight] += count
    for weight, count in reads.items():
        idle[owner[weight]] += max(len(weight) - count, 0) * weight[0].numel()
    return {part: (count, count - idle[part]) for part, count in total.items()}


def owners(model: Transformer) -> dict[nn.Parameter, str]:
    """The pool of each parameter that a mechanism has brought."""
    return {weight: pool for pool, each in model._placed for weight in each.layer.parameters()}


def check_account(config: Model, sizes: Sizes, model: Transformer | None = None) -> None:
    """
    Args:
        model: of these sizes; by default one is built without the memory of its tensors.

    Raises:
        RuntimeError: a closed form is not what the tensors hold.
    """
    if model is None:
        with torch.device("meta"):
            model = Transformer(
                config, sizes, context=1, canonical=torch.zeros(1, dtype=torch.int64, device="cpu"), separator=0
            )
    parts = count_model(config, sizes, context=1, vocabulary=0).parts
    stated, held = {part: (one.total, one.active) for part, one in parts.items()}, count_tensors(model)
    for part in stated.keys() | held.keys():
        if stated.get(part, (0, 0)) != held.get(part, (0, 0)):
            raise RuntimeError(
                f"the account of `{part}` states {stated.get(part)} parameters in all and activated, but its tensors "
                f"hold {held.get(part)}; mend the account, which stands beside the mechanism's code, or report this"
            )


def memory_params(config: Model, sizes: Sizes) -> int:
    """Parameters of the rows of all memories."""
    return sum(sizes.rows(pool) * MEMORY_POOLS[pool].row_width(config) for pool in sizes.tables)


def memory_rows_read(config: Model, sizes: Sizes) -> int:
    """Rows that one token reads, over all memories and layers."""
    return sum(MEMORY_POOLS[pool].rows_read(config, sizes) for pool in sizes.tables)
