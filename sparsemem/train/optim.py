"""Optimisers and the learning-rate schedule of one trial.

Backbone: AdamW, with decay on matrices only (the vocabulary's and the convolution's taps among them).
Memory tables: Adam without decay at a multiple of the rate, which may fall linearly from its start to its end, on the rows that the step
read (torch's SparseAdam: moments of other rows stay as they are; the bias correction counts steps of the whole table).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from sparsemem.config import Train


class Optimizer:
    """Both optimisers behind one schedule; every rate is a fixed multiple of the scheduled one."""

    def __init__(self, model: nn.Module, config: Train) -> None:
        tables = [weight for weight in model.parameters() if getattr(weight, "sparse_gradient", False)]
        self.backbone = [weight for weight in model.parameters() if not getattr(weight, "sparse_gradient", False)]
        self.config = config
        adamw = torch.optim.AdamW(
            [
                {"params": [weight for weight in self.backbone if weight.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [weight for weight in self.backbone if weight.ndim == 1], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if tables:
            constant = (config.table_lr_factor, config.table_lr_factor)
            groups = [{"params": [table], "factors": getattr(table, "rate", None) or constant} for table in tables]
            sparse = torch.optim.SparseAdam(groups, lr=config.lr, betas=config.betas)
            for table in tables:
                sparse.state[table] = {"step": 0, "exp_avg": _zeros_on_demand(table), "exp_avg_sq": _zeros_on_demand(table)}
            self.parts.append(sparse)

    def step(self, rate: float, done: float) -> float:
        """Clip the backbone's gradient, update everything, forget the gradients. Returns the norm before clipping.

        Args:
            rate: learning rate of the backbone.
            done: share of the token budget, along which the tables' factors go from their start to their end.
        """
        norm = nn.utils.clip_grad_norm_(self.backbone, self.config.grad_clip)
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                start, end = group.get("factors", (1.0, 1.0))
                group["lr"] = rate * (start + (end - start) * done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> list[dict[str, object]]:
        return [optimizer.state_dict() for optimizer in self.parts]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for optimizer, state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


def _zeros_on_demand(like: Tensor) -> Tensor:
    """Zeros that take memory only where they are written: numpy asks the system for fresh pages, torch fills them itself."""
    return torch.from_numpy(np.zeros(like.shape, np.float32)) if like.device.type == "cpu" else torch.zeros_like(like)


def learning_rate(config: Train, done: float) -> float:
    """Rate after a share `done` of the token budget: linear warm-up, then cosine or constant-and-linear down to `final_lr`.

    >>> train = Train(batch_tokens=2048, lr=0.01, warmup=0.1, final_lr=0.0)
    >>> [round(learning_rate(train, done), 4) for done in (0.05, 0.1, 0.55, 1.0)]
    [0.005, 0.01, 0.005, 0.0]
    """
    if done <= config.warmup:
        return config.lr * (done / config.warmup if config.warmup else 1.0)
    if config.schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    else:
        height = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
    return config.lr * (config.final_lr + (1 - config.final_lr) * height)
