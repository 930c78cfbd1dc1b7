"""From a study to its trials with solved sizes, and how long they will take. It must not know results or engines."""

from __future__ import annotations

import functools
import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sparsemem.config import WIDEST_TOLERANCE, Budget, BudgetError, ConfigError, Model, Run, Study, Trial
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS, POOLS
from sparsemem.study.jobs import slots
from sparsemem.study.text import count, duration, size, table

if TYPE_CHECKING:
    from sparsemem.model import ModelAccount, Sizes

LARGEST_STEP = {
    "cpu": 5e11,
    "cuda": 5e13,
}  # FLOPs of a training step that is still tried out for its time: some seconds
MEASURED_SIZES = 3  # steps are measured at so many sizes at most; the others are interpolated
START_SECONDS = 4.0  # a trial's process, its imports and its corpus
EXPERT_WIDTH = EXPERTS.field("expert_width")
WHOLE_ROWS = 8  # that width is a multiple of this
FEW_STEPS = 10
MOST_OFFERS = 24  # values that are tried for a remedy
CHECKED_MODELS = 32  # whose accounts a plan holds against tensors; every model is checked once more where it is trained
HELD_OUT_PASSES = 2  # the last evaluation reads the held-out set once, the ones before it about once together


@dataclass(frozen=True)
class PlannedTrial:
    """A trial, what the budget solved for it, and what that costs."""

    study: str
    trial: Trial
    varied: dict[str, Any]
    """Dotted path -> value of every field that the study varies."""
    tuned: dict[str, Any]
    """Dotted path -> value of every field that the study's `tuned` fills in."""
    pools: tuple[str, ...]
    """Memories that any trial of the study holds."""
    sizes: Sizes
    account: ModelAccount

    def row(self) -> dict[str, Any]:
        """The columns of `trials.csv` that are known before training, under their names there."""
        from sparsemem.budget import budget_errors
        from sparsemem.model import memory_params, memory_rows_read

        trial, account, sizes = self.trial, self.account, self.sizes
        error_total, error_active = budget_errors(trial.model, account, trial.budget)
        row = {
            "trial_id": trial.id,
            "study": self.study,
            "seed": trial.seed,
            "rho": trial.rho,
            "share_moe": account.share(EXPERTS.name),
            "total_params": account.total_params,
            "active_params": account.active_params,
            "sparse_params": account.sparse_params,
            "embedding_params": account.embedding_params,
            "budget_error_total": error_total,
            "budget_error_active": error_active,
            "routed_experts": sizes.routed_experts,
            "shared_width": sizes.shared_width,
            "memory_rows": sizes.memory_rows,
            "memory_rows_read": memory_rows_read(trial.model, sizes),
            "memory_params": memory_params(trial.model, sizes),
            "memory_flops_share": account.memory_flops_share,
            "flops_per_token": account.flops_per_token,
            "flops_per_token_head": account.flops_per_token_head,
            "memory_bytes_per_token": account.memory_bytes_per_token,
            "tokens": trial.budget.tokens,
        }
        row |= {f"share_{pool}": account.share(pool) for pool in self.pools}
        row |= {path: value for path, value in self.varied.items() if path not in row}
        return row | {path if path == "train.lr" else f"tuned.{path}": value for path, value in self.tuned.items()}

    @property
    def tokens_per_active_param(self) -> float:
        """Of the model that the budget came to, whose activated parameters may be off by its tolerance."""
        return self.trial.budget.tokens / self.account.active_params

    @property
    def flops(self) -> int:
        """Of the whole training."""
        return self.account.flops_per_token_head * self.trial.budget.tokens


def in_order(planned: Sequence[PlannedTrial], run: Run) -> list[PlannedTrial]:
    """As `run.priority` has trials start."""
    return list(planned) if run.priority == "as-planned" else sorted(planned, key=lambda p: -p.flops)


