"""Engram: hashed n-gram memory at the entry of some blocks (arXiv 2601.07372)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from sparsemem.accounting import Account
from sparsemem.mechanisms.hashed import Hashed, Order, refuse_unless_rising
from sparsemem.mechanisms.mechanism import MemoryFields, Placed, Vocabulary
from sparsemem.values import Count, Real, Size, SmallCount

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.model import Sizes


class Engram(MemoryFields):
    """Hashed n-gram memory (arXiv 2601.07372)."""

    layers: tuple[SmallCount, ...] = Field(examples=["[2]"])
    """1-based blocks at whose entry a module sits."""
    orders: tuple[Order, ...] = (2, 3)
    """Lengths of the suffix n-grams."""
    heads: SmallCount = 8
    """Hash heads an order; each has its own table of a prime number of rows."""
    row_dim: Size = 8
    """Width of one row."""
    gate: Literal["signed-root", "plain"] = "signed-root"
    """`plain`: sigmoid of the scaled dot product (paper); `signed-root`: of its signed square root (released code)."""
    fusion: Literal["after_mix", "per_branch"] = "after_mix"
    """With several residual streams. `after_mix`: one gate on what attention would read, whose output all streams get
    alike; `per_branch`: a key projection, a gate and a convolution for each stream, on one table and one value
    projection (paper, sec. 2.4).
    """
    bias: StrictBool = False
    """Biases in the key and value projections (released demo)."""
    conv: StrictBool = True
    """The depthwise causal convolution after the gate."""
    conv_kernel: SmallCount = 4
    """Taps of that convolution; its dilation is the largest order."""
    conv_reset_at_document_end: StrictBool = False
    """Nor does the convolution reach across document separators. (The released code's does; attention always does,
    within a sequence.)
    """
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
        refuse_unless_rising(self, "layers", "orders")
        return self


class EngramMechanism(Hashed):
    """A module at the entry of each of its `layers`."""

    name, label, fields = "engram", "Engram", Engram

    def modules(self, model: Model) -> int:
        return len(self.of(model).layers)

    def check(self, model: Model) -> None:
        engram: Engram = self.of(model)
        if max(engram.layers) > model.layers:
            raise ValueError(
                f"`engram.layers` {list(engram.layers)} names a block beyond the {model.layers} of the model"
            )
        if engram.fusion == "per_branch" and model.stream_count == 1:
            raise ValueError(
                f"`engram.fusion` is per_branch, and `residual: {model.residual}` has one stream; leave `fusion` out, "
                "or write a `residual` of several streams, such as residual: manifold"
            )
        super().check(model)

    def account(self, model: Model, sizes: Sizes) -> Account:
        from sparsemem.mechanisms.engram.layer import engram_account

        return engram_account(model, sizes.of(self.name))

    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        from sparsemem.mechanisms.engram.layer import EngramMemory

        for block, rows in zip(self.of(model).layers, sizes.of(self.name), strict=True):
            layer = EngramMemory(model, block, rows, vocabulary.canonical, vocabulary.separator)
            yield Placed(block, "entry", "memory", layer, per_stream=layer.streams > 1)


ENGRAM = EngramMechanism()
