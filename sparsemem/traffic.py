"""What a batch reads of the sparse parameters, and what finding them costs: the figures beside which a memory is chosen over experts.

Closed forms after UltraMem (arXiv 2411.12364, fig. 1): of N rows (or experts) of which each token picks m, a batch of B tokens reads at
most min(B m, N); keys are read once a batch. Tokens that pick alike read less, so these are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsemem.accounting import BYTES_PER_PARAMETER
from sparsemem.config import PRODUCT_KEY, Model
from sparsemem.layers.feed_forward import feed_forward_account
from sparsemem.layers.product_key import product_key_account, row_parameters
from sparsemem.layers.retrieval import index_cost, key_parameters
from sparsemem.model import Sizes, is_sparse

BATCHES = (1, 64, 65_536)  # tokens: one, a small batch of decoding, a large one of training


@dataclass(frozen=True)
class Index:
    """Work of finding the rows of one product-key memory, per token over all its layers."""

    scoring: int
    """FLOPs of scoring the keys."""
    candidates: int
    """FLOPs of scoring the candidates."""
    sorting: int
    """Comparisons of both selections."""
    share: float
    """These three over themselves and the layers' other FLOPs."""


def index_of(config: Model, sizes: Sizes, pool: str) -> Index:
    """Of a product-key memory that the model holds."""
    memory, tables, together = getattr(config, pool), sizes.tables[pool], config.layers_per_table(pool)
    costs = [index_cost(memory, (rows, columns)) for rows, columns in tables]
    scoring, candidates, sorting = (together * sum(getattr(cost, name) for cost in costs) for name in ("scoring", "candidates", "sorting"))
    layers = product_key_account(config, pool, tuple((rows, columns) for rows, columns in tables)).flops
    return Index(scoring, candidates, sorting, (scoring + candidates + sorting) / (layers + sorting))


def key_bytes(config: Model, sizes: Sizes, pool: str, batch: int) -> float:
    """Bytes of keys that a batch reads, per token; 0 for a hashed memory, which has none."""
    if pool not in PRODUCT_KEY:
        return 0.0
    keys = sum(key_parameters(getattr(config, pool), (rows, columns)) for rows, columns in sizes.tables[pool])
    return keys * config.layers_per_table(pool) * BYTES_PER_PARAMETER / batch


def row_bytes(config: Model, sizes: Sizes, pool: str, batch: int) -> float:
    """Bytes of rows that a batch reads at most, per token."""
    memory = getattr(config, pool)
    if pool in PRODUCT_KEY:
        picks, width = memory.heads * memory.top_m, row_parameters(config, pool)
        read = sum(min(batch * picks, rows * columns) for rows, columns in sizes.tables[pool]) * config.layers_per_table(pool)
    else:
        read, width = sum(min(batch, rows) for module in sizes.tables[pool] for rows in module), memory.row_dim
    return read * width * BYTES_PER_PARAMETER / batch


def expert_bytes(config: Model, sizes: Sizes, batch: int) -> float:
    """Bytes of routed experts that a batch reads at most, per token."""
    if config.moe is None:
        return 0.0
    layers = sum(is_sparse(config, sizes, layer) for layer in range(1, config.layers + 1))
    expert = feed_forward_account(config.width, config.moe.expert_width).total
    return layers * min(batch * config.moe.top_k, sizes.routed_experts) * expert * BYTES_PER_PARAMETER / batch
