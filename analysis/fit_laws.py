"""The laws that `python -m analysis fit` knows, and which columns each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pandas as pd

OPTIONS = {
    "n": "parameters (activated ones, where --total is given)",
    "d": "training tokens",
    "unique": "unique tokens among the training tokens",
    "bits": "bits of precision in training, such as 4 or 16",
    "total": "total parameters",
    "x": "the size, whichever it is",
    "flops": "training budget",
    "experts": "routed experts; 1 for a dense model",
    "share": "share of the sparse parameters in routed experts, 0 to 1",
    "mechanism": "kind of memory; empty for the backbone alone",
    "slots": "memory rows",
    "loss": "loss",
    "loss-se": "standard error of each loss",
    "seed": "seed; runs of one seed are paired",
    "run": "which rows are checkpoints of one run, to be drawn together",
}
"""Option -> what its column holds."""
TEXT = ("mechanism", "seed", "run")


@dataclass(frozen=True)
class Law:
    """How a law is asked for."""

    says: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    fit: Callable[..., Any]
    """From the table and the columns, by option."""
    example: str
    sizes: tuple[str, ...] = ()
    """Options of the columns by which runs are of one cell, of which `--best-of-cell` keeps the best; () where repeats
    are seeds.
    """
    compares: bool = False
    """Whether it needs `--reference`: a value of the column `--mechanism`."""


ARGUMENTS = {"n": "params", "d": "tokens", "share": "x", "slots": "x", "loss-se": "loss_se"}
"""Option -> what most fits call it, where that is another name."""


def _call(home: str, name: str, given: dict[str, Any] | None = None, **names: str) -> Callable[..., Any]:
    """A function of `analysis.fits`, imported only when called.

    Args:
        given: arguments that are no columns.
        names: option -> argument, where it is not that of `ARGUMENTS`.
    """

    def call(frame: pd.DataFrame, columns: dict[str, str], **chosen: str) -> Any:
        arguments = {(ARGUMENTS | names).get(option, option): column for option, column in columns.items()}
        return getattr(import_module(f"analysis.fits.{home}"), name)(frame, **arguments, **(given or {}), **chosen)

    return call


LAWS = {
    "chinchilla": Law(
        "L = E + A n^-alpha + B d^-beta (+ C total^-gamma), and the compute-optimal exponents",
        ("n", "d", "loss"),
        ("total", "run"),
        _call("surface", "fit_surface"),
        "--n params --d tokens --loss loss",
        ("n", "d", "total"),
    ),
    "data-constrained": Law(
        "the same where tokens are repeated: what repeats and excess parameters are worth (arXiv 2305.16264)",
        ("n", "d", "unique", "loss"),
        ("run",),
        _call("data_constrained", "fit_data_constrained"),
        "--n params --d tokens --unique unique_tokens --loss loss",
        ("n", "d", "unique"),
    ),
    "precision": Law(
        "the same where weights are trained in few bits: how many parameters those are worth (arXiv 2411.04330)",
        ("n", "d", "bits", "loss"),
        ("run",),
        _call("precision", "fit_precision"),
        "--n params --d tokens --bits bits --loss loss",
        ("n", "d", "bits"),
    ),
    "power": Law(
        "L = A x^-alpha",
        ("x", "loss"),
        ("run",),
        _call("power_law", "fit_power", {"floor": False}),
        "--x flops --loss loss",
        ("x",),
    ),
    "saturating-power": Law(
        "L = E + A x^-alpha", ("x", "loss"), ("run",), _call("power_law", "fit_power"), "--x flops --loss loss", ("x",)
    ),
    "isoflop": Law(
        "the best size at each budget, and the power with which it grows",
        ("flops", "n", "loss"),
        ("loss-se",),
        _call("isoflop", "fit_isoflop"),
        "--flops flops --n params --loss loss",
        ("flops", "n"),
    ),
    "routing": Law(
        "loss against size and number of routed experts (arXiv 2202.01169)",
        ("n", "experts", "loss"),
        ("run",),
        _call("routing", "fit_routing"),
        "--n params --experts experts --loss loss",
        ("n", "experts"),
    ),
    "moe-joint": Law(
        "loss against active parameters, tokens and number of routed experts (arXiv 2502.05172)",
        ("n", "d", "experts", "loss"),
        ("run",),
        _call("moe_joint", "fit_moe_joint"),
        "--n params --d tokens --experts experts --loss loss",
        ("n", "d", "experts"),
    ),
    "allocation": Law(
        "loss against the share of routed experts, its optimum and what is tied with it",
        ("share", "loss", "seed"),
        (),
        _call("allocation", "fit_allocation"),
        "--share share_moe --loss val_loss --seed seed",
    ),
    "allocation-joint": Law(
        "one law of that kind over several budgets: whether the best share moves with size, tokens for each parameter "
        "or sparsity",
        ("share", "loss", "seed", "d", "total", "n"),
        (),
        _call("joint", "fit_joint", n="active"),
        "--share share_moe --loss val_loss --seed seed --d tokens --total total_params --n active_params",
    ),
    "slots": Law(
        "loss against the rows of each kind of memory",
        ("mechanism", "slots", "loss", "seed"),
        (),
        _call("slots", "fit_slots"),
        "--mechanism mechanism --slots memory_rows --loss val_loss --seed seed",
    ),
    "scaling": Law(
        "loss against compute in each mechanism at fixed tokens for each parameter, and the compute that each saves "
        "against --reference",
        ("mechanism", "flops", "n", "d", "loss", "seed"),
        (),
        _call("scaling", "fit_scaling", n="active", d="tokens"),
        "--mechanism mechanism --reference dense --flops flops --n active_params --d tokens --loss loss --seed seed",
        compares=True,
    ),
}
