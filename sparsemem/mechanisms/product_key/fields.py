"""Fields of the product-key memories, with unit, default and bounds; and which layers read which table. It must not
know torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from sparsemem.mechanisms.mechanism import MemoryFields
from sparsemem.values import Count, Real, Size, SmallCount

if TYPE_CHECKING:
    from sparsemem.config import Model

Rank = Annotated[Count, Field(le=64)]


class ProductKey(MemoryFields):
    """A memory whose rows are retrieved by product keys. Every published design is a point in these fields.

    The subclasses are five of those points, by their defaults, and the pools that `shares` names; one becomes the next
    field by field.
    """

    layers: tuple[SmallCount, ...] | None = None
    """1-based blocks that hold a memory layer; default: every block."""
    layers_per_table: SmallCount | Literal["all"] = 1
    """Memory layers, counted from the first, that read one table of values (Memory+): groups without overlap. In
    UltraMemV2's released code each layer reads a window of all values that slides from layer to layer; that is not
    built.
    """
    placement: Literal["replace", "parallel"] = "replace"
    """`replace`: in place of the block's feed-forward; `parallel`: beside it, fed by its normed input."""
    skip: Count = 0
    """So many blocks after the one that reads, the output is added (UltraMem); needs `placement: parallel`."""
    heads: Size = 4
    """Retrievals a token, each with its own keys; what they read is summed."""
    top_m: Annotated[Size, Field(le=2**16)] = 32
    """Rows that one head reads."""
    key_dim: Size = Field(examples=["16"])
    """Width of a key, and of the query of one side and one Tucker rank: UltraMem's D_k / r, the released
    code's `kdim`.
    """
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
    cores: SmallCount = 1
    """Tucker cores: rows are chosen by their sum, and slice i of a value is weighted by the score of core i (multi-core
    scoring).
    """
    virtual_tables: Size = 1
    """Addresses a row, a square number E: sqrt(E) times the keys a side, shuffled over the rows (implicit value
    expansion).
    """
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
    """Scale at the start. `flat`: values of 0.02 and an output projection as small as a feed-forward's; `released`:
    values of 0.02 and projections of 1 / sqrt(inputs), which UltraMemV2's released code has had and which speak louder;
    otherwise the values' scale by the paper of that name. That of `ultramem_v2` matches the memory to a feed-forward
    whose `model.init_std` is sqrt(2 / (5 width)): set that too.
    """
    value_rate: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]] | None = None
    """Learning rate of the values over `train.lr` at the start and at the end, linear between; default:
    `train.table_lr_factor`.
    """

    @model_validator(mode="after")
    def _shapes(self) -> ProductKey:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"`layers` must be a rising list without repeats, such as [2, 3]; got {list(self.layers)}")
        if self.skip and self.placement == "replace":
            raise ValueError(
                f"`skip` {self.skip} needs `placement: parallel`: what replaces a feed-forward is added in its own "
                "block"
            )
        if self.rows and self.placement == "replace":
            raise ValueError(
                f"`rows` {self.rows:,} puts the memory on top of a fixed backbone: set `placement: parallel`"
            )
        if math.isqrt(self.virtual_tables) ** 2 != self.virtual_tables:
            raise ValueError(
                f"`virtual_tables` {self.virtual_tables} must be a square number (1, 4, 9, ...): its root multiplies "
                "the keys"
            )
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
            raise ValueError(
                f"`cores` {self.cores} needs `softmax: false`: each core's own score weights its slice of the value"
            )
        if self.pre_value_dim and self.pre_values == "none":
            raise ValueError(f"`pre_value_dim` {self.pre_value_dim} needs `pre_values: linear` or `gelu`")
        return self


class PKM(ProductKey):
    """Product-key memory (arXiv 1907.05242)."""


class MemoryPlus(ProductKey):
    """Memory layers at scale (arXiv 2412.09764): one table for all layers, gated output."""

    layers_per_table: SmallCount | Literal["all"] = "all"
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
    cores: SmallCount = 2
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
    cores: SmallCount = 2
    virtual_tables: Size = 4
    projection_per_table: StrictBool = False
    projection: Literal["none", "linear", "gated"] = "linear"
    pre_values: Literal["none", "linear", "gelu"] = "linear"
    init: Literal["flat", "released", "ultramem", "ultramem_v2"] = "ultramem_v2"
    value_rate: tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]] | None = (4.0, 1.0)


def memory_layers(model: Model, pool: str) -> tuple[int, ...]:
    """1-based blocks that hold a layer of this memory."""
    return model.pools[pool].layers or tuple(range(1, model.layers + 1))


def layers_per_table(model: Model, pool: str) -> int:
    """Layers of this memory that read one table."""
    wanted = model.pools[pool].layers_per_table
    return len(memory_layers(model, pool)) if wanted == "all" else wanted


def key_counts(memory: ProductKey, pool: str) -> tuple[int, int]:
    """Row keys and column keys of a table of given rows: the two factors nearest to each other.

    Raises:
        ValueError: the rows are not the product of two key counts of which one is at most twice the other, or are fewer
            than a token reads.
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
            f"`{pool}.top_m` {memory.top_m} of {memory.heads} heads is more than the {memory.rows:,} candidate rows of "
            "a table"
        )
    return memory.rows // columns, columns
