"""`sparsemem bench moe`: the routed experts alone, forward and backward, by several ways of dispatch.

- `layer`: as training does it, which is one of the next two (`kernels.grouped_experts`);
- `grouped`: sorted, all experts at once by torch's grouped product; `apart`: sorted, one by one through oneDNN (on the
  processor);
- `loop`: a plain loop over experts that autograd differentiates, as most code has it;
- `padded`: batched products, each expert given as many rows as the busiest one.

Tokens choose experts at random, the popular ones more often: the busiest gets about twice the mean. Every turn draws
anew.

Shape letters: S tokens, D model width, E routed experts, K experts a token, F inner width, C rows of the busiest
expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemem.accounting import STEP_OVER_FORWARD
from sparsemem.bench.measure import Place, Row, progress, speeds, training_place
from sparsemem.bench.step import SHAPES
from sparsemem.budget import solve
from sparsemem.config import Trial
from sparsemem.kernels import grouped_experts
from sparsemem.layers.feed_forward import feed_forward_account
from sparsemem.mechanisms.moe.layer import MixtureOfExperts
from sparsemem.parameter import initialize

ROUNDS = 15


def bench_moe() -> Iterator[Row]:
    """Measurements at each shape of `bench step`."""
    place = training_place()
    for shape, fields in SHAPES.items():
        progress(f"moe: {shape}")
        trial = Trial.model_validate({**fields, "shares": {"moe": 1.0}})
        layer = MixtureOfExperts(trial.model, solve(trial.model, trial.budget, trial.shares).routed_experts, 0)
        initialize(layer, seed=0)
        layer.to(place.device)
        tokens, flops = (
            trial.train.batch_tokens,
            feed_forward_account(trial.model.width, layer.config.expert_width).flops,
        )
        ways = {
            name: _turn(place, layer, tokens, way)
            for name, way in WAYS.items()
            if name != "apart" or place.device.type == "cpu"
        }
        counted = dict.fromkeys(ways, flops * layer.config.top_k * STEP_OVER_FORWARD)
        yield from speeds(place, "experts", shape, tokens, ways, counted, ("grouped", "loop"), ROUNDS)


def _turn(
    place: Place,
    layer: MixtureOfExperts,
    tokens: int,
    way: Callable[[MixtureOfExperts, Tensor, Tensor, Tensor], Tensor],
) -> Callable[[], float]:
    experts, width = layer.gate_up_EDF.shape[:2]
    popularity_E = torch.linspace(-0.4, 0.4, experts, device=place.device)

    def both_ways(x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor, gradient_SD: Tensor) -> None:
        with place.autocast():
            y_SD = way(layer, x_SD, gates_SK, experts_SK)
        y_SD.backward(gradient_SD.to(y_SD.dtype))

    def turn() -> float:
        x_SD, gradient_SD = torch.randn(2, tokens, width, device=place.device)
        gates_SK, experts_SK = (popularity_E + torch.randn(tokens, experts, device=place.device)).topk(
            layer.config.top_k
        )
        gates_SK = gates_SK.softmax(-1).requires_grad_()
        spent = place.timed(lambda: both_ways(x_SD.requires_grad_(), gates_SK, experts_SK, gradient_SD))
        layer.zero_grad(set_to_none=True)
        return spent

    return turn


# --- ways of dispatch -------------------------------------------------------------------------------------------------


def _grouped(layer: MixtureOfExperts, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
    with patch.object(grouped_experts, "WIDE", math.inf):
        return layer.routed(x_SD, gates_SK, experts_SK)


def _apart(layer: MixtureOfExperts, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
    with patch.multiple(grouped_experts, WIDE=0, BUSY=0):
        return layer.routed(x_SD, gates_SK, experts_SK)


def _loop(layer: MixtureOfExperts, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
    y_SD = torch.zeros_like(x_SD)
    for expert, weights in enumerate(zip(layer.gate_up_EDF.unbind(0), layer.down_EFD.unbind(0), strict=True)):
        tokens, places = (experts_SK == expert).nonzero(as_tuple=True)
        rows = _expert(x_SD[tokens], *weights) * gates_SK[tokens, places].unsqueeze(-1)
        y_SD = y_SD.index_add(0, tokens, rows)
    return y_SD


def _padded(layer: MixtureOfExperts, x_SD: Tensor, gates_SK: Tensor, experts_SK: Tensor) -> Tensor:
    chosen, (experts, width) = experts_SK.flatten(), layer.gate_up_EDF.shape[:2]
    order = chosen.argsort(stable=True)
    load_E = torch.bincount(chosen, minlength=experts)
    room = int(load_E.max())
    sorted_ = chosen[order]
    places = sorted_ * room + torch.arange(len(order), device=order.device) - (load_E.cumsum(0) - load_E)[sorted_]
    x_ECD = (
        x_SD.new_zeros(experts * room, width)
        .index_copy(0, places, x_SD[order // experts_SK.shape[1]])
        .view(experts, room, width)
    )
    y_ECD = _expert(x_ECD, layer.gate_up_EDF, layer.down_EFD).flatten(0, 1)
    rows_SK = torch.empty_like(order).scatter_(0, order, places).view_as(experts_SK)
    return (y_ECD[rows_SK] * gates_SK.unsqueeze(-1)).sum(1)


def _expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down


WAYS = {"layer": MixtureOfExperts.routed, "grouped": _grouped, "apart": _apart, "loop": _loop, "padded": _padded}
