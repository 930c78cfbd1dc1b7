"""The plan's second table: what finding and reading the rows of each memory costs, beside the routed experts of the
same budget.

Closed forms after UltraMem (arXiv 2411.12364, fig. 1), which stand with each mechanism. Tokens that pick alike read
less: the bytes are upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsemem.config import ConfigError, Model
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.study.plan import PlannedTrial
from sparsemem.study.text import count, size, table

if TYPE_CHECKING:
    from sparsemem.model import Sizes

BATCHES = (1, 64, 65_536)  # tokens: one, a small batch of decoding, a large one of training


def memory_access(planned: Sequence[PlannedTrial]) -> list[dict[str, Any]]:
    """One row for each memory of each distinct set of sizes.

    Returns:
        trial_id (of the first trial with these sizes), pool, and per token: key_flops, candidate_flops,
        sorting_comparisons and index_share (None for a memory without keys), then for each batch size B key_bytes_B,
        row_bytes_B and moe_bytes_B (None where the budget holds no pure mixture of experts).
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for p in planned:
        for pool in p.sizes.tables:
            key = (p.trial.model.model_dump_json(), str(p.sizes), pool)
            if key in rows:
                continue
            memory = MEMORY_POOLS[pool]
            index = memory.index(p.trial.model, p.sizes)
            row: dict[str, Any] = {"trial_id": p.trial.id, "pool": pool}
            row |= {"key_flops": index and index.scoring, "candidate_flops": index and index.candidates}
            share = index and sum(index) / (p.account.parts[pool].flops + index.sorting)  # of the layers' whole work
            row |= {"sorting_comparisons": index and index.sorting, "index_share": share}
            experts = _pure_experts(p)
            for batch in BATCHES:
                row[f"key_bytes_{batch}"] = memory.key_bytes(p.trial.model, p.sizes, batch)
                row[f"row_bytes_{batch}"] = memory.row_bytes(p.trial.model, p.sizes, batch)
                row[f"{EXPERTS.name}_bytes_{batch}"] = None if experts is None else EXPERTS.row_bytes(*experts, batch)
            rows[key] = row
    return list(rows.values())


def _pure_experts(p: PlannedTrial) -> tuple[Model, Sizes] | None:
    """Model and sizes of the mixture of experts of the same budget, or None."""
    from sparsemem.budget import solve

    if EXPERTS.of(p.trial.model) is None or not p.trial.shares:
        return None
    model = p.trial.model.model_copy(update=dict.fromkeys(MEMORY_POOLS))
    try:
        return model, solve(model, p.trial.budget, {EXPERTS.name: 1.0})
    except ConfigError:
        return None


def describe_access(rows: Sequence[dict[str, Any]]) -> str:
    """`memory_access` as a table; '' without memories."""
    if not rows:
        return ""
    header = ["trial", "memory", "keys", "candidates", "sorting", "index share"]
    header += [f"{name}, B={batch:,}" for batch in BATCHES for name in ("keys", "rows", "experts")]
    lines = []
    for row in rows:
        index = [row[name] for name in ("key_flops", "candidate_flops", "sorting_comparisons")]
        line = [row["trial_id"], row["pool"], *("-" if value is None else count(value) for value in index)]
        line.append("-" if row["index_share"] is None else f"{row['index_share']:.1%}")
        for batch in BATCHES:
            values = [row[f"{name}_bytes_{batch}"] for name in ("key", "row", EXPERTS.name)]
            line += ["-" if value is None else size(value) for value in values]
        lines.append(line)
    about = (
        "memory access per token: FLOPs of scoring keys and candidates, comparisons of sorting, their share of the "
        "layers' work;"
    )
    return (
        f"{about} bytes read at batch sizes B, at most, beside the routed experts of the same "
        f"budget\n{table(header, lines)}"
    )
