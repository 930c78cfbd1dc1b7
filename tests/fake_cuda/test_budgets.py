"""What a training step and an evaluation of each mechanism ask of a GPU, on a fake one.

Whoever lowers a number writes the lower one here. Who must raise one says in the commit why the GPU has to wait longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import device

ROOT = Path(__file__).resolve().parents[2]
LOAD_FIRST = """
import ctypes, runpy, sys
ctypes.CDLL(sys.argv.pop(1))
runpy.run_module("tests.fake_cuda.cases", run_name="__main__", alter_sys=True)
"""
"""torch looks once, while it is imported, whether there is CUDA."""

BUDGETS: dict[str, dict[str, tuple[int, int, int]]] = {
    "moe": {"training": (671, 4, 0), "evaluation": (248, 0, 3)},
    "dense": {"training": (465, 2, 0), "evaluation": (168, 0, 3)},
    "engram": {"training": (900, 6, 0), "evaluation": (344, 0, 6)},
    "ngram_embedding": {"training": (729, 6, 0), "evaluation": (288, 0, 5)},
    "pkm": {"training": (642, 5, 1), "evaluation": (264, 0, 8)},
    "memory_plus": {"training": (924, 7, 2), "evaluation": (394, 0, 13)},
    "peer": {"training": (679, 6, 1), "evaluation": (271, 0, 8)},
    "ultramem": {"training": (905, 8, 0), "evaluation": (366, 2, 7)},
    "ultramem_v2": {"training": (1069, 12, 0), "evaluation": (428, 2, 11)},
    "many-experts": {"training": (759, 8, 0), "evaluation": (278, 4, 3)},
}
"""Case -> launches, host syncs and transfers between processor and GPU of a training step after the first, and of an
evaluation.

Launches are torch's operations as the fake device runs them: more than a GPU's kernels, where one kernel does the work
of several.
"""
IN_FP32 = {
    "layers/attention.py:forward": "the plain attention that a fake device takes in place of flash attention",
    "kernels/matmul.py:linear": "the router",
    "kernels/matmul.py:linears": "scores of product keys",
    "mechanisms/product_key/retrieval.py:<genexpr>": "their filter",
    "mechanisms/product_key/retrieval.py:_choose_products": "scores of candidate rows",
    "mechanisms/product_key/retrieval.py:score_pairs": "scores of chosen rows",
    "train/step.py:train_step": "the backward passes of these",
}
"""Who multiplies matrices in fp32 though autocast is on, and what."""
CHEAP = ("moe", "ultramem")  # between them they hold most of what can go wrong


@pytest.fixture(scope="session")
def on_fake_cuda(pytestconfig: pytest.Config) -> Callable[..., list[dict[str, Any]]]:
    """Run cases in a process of their own."""
    if torch.version.cuda:
        pytest.skip("this build of PyTorch has a real CUDA device: make test-gpu")
    if device.compiler() is None:
        pytest.skip("no C++ compiler to make a fake CUDA device with")
    library = device.compiled(pytestconfig.cache.mkdir("fake_cuda"))

    def run(*cases: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-c", LOAD_FIRST, str(library), *cases]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_the_commonest_mechanisms_keep_to_their_budgets(on_fake_cuda: Callable[..., list[dict[str, Any]]]) -> None:
    *all_found, planted = on_fake_cuda(*CHEAP, "planted-mistakes")
    for found in all_found:
        _check(found)
    assert planted["caught"] == ["ends on the processor", "ends in int64", "weights in fp32"]


@pytest.mark.slow
def test_the_other_mechanisms_keep_to_their_budgets(on_fake_cuda: Callable[..., list[dict[str, Any]]]) -> None:
    for found in on_fake_cuda(*(case for case in BUDGETS if case not in CHEAP)):
        _check(found)


@pytest.mark.slow
def test_benches_run_wholly_on_one_device_and_say_which(on_fake_cuda: Callable[..., list[dict[str, Any]]]) -> None:
    for found in on_fake_cuda("bench-step", "bench-profile", "bench-moe", "bench-memory", "bench-eval"):
        assert len(found["rows"]) >= 4
        for name, place in found["rows"].items():
            in_fp32 = name.startswith(("update/", "gather/"))  # of tables, which are kept in it
            assert place == ["cuda", "fp32" if in_fp32 else "bf16"], name


def _check(found: dict[str, Any]) -> None:
    case = found["case"]
    for phase, budget in BUDGETS[case].items():
        counts = found[phase]
        for name, allowed in zip(("launches", "syncs", "transfers"), budget, strict=True):
            got = sum(counts[name].values())
            assert got <= allowed, (
                f"{case}, {phase}: {got} {name}, budget {allowed}; by line of sparsemem: {counts[name]}"
            )
            if name != "launches":  # torch's versions differ in those
                assert got == allowed, (
                    f"{case}, {phase}: only {got} {name}, budget {allowed}; write the lower number into BUDGETS"
                )
        assert counts["fp32"].keys() <= IN_FP32.keys(), (
            f"{case}, {phase}: products in fp32 under autocast: {counts['fp32']}"
        )
        assert counts["groups"] < 1024, (
            f"{case}, {phase}: torch's grouped product refuses {counts['groups']} groups on a GPU"
        )


def test_every_case_has_a_budget() -> None:
    from .cases import CASES

    assert {case for case in CASES if not case.startswith(("planted-", "bench-"))} == BUDGETS.keys()