def plan(study: Study) -> list[PlannedTrial]:
    """Every distinct trial of the study, in the order of its axes.

    Raises:
        ConfigError: trials miss their budgets; a line for each way to do so names the point, the field and the nearest
            feasible value.
        RuntimeError: a model's account, from which its budget error is computed, is not what its tensors hold.
    """
    from sparsemem.model import check_account

    axes, filled_in = study.axes, study.tuned.fields if study.tuned else ()
    points = list(study.points())
    pools = tuple(pool for pool in MEMORY_POOLS if any(getattr(trial.model, pool) for _, trial in points))
    solved = functools.cache(_solved)  # most of a large study differs in what no size depends on
    planned: dict[str, PlannedTrial] = {}
    refused: dict[str, tuple[ConfigError, Budget, str]] = {}
    for varied, trial in points:
        id_ = trial.id
        if id_ in planned:
            continue
        try:
            _check_ranks(trial, study.run)
            sizes, account = solved(
                trial.model, trial.budget, tuple(trial.shares.items()), trial.data.context, trial.data.vocab_size
            )
        except ConfigError as error:
            point = ", ".join(f"{path}={value}" for path, value in varied.items())
            refused.setdefault(str(error), (error, trial.budget, f" (at the point {point})" if point else ""))
            continue
        planned[id_] = PlannedTrial(
            study.study, trial, _values(trial, axes), trial.at(filled_in), pools, sizes, account
        )
    if refused:
        trials = [trial for _, trial in points]
        lines: dict[str, str] = {}
        for refusal, budget, point in refused.values():
            lines.setdefault(
                _serving_all(refusal, budget, trials) if isinstance(refusal, BudgetError) else str(refusal), point
            )
        raise ConfigError("\n".join(words + point for words, point in lines.items()))
    kinds = {(p.trial.model, tuple(p.trial.shares)): p.sizes for p in planned.values()}
    for (model, _), sizes in islice(kinds.items(), CHECKED_MODELS):
        check_account(model, sizes)
    return list(planned.values())


def labelled(line: str) -> str:
    """What is foreseen, under a label unless it brings its own."""
    return line if line.startswith("Warning: ") else f"note: {line}"


