"""The schema of results: how far a trial is, and the columns of `trials.csv`. Ledger, plan, trackers and `analysis`
read it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TrialStatus(StrEnum):
    """How far a trial is."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    """Its loss left the range in which training goes on. It is over, without a loss."""
    FAILED = "failed"
    OUT_OF_MEMORY = "out_of_memory"
    INTERRUPTED = "interrupted"
    """It goes on from its last checkpoint."""
    RUNNING = "running"
    PENDING = "pending"
    PRUNED = "pruned"
    """By `sparsemem tune`: others were better by then."""


FINAL = (TrialStatus.FINISHED, TrialStatus.DIVERGED)
"""With a `result.json`: never trained again."""


LEARNED_NATS = 0.05
"""Below the loss of equally likely tokens, from which on a trial has learned something."""
FREQUENCY_NATS = 0.02
"""A loss less than this below that of token frequencies alone says that nothing of the tokens' order was learned."""


@dataclass(frozen=True)
class Column:
    """Of every `trials.csv`."""

    name: str
    heading: str
    """For readers, with the unit."""
    is_text: bool = False
    measured: bool = False
    """Known after training; the others are known before."""


_COLUMNS = (
    Column("trial_id", "trial", is_text=True),
    Column("status", "status", is_text=True),
    Column("study", "study", is_text=True),
    Column("seed", "seed"),
    Column("rho", "rho"),
    Column("share_moe", "share of routed experts"),
    Column("total_params", "P_tot"),
    Column("active_params", "P_act"),
    Column("sparse_params", "sparse parameters"),
    Column("embedding_params", "embedding parameters"),
    Column("budget_error_total", "error of P_tot"),
    Column("budget_error_active", "error of P_act"),
    Column("routed_experts", "experts"),
    Column("shared_width", "shared width"),
    Column("memory_rows", "rows"),
    Column("memory_rows_read", "rows read/token"),
    Column("memory_params", "memory parameters"),
    Column("memory_flops_share", "memory's share of FLOPs"),
    Column("flops_per_token", "FLOPs/token"),
    Column("flops_per_token_head", "FLOPs/token with the output head"),
    Column("memory_bytes_per_token", "bytes/token"),
    Column("tokens", "tokens"),
    Column("val_loss", "val loss (nats/token)", measured=True),
    Column("val_loss_se", "s.e.", measured=True),
    Column("val_bpb", "bits/byte", measured=True),
    Column("train_loss", "train loss (nats/token)", measured=True),
    Column("tokens_per_second", "tokens/s", measured=True),
    Column("peak_memory_bytes", "peak (GB)", measured=True),
    Column("seconds", "time (m:s)", measured=True),
)
COLUMNS = {column.name: column for column in _COLUMNS}
"""Of `trials.csv`, in order. The share of each memory of the study follows (`share_...`), every varied field under its
dotted path, and what `tuned` filled in: `train.lr` under that name, which `analysis` lets each share have its own of,
other fields under `tuned.PATH`.
"""
MEASURED = tuple(column.name for column in _COLUMNS if column.measured)
NUMBERS = tuple(column.name for column in _COLUMNS if not column.is_text)
