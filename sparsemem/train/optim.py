"""Optimisers and the learning-rate schedule of one trial.

Backbone: AdamW, with decay on matrices only (among them the vocabulary's, the convolution's taps and the projections of
residual streams, whose biases, scales and gains are stored flat).
Memory tables: Adam without decay at a multiple of the rate, which may fall linearly from its start to its end, on the
rows that the step read (as torch's SparseAdam: moments of other rows stay as they are; the bias correction counts steps
of the whole table).

Neither is a `torch.optim.Optimizer`: making one imports torch's compiler, which takes as long as the rest of torch.

Shape letters: R rows of a table, C width of a row, U distinct rows that a step read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sparsemem.config import Train

EPS = 1e-8


class Optimizer:
    """Both optimisers behind one schedule; every rate is a fixed multiple of the scheduled one."""

    def __init__(self, model: nn.Module, config: Train) -> None:
        tables = [weight for weight in model.parameters() if getattr(weight, "sparse_gradient", False)]
        self.backbone = [weight for weight in model.parameters() if not getattr(weight, "sparse_gradient", False)]
        self.config = config
        constant = (config.table_lr_factor, config.table_lr_factor)
        matrices = [weight for weight in self.backbone if weight.ndim > 1]
        self.parts: Sequence[AdamW | RowAdam] = [
            AdamW(matrices, config.betas, config.weight_decay),
            AdamW([weight for weight in self.backbone if weight.ndim == 1], config.betas, 0.0),
            *[RowAdam(table, config.betas, getattr(table, "rate", None) or constant) for table in tables],
        ]
        self.names: Mapping[Tensor, str] = {weight: name for name, weight in model.named_parameters()}

    def step(self, rate: float, done: float) -> float:
        """Clip the backbone's gradient, update everything, forget the gradients. Returns the norm before clipping.

        Args:
            rate: learning rate of the backbone.
            done: share of the token budget, along which the tables' factors go from their start to their end.
        """
        norm = nn.utils.clip_grad_norm_(self.backbone, self.config.grad_clip)
        for part in self.parts:
            part.step(rate, done)
        return float(norm)

    def state_dict(self) -> dict[str, list[Any]]:
        """First moment, second moment and steps of each weight, by its name: their order is no part of a checkpoint."""
        pairs = (pair for part in self.parts for pair in zip(part.weights, part.state, strict=True))
        return {self.names[weight]: state for weight, state in pairs}

    def load_state_dict(self, states: Mapping[str, list[Any]]) -> None:
        """Take over a `state_dict`.

        Raises:
            ValueError: it is of other weights; nothing is taken over then.
        """
        shapes = {self.names[weight]: weight.shape for part in self.parts for weight in part.weights}
        if not isinstance(states, Mapping) or states.keys() != shapes.keys():
            raise ValueError("the state of its optimiser is not one of these weights, by their names")
        for name, (mean, square, _) in states.items():
            if not mean.shape == square.shape == shapes[name]:
                raise ValueError(f"the state of its optimiser for `{name}` has the shape {tuple(mean.shape)}")
        for part in self.parts:
            part.load([states[self.names[weight]] for weight in part.weights])


class AdamW:
    """torch's fused AdamW of some weights. A weight without a gradient stays as it is."""

    def __init__(self, weights: Sequence[Tensor], betas: tuple[float, float], decay: float) -> None:
        self.weights, self.betas, self.decay = weights, betas, decay
        # of each weight: first moment, second moment, steps
        self.state = [[torch.zeros_like(weight), torch.zeros_like(weight), weight.new_zeros(())] for weight in weights]

    @torch.no_grad()
    def step(self, rate: float, _: float) -> None:
        learning = [
            (weight, weight.grad, *state)
            for weight, state in zip(self.weights, self.state, strict=True)
            if weight.grad is not None
        ]
        if not learning:
            return
        weights, gradients, means, squares, steps = map(list, zip(*learning, strict=True))
        beta1, beta2 = self.betas
        unused: list[Tensor] = []  # by this variant
        fixed: dict[str, Any] = {"fused": True, "amsgrad": False, "maximize": False, "eps": EPS}
        adamw(
            weights,
            gradients,
            means,
            squares,
            unused,
            steps,
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=self.decay,
            **fixed,
        )
        for weight in weights:
            weight.grad = None

    def load(self, state: list[list[Tensor]]) -> None:
        self.state = [
            [tensor.to(weight.device) for tensor in of] for weight, of in zip(self.weights, state, strict=True)
        ]


class RowAdam:
    """Adam of one table: time and memory of a step grow with the rows that were read, not with the table."""

    def __init__(self, table: Tensor, betas: tuple[float, float], factors: tuple[float, float]) -> None:
        self.table, self.betas, self.factors = table, betas, factors
        self.weights = [table]
        self.mean_RC, self.square_RC, self.steps = _zeros_on_demand(table), _zeros_on_demand(table), 0

    @torch.no_grad()
    def step(self, rate: float, done: float) -> None:
        if self.table.grad is None:
            return
        gradient, self.table.grad = self.table.grad.coalesce(), None
        rows_U, gradient_UC = gradient._indices()[0], gradient._values()
        self.steps += 1
        (beta1, beta2), (start, end) = self.betas, self.factors
        mean_UC = _move(self.mean_RC, rows_U, gradient_UC, 1 - beta1)
        square_UC = _move(self.square_RC, rows_U, gradient_UC.square(), 1 - beta2)
        size = rate * (start + (end - start) * done) * math.sqrt(1 - beta2**self.steps) / (1 - beta1**self.steps)
        new_UC = self.table.index_select(0, rows_U).addcdiv_(mean_UC, square_UC.sqrt_().add_(EPS), value=-size)
        self.table.index_copy_(0, rows_U, new_UC)

    @property
    def state(self) -> list[list[Any]]:
        return [[self.mean_RC, self.square_RC, self.steps]]

    def load(self, state: list[list[Any]]) -> None:
        ((mean_RC, square_RC, self.steps),) = state
        self.mean_RC, self.square_RC = mean_RC.to(self.table.device), square_RC.to(self.table.device)


def _move(moment_RC: Tensor, rows_U: Tensor, target_UC: Tensor, share: float) -> Tensor:
    """Move some rows of a moment a share of the way to their target. Returns what they are then, (U, C)."""
    moved_UC = moment_RC.index_select(0, rows_U).lerp_(target_UC, share)
    moment_RC.index_copy_(0, rows_U, moved_UC)
    return moved_UC


def _zeros_on_demand(like: Tensor) -> Tensor:
    """Zeros that take memory only where they are written: numpy asks the system for fresh pages (on Linux of 2 MiB),
    torch fills them.
    """
    return (
        torch.zeros_like(like)
        if like.device.type != "cpu"
        else torch.from_numpy(np.zeros(like.shape, like[:0].detach().numpy().dtype))
    )


def learning_rate(config: Train, done: float) -> float:
    """Rate after a share `done` of the token budget: linear warm-up, then cosine or constant-and-linear down to
    `final_lr`.

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
