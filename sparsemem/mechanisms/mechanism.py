"""All that the rest of the code asks of a mechanism: the one protocol. It must not know torch, nor any mechanism.

A mechanism is a kind of sparse parameters: a pool of the budget. Its fields stand under its name in a study's `model`,
its share of the sparse parameters under the same name in `shares`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from sparsemem.accounting import BYTES_PER_PARAMETER, Account
from sparsemem.values import Quantity, Strict

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemem.config import Model, Trial
    from sparsemem.mechanisms.layer import SparseLayer
    from sparsemem.model import Sizes

Tables = tuple[tuple[int, ...], ...]
"""The integers that a share comes to, in the mechanism's own order."""


class MemoryFields(Strict):
    """What every memory has: the rows of its tables are solved from its share of the budget, unless they are given."""

    rows: Annotated[Quantity, Field(le=10**12)] | None = None
    """Rows of each table, at most 1T. A memory of given rows takes no share: it comes on top of the budget, on an
    unchanged backbone.
    """


@dataclass(frozen=True)
class Vocabulary:
    """What a layer may know of the token ids."""

    canonical: Tensor
    """(V,) raw token id -> canonical id (`data.canonical`)."""
    separator: int
    """Token id that ends a document."""


@dataclass(frozen=True)
class Placed:
    """A layer and its place in the model."""

    block: int
    """1-based; 0 with `embedding`."""
    at: Literal["embedding", "entry", "feed_forward", "beside"]
    """`embedding`: turns the vocabulary embedding into what enters the first block; the others add to the residual
    stream: at the `entry` of the block, before attention; as its `feed_forward`; or `beside` it, fed by the same normed
    input.
    """
    path: str
    """Its name in the block, or in the model with `embedding`. Initial weights are drawn by it."""
    layer: SparseLayer
    skip: int = 0
    """So many blocks later its output is added; of a layer `beside`."""
    per_stream: bool = False
    """Of a layer at the `entry`: it is fed all residual streams, (B, T, N, D), and adds to each its own."""


class Index(NamedTuple):
    """Work of finding rows by their keys, per token, query projection aside."""

    scoring: int
    """FLOPs of the keys' scores."""
    candidates: int
    """FLOPs of choosing the candidates and scoring them."""
    sorting: int
    """Comparisons of the two selections over the keys of a side and of the one over the candidates."""


class Mechanism(ABC):
    """A kind of sparse parameters. Where tables are asked for by `sizes`, they are `sizes.of(self.name)`.

    The abstract methods have to be given; the others hold for tables of which a token reads one row each.
    """

    name: str
    """Of its group of fields in `model`, and of its share in `shares`."""
    label: str
    """What readers call it."""
    fields: type[Strict]
    """Its group of fields, with unit, default and bounds; of a memory a `MemoryFields`."""
    called: ClassVar[Mapping[str, str]] = {}
    """Field -> what other trainers call it, between spaces."""
    published_slope: float | None = None
    """Nats per token for every tenfold of its rows, where a paper gives it."""
    coarse: bool = False
    """Its sizes are solved before those of finer ones, whose rows take up what rounding leaves."""

    def of(self, model: Model) -> Any:
        """Its fields as this model has them; None: not configured."""
        return model.pools.get(self.name)

    def check(self, model: Model) -> None:  # noqa: B027
        """Refuse fields that do not fit the model.

        Raises:
            ValueError: names field, value and remedy.
        """

    def check_trial(self, trial: Trial) -> None:  # noqa: B027
        """Likewise with the whole trial."""

    def check_start(self, model: Model, sizes: Sizes) -> None:  # noqa: B027
        """Refuse sizes that have no initial scale.

        Raises:
            ConfigError: names field, value and remedy.
        """

    def replaced(self, model: Model) -> tuple[int, ...]:
        """1-based blocks in which a layer of it stands in place of the feed-forward."""
        return ()

    # --- sizes: the budget solves for one integer, from which all tables follow

    @abstractmethod
    def least(self, model: Model) -> int:
        """The smallest size."""

    @abstractmethod
    def tables(self, model: Model, size: int) -> Tables:
        """Tables of a size; their parameters rise with it."""

    def given(self, model: Model) -> Tables:
        """Tables of the rows that the study gives."""
        return self.tables(model, self.of(model).rows)

    # --- counts

    @abstractmethod
    def account(self, model: Model, sizes: Sizes) -> Account:
        """Closed form of all that `build` makes."""

    @abstractmethod
    def row_width(self, model: Model) -> int:
        """Parameters of one row."""

    def rows(self, tables: Tables) -> int:
        """Of all tables."""
        return sum(map(sum, tables))

    def rows_read(self, model: Model, sizes: Sizes) -> int:
        """By one token, over all layers."""
        return sum(map(len, sizes.of(self.name)))

    def row_bytes(self, model: Model, sizes: Sizes, batch: int) -> float:
        """Bytes of rows that a batch of so many tokens reads at most, per token: of N rows, of which each picks m,
        min(B m, N).
        """
        read = sum(min(batch, rows) for tables in sizes.of(self.name) for rows in tables)
        return read * self.row_width(model) * BYTES_PER_PARAMETER / batch

    def key_bytes(self, model: Model, sizes: Sizes, batch: int) -> float:
        """Bytes of keys that a batch reads, per token; 0 without keys."""
        return 0.0

    def index(self, model: Model, sizes: Sizes) -> Index | None:
        """What finding the rows costs over all layers; None without keys."""
        return None

    # --- layers

    @abstractmethod
    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        """Its layers, uninitialised, first block first. Imports torch."""
