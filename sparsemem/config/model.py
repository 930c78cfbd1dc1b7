"""Fields of the model: its blocks, its experts and each kind of memory, with unit, default and bounds."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from sparsemem.config.values import Count, Few, Quantity, Real, Size, Strict

HASHED = ("engram", "ngram_embedding")  # memories whose rows follow from the token ids
PRODUCT_KEY = ("pkm", "memory_plus", "peer", "ultramem", "ultramem_v2")  # memories whose rows are retrieved by product keys
MEMORY_POOLS = (*HASHED, *PRODUCT_KEY)
POOLS = ("moe", *MEMORY_POOLS)  # the kinds of sparse parameters; the names of `shares`


MOST_TABLES = 1024  # of hashed rows: each has a prime of its own, which is searched for
Order = Annotated[StrictInt, Field(ge=2, le=64)]
Rank = Annotated[Count, Field(le=64)]


class MoE(Strict):
    """DeepSeekMoE layer (arXiv 2401.06066). The number of routed experts and the shared width are solved from the budget."""

    expert_width: Size
    """Inner width of one routed expert (SwiGLU)."""
    top_k: Size
    """Routed experts that a token activates."""
    shared_experts: Count = 1
    """Experts that every token passes; their width is what the budget solves for."""
    leading_dense: Count = 0
    """First blocks that hold a dense feed-forward in place of experts."""
    dense_width: Size | None = None
    """Inner width of those; default: the activated width, of the shared and the top-k experts together."""
    gate: Literal["sigmoid", "softmax"] = "sigmoid"
    """Affinity: `sigmoid` (DeepSeek-V3) or `softmax` (DeepSeekMoE, OLMoE)."""
    normalize_gates: StrictBool = True
    """Divide the top-k gates by their sum."""
    bias_rate: Annotated[Real, Field(ge=0)] = 1e-3
    """Step of the loss-free balancing bias (arXiv 2408.15664); 0 turns it off."""
    balance_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the switch-style auxiliary balance loss, summed over the MoE blocks; trainers that take their mean, such as OLMoE's, write
    so many times as much."""
    z_loss: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the router z-loss (mean squared logsumexp of the router logits), summed over the MoE blocks."""


class _Memory(Strict):
    """What every memory has: the rows of its tables are solved from its share of the budget, unless they are given."""

    rows: Annotated[Quantity, Field(le=10**12)] | None = None
    """Rows of each table, at most 1T. A memory of given rows takes no share: it comes on top of the budget, on an unchanged backbone."""


class Engram(_Memory):
    """Hashed n-gram memory (arXiv 2601.07372)."""

    layers: tuple[Few, ...]
    """1-based blocks at whose entry a module sits."""
    orders: tuple[Order, ...] = (2, 3)
    """Lengths of the suffix n-grams."""
    heads: Few = 8
    """Hash heads an order; each has its own table of a prime number of rows."""
    row_dim: Size = 8
    """Width of one row."""
    gate: Literal["signed-root", "plain"] = "signed-root"
    """`plain`: sigmoid of the scaled dot product (paper); `signed-root`: of its signed square root (released code)."""
    bias: StrictBool = False
    """Biases in the key and value projections (released demo)."""
    conv: StrictBool = True
    """The depthwise causal convolution after the gate."""
    conv_kernel: Few = 4
    """Taps of that convolution; its dilation is the largest order."""
    conv_reset_at_document_end: StrictBool = False
    """Nor does the convolution reach across document separators. (The released code's does; attention always does, within a sequence.)"""
    compression: StrictBool = True
    """Hash canonical tokens (case, accents and spaces folded) in place of raw ids."""
    reset_at_document_end: StrictBool = True
    """n-grams do not reach across document separators."""
    init_std: Annotated[Real, Field(ge=0)] = 0.02
    """Standard deviation of the rows at the start."""
    hash_seed: Count = 0
    """Seed of the hash multipliers."""

    @model_validator(mode="after")
    def _distinct(self) -> Engram:
        for name in ("layers", "orders"):
            values = getattr(self, name)
            if not values or list(values) != sorted(set(values)):
                raise ValueError(f"`{name}` must be a rising list without repeats, such as [2, 3]; got {list(values)}")
        return self


class NgramEmbedding(_Memory):
    """Hashed n-grams added to the vocabulary embedding (OverEncoding, arXiv 2501.16975; amplified as in LongCat, arXiv 2601.21204)."""

    orders: tuple[Order, ...] = (2, 3)
    """Lengths of the suffix n-grams."""
    heads: Few = 4
    """Tables an order, each with a prime number of rows of its own and a projection to the model's width."""
    row_dim: Size = 8
    """Width of one row."""
    amplify: Literal["none", "scale", "norm"] = "none"
    """So that the n-grams are not drowned in the residual stream: the sum times the root of the width, or its RMS norm."""
    reset_at_document_end: StrictBool = True
    """n-grams do not reach across document separators."""
    init_std: Annotated[Real, Field(ge=0)] = 0.02
    """Standard deviation of the rows at the start."""

    @model_validator(mode="after")
    def _rising(self) -> NgramEmbedding:
        if not self.orders or list(self.orders) != sorted(set(self.orders)):
            raise ValueError(f"`orders` must be a rising list without repeats, such as [2, 3]; got {list(self.orders)}")
        return self


class ProductKey(_Memory):
    """A memory whose rows are retrieved by product keys. Every published design is a point in these fields.

    The subclasses are five of those points, by their defaults, and the pools that `shares` names; one becomes the next field by field.
    """

    layers: tuple[Few, ...] | None = None
    """1-based blocks that hold a memory layer; default: every block."""
    layers_per_table: Few | Literal["all"] = 1
    """Memory layers, counted from the first, that read one table of values (Memory+): groups without overlap. In UltraMemV2's released code
    each layer reads a window of all values that slides from layer to layer; that is not built."""
    placement: Literal["replace", "parallel"] = "replace"
    """`replace`: in place of the block's feed-forward; `parallel`: beside it, fed by its normed input."""
    skip: Count = 0
    """So many blocks after the one that reads, the output is added (UltraMem); needs `placement: parallel`."""
    heads: Size = 4
    """Retrievals a token, each with its own keys; what they read is summed."""
    top_m: Annotated[Size, Field(le=2**16)] = 32
    """Rows that one head reads."""
    key_dim: Size
    """Width of a key, and of the query of one side and one Tucker rank: UltraMem's D_k / r, the released code's `kdim`."""
    shared_keys: StrictBool = False
    """All heads score the same keys (PEER)."""
    shared_query: StrictBool = False
    """Pairs of heads share a query (UltraMem)."""
    query_per_rank: StrictBool = False
    """Each Tucker rank has a query of its own (UltraMemV2)."""
    query_conv: Count = 0
    """Taps of a causal depthwise convolution before the query; 0: none (UltraMem: 4)."""
    conv_reset_at_document_end: StrictBool = False
    """That convolution does not reach across document separators."""
    norm: Literal["none", "batch", "layer"] = "batch"
    """`batch`: batch norm of the query (PKM); `layer`: layer norm of query and keys (UltraMem)."""
    softmax: StrictBool = True
    """Weights are the softmax of a head's top-m scores; otherwise the scores themselves."""
    tucker_rank: Rank = 0
    """0: the score of a row is the sum of its two key scores; r: `row^T C column` with a learned r x r core."""
    tucker_penalty: Annotated[Real, Field(ge=0)] = 0.0
    """Weight of the penalty on the core's singular values after the first."""
    tucker_threshold: Annotated[Real, Field(ge=0)] = 0.15
    """Singular values below it are free."""
    cores: Few = 1
    """Tucker cores: rows are chosen by their sum, and slice i of a value is weighted by the score of core i (multi-core scoring)."""
    virtual_tables: Size = 1
    """Addresses a row, a square number E: sqrt(E) times the keys a side, shuffled over the rows (implicit value expansion)."""
    projection_per_table: StrictBool = True
    """Each virtual table has its own projection (UltraMem); otherwise one serves all (UltraMemV2)."""
    value_dim: Size | None = None
    """Width of a value; default: the model's."""
    projection: Literal["none", "linear", "gated"] = "none"
    """Of the pooled value to the model's width; `gated`: times silu of a projection of the input first (Memory+)."""
    pre_values: Literal["none", "linear", "gelu"] = "none"
    """A row's weight is multiplied by its pre-value times the input: each row is an expert of one neuron (PEER)."""
    pre_value_dim: Size | None = None
    """Width of a pre-value, to which the input is projected; default: the model's, without a projection."""
    init: Literal["flat", "released", "ultramem", "ultramem_v2"] = "flat"
    """Scale at the start. `flat`: values of 0.02 and an output projection as small as a feed-forward's; `released`: values of 0.02 and
    projections of 1 / sqrt(inputs), which UltraMemV2's released code has had and which speak louder; otherwise the values' scale by the
    paper of that name. That of `ultramem_v2` matches the memory to a feed-forward whose `model.init_std` is sqrt(2 / (5 width)): set that
    too."""
    value_rate: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]] | None = None
    """Learning rate of the values over `train.lr` at the start and at the end, linear between; default: `train.table_lr_factor`."""

    @model_validator(mode="after")
    def _shapes(self) -> ProductKey:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"`layers` must be a rising list without repeats, such as [2, 3]; got {list(self.layers)}")
        if self.skip and self.placement == "replace":
            raise ValueError(f"`skip` {self.skip} needs `placement: parallel`: what replaces a feed-forward is added in its own block")
        if self.rows and self.placement == "replace":
            raise ValueError(f"`rows` {self.rows:,} puts the memory on top of a fixed backbone: set `placement: parallel`")
        if math.isqrt(self.virtual_tables) ** 2 != self.virtual_tables:
            raise ValueError(f"`virtual_tables` {self.virtual_tables} must be a square number (1, 4, 9, ...): its root multiplies the keys")
        if self.shared_query and self.heads % 2:
            raise ValueError(f"`heads` {self.heads} must be even with `shared_query`: pairs of heads share a query")
        if self.norm == "layer" and self.key_dim < 2:
            raise ValueError(f"`key_dim` {self.key_dim} with `norm: layer` makes every score 0; use 2 or more")
        if self.conv_reset_at_document_end and not self.query_conv:
            raise ValueError("`conv_reset_at_document_end` needs a `query_conv` of 1 or more")
        for name in ("query_per_rank", "tucker_penalty"):
            if getattr(self, name) and not self.tucker_rank:
                raise ValueError(f"`{name}` needs a `tucker_rank` of 1 or more")
        if self.cores > 1 and not self.tucker_rank:
            raise ValueError(f"`cores` {self.cores} needs a `tucker_rank` of 1 or more")
        if self.cores > 1 and self.softmax:
            raise ValueError(f"`cores` {self.cores} needs `softmax: false`: each core's own score weights its slice of the value")
        if self.pre_value_dim and self.pre_values == "none":
            raise ValueError(f"`pre_value_dim` {self.pre_value_dim} needs `pre_values: linear` or `gelu`")
        return self


