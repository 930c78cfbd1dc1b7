"""The product-key family: PKM, Memory+, PEER, UltraMem, UltraMemV2. One mechanism, whose fields have five published
sets of defaults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsemem.accounting import BYTES_PER_PARAMETER, Account
from sparsemem.mechanisms.mechanism import Index, Mechanism, Placed, Tables, Vocabulary
from sparsemem.mechanisms.moe import EXPERTS
from sparsemem.mechanisms.product_key.fields import (
    PEER,
    PKM,
    MemoryPlus,
    ProductKey,
    UltraMem,
    UltraMemV2,
    key_counts,
    layers_per_table,
    memory_layers,
)
from sparsemem.values import ConfigError

if TYPE_CHECKING:
    from sparsemem.config import Model
    from sparsemem.model import Sizes


class ProductKeyMechanism(Mechanism):
    """A layer in place of the feed-forward of its blocks or beside it. A table is told by its row keys and column keys,
    whose product is its rows.

    A size is a number of keys, which are activated. They are spread as evenly as whole numbers allow over the tables
    and their two sides.
    """

    coarse = True

    def __init__(self, name: str, label: str, fields: type[ProductKey]) -> None:
        self.name, self.label, self.fields = name, label, fields

    def check(self, model: Model) -> None:
        memory: ProductKey = self.of(model)
        layers, together, pool = memory_layers(model, self.name), layers_per_table(model, self.name), self.name
        if layers[-1] + memory.skip > model.layers:
            beyond = f"`{pool}.layers` {list(layers)}" + (f" with `{pool}.skip` {memory.skip}" if memory.skip else "")
            raise ValueError(f"{beyond} reaches beyond the {model.layers} blocks of the model")
        if len(layers) % together:
            raise ValueError(
                f"`{pool}.layers_per_table` {together} does not divide the {len(layers)} memory layers {list(layers)}"
            )
        value_dim = memory.value_dim or model.width
        if (
            memory.projection == "none"
            and value_dim * (memory.virtual_tables if memory.projection_per_table else 1) != model.width
        ):
            raise ValueError(
                f"`{pool}.value_dim` {value_dim} with {memory.virtual_tables} virtual tables is not the model's "
                f"`width` {model.width}; set `{pool}.projection: linear`"
            )
        if value_dim % memory.cores:
            raise ValueError(
                f"`{pool}.value_dim` {value_dim} must be a multiple of `{pool}.cores` {memory.cores}: each core "
                "weights a slice"
            )
        if memory.rows:
            key_counts(memory, pool)

    def check_start(self, model: Model, sizes: Sizes) -> None:
        from sparsemem.mechanisms.product_key.retrieval import initial_gain

        memory: ProductKey = self.of(model)
        for keys in set(self._keys(sizes)) if memory.init == "ultramem_v2" else ():
            try:
                initial_gain(memory, keys)
            except ValueError as error:
                raise ConfigError(f"field `model.{self.name}.top_m` has the value {memory.top_m}: {error}") from None

    def replaced(self, model: Model) -> tuple[int, ...]:
        return memory_layers(model, self.name) if self.of(model).placement == "replace" else ()

    def least(self, model: Model) -> int:
        """So many keys that each table holds the rows that a token reads of it."""
        return 2 * math.ceil(math.sqrt(self._picks(model) * layers_per_table(model, self.name))) * self._tables(model)

    def tables(self, model: Model, size: int) -> Tables:
        tables = self._tables(model)
        keys = [size // tables + (place < size % tables) for place in range(tables)]
        return tuple((-(-count // 2), count // 2) for count in keys)

    def given(self, model: Model) -> Tables:
        return (key_counts(self.of(model), self.name),) * self._tables(model)

    def account(self, model: Model, sizes: Sizes) -> Account:
        from sparsemem.mechanisms.product_key.layer import product_key_account

        return product_key_account(model, self.name, self._keys(sizes))

    def row_width(self, model: Model) -> int:
        from sparsemem.mechanisms.product_key.layer import row_parameters

        return row_parameters(model, self.name)

    def rows(self, tables: Tables) -> int:
        return sum(map(math.prod, tables))

    def rows_read(self, model: Model, sizes: Sizes) -> int:
        return len(memory_layers(model, self.name)) * self._picks(model)

    def row_bytes(self, model: Model, sizes: Sizes, batch: int) -> float:
        read = sum(min(batch * self._picks(model), math.prod(keys)) for keys in self._keys(sizes)) * layers_per_table(
            model, self.name
        )
        return read * self.row_width(model) * BYTES_PER_PARAMETER / batch

    def key_bytes(self, model: Model, sizes: Sizes, batch: int) -> float:
        from sparsemem.mechanisms.product_key.cost import key_parameters

        keys = sum(key_parameters(self.of(model), keys) for keys in self._keys(sizes))
        return keys * layers_per_table(model, self.name) * BYTES_PER_PARAMETER / batch

    def index(self, model: Model, sizes: Sizes) -> Index:
        from sparsemem.mechanisms.product_key.cost import index_cost

        costs, together = (
            [index_cost(self.of(model), keys) for keys in self._keys(sizes)],
            layers_per_table(model, self.name),
        )
        return Index(*(together * sum(each) for each in zip(*costs, strict=True)))

    def build(self, model: Model, sizes: Sizes, vocabulary: Vocabulary) -> Iterator[Placed]:
        """Layers of one group read the same table."""
        from sparsemem.mechanisms.product_key.layer import ProductKeyMemory, ValueTable

        ffn_inner, keys = EXPERTS.activated_width(model, sizes), self._keys(sizes)
        tables = [ValueTable(model, self.name, each, ffn_inner) for each in keys]
        for number, block in enumerate(memory_layers(model, self.name)):
            place = number // layers_per_table(model, self.name)
            layer = ProductKeyMemory(model, self.name, block, keys[place], tables[place], vocabulary.separator)
            yield Placed(block, "beside", f"product_keys.{self.name}", layer, self.of(model).skip)

    def _keys(self, sizes: Sizes) -> tuple[tuple[int, int], ...]:
        return tuple((rows, columns) for rows, columns in sizes.of(self.name))

    def _picks(self, model: Model) -> int:
        """Rows that a token reads in one layer."""
        return int(self.of(model).heads * self.of(model).top_m)

    def _tables(self, model: Model) -> int:
        return len(memory_layers(model, self.name)) // layers_per_table(model, self.name)


PRODUCT_KEY = {
    each.name: each
    for each in (
        ProductKeyMechanism("pkm", "PKM", PKM),
        ProductKeyMechanism("memory_plus", "Memory+", MemoryPlus),
        ProductKeyMechanism("peer", "PEER", PEER),
        ProductKeyMechanism("ultramem", "UltraMem", UltraMem),
        ProductKeyMechanism("ultramem_v2", "UltraMemV2", UltraMemV2),
    )
}
