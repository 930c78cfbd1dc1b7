"""From a budget and shares to integer sizes: experts, shared width, rows of every table.

P_sparse = P_tot - P_act is divided among the pools. Then, in this order:

1. routed experts: as many idle ones as their share of P_sparse comes to, rounded; likewise the rows of every memory
   but the last;
2. the shared experts' width (without experts, the feed-forward's): whatever P_act leaves after attention, router, top-k
   experts and the memories' own activated part, so that P_act holds at every share;
3. rows of the last memory: whatever P_tot leaves, so that all rounding ends in the rows and P_tot holds too. Coarse
   memories come first. Where what a memory activates rises with its size, steps 2 and 3 are repeated.

Memories of given rows come on top of that. Pure integer arithmetic over the closed forms of `model.count_model`;
nothing is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from sparsemem.config import Budget, BudgetError, ConfigError, Model
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.model import ModelAccount, Sizes, count_model

SHARE_TOLERANCE = 0.02  # how far the share that integer sizes come to may lie from the one asked for


def solve(config: Model, budget: Budget, shares: Mapping[str, float]) -> Sizes:
    """Sizes that meet P_tot and P_act within `budget.tolerance`.

    Args:
        shares: pool -> share of P_sparse; empty: a dense model of P_act parameters.

    Raises:
        ConfigError: no integer sizes meet the budget; the message names the field, its value and the nearest feasible
            value.
    """
    on_top = {pool: MEMORY_POOLS[pool].given(config) for pool in config.on_top}
    config = config.model_copy(update=dict.fromkeys(on_top))  # the backbone is solved as if they were not there
    memories = sorted((pool for pool in MEMORY_POOLS if pool in shares), key=lambda pool: not MEMORY_POOLS[pool].coarse)
    least = {pool: MEMORY_POOLS[pool].tables(config, MEMORY_POOLS[pool].least(config)) for pool in memories}
    sizes = Sizes(_routed_experts(config, budget, shares), 0, least)
    experts = EXPERTS.of(config)
    if experts and experts.shared_experts == 0 and memories:
        raise ConfigError(
            f"field `{EXPERTS.field('shared_experts')}` is 0: the memory's activated part is taken off the shared "
            "experts; set it to 1"
        )
    for pool in memories[:-1]:
        sizes = _fit_share(config, budget, shares[pool], pool, sizes)
    sizes = _fit_shared_width(config, budget, sizes)
    if memories:
        sizes = _fit_rows(config, budget, memories[-1], sizes)
        for _ in range(3):
            if (wider := _fit_shared_width(config, budget, sizes)) == sizes:
                break
            sizes = _fit_rows(config, budget, memories[-1], wider)
        sizes = _fit_shared_width(config, budget, sizes)
    _check(config, budget, shares, sizes)
    return replace(sizes, tables={**sizes.tables, **on_top})


def _routed_experts(config: Model, budget: Budget, shares: Mapping[str, float]) -> int:
    """Top-k and as many idle ones as the share of P_sparse comes to; none in a dense model."""
    if not shares or EXPERTS.of(config) is None:
        return 0
    one_expert = _count(config, Sizes(EXPERTS.least(config) + 1, 0)).parts[EXPERTS.name].idle
    return EXPERTS.solve(config, budget, shares.get(EXPERTS.name, 0.0), one_expert)


def budget_errors(config: Model, account: ModelAccount, budget: Budget) -> tuple[float, float]:
    """Signed relative errors of P_tot and P_act, without the memories that come on top of the budget.

    The dense baseline has P_tot = P_act by definition: both are held against P_act.
    """
    budgeted = replace(account, parts={pool: part for pool, part in account.parts.items() if pool not in config.on_top})
    total = budget.total_params if budgeted.sparse_params else budget.active_params
    return budgeted.total_params / total - 1, budgeted.active_params / budget.active_params - 1


def _fit_shared_width(config: Model, budget: Budget, sizes: Sizes) -> Sizes:
    """The multiple of the number of shared experts whose P_act is nearest to the budget's."""
    experts = EXPERTS.of(config)
    step = max(experts.shared_experts if experts else 0, 0 if sizes.routed_experts else 1)
    if step == 0:
        return sizes

    def active(width: int) -> int:
        return _count(config, replace(sizes, shared_width=width)).active_params

    floor, slope = active(0), active(step) - active(0)
    steps = round((budget.active_params - floor) / slope)
    if steps < 1:
        routed = sizes.routed_experts and experts
        parts = [
            "attention",
            *(["what reads and writes the residual streams"] if config.stream_count > 1 else []),
            *(["router", f"the top-{experts.top_k} experts"] if routed else []),
            "the memory's projections",
        ]
        smaller = f"`{EXPERTS.field('expert_width')}`" if routed else "the memory's widths"
        smaller += " or `model.streams`" if config.stream_count > 2 else ""
        raise BudgetError(
            "active_params",
            f"field `budget.active_params` has the value {budget.active_params:,}: {', '.join(parts[:-1])} and "
            f"{parts[-1]} alone activate {floor:,}; raise it to {{}} or more, or make {smaller} smaller",
            floor + slope,
        )
    return replace(sizes, shared_width=steps * step)


