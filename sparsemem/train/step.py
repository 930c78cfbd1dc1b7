"""One training step of a model, and the time that it takes. It must not know files."""

from __future__ import annotations

import math
import statistics
import time

import torch

from sparsemem import parallel
from sparsemem.budget import solve
from sparsemem.config import Train, Trial
from sparsemem.model import Transformer
from sparsemem.train.allocator import keep_freed_memory
from sparsemem.train.optim import Optimizer


def train_step(
    model: Transformer,
    optimizer: Optimizer,
    inputs_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    tokens: int,
    rate: float,
    done: float,
    precision: torch.dtype,
) -> tuple[float, float]:
    """One update on the first `tokens` targets of the batch, `done` of the token budget; targets below 0 have no loss.

    Returns (mean nats per token, gradient norm).
    """
    rows, context = inputs_BT.shape
    with parallel.shard(rows) as part:
        own = min(tokens, part.stop * context) - part.start * context
        with torch.autocast(inputs_BT.device.type, dtype=precision, enabled=precision != torch.float32):
            loss, auxiliary = model.loss(inputs_BT[part], targets_BT[part], own)
        scored, all_scored = (
            (each.flatten()[:count] >= 0).sum() for each, count in ((targets_BT[part], own), (targets_BT, tokens))
        )
        loss = loss * (scored / all_scored.clamp_min(1))
        (loss + auxiliary * ((part.stop - part.start) / rows)).backward()
        value = float(parallel.all_reduce(loss.detach()))
        parallel.all_reduce_gradients(model.parameters())
    norm = optimizer.step(rate, done) if math.isfinite(value) else math.nan
    for layer in model.layers_of():
        layer.end_step()
    return value, norm


class StepTimer:
    """Training steps of a trial's model on random tokens, to be timed. Nothing is read or written."""

    def __init__(self, trial: Trial, threads: int, device: str | None = None) -> None:
        prepare_process(threads)
        self.trial, self.device = trial, torch.device(device or default_device())
        sizes = solve(trial.model, trial.budget, trial.shares)
        model = Transformer(trial.model, sizes, trial.data.context, torch.arange(trial.data.vocab_size), separator=0)
        self.model = model.initialize(trial.seed).to(self.device)
        self.optimizer, self.precision = Optimizer(self.model, trial.train), precision_on(self.device, trial.train)

    def step(self) -> float:
        """Seconds of one step."""
        data, batch_tokens = self.trial.data, self.trial.train.batch_tokens
        windows = torch.randint(data.vocab_size, (batch_tokens // data.context, data.context + 1), device=self.device)
        start = time.perf_counter()
        train_step(self.model, self.optimizer, windows[:, :-1], windows[:, 1:], batch_tokens, 1e-6, 0.0, self.precision)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def measure_step(trial: Trial, threads: int, device: str | None = None, steps: int = 4) -> float:
    """Median seconds of a training step, after one that does not count."""
    timer = StepTimer(trial, threads, device)
    timer.step()
    return statistics.median(timer.step() for _ in range(steps))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_process(threads: int) -> None:
    """Settings of the whole process that make training fast."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # Adam's second moments of rarely used experts decay into denormals, which are slow
    keep_freed_memory()


def precision_on(device: torch.device, config: Train) -> torch.dtype:
    """In which a trial multiplies there, by autocast if it is not fp32."""
    return torch.bfloat16 if config.precision_on(gpu=device.type == "cuda") == "bf16" else torch.float32
