"""CUDA code paths without a GPU: fake tensors on a fake device, what is launched on it, and what the processor waits
for.

A fake tensor has a shape, a dtype and a device, and no numbers: every operation runs through the real dispatcher,
autograd and autocast, and fails as it would on a GPU where devices or dtypes do not fit. What kernels compute is not
seen, nor what only a kernel refuses.

`guard.cpp` is compiled once for each version of torch and loaded into the process for good, so this is for processes of
its own (`cases`).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsemem
from sparsemem.memory import table

GUARD = Path(__file__).with_name("guard.cpp")
PACKAGE = str(Path(sparsemem.__file__).parent)
READS_PER_ROW = 2
"""How often a row is read that is read at all: which rows are distinct is not known of fake tensors."""

# Nothing is launched for these: they look at a tensor in another way, or ask for memory.
_FREE = """
_coalesced_ _has_compatible_shallow_copy_type _indices _nnz _reshape_alias _sparse_coo_tensor_unsafe
_sparse_coo_tensor_with_dims_and_tensors _to_sparse _unsafe_view _values alias as_strided chunk dense_dim detach device
diagonal dim empty empty_like empty_strided expand
is_coalesced lift_fresh new_empty new_empty_strided numel permute prim_device prim_layout requires_grad_ reshape
resize_ select slice
sparse_dim split split_with_sizes squeeze t transpose unbind unflatten unfold unsqueeze view
"""
FREE = frozenset(_FREE.split())
PRODUCTS = frozenset(("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_attention_math"))
SYNCS = {
    "_local_scalar_dense": 1,
    "is_nonzero": 1,
    "nonzero": 1,
    "unique_consecutive": 1,
    "bincount": 2,
    "_linalg_svd": 1,
}
"""Operations whose result, or whether it is one, the processor waits for: in CUDA's own implementation."""


def compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++")


def compiled(folder: Path) -> Path:
    """The guard as a library, made where it is not yet."""
    torch_folder = Path(torch.__file__).parent
    key = hashlib.sha256(GUARD.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    if not library.exists():
        new = library.with_suffix(f".{id(library)}.tmp")
        command = [compiler() or "c++", "-O0", "-shared", "-fPIC", "-std=c++20", str(GUARD), "-o", str(new)]
        libraries = torch_folder / "lib"
        command += [
            f"-I{torch_folder / 'include'}",
            f"-L{libraries}",
            f"-Wl,-rpath,{libraries}",
            "-lc10",
            "-ltorch_cpu",
        ]
        subprocess.run(command, check=True)
        new.replace(library)
    return library


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made inside are fake, on whatever device; `cuda` is one where the guard was loaded."""
    with ExitStack() as held:
        for target, value in {
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.synchronize": lambda *_: None,
            "torch.cuda.get_device_name": lambda *_: "fake",
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
            "torch.nn.Module.to": _moved,
            "torch.Tensor.new_tensor": lambda self, number: torch.full(
                (), number, dtype=self.dtype, device=self.device
            ),
            "sparsemem.mechanisms.product_key.retrieval.top_score_moments": lambda memory, keys: (
                1.0,
                0.5,
            ),  # simulated with real numbers
            "sparsemem.mechanisms.product_key.layer.top_score_moments": lambda memory, keys: (1.0, 0.5),
        }.items():
            held.enter_context(patch(target, value))
        held.enter_context(
            torch.autograd.set_multithreading_enabled(False)
        )  # the backward pass in this thread, which is watched
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """`nn.Module.to`, which swaps the data of parameters in place; fake ones are replaced. What is glued to them comes
    along.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None:
                continue
            if weight not in moved:
                new = moved[weight] = nn.Parameter(weight.detach().to(device))
                vars(new).update(vars(weight) | vars(new))
                if getattr(weight, "sparse_gradient", False):
                    new.register_post_accumulate_grad_hook(table._mark_coalesced)
            part._parameters[name] = moved[weight]
        for name, held in part._buffers.items():
            if held is not None:
                held.constant = None  # a fake tensor of one number keeps it, and would really move it
                part._buffers[name] = held.to(device)
    return module


class Watch(TorchDispatchMode):
    """Counts by the line of sparsemem that asked: launches, host syncs, transfers, and products in fp32.

    Where a number or a length depends on data, a made-up one is returned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.transfers: Counter[str] = Counter()
        self.fp32: Counter[str] = Counter()
        self.groups = 0
        """Of the largest grouped product."""

    def counts(self) -> dict[str, Any]:
        by_line = {name: dict(getattr(self, name)) for name in ("launches", "syncs", "transfers", "fp32")}
        return {**by_line, "groups": self.groups}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            torch.is_inference_mode_enabled() and function.namespace == "aten"
        ):  # where autograd does not take composite operations apart
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = function._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        target = kwargs.get("device")
        if target is not None:
            devices.add(torch.device(target).type)
        if "cuda" in devices:
            self._count(name, args, tensors, devices)
        return _answer(function, name, args, kwargs)

    def _count(self, name: str, args: tuple[Any, ...], tensors: list[Tensor], devices: set[str]) -> None:
        line = asked_by(sys._getframe(2))
        if name not in FREE:
            self.launches[line] += 1
        if name in SYNCS:
            self.syncs[line] += SYNCS[name]
        if len(devices) > 1 and name in ("_to_copy", "copy_") and any(tensor.numel() for tensor in tensors):
            self.transfers[line] += 1
        if name in PRODUCTS and tensors[0].dtype == torch.float32:
            self.fp32[line] += 1
        if name == "_grouped_mm":
            self.groups = max(self.groups, len(tensors[2]))


def _answer(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in ("_local_scalar_dense", "is_nonzero"):
        dtype = args[0].dtype
        return True if name == "is_nonzero" or dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
    if name == "bincount":
        return args[0].new_zeros(args[2] if len(args) > 2 else kwargs["minlength"])
    if name == "unique_consecutive":
        rows = max(1, args[0].numel() // READS_PER_ROW)
        return (
            args[0][:rows].clone(),
            args[0].new_zeros(0, dtype=torch.int64),
            args[0].new_zeros(rows, dtype=torch.int64),
        )
    if name == "nonzero":
        return args[0].new_zeros((max(1, args[0].numel() // 2), args[0].dim()), dtype=torch.int64)
    return function(*args, **kwargs)


def asked_by(frame: FrameType | None) -> str:
    """`file:function` of the innermost frame inside the package."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return f"{code.co_filename[len(PACKAGE) + 1 :]}:{code.co_name}"
        frame = frame.f_back
    return "elsewhere"
