"""`sparsemem bench profile`: where the time of a training step goes, in milliseconds and as a share of the whole step.

Each part runs alone, forward and backward, over all blocks of the model of `bench step` with a quarter of the sparse
parameters in memory. What is left of the step is the residual stream, the embedding's gradient, auxiliary losses and
Python in between; a part alone finds its data in the cache more often than in the step, so that the sum says less than
the shares beside each other.

Shape letters: B sequences, T positions, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsemem.bench.measure import Place, Row, measurement, over, progress, take_turns
from sparsemem.bench.step import SHAPES, SHARES, TAKEN_APART
from sparsemem.config import Trial
from sparsemem.kernels.cross_entropy import head_loss
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.model import Block
from sparsemem.train.step import StepTimer

ROUNDS = {"quick": 15, "1M": 7, "10M": 3}


def bench_profile() -> Iterator[Row]:
    """Measurements of each shape."""
    for shape, fields in SHAPES.items():
        progress(f"profile: {shape}")
        timer = StepTimer(Trial.model_validate({**fields, "shares": SHARES[TAKEN_APART]}), torch.get_num_threads())
        seconds = take_turns({"step": timer.step} | parts(timer), ROUNDS.get(shape, 3))
        for name, spent in seconds.items():
            yield measurement(
                f"part/{name}",
                shape,
                [1000 * each for each in spent],
                "ms",
                Place(timer.device, timer.precision),
                share_of_step=over(spent, seconds["step"]),
            )


def parts(timer: StepTimer) -> dict[str, Callable[[], float]]:
    """Functions that run a part of the step once and return its seconds."""
    trial, model, place = timer.trial, timer.model, Place(timer.device, timer.precision)
    shape = (trial.train.batch_tokens // trial.data.context, trial.data.context)
    tokens_BT = torch.randint(trial.data.vocab_size, shape, device=timer.device)
    gradient_BTD = torch.randn(*shape, trial.model.width, device=timer.device)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    experts: list[Any] = model.layers_of(EXPERTS.name)

    def both_ways(*runs: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        """Forward and backward of each, on fresh inputs."""

        def part() -> float:
            spent = 0.0
            for run in runs:
                x_BTD = torch.randn_like(gradient_BTD).requires_grad_()
                spent += place.timed(partial(_both_ways, place, run, x_BTD, gradient_BTD))
            model.zero_grad(set_to_none=True)
            return spent

        return part

    def routed(layer: Any) -> Callable[[Tensor], Tensor]:
        def run(x_BTD: Tensor) -> Tensor:
            with torch.no_grad():
                gates_SK, experts_SK, _ = layer.route(x_BTD.flatten(0, 1))
            return layer.routed(x_BTD.flatten(0, 1), gates_SK.requires_grad_(), experts_SK).view_as(x_BTD)

        return run

    def update() -> float:
        with place.autocast():
            loss, auxiliary = model.loss(tokens_BT, tokens_BT, tokens_BT.numel())
        (loss + auxiliary).backward()
        return place.timed(lambda: timer.optimizer.step(1e-6, 0.0)) + place.timed(
            lambda: [layer.end_step() for layer in experts]
        )

    shared = [layer.shared for layer in experts if layer.shared is not None]
    return {
        "attention": both_ways(*(lambda x, block=block: block.attention(x, model.cos_sin_2THK) for block in blocks)),
        "norms": both_ways(
            *(norm for block in blocks for norm in (block.attention_norm, block.ffn_norm) if norm), model.norm
        ),
        "router": both_ways(*(lambda x, layer=layer: _sum(layer.route(x.flatten(0, 1))[::2]) for layer in experts)),
        "experts": both_ways(*map(routed, experts)),
        "shared-experts": both_ways(*shared),
        "memory": both_ways(
            *(lambda x, memory=memory: memory(x, tokens_BT) for memory in model.layers_of(*MEMORY_POOLS))
        ),
        "head-and-loss": both_ways(lambda x: head_loss(x.flatten(0, 1), model.embedding, tokens_BT.flatten())),
        "update": update,
    }


def _both_ways(place: Place, run: Callable[[Tensor], Tensor], x_BTD: Tensor, gradient_BTD: Tensor) -> None:
    with place.autocast():
        y = run(x_BTD)
    y.backward(gradient_BTD.to(y.dtype) if y.ndim else None)


def _sum(values: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([value.sum() for value in values]).sum()
