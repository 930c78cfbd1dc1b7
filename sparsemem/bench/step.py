"""`sparsemem bench step`: how fast a training step is, as ratios taken in one run.

- `moe`: the study's mixture of experts; `engram`: the same budget with a quarter of the sparse parameters in memory; `ultramem_v2`: with a
  fifth of them in product-key values that every block reads;
- `dense`: the dense model of the same activated parameters;
- `transformers`: Hugging Face's Qwen2-MoE of the same widths and experts (extra `compare`), forward, backward and AdamW, in a process of
  its own as its users run it; `transformers-kept`: with our settings of the process (`train.loop.prepare_process`).

The machine's peak is the fastest of several large matrix products, with the same threads, by either of torch's libraries. All of them run
on one device and in one precision, which each line names: bf16 on the GPU where there is one (CUDA_VISIBLE_DEVICES= hides it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsemem.bench.measure import Place, Row, progress, speeds
from sparsemem.bench.rival import rivals
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.model import Sizes, count_model
from sparsemem.train.loop import StepTimer

ROUNDS = {"quick": 12, "1M": 7, "10M": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"vocab_size": 4096, "context": 128},
        "model": {
            **{"layers": 3, "width": 64, "heads": 4},
            "moe": {"expert_width": 48, "top_k": 2},
            "engram": {"layers": [2], "orders": [2, 3], "heads": 4, "row_dim": 8},
            "ultramem_v2": {"key_dim": 8, "top_m": 8, "value_dim": 16, "pre_value_dim": 16, "init": "flat"},
        },
        "budget": {"total_params": "1.24M", "active_params": "135k", "tokens": "500k"},
        "train": {"batch_tokens": 2048, "lr": 0.01},
    },
    "1M": {
        "data": {"vocab_size": 8192, "context": 128},
        "model": {
            **{"layers": 4, "width": 128, "heads": 4},
            "moe": {"expert_width": 128, "top_k": 3},
            "engram": {"layers": [2], "orders": [2, 3], "heads": 8, "row_dim": 8},
            "ultramem_v2": {"key_dim": 16, "top_m": 16, "value_dim": 32, "pre_value_dim": 32},
        },
        "budget": {"total_params": "13M", "active_params": "1M", "tokens": "100M"},
        "train": {"batch_tokens": 4096, "lr": 0.002},
    },
    "10M": {
        "data": {"vocab_size": 8192, "context": 256},
        "model": {
            **{"layers": 8, "width": 256, "heads": 8},
            "moe": {"expert_width": 192, "top_k": 4},
            "engram": {"layers": [2, 5], "orders": [2, 3], "heads": 8, "row_dim": 16},
            "ultramem_v2": {"key_dim": 32, "value_dim": 64, "pre_value_dim": 64},
        },
        "budget": {"total_params": "100M", "active_params": "10M", "tokens": "1B"},
        "train": {"batch_tokens": 4096, "lr": 0.001},
    },
}
RIVALS = ("moe", "dense", "transformers", "transformers-kept")
SHARES: dict[str, dict[str, float]] = {
    **{"moe": {"moe": 1.0}, "engram": {"moe": 0.75, "engram": 0.25}, "ultramem_v2": {"moe": 0.8, "ultramem_v2": 0.2}},
    "dense": {},
}


def bench_step() -> Iterator[Row]:
    """Measurements of each shape."""
    for shape, fields in SHAPES.items():
        progress(f"step: {shape}")
        trials = {name: Trial.model_validate({**fields, "shares": shares}) for name, shares in SHARES.items()}
        timers = {name: StepTimer(trial, torch.get_num_threads()) for name, trial in trials.items()}
        steps: dict[str, Callable[[], float]] = {name: timer.step for name, timer in timers.items()}
        place = Place(timers["moe"].device, timers["moe"].precision)
        flops = {name: _flops(trial) for name, trial in trials.items()}
        with rivals(trials["moe"], place) as others:
            yield from speeds(place, "step", shape, trials["moe"].train.batch_tokens, steps | others, flops, RIVALS, ROUNDS[shape])


def _flops(trial: Trial) -> int:
    sizes: Sizes = solve(trial.model, trial.budget, trial.shares)
    return count_model(trial.model, sizes, trial.data.context, trial.data.vocab_size).flops_per_token_head
