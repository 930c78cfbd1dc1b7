"""`sparsemem bench step`: how fast a training step is, as ratios taken in one run.

- `moe`: the study's mixture of experts; `engram`: the same budget with a quarter of the sparse parameters in memory;
  `ultramem_v2`: with a fifth of them in product-key values that every block reads;
- `dense`: the dense model of the same activated parameters;
- `transformers`: Hugging Face's Qwen2-MoE of the same widths and experts (extra `compare`), forward, backward and
  AdamW, in a process of its own as its users run it; `transformers-kept`: with our settings of the process
  (`train.step.prepare_process`).

The machine's peak is the fastest of several large matrix products, with the same threads, by either of torch's
libraries. All of them run on one device and in one precision, which each line names: bf16 on the GPU where there is one
(CUDA_VISIBLE_DEVICES= hides it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sparsemem.bench.measure import Place, Row, progress, speeds
from sparsemem.bench.rival import rivals
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.mechanisms import EXPERTS
from sparsemem.model import Sizes, count_model
from sparsemem.train.step import StepTimer

ROUNDS = {"quick": 12, "1M": 7, "10M": 4}
MEASURED: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))
SHAPES: dict[str, dict[str, Any]] = MEASURED["step"]
SHARES: dict[str, dict[str, float]] = MEASURED["shares"]
RIVALS = (EXPERTS.name, "dense", "transformers", "transformers-kept")
TAKEN_APART = list(SHARES)[1]


def bench_step() -> Iterator[Row]:
    """Measurements of each shape."""
    for shape, fields in SHAPES.items():
        progress(f"step: {shape}")
        trials = {name: Trial.model_validate({**fields, "shares": shares}) for name, shares in SHARES.items()}
        timers = {name: StepTimer(trial, torch.get_num_threads()) for name, trial in trials.items()}
        steps: dict[str, Callable[[], float]] = {name: timer.step for name, timer in timers.items()}
        place = Place(timers[EXPERTS.name].device, timers[EXPERTS.name].precision)
        flops = {name: _flops(trial) for name, trial in trials.items()}
        with rivals(trials[EXPERTS.name], place) as others:
            yield from speeds(
                place,
                "step",
                shape,
                trials[EXPERTS.name].train.batch_tokens,
                steps | others,
                flops,
                RIVALS,
                ROUNDS[shape],
            )


def _flops(trial: Trial) -> int:
    sizes: Sizes = solve(trial.model, trial.budget, trial.shares)
    return count_model(trial.model, sizes, trial.data.context, trial.data.vocab_size).flops_per_token_head
