"""`sparsemem bench step`: how fast a training step is, as ratios taken in one run.

- `moe`: the study's mixture of experts; `engram`: the same budget with a quarter of the sparse parameters in memory; `ultramem_v2`: with a
  fifth of them in product-key values that every block reads;
- `dense`: the dense model of the same activated parameters;
- `transformers`: Hugging Face's Qwen2-MoE of the same widths and experts (extra `compare`), forward, backward and AdamW.

The machine's peak is the fastest of several large matrix products in the same dtype, with the same threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparsemem.bench.measure import Row, progress, speeds
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.model import Sizes, count_model
from sparsemem.train.loop import StepTimer

ROUNDS = {"quick": 12, "10M": 5}
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
SHARES: dict[str, dict[str, float]] = {
    **{"moe": {"moe": 1.0}, "engram": {"moe": 0.75, "engram": 0.25}, "ultramem_v2": {"moe": 0.8, "ultramem_v2": 0.2}},
    "dense": {},
}


def bench_step() -> Iterator[Row]:
    """Measurements of each shape."""
    for shape, fields in SHAPES.items():
        progress(f"step: {shape}")
        trials = {name: Trial.model_validate({**fields, "shares": shares}) for name, shares in SHARES.items()}
        steps: dict[str, Callable[[], float]] = {name: StepTimer(trial, torch.get_num_threads()).step for name, trial in trials.items()}
        other = _transformers_step(trials["moe"])
        if other is not None:
            steps["transformers"] = other
        flops = {name: _flops(trial) for name, trial in trials.items()}
        yield from speeds("step", shape, trials["moe"].train.batch_tokens, steps, flops, ("moe", "dense", "transformers"), ROUNDS[shape])


def _flops(trial: Trial) -> int:
    sizes: Sizes = solve(trial.model, trial.budget, trial.shares)
    return count_model(trial.model, sizes, trial.data.context, trial.data.vocab_size).flops_per_token_head


def _transformers_step(trial: Trial) -> Callable[[], float] | None:
    """A step of the same shape in Hugging Face's library, or None where it is not installed."""
    try:
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
    except ImportError:
        print("bench step: transformers is not installed (pip install 'sparsemem[compare]'); measured without it", file=sys.stderr)
        return None
    sizes, model = solve(trial.model, trial.budget, trial.shares), trial.model
    assert model.moe is not None
    config = Qwen2MoeConfig(
        vocab_size=trial.data.vocab_size,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads or model.heads,
        num_experts=sizes.routed_experts,
        num_experts_per_tok=model.moe.top_k,
        moe_intermediate_size=model.moe.expert_width,
        shared_expert_intermediate_size=sizes.shared_width,
        max_position_embeddings=trial.data.context,
        use_cache=False,
    )
    network = Qwen2MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    shape = (trial.train.batch_tokens // trial.data.context, trial.data.context)

    def step() -> float:
        tokens_BT = torch.randint(trial.data.vocab_size, shape)
        start = time.perf_counter()
        network(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step