def few_steps(planned: Sequence[PlannedTrial]) -> list[str]:
    """Says so where a trial ends before it has begun to learn."""
    sizes = {(p.trial.budget.tokens, p.trial.train.batch_tokens) for p in planned}
    steps, tokens, batch = min((-(-tokens // batch), tokens, batch) for tokens, batch in sizes)
    if steps >= FEW_STEPS:
        return []
    return [
        f"`budget.tokens` {tokens:,} make {steps} steps of `train.batch_tokens` {batch:,}: too few to learn from; "
        "lower the batch"
    ]


def _solved(
    model: Model, budget: Budget, shares: tuple[tuple[str, float], ...], context: int, vocabulary: int
) -> tuple[Sizes, ModelAccount]:
    from sparsemem.budget import solve
    from sparsemem.model import count_model

    sizes = solve(model, budget, dict(shares))
    account = count_model(model, sizes, context, vocabulary)
    _check_flops(budget, account)
    for pool in sizes.pools:
        POOLS[pool].check_start(model, sizes)
    return sizes, account


def _serving_all(error: BudgetError, budget: Budget, trials: Sequence[Trial]) -> str:
    """The refusal with an offer that every trial of the same budget takes, and narrower experts that fit, where they
    are found.
    """
    from sparsemem.budget import solve

    alike = {(trial.model, tuple(trial.shares.items())) for trial in trials if trial.budget == budget}

    def refused(field: str, value: int) -> list[ConfigError]:
        found = []
        for model, shares in alike:
            own = budget if field == EXPERT_WIDTH else budget.model_copy(update={field: value})
            experts = EXPERTS.of(model)
            narrower = {EXPERTS.name: experts and experts.model_copy(update={"expert_width": value})}
            try:
                solve(model.model_copy(update=narrower) if field == EXPERT_WIDTH else model, own, dict(shares))
            except ConfigError as other:
                found.append(other)
        return found

    offers, served = [error.offer], None
    for offer in offers:  # grows while it is read
        others = refused(error.field, offer)
        same = [other.offer for other in others if isinstance(other, BudgetError) and other.field == error.field]
        if not same:
            served = offer  # the other field of the budget may be next
        if not others:
            break
        offers += sorted(set(same).difference(offers), reverse=True)[: MOST_OFFERS - len(offers)]
    words = str(error if served is None else error.offering(served))
    if served is None:
        wide = _least_tolerance(alike, budget)
        remedy = f"`budget.tolerance: {wide:g}` would do" if wide else "change the model"
        words = words.replace(
            f"the nearest feasible value is {error.offer}", f"no value near it serves every point: {remedy}"
        )
    widths = {experts.expert_width for model, _ in alike if (experts := EXPERTS.of(model))}
    if f"`{EXPERT_WIDTH}`" in words and len(widths) == 1:
        (width,) = widths
        narrower = range(
            (width - 1) // WHOLE_ROWS * WHOLE_ROWS, 0, -WHOLE_ROWS * max(1, width // (WHOLE_ROWS * MOST_OFFERS))
        )
        fits = next((each for each in narrower if not refused(EXPERT_WIDTH, each)), None)
        words += f"; `{EXPERT_WIDTH}: {fits}` would do" if fits else ""
    return words


def _least_tolerance(models: Iterable[tuple[Model, tuple[tuple[str, float], ...]]], budget: Budget) -> float | None:
    """At which every model meets the budget, rounded up; None where none is allowed to be so wide."""
    from sparsemem.budget import budget_errors, solve
    from sparsemem.model import count_model

    errors = []
    for model, shares in models:
        try:
            account = count_model(
                model,
                solve(model, budget.model_copy(update={"tolerance": WIDEST_TOLERANCE}), dict(shares)),
                context=1,
                vocabulary=0,
            )
        except ConfigError:
            return None
        errors += [abs(error) for error in budget_errors(model, account, budget)]
    return math.ceil(1e4 * max(errors)) / 1e4


def _check_flops(budget: Budget, account: ModelAccount) -> None:
    wanted, got = budget.flops_per_token, account.flops_per_token
    if wanted and abs(got / wanted - 1) > budget.tolerance:
        raise ConfigError(
            f"field `budget.flops_per_token` has the value {wanted:,}, but these sizes come to {got:,} "
            f"({got / wanted - 1:+.2%}, beyond `tolerance` {budget.tolerance:.2%}); change the memory's `key_dim` or "
            "`top_m`, or the budget"
        )


def _check_ranks(trial: Trial, run: Run) -> None:
    sequences = trial.train.batch_tokens // trial.data.context
    if run.gpus_per_trial > sequences:
        raise ConfigError(
            f"field `run.gpus_per_trial` has the value {run.gpus_per_trial:g}, but a batch of `train.batch_tokens` "
            f"{trial.train.batch_tokens:,} has {sequences} sequences to divide among them; lower it"
        )


def _values(trial: Trial, paths: Iterable[str]) -> dict[str, Any]:
    """What the trial came to at each path; groups and lists as JSON."""
    return {
        path: json.dumps(value) if isinstance(value, dict | list) else value for path, value in trial.at(paths).items()
    }


# --- time -------------------------------------------------------------------------------------------------------------


def estimate_seconds(planned: Sequence[PlannedTrial], study: Study) -> tuple[list[float], float] | None:
    """Seconds of each trial, and of the whole study over this machine's slots, from a few training steps on this
    machine.

    None where a step is too large to be tried out, as for the published configurations, or where this machine cannot
    hold a trial. Steps are timed at the smallest, the middle and the largest size; seconds per FLOP of the others are
    interpolated by rank. Several GPUs are taken to divide the time by their number.
    """
    from sparsemem.accounting import STEP_OVER_FORWARD
    from sparsemem.train import measure_step

    run, gpus = study.run, max(1.0, study.run.gpus_per_trial)
    try:
        together = slots(run)
    except ConfigError:
        return None
    device = "cuda" if run.gpus_per_trial else "cpu"
    if any(p.account.flops_per_token_head * p.trial.train.batch_tokens > LARGEST_STEP[device] for p in planned):
        return None
    by_size = sorted(
        {(p.account.flops_per_token_head, p.sizes.routed_experts, p.sizes.memory_rows): p for p in planned}.items()
    )
    sizes = [key for key, _ in by_size]
    last = len(sizes) - 1
    measured = {}
    for rank in {round(last * part / (MEASURED_SIZES - 1)) for part in range(MEASURED_SIZES)}:
        trial = by_size[rank][1].trial
        step = measure_step(trial, run.cpus_per_trial, device=device)
        measured[rank] = step / trial.train.batch_tokens / sizes[rank][0]
    seconds = []
    for p in planned:
        flops = p.account.flops_per_token_head
        tokens = p.trial.budget.tokens + p.trial.data.validation_tokens * HELD_OUT_PASSES / STEP_OVER_FORWARD
        rank = sizes.index((flops, p.sizes.routed_experts, p.sizes.memory_rows))
        seconds.append(START_SECONDS + tokens * flops * _interpolated(rank, measured) / gpus)
    by_id = {p.trial.id: each for p, each in zip(planned, seconds, strict=True)}
    return seconds, _makespan([by_id[p.trial.id] for p in in_order(planned, run)], together)


def _interpolated(rank: int, measured: dict[int, float]) -> float:
    low, high = max(r for r in measured if r <= rank), min(r for r in measured if r >= rank)
    return (
        measured[low] if low == high else measured[low] + (measured[high] - measured[low]) * (rank - low) / (high - low)
    )


def _makespan(seconds: Sequence[float], slots: int) -> float:
    """When the last trial ends if each starts as soon as a slot is free."""
    free = [0.0] * slots
    for trial in seconds:
        heapq.heapreplace(free, free[0] + trial)
    return max(free)


# --- for people -------------------------------------------------------------------------------------------------------


def describe(
    planned: Sequence[PlannedTrial], estimate: tuple[Sequence[float], float] | None, most: int | None = None
) -> str:
    """The plan as a table with a line of totals.

    Args:
        estimate: that of `estimate_seconds`.
        most: trials that the study may come to where it searches its shares, the planned ones being its first batch.
    """
    seconds: Sequence[float | None] = estimate[0] if estimate else [None] * len(planned)
    axes, filled_in = list(planned[0].varied), list(planned[0].tuned)
    header = [
        "trial",
        *axes,
        *(f"{path} (tuned)" for path in filled_in),
        "experts",
        "shared width",
        "memory rows",
        "P_tot",
        "error",
        "P_act",
        "error",
    ]
    header += ["FLOPs/token", "bytes/token", "tokens", "tokens/P_act", "time"]
    rows = []
    for p, time in zip(planned, seconds, strict=True):
        row = p.row()
        rows.append(
            [
                row["trial_id"],
                *("-" if p.varied[axis] is None else f"{p.varied[axis]}" for axis in axes),
                *(f"{p.tuned[path]}" for path in filled_in),
                f"{row['routed_experts']}",
                f"{row['shared_width']}",
                f"{row['memory_rows']:,}",
                f"{row['total_params']:,}",
                f"{row['budget_error_total']:+.3%}",
                f"{row['active_params']:,}",
                f"{row['budget_error_active']:+.3%}",
                count(row["flops_per_token"]),
                size(row["memory_bytes_per_token"]),
                count(row["tokens"]),
                f"{p.tokens_per_active_param:.3g}",
                "-" if time is None else duration(time),
            ]
        )
    tokens = sum(p.trial.budget.tokens for p in planned)
    worst = max(abs(p.row()[name]) for p in planned for name in ("budget_error_total", "budget_error_active"))
    how_long = (
        f"about {duration(estimate[1])} on this machine" if estimate else "its time cannot be estimated on this machine"
    )
    totals = f"{len(planned)} trials, {count(tokens)} tokens, largest budget error {worst:.3%}, {how_long}"
    if most:
        whole = f", about {duration(estimate[1] * most / len(planned))}" if estimate else ""
        totals += (
            f"\nthese are the first batch; further shares follow from the results, at most {most} trials in all{whole}"
        )
    return f"{table(header, rows)}\n{totals}"
