"""Each kernel against the plain formula beside it, and whole models that run on the plain ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsemem.kernels.cross_entropy import head_loss, head_loss_reference
from sparsemem.kernels.grouped_experts import grouped_experts, grouped_experts_reference
from sparsemem.kernels.rms_norm import rms_norm, rms_norm_reference
from sparsemem.kernels.rotary import rotate, rotate_reference, rotations
from sparsemem.kernels.sinkhorn import sinkhorn, sinkhorn_reference
from sparsemem.kernels.swiglu import swiglu, swiglu_reference

COS_SIN = rotations(6, 3, 8, 10_000.0, torch.device("cpu"))
CHOSEN = torch.tensor([[0, 2], [2, 3], [0, 3], [2, 0], [3, 2]])  # none of expert 1
TARGETS = torch.tensor([3, 0, -1, 7, 2])
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_norm": (lambda x, g: rms_norm(x, g, 1e-5), lambda x, g: rms_norm_reference(x, g, 1e-5), ((5, 7), (7,))),
    "swiglu": (swiglu, swiglu_reference, ((5, 12),)),
    "sinkhorn": (sinkhorn, sinkhorn_reference, ((5, 4, 4),)),
    "rotary": (lambda x: rotate(x, COS_SIN), lambda x: rotate_reference(x, *COS_SIN.to(x.dtype)), ((2, 6, 3, 8),)),
    "cross_entropy": (
        lambda x, w: head_loss(x, w, TARGETS),
        lambda x, w: head_loss_reference(x, w, TARGETS),
        ((5, 6), (9, 6)),
    ),
    "grouped_experts": (
        lambda x, g, up, down: grouped_experts(x, g, CHOSEN, up, down),
        lambda x, g, up, down: grouped_experts_reference(x, g, CHOSEN, up, down),
        ((5, 8), (5, 2), (4, 8, 16), (4, 8, 8)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_equals_its_formula_in_value_and_gradients(name: str) -> None:
    """fp32 against float64, whose rounding does not show."""
    fast, reference, shapes = CASES[name]
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, wanted = fast(*leaves), reference(*exact)
    weight = torch.randn(y.shape)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((y * weight).sum(), leaves)
    theirs = torch.autograd.grad((wanted * weight.double()).sum(), exact)
    for ours, their in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours.double(), their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["engram", pytest.param("ultramem_v2", marks=pytest.mark.slow), "streams"])
def test_a_whole_model_runs_on_the_formulas(pool: str) -> None:
    """Losses of the first steps, each choice of kernels in a process of its own."""
    found = {}
    for kernels in ("fast", "reference"):
        environment = os.environ | {"SPARSEMEM_KERNELS": kernels}
        done = subprocess.run(
            [sys.executable, "-m", "tests.kernels.whole_model", pool],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        found[kernels] = json.loads(done.stdout)
    assert found["fast"]["reference"] is False
    assert found["reference"]["reference"] is True
    assert found["reference"]["losses"] == pytest.approx(found["fast"]["losses"], rel=1e-4)
    assert found["reference"]["losses"][-1] < found["reference"]["losses"][0]


def test_another_choice_is_refused_by_name() -> None:
    environment = os.environ | {"SPARSEMEM_KERNELS": "fastest"}
    command = [sys.executable, "-m", "sparsemem", "plan", "sweeps/allocation-quick.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "SPARSEMEM_KERNELS has the value 'fastest'; choose one of fast, reference" in done.stderr
    assert "Traceback" not in done.stderr
