"""A few steps of a small model with experts and a memory, on random tokens: losses as JSON. For `test_reference`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from sparsemem import kernels
from sparsemem.config import Trial
from sparsemem.train.step import StepTimer, train_step

POOLS = {
    "engram": {"layers": [2], "heads": 2, "row_dim": 4},
    "ultramem_v2": {"key_dim": 4, "top_m": 4, "value_dim": 4, "pre_value_dim": 4, "init": "flat"},
}


STREAMS = {"residual": "manifold", "streams": 2}


def main(case: str) -> None:
    pool = "engram" if case == "streams" else case
    model: dict[str, Any] = {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "moe": {"expert_width": 8, "top_k": 2, "shared_experts": 1},
        pool: POOLS[pool],
    } | (STREAMS if case == "streams" else {})
    budget = {"total_params": "40k", "active_params": "9k", "tokens": "1k", "tolerance": "10%"}
    fields = {
        "data": {"vocab_size": 300, "context": 16},
        "model": model,
        "budget": budget,
        "train": {"batch_tokens": 128, "lr": 0.01},
    }
    timer = StepTimer(Trial.model_validate(fields | {"shares": {"moe": 0.5, pool: 0.5}}), threads=1)
    windows = torch.randint(300, (8, 17), generator=torch.Generator().manual_seed(0))
    steps = range(1, 9)
    losses = [
        train_step(timer.model, timer.optimizer, windows[:, :-1], windows[:, 1:], 128, 0.01, step / 8, torch.float32)[0]
        for step in steps
    ]
    print(json.dumps({"reference": kernels.REFERENCE, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1])
