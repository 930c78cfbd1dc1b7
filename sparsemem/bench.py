"""`sparsemem bench step`: how fast a training step is, as ratios taken in one run.

Contenders of one shape take turns, so that a drift of the machine hits all of them; a ratio is the median of the ratios of its rounds.

- `moe`: the study's mixture of experts; `engram`: the same budget with a quarter of the sparse parameters in memory;
- `dense`: the dense model of the same activated parameters;
- `transformers`: Hugging Face's Qwen2-MoE of the same widths and experts (extra `compare`), forward, backward and AdamW.

The machine's peak is the fastest of several large matrix products in the same dtype, with the same threads.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.model import Sizes, count_model
from sparsemem.study.engine import processors
from sparsemem.train.loop import StepTimer

ROUNDS = {"quick": 12, "10M": 5}
WARM_UP = 2
SHAPES: dict[str, dict[str, Any]] = {
    "quick": {
        "data": {"vocab_size": 4096, "context": 128},
        "model": {
            **{"layers": 3, "width": 64, "heads": 4},
            "moe": {"expert_width": 48, "top_k": 2},
            "engram": {"layers": [2], "orders": [2, 3], "heads": 4, "row_dim": 8},
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
        },
        "budget": {"total_params": "100M", "active_params": "10M", "tokens": "1B"},
        "train": {"batch_tokens": 4096, "lr": 0.001},
    },
}
SHARES: dict[str, dict[str, float]] = {"moe": {"moe": 1.0}, "engram": {"moe": 0.75, "engram": 0.25}, "dense": {}}


def bench_step(as_json: bool) -> None:
    """Print a table, or with `as_json` one object a line, to stdout."""
    threads = processors()
    for shape, fields in SHAPES.items():
        print(f"bench step: {shape}, {threads} threads", file=sys.stderr, flush=True)
        for row in _bench_shape(shape, fields, threads):
            print(json.dumps(row) if as_json else _line(row), flush=True)


def _bench_shape(shape: str, fields: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    trials = {name: Trial.model_validate({**fields, "shares": shares}) for name, shares in SHARES.items()}
    steps: dict[str, Callable[[], float]] = {name: StepTimer(trial, threads).step for name, trial in trials.items()}
    flops = {name: _flops(trial) for name, trial in trials.items()}
    other = _transformers_step(trials["moe"])
    if other is not None:
        steps["transformers"] = other
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for number in range(WARM_UP + ROUNDS[shape]):
        peak = _matrix_product_rate()
        for name, step in steps.items():
            spent = step()
            if number >= WARM_UP:
                seconds[name].append(spent)
        peaks.append(peak)
    tokens = trials["moe"].train.batch_tokens
    common = {"shape": shape, "threads": threads, "dtype": "fp32"}
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        rates = [tokens / spent for spent in times]
        row: dict[str, Any] = {"name": f"step/{name}", **common, **_spread(rates), "unit": "tokens/s"}
        if name != "transformers":
            row["share_of_peak"] = round(statistics.median(rates) * flops[name] / max(peaks), 4)
            for rival in {"dense", "transformers"} & (seconds.keys() - {name}):
                ratio = _spread([theirs / ours for ours, theirs in zip(times, seconds[rival], strict=True)])
                row |= {f"ratio_to_{rival}": ratio["median"], f"ratio_to_{rival}_range": [ratio["low"], ratio["high"]]}
        rows.append(row)
    return [*rows, {"name": "peak/matrix-product", **common, **_spread([peak / 1e9 for peak in peaks]), "unit": "GFLOP/s"}]


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


def _matrix_product_rate(size: int = 1536) -> float:
    """FLOP/s of the best of three large square products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def _line(row: dict[str, Any]) -> str:
    text = f"{row['name']:<22} {row['median']:>10,.0f} [{row['low']:,.0f}, {row['high']:,.0f}] {row['unit']}"
    if "share_of_peak" in row:
        text += f"   {row['share_of_peak']:.1%} of peak"
    for rival in ("dense", "transformers"):
        if f"ratio_to_{rival}" in row:
            low, high = row[f"ratio_to_{rival}_range"]
            text += f"   {row[f'ratio_to_{rival}']:.2f} [{low:.2f}, {high:.2f}] x {rival}"
    return text