class PKM(ProductKey):
    """Product-key memory (arXiv 1907.05242)."""


class MemoryPlus(ProductKey):
    """Memory layers at scale (arXiv 2412.09764): one table for all layers, gated output."""

    layers_per_table: Few | Literal["all"] = "all"
    norm: Literal["none", "batch", "layer"] = "layer"
    projection: Literal["none", "linear", "gated"] = "gated"


class PEER(ProductKey):
    """Mixture of a million experts (arXiv 2407.04153): a row is an expert of one neuron."""

    heads: Size = 8
    top_m: Annotated[Size, Field(le=2**16)] = 16
    shared_keys: StrictBool = True
    pre_values: Literal["none", "linear", "gelu"] = "gelu"


class UltraMem(ProductKey):
    """UltraMem (arXiv 2411.12364)."""

    placement: Literal["replace", "parallel"] = "parallel"
    heads: Size = 2
    shared_query: StrictBool = True
    query_conv: Count = 4
    norm: Literal["none", "batch", "layer"] = "layer"
    softmax: StrictBool = False
    tucker_rank: Rank = 2
    tucker_penalty: Annotated[Real, Field(ge=0)] = 0.001
    cores: Few = 2
    virtual_tables: Size = 4
    projection: Literal["none", "linear", "gated"] = "linear"
    init: Literal["flat", "released", "ultramem", "ultramem_v2"] = "ultramem"
    value_rate: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]] | None = (10.0, 1.0)