def _fit_rows(config: Model, budget: Budget, pool: str, sizes: Sizes) -> Sizes:
    """The memory's tables that bring P_tot nearest to the budget's."""

    def excess(size: int) -> float:
        return _count(config, _with_tables(config, pool, size, sizes)).total_params - budget.total_params

    low = MEMORY_POOLS[pool].least(config)
    if excess(low) > 0:
        feasible = budget.total_params + math.ceil(excess(low))
        raise BudgetError(
            "total_params",
            f"field `budget.total_params` has the value {budget.total_params:,}: the share of the memory leaves it no "
            "rows; raise it to {} or more, or give the memory a larger share",
            feasible,
        )
    return _with_tables(config, pool, _nearest(low, excess), sizes)


def _fit_share(config: Model, budget: Budget, share: float, pool: str, sizes: Sizes) -> Sizes:
    """The memory's tables whose idle parameters come nearest to its share of P_sparse."""
    wanted = share * (budget.total_params - budget.active_params)

    def excess(size: int) -> float:
        return _count(config, _with_tables(config, pool, size, sizes)).parts[pool].idle - wanted

    low = MEMORY_POOLS[pool].least(config)
    return _with_tables(config, pool, low if excess(low) > 0 else _nearest(low, excess), sizes)


def _nearest(low: int, excess: Callable[[int], float]) -> int:
    below = _largest(low, excess)
    return min((below, below + 1), key=lambda size: abs(excess(size)))


def _largest(low: int, excess: Callable[[int], float]) -> int:
    """The largest size that does not exceed what is wanted (`excess` rises with the size)."""
    high = 2 * low
    while excess(high) <= 0:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
    return low


def _with_tables(config: Model, pool: str, size: int, sizes: Sizes) -> Sizes:
    return replace(sizes, tables={**sizes.tables, pool: MEMORY_POOLS[pool].tables(config, size)})


def _check(config: Model, budget: Budget, shares: Mapping[str, float], sizes: Sizes) -> None:
    account = _count(config, sizes)
    error_total, error_active = budget_errors(config, account, budget)
    # Active first: while P_act is missed, so is what P_tot leaves for the pools. A dense model has no P_tot of its own.
    checks = [
        ("active_params", error_active, account.active_params),
        ("total_params", error_total, account.total_params),
    ]
    for name, error, got in checks[: 2 if shares else 1]:
        if abs(error) > budget.tolerance:
            raise BudgetError(
                name,
                f"field `budget.{name}` has the value {getattr(budget, name):,}, which no integer sizes meet within "
                f"{budget.tolerance:.2%} (off by {error:+.2%}); the nearest feasible value is {{}}"
                + (_remedies(config) if (experts := EXPERTS.of(config)) and experts.shared_experts == 0 else ""),
                got,
            )
    for pool, share in shares.items():
        if abs(account.share(pool) - share) > SHARE_TOLERANCE:
            raise ConfigError(
                f"field `shares.{pool}` has the value {share:g}, which no whole sizes come to within "
                f"{SHARE_TOLERANCE:g} of the {account.sparse_params:,} sparse parameters that P_tot leaves; the "
                f"nearest feasible value is {account.share(pool):.4g}"
                + (
                    f". Smaller experts (`{EXPERTS.field('expert_width')}`) make finer shares"
                    if EXPERTS.of(config)
                    else ""
                )
            )


def _remedies(config: Model) -> str:
    heads = (
        f"; wider heads too (`model.head_dim`, now `width` / `heads` = {config.head_width})"
        if config.head_dim is None
        else ""
    )
    return f"; `{EXPERTS.field('shared_experts')}: 1` would take up the rest{heads}"


def _count(config: Model, sizes: Sizes) -> ModelAccount:
    # Neither the context nor the vocabulary enters the parameters that a budget counts.
    return count_model(config, sizes, context=1, vocabulary=0)
