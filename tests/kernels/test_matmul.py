"""Products by either library against float64, whatever the strides, and their gradients; which library is taken."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.kernels import matmul as products
from sparsemem.kernels.matmul import library, linear, linears, matmul, use_library, weight_gradient

SIZES = st.integers(1, 40)


@pytest.fixture(autouse=True, params=["onednn", "torch"])
def _either_library(request: pytest.FixtureRequest) -> Iterator[None]:
    use_library(request.param)
    yield
    use_library(None)


@pytest.mark.parametrize(("speed_up", "taken"), [(2.2, "onednn"), (1.1, "torch"), (0.9, "torch")])
def test_onednn_is_taken_where_it_is_clearly_faster(
    speed_up: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_speed_up", lambda: speed_up)
    use_library(None)
    assert library() == taken


def test_a_choice_is_made_once_and_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(None)
    start = time.thread_time()
    chosen = library()
    assert time.thread_time() - start < 1
    monkeypatch.setattr(products, "_speed_up", lambda: pytest.fail("measured again"))
    assert library() == chosen


@settings(max_examples=40, deadline=None)
@given(S=SIZES, K=SIZES, N=SIZES, turned=st.tuples(st.booleans(), st.booleans()))
def test_products_are_those_of_float64_whatever_the_strides(S: int, K: int, N: int, turned: tuple[bool, bool]) -> None:
    x, weight = (
        torch.randn(b, a).T if turn else torch.randn(a, b)
        for (a, b), turn in zip(((S, K), (N, K)), turned, strict=True)
    )
    torch.testing.assert_close(matmul(x, weight).double(), x.double() @ weight.double().T, rtol=1e-4, atol=1e-4)
    gradient = torch.randn(S, N)
    torch.testing.assert_close(
        weight_gradient(x, gradient).double(), gradient.double().T @ x.double(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("built", [True, False])
def test_a_linear_map_and_its_gradients_are_torchs(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not built:  # torch without oneDNN
        monkeypatch.setattr(products, "_ONEDNN", None)
    x, weight, gradient = (
        torch.randn(3, 5, 7, requires_grad=True),
        torch.randn(11, 7, requires_grad=True),
        torch.randn(3, 5, 11),
    )
    found = torch.autograd.grad(linear(x, weight), (x, weight), gradient)
    expected = torch.autograd.grad(F.linear(x, weight), (x, weight), gradient)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_products_of_several_pairs_are_those_of_each() -> None:
    x, weight = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 11, 7, requires_grad=True)
    gradient = torch.randn(3, 5, 11)
    torch.testing.assert_close(linears(x, weight), x @ weight.mT)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, (x, weight), gradient) for y in (linears(x, weight), x @ weight.mT)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_processor_without_bf16_multiplies_it_all_the_same() -> None:
    """oneDNN refuses bf16 there, where torch does not."""
    script = "import torch; from sparsemem.kernels.matmul import fast, matmul, use_library; use_library('onednn')\n"
    script += "x = torch.ones(3, 8, dtype=torch.bfloat16)\n"
    script += "assert not fast(x) and fast(x.float()); assert matmul(x, x).eq(8).all()"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
