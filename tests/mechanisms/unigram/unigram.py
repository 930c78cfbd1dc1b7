"""A memory from outside of the package: a row a token id, gated into the residual stream at the entry of some blocks.

It is the smallest conditional memory, a bag of single tokens. `sparsemem` knows it by the entry point in
`pyproject.toml`, or by `sparsemem.register("unigram:UNIGRAM")`. CONTRIBUTING.md walks through this file.

Shape letters: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from torch import Tensor

from sparsemem.accounting import BYTES_PER_PARAMETER, Account, always_active
from sparsemem.mechanisms import Mechanism, MemoryFields, Placed, Tables, Vocabulary
from sparsemem.mechanisms.layer import SparseLayer
from sparsemem.memory.table import MemoryTable
from sparsemem.parameter import parameter
from sparsemem.values import Real, SmallCount

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.model import Sizes


# 1. The fields of `model.unigram`, each with its default, its bounds and a docstring.


class Unigram(MemoryFields):
    """One table a layer, whose rows are as wide as the model."""

    layers: tuple[SmallCount, ...] = Field(examples=["[1]"])
    """1-based blocks at whose entry a layer sits."""
    init_std: Annotated[Real, Field(ge=0)] = 0.02
    """Standard deviation of the rows at the start."""


# 2. The layer. Its parameters say how they start; the rows lie in a `MemoryTable`, whose gradient and update are
# sparse.


class UnigramLayer(SparseLayer):
    """A table with a gate: a token reads the row of its id, or of its id modulo the rows where the budget affords
    fewer.
    """

    def __init__(self, width: int, rows: int, std: float) -> None:
        super().__init__(rows)
        self.table = MemoryTable((rows,), width, std)
        self.gate_D = parameter(width, std=width**-0.5)

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        rows_BT1 = (tokens_BT % self.rows).unsqueeze(-1)
        gate_BT1 = (x_BTD * self.gate_D).sum(-1, keepdim=True).sigmoid()
        out_BTD = gate_BT1 * self.table(rows_BT1)
        if not self.training:
            self.note(rows_BT1, out_BTD, gate_mean=gate_BT1)
        return out_BTD


# 3. What the harness asks: sizes from one integer, the closed form of what `build` makes, and the layers with their
# places.


class UnigramMechanism(Mechanism):
    """A size is the rows of each table."""

    name, label, fields = "unigram", "Unigram memory", Unigram

    def check(self, model: Model) -> None:
        layers = self.of(model).layers
        if not layers or list(layers) != sorted(set(layers)) or layers[-1] > model.layers:
            raise ValueError(
                f"`unigram.layers` {list(layers)} must be a rising list of blocks from 1 to {model.layers}, such as [1]"
            )

    def least(self, model: Model) -> int:
        return 1

    def tables(self, model: Model, size: int) -> Tables:
        return ((size,),) * len(self.of(model).layers)

    def row_width(self, model: Model) -> int:
        return model.width

    def account(self, model: Model, sizes: Sizes) -> Account:
        tables, width = sizes.of(self.name), model.width
        rows = Account(
            total=self.rows(tables) * width,
            active=len(tables) * width,
            sparse_bytes=len(tables) * width * BYTES_PER_PARAMETER,
        )
        return rows + always_active(width) * len(tables)

    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        for block, (rows,) in zip(self.of(model).layers, sizes.of(self.name), strict=True):
            yield Placed(block, "entry", self.name, UnigramLayer(model.width, rows, self.of(model).init_std))


UNIGRAM = UnigramMechanism()
