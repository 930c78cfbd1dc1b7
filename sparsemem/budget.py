"""From a budget and shares to integer sizes: experts, shared width, rows of every table.

P_sparse = P_tot - P_act is divided among the pools. Then, in this order:

1. routed experts: as many idle ones as their share of P_sparse comes to, rounded;
2. the shared experts' width: whatever P_act leaves after attention, router, top-k experts and the memory's own activated part,
   so that P_act holds at every share;
3. rows of the memory: whatever P_tot leaves, so that the rounding of step 1 ends in the rows and P_tot holds too.

Pure integer arithmetic over the closed forms of `model.count_model`; nothing is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsemem.config import Budget, ConfigError, Model
from sparsemem.layers.engram import distinct_primes
from sparsemem.model import ModelAccount, Sizes, count_model

SHARE_TOLERANCE = 0.02  # how far the share that integer sizes come to may lie from the one asked for


def solve(config: Model, budget: Budget, shares: Mapping[str, float]) -> Sizes:
    """Sizes that meet P_tot and P_act within `budget.tolerance`.

    Args:
        shares: pool -> share of P_sparse; empty: a dense model of P_act parameters.

    Raises:
        ConfigError: no integer sizes meet the budget; the message names the field, its value and the nearest feasible value.
    """
    if not shares:
        return _checked(config, budget, shares, _fit_shared_width(config, budget, Sizes(routed_experts=0, shared_width=0)))
    if config.moe.shared_experts == 0 and config.engram:
        raise ConfigError("field `model.moe.shared_experts` is 0: the memory's activated part is taken off the shared experts; set it to 1")
    sparse = budget.total_params - budget.active_params
    one_expert = _count(config, Sizes(config.moe.top_k + 1, 0)).parts["moe"].idle
    idle_experts = round(shares.get("moe", 0.0) * sparse / one_expert)
    if shares.get("moe", 0.0) > 0 and idle_experts == 0:
        feasible = budget.active_params + math.ceil(one_expert / shares["moe"])
        raise ConfigError(
            f"field `budget.total_params` has the value {budget.total_params:,}: the routed experts' share does not hold one of them; "
            f"raise it to {feasible:,} or more, or make `model.moe.expert_width` smaller"
        )
    sizes = Sizes(config.moe.top_k + idle_experts, 0, _rows(config, 2) if config.engram else ())
    sizes = _fit_shared_width(config, budget, sizes)
    if config.engram:
        sizes = _fit_rows(config, budget, sizes)
    return _checked(config, budget, shares, sizes)


def budget_errors(account: ModelAccount, budget: Budget) -> tuple[float, float]:
    """Signed relative errors of P_tot and P_act. The dense baseline has P_tot = P_act by definition: both are held against P_act."""
    total = budget.total_params if "moe" in account.parts else budget.active_params
    return account.total_params / total - 1, account.active_params / budget.active_params - 1


def _fit_shared_width(config: Model, budget: Budget, sizes: Sizes) -> Sizes:
    """The multiple of the number of shared experts whose P_act is nearest to the budget's."""
    step = max(config.moe.shared_experts, 0 if sizes.routed_experts else 1)
    if step == 0:
        return sizes

    def active(width: int) -> int:
        return _count(config, replace(sizes, shared_width=width)).active_params

    floor, slope = active(0), active(step) - active(0)
    steps = round((budget.active_params - floor) / slope)
    if steps < 1:
        raise ConfigError(
            f"field `budget.active_params` has the value {budget.active_params:,}: attention, router, the top-{config.moe.top_k} experts "
            f"and the memory's projections alone activate {floor:,}; raise it to {floor + slope:,} or more, "
            "or make `model.moe.expert_width` smaller"
        )
    return replace(sizes, shared_width=steps * step)


def _fit_rows(config: Model, budget: Budget, sizes: Sizes) -> Sizes:
    """Distinct primes whose rows bring P_tot nearest to the budget's."""

    def excess(at_least: int) -> int:
        return _count(config, replace(sizes, engram_rows=_rows(config, at_least))).total_params - budget.total_params

    low = 2
    if excess(low) > 0:
        feasible = budget.total_params + excess(low)
        raise ConfigError(
            f"field `budget.total_params` has the value {budget.total_params:,}: the share of the memory leaves it no rows; "
            f"raise it to {feasible:,} or more, or give the memory a larger share"
        )
    below = _largest(low, excess)
    best = min((below, below + 1), key=lambda rows: abs(excess(rows)))
    return replace(sizes, engram_rows=_rows(config, best))


def _largest(low: int, excess: Callable[[int], int]) -> int:
    """The largest start whose rows do not exceed the budget (`excess` rises with the start)."""
    high = 2 * low
    while excess(high) <= 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return low


def _rows(config: Model, at_least: int) -> tuple[tuple[int, ...], ...]:
    """Distinct primes for every table of every module, in the order module, n-gram order, head."""
    assert config.engram is not None
    tables = len(config.engram.orders) * config.engram.heads
    primes = distinct_primes(at_least, tables * len(config.engram.layers))
    return tuple(primes[start : start + tables] for start in range(0, len(primes), tables))


def _checked(config: Model, budget: Budget, shares: Mapping[str, float], sizes: Sizes) -> Sizes:
    account = _count(config, sizes)
    error_total, error_active = budget_errors(account, budget)
    # Active first: while P_act is missed, so is what P_tot leaves for the pools. A dense model has no P_tot of its own.
    checks = [("active_params", error_active, account.active_params), ("total_params", error_total, account.total_params)]
    for name, error, got in checks[: 2 if shares else 1]:
        if abs(error) > budget.tolerance:
            raise ConfigError(
                f"field `budget.{name}` has the value {getattr(budget, name):,}, which no integer sizes meet within "
                f"{budget.tolerance:.2%}; the nearest feasible value is {got:,} ({error:+.2%})"
                + ("; `model.moe.shared_experts: 1` would take up the rest" if config.moe.shared_experts == 0 else "")
            )
    for pool, share in shares.items():
        if abs(account.share(pool) - share) > SHARE_TOLERANCE:
            raise ConfigError(
                f"field `shares.{pool}` has the value {share:g}, which no whole number of experts comes to within "
                f"{SHARE_TOLERANCE:g}; the nearest feasible value is {account.share(pool):.4g}. "
                "Smaller experts (`model.moe.expert_width`) make finer shares"
            )
    return sizes


def _count(config: Model, sizes: Sizes) -> ModelAccount:
    # Neither the context nor the vocabulary enters the parameters that a budget counts.
    return count_model(config, sizes, context=1, vocabulary=0)
