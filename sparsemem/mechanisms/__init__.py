"""The registry: every mechanism, by the name of its pool. The rest of the code names none.

One from outside of the package is told of by an entry point of the group `sparsemem.mechanisms`, or in Python by
`sparsemem.register`. CONTRIBUTING.md walks through one. This module must not know torch: `analysis` reads it.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points

from sparsemem.mechanisms.engram import ENGRAM
from sparsemem.mechanisms.mechanism import Index, Mechanism, MemoryFields, Placed, Tables, Vocabulary
from sparsemem.mechanisms.moe import EXPERTS
from sparsemem.mechanisms.ngram_embedding import NGRAM_EMBEDDING
from sparsemem.mechanisms.product_key import PRODUCT_KEY

__all__ = [
    "EXPERTS",
    "MEMORY_POOLS",
    "POOLS",
    "Index",
    "Mechanism",
    "MemoryFields",
    "Placed",
    "Tables",
    "Vocabulary",
    "label",
]

GROUP = "sparsemem.mechanisms"
VARIABLE = "SPARSEMEM_MECHANISMS"
"""Names what `register` was given, so that worker processes register it too."""

MEMORY_POOLS: dict[str, Mechanism] = {ENGRAM.name: ENGRAM, NGRAM_EMBEDDING.name: NGRAM_EMBEDDING, **PRODUCT_KEY}
"""Kinds of memory: all but the routed experts."""
POOLS: dict[str, Mechanism] = {EXPERTS.name: EXPERTS, **MEMORY_POOLS}
"""Kinds of sparse parameters; the names of `shares`."""


def label(pool: str) -> str:
    """What readers call a pool; its name where it is not registered here."""
    return POOLS[pool].label if pool in POOLS else pool


def outside() -> list[EntryPoint]:
    """Mechanisms that installed packages bring, and those that the process that started this one has registered."""
    registered = [EntryPoint(name, name, GROUP) for name in filter(None, os.environ.get(VARIABLE, "").split(","))]
    return [*entry_points(group=GROUP), *registered]


def load(entry: EntryPoint) -> Mechanism:
    """
    Raises:
        ImportError: it cannot be imported, or is no mechanism.
    """
    where = f"the mechanism `{entry.value}`" + (f" of the package {entry.dist.name}" if entry.dist else "")
    try:
        found = entry.load()
    except Exception as error:
        raise ImportError(f"{where} cannot be loaded: {error!r}; mend it, or uninstall what brings it") from error
    if not isinstance(found, Mechanism):
        raise ImportError(
            f"{where} is a {type(found).__name__}; name an instance of a subclass of `sparsemem.mechanisms.Mechanism`"
        )
    return found
