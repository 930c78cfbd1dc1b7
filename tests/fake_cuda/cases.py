"""What each case does on the fake device, as one line of JSON each; see `test_budgets` for how this is run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from sparsemem.bench import BENCHES
from sparsemem.config import Trial
from sparsemem.kernels import grouped_experts as moe
from sparsemem.train.evaluate import sequence_losses
from sparsemem.train.step import StepTimer

from .device import Watch, fake_cuda

MODEL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "moe": {"expert_width": 8, "top_k": 2}}
MEMORIES: dict[str, dict[str, Any]] = {
    "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4},
    "ngram_embedding": {"heads": 2, "row_dim": 4},
    "pkm": {"layers": [2], "heads": 2, "top_m": 4, "key_dim": 4},
    "memory_plus": {"layers": [1, 2], "placement": "parallel", "heads": 1, "top_m": 4, "key_dim": 4, "value_dim": 8},
    "peer": {"layers": [2], "heads": 2, "top_m": 4, "key_dim": 4},
    "ultramem": {"layers": [1], "skip": 1, "top_m": 4, "key_dim": 4, "value_dim": 8},
    "ultramem_v2": {"top_m": 4, "key_dim": 4, "value_dim": 8, "pre_value_dim": 8},
}


def trial(shares: dict[str, float], total: int = 24_000, active: int = 10_000) -> Trial:
    return Trial.model_validate(
        {
            "data": {"vocab_size": 260, "context": 16, "validation_tokens": 1000},
            "model": MODEL | {pool: MEMORIES[pool] for pool in shares if pool != "moe"},
            "budget": {"total_params": total, "active_params": active, "tokens": 2010, "tolerance": 0.05},
            "train": {"batch_tokens": 128, "lr": 0.01},
            "shares": shares,
        }
    )


def steps(of: Trial) -> dict[str, Any]:
    """A training step, after one that is not counted, and an evaluation, in bf16."""
    timer = StepTimer(of, threads=1, device="cuda")
    assert timer.precision == torch.bfloat16
    timer.step()
    with Watch() as training:
        timer.step()
    windows_ST = torch.randint(260, (4, 17), device="cpu")
    with Watch() as evaluation:
        sequence_losses(timer.model, windows_ST[:, :-1], windows_ST[:, 1:], timer.precision)
    return {"training": training.counts(), "evaluation": evaluation.counts()}


def many_experts() -> dict[str, Any]:
    """More experts than one grouped product takes. How many rows go to each part depends on data: to all but the first,
    one.
    """
    real = moe._together

    def together(load_E: torch.Tensor, rows: int) -> Any:
        groups = real(load_E, rows)
        others = len(groups.sizes) - 1
        return dataclasses.replace(groups, sizes=[rows - others, *[1] * others])

    with patch.object(moe, "_together", together):
        return steps(trial({"moe": 1.0}, total=1_000_000, active=70_000))


def planted_mistakes() -> dict[str, Any]:
    """Mistakes that a CPU does not notice, and whether the fake device does."""
    layer, x_SD = (
        StepTimer(trial({"moe": 1.0}), threads=1, device="cuda").model.layers_of("moe")[0],
        torch.randn(4, 16, device="cuda"),
    )
    chosen_SK, gates_SK = torch.zeros(4, 2, dtype=torch.int64, device="cuda"), torch.ones(4, 2, device="cuda")
    real = moe._product

    def wrong_ends(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with patch.object(moe, "_product", lambda x, weight, ends_E: real(x, weight, change(ends_E))):
            layer.routed(x_SD, gates_SK, chosen_SK)

    mistakes = {
        "none": lambda: layer.routed(x_SD, gates_SK, chosen_SK),
        "ends on the processor": lambda: wrong_ends(lambda ends_E: ends_E.cpu()),
        "ends in int64": lambda: wrong_ends(lambda ends_E: ends_E.long()),
        "weights in fp32": lambda: moe._Experts.apply(
            x_SD.bfloat16(), gates_SK.bfloat16(), chosen_SK, layer.gate_up_EDF, layer.down_EFD
        ),
    }
    with torch.autocast("cuda", torch.bfloat16):
        return {"caught": [name for name, mistake in mistakes.items() if _fails(mistake)]}


def bench(name: str) -> dict[str, Any]:
    """A bench with tiny shapes: the devices and precisions that its lines name. What mixes them fails."""
    step_shape = {
        "data": {"vocab_size": 300, "context": 16},
        "model": MODEL
        | {"engram": {"layers": [2], "heads": 2}}
        | {"ultramem_v2": {"key_dim": 4, "top_m": 4, "value_dim": 4, "pre_value_dim": 4, "init": "flat"}},
        "budget": {"total_params": "40k", "active_params": "9k", "tokens": "1k", "tolerance": "5%"},
        "train": {"batch_tokens": 64, "lr": 0.01},
    }
    memories = {
        pool: fields | ({"placement": "parallel"} if pool in ("pkm", "peer") else {})
        for pool, fields in MEMORIES.items()
    }
    memories["engram"] = memories["engram"] | {"layers": [1]}
    for pool in ("pkm", "memory_plus", "peer", "ultramem"):
        memories[pool] = {key: value for key, value in memories[pool].items() if key not in ("layers", "skip")}
    layers = {
        "rounds": 2,
        "batch": (2, 16),
        "rows": 64,
        "model": MODEL | {"layers": 1, "moe": {"expert_width": 8, "top_k": 8}} | memories,
    }
    values = {
        "step.SHAPES": {"tiny": step_shape},
        **{f"{module}.SHAPES": {"tiny": step_shape} for module in ("profile", "moe", "data", "eval")},
        **{f"{module}.ROUNDS": {"tiny": 2} for module in ("step", "profile", "data", "eval")},
        **{
            "moe.ROUNDS": 2,
            "measure.WARM_UP": 0,
            "measure.GPU_SIDE": 32,
            "eval.TOKENS_AT_ONCE": 64,
            "data.TEXT_TOKENS": 1000,
        },
        **{
            "memory.SHAPES": {"tiny": layers},
            "memory.UPDATE_ROWS": (50, 500),
            "memory.UPDATE_READS": (4, 2),
            "memory.UPDATE_ROUNDS": 2,
        },
        **{
            "memory.CACHE_BYTES": 1000,
            "memory.GATHER_TABLES": ((1000, 4),),
            "memory.GATHER_READS": (4, 2),
            "memory.GATHER_ROUNDS": 2,
        },
        "measure.default_device": lambda: "cuda",
    }
    with ExitStack() as held:
        for path, value in values.items():
            held.enter_context(patch(f"sparsemem.bench.{path}", value))
        held.enter_context(patch("sparsemem.train.step.default_device", lambda: "cuda"))
        held.enter_context(patch("sparsemem.bench.step.rivals", lambda *_: nullcontext({})))
        rows = list(BENCHES[name]())
    return {"rows": {row["name"]: [row["device"], row["dtype"]] for row in rows}}


def _fails(work: Callable[[], object]) -> bool:
    try:
        work()
    except (RuntimeError, ValueError):
        return True
    return False


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": lambda: steps(trial({})),
    "moe": lambda: steps(trial({"moe": 1.0})),
    "many-experts": many_experts,
    "planted-mistakes": planted_mistakes,
    **{f"bench-{name}": lambda name=name: bench(name) for name in ("step", "profile", "moe", "memory", "eval")},  # type: ignore[misc]
    **{pool: lambda pool=pool: steps(trial({"moe": 0.5, pool: 0.5})) for pool in MEMORIES},  # type: ignore[misc]
}


def main(*names: str) -> None:
    torch.set_num_threads(1)
    for name in names:
        with fake_cuda(), Watch():
            found = CASES[name]()
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