class UltraMemV2(ProductKey):
    """UltraMemV2 (arXiv 2508.18756): in every block, beside its feed-forward."""

    placement: Literal["replace", "parallel"] = "parallel"
    heads: Size = 1
    query_per_rank: StrictBool = True
    norm: Literal["none", "batch", "layer"] = "layer"
    softmax: StrictBool = False
    tucker_rank: Rank = 2
    cores: Few = 2
    virtual_tables: Size = 4
    projection_per_table: StrictBool = False
    projection: Literal["none", "linear", "gated"] = "linear"
    pre_values: Literal["none", "linear", "gelu"] = "linear"
    init: Literal["flat", "released", "ultramem", "ultramem_v2"] = "ultramem_v2"
    value_rate: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]] | None = (4.0, 1.0)


class Model(Strict):
    """Pre-norm decoder: RoPE, QK-norm, grouped-query attention, SwiGLU."""

    layers: Few
    width: Size
    heads: Size
    kv_heads: Size | None = None
    """Key-value heads (grouped-query attention); default: as many as `heads`."""
    head_dim: Size | None = None
    """Width of a head; default: `width` / `heads`."""
    rope_theta: Annotated[Real, Field(gt=1)] = 10_000.0
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-6
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    tie_embeddings: StrictBool = False
    """Use the vocabulary embedding as the LM head too."""
    moe: MoE | None = None
    """Default: dense feed-forwards, whose width is solved from the budget."""
    engram: Engram | None = None
    ngram_embedding: NgramEmbedding | None = None
    pkm: PKM | None = None
    memory_plus: MemoryPlus | None = None
    peer: PEER | None = None
    ultramem: UltraMem | None = None
    ultramem_v2: UltraMemV2 | None = None

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return self.head_dim or self.width // self.heads

    @property
    def product_keys(self) -> dict[str, ProductKey]:
        """The memories of the product-key family, by the name of their pool."""
        return {pool: getattr(self, pool) for pool in PRODUCT_KEY if getattr(self, pool) is not None}

    @property
    def on_top(self) -> tuple[str, ...]:
        """Memories of given rows: they come on top of the budget."""
        return tuple(pool for pool in MEMORY_POOLS if (memory := getattr(self, pool)) is not None and memory.rows)

    def memory_layers(self, pool: str) -> tuple[int, ...]:
        """1-based blocks that hold a layer of this product-key memory."""
        return getattr(self, pool).layers or tuple(range(1, self.layers + 1))

    def layers_per_table(self, pool: str) -> int:
        """Layers of this product-key memory that read one table."""
        wanted = getattr(self, pool).layers_per_table
        return len(self.memory_layers(pool)) if wanted == "all" else wanted

    def is_replaced(self, layer: int) -> bool:
        """Whether a memory stands in place of the feed-forward of this 1-based block."""
        return any(memory.placement == "replace" and layer in self.memory_layers(pool) for pool, memory in self.product_keys.items())

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.head_dim is None and self.width % (2 * self.heads):
            fit = ", ".join(str(heads) for heads in range(1, self.width) if self.width % (2 * heads) == 0)
            raise ValueError(
                f"`width` {self.width} must be a multiple of 2 x `heads` = {2 * self.heads} (RoPE turns pairs): write heads: "
                f"{fit or '(none divides an odd `width`)'}, or the width of a head, head_dim: {self.width // self.heads // 2 * 2 or 2}"
            )
        if self.head_width % 2:
            raise ValueError(f"`head_dim` {self.head_dim} must be even: RoPE turns pairs")
        for name, value in (("width", self.width), ("moe.expert_width", self.moe.expert_width if self.moe else 8)):
            if value % 8:
                raise ValueError(f"`{name}` {value} must be a multiple of 8: grouped matrix products need rows of whole 16 bytes")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"`heads` {self.heads} must be a multiple of `kv_heads` {self.kv_heads}")
        if self.moe and self.moe.leading_dense >= self.layers:
            raise ValueError(f"`moe.leading_dense` {self.moe.leading_dense} leaves no MoE block among {self.layers} layers")
        if self.moe and self.moe.dense_width and not self.moe.leading_dense:
            raise ValueError(f"`moe.dense_width` {self.moe.dense_width} needs a `moe.leading_dense` of 1 or more")
        if self.engram and max(self.engram.layers) > self.layers:
            raise ValueError(f"`engram.layers` {list(self.engram.layers)} names a block beyond the {self.layers} of the model")
        for pool in HASHED:
            if (memory := getattr(self, pool)) is not None:
                tables = len(memory.orders) * memory.heads * len(getattr(memory, "layers", (1,)))
                if tables > MOST_TABLES:
                    raise ValueError(
                        f"`{pool}` has {tables:,} tables; use fewer `orders`, `heads` or `layers`, at most {MOST_TABLES:,} tables in all"
                    )
        for pool in self.product_keys:
            self._check_product_key(pool)
        leading = self.moe.leading_dense if self.moe else 0
        if all(self.is_replaced(layer) for layer in range(leading + 1, self.layers + 1)):
            raise ValueError("memories in place of a feed-forward leave no block with one; shorten `layers` or set `placement: parallel`")
        return self

    def _check_product_key(self, pool: str) -> None:
        memory: ProductKey = getattr(self, pool)
        layers, together = self.memory_layers(pool), self.layers_per_table(pool)
        if layers[-1] + memory.skip > self.layers:
            beyond = f"`{pool}.layers` {list(layers)}" + (f" with `{pool}.skip` {memory.skip}" if memory.skip else "")
            raise ValueError(f"{beyond} reaches beyond the {self.layers} blocks of the model")
        if len(layers) % together:
            raise ValueError(f"`{pool}.layers_per_table` {together} does not divide the {len(layers)} memory layers {list(layers)}")
        for other in self.product_keys:
            both = sorted(set(layers) & set(self.memory_layers(other)))
            if other != pool and memory.placement == getattr(self, other).placement == "replace" and both:
                raise ValueError(
                    f"`{pool}` and `{other}` both replace the feed-forward of block {both[0]}; set one to `placement: parallel`"
                )
        value_dim = memory.value_dim or self.width
        if memory.projection == "none" and value_dim * (memory.virtual_tables if memory.projection_per_table else 1) != self.width:
            raise ValueError(
                f"`{pool}.value_dim` {value_dim} with {memory.virtual_tables} virtual tables is not the model's `width` {self.width}; "
                f"set `{pool}.projection: linear`"
            )
        if value_dim % memory.cores:
            raise ValueError(
                f"`{pool}.value_dim` {value_dim} must be a multiple of `{pool}.cores` {memory.cores}: each core weights a slice"
            )
        if memory.rows:
            key_counts(memory, pool)


def key_counts(memory: ProductKey, pool: str) -> tuple[int, int]:
    """Row keys and column keys of a table of given rows: the two factors nearest to each other.

    Raises:
        ValueError: the rows are not the product of two key counts of which one is at most twice the other, or are fewer than a token reads.
    """
    assert memory.rows
    columns = next(n for n in range(math.isqrt(memory.rows), 0, -1) if memory.rows % n == 0)
    if memory.rows > 2 * columns**2:
        near = math.isqrt(memory.rows)
        raise ValueError(
            f"`{pool}.rows` {memory.rows:,} is not a product of two key counts of similar size; the nearest that are: "
            f"{near**2:,} ({near} x {near}), {near * (near + 1):,} ({near + 1} x {near})"
        )
    if memory.heads * memory.top_m > memory.rows:
        raise ValueError(
            f"`{pool}.top_m` {memory.top_m} of {memory.heads} heads is more than the {memory.rows:,} candidate rows of a table"
        )
    return memory.rows // columns, columns
