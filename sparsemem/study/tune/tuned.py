"""What a tuning came to, in words and as a table. It must not know Optuna's storage or processes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from sparsemem.config import Train, Tune, Winner, named
from sparsemem.study.text import table

BRACKET = 3  # values tried of which the best may have a worse one on either side
WIDER = 3  # factor by which a logarithmic range is widened
SEED_NOTE = (
    "se: over the held-out sequences, of one run a value. Runs of another seed scatter more, so a small movement may "
    "be chance."
)
EDGE = 0.1  # share of a range, at each end, that counts as its edge


@dataclass(frozen=True)
class Outcome:
    """The search at one point."""

    at: Mapping[str, Any]
    statuses: Mapping[str, int]
    """Status -> number of its trials: finished, pruned, diverged, failed."""
    winner: Winner | None
    """None where no trial finished."""
    learned: bool
    """Whether the winner's loss is below that of equally likely tokens."""
    near: Mapping[str, tuple[float, float]]
    """Range field -> its least and largest value among the trials within one standard error of the best loss."""
    frequencies: float | None = None
    """The loss of token frequencies alone, where that of the winner is not clearly below it."""


def edges(fields: Mapping[str, BaseDistribution], values: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields whose value lies in the outer tenth of its range, or is the least or largest of three numbers or more."""
    found = []
    for path, field in fields.items():
        value = values[path]
        if isinstance(field, FloatDistribution):
            scale = math.log if field.log else float
            place = (scale(value) - scale(field.low)) / (scale(field.high) - scale(field.low))
            at_edge = not EDGE <= place <= 1 - EDGE
        else:
            choices = field.choices if isinstance(field, CategoricalDistribution) else ()
            numbers = [choice for choice in choices if isinstance(choice, int | float) and not isinstance(choice, bool)]
            at_edge = len(numbers) >= 3 and len(numbers) == len(choices) and value in (min(numbers), max(numbers))
        if at_edge:
            found.append(path)
    return tuple(found)


def as_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [
        asdict(outcome) | {"winner": outcome.winner and outcome.winner.model_dump(mode="json")} for outcome in outcomes
    ]


def describe_outcomes(outcomes: Sequence[Outcome], settings: Tune) -> str:
    """The best of each point, how far it moves along the last field of `per`, and which winners to doubt."""
    fields = list(settings.search)
    ranges = [path for path in fields if settings.search[path].low is not None]
    header = [
        *settings.per,
        "trials",
        "val loss",
        "± se",
        *(f"{path} (± 1 se)" if path in ranges else path for path in fields),
    ]
    rows = []
    for outcome in outcomes:
        row = [
            *map(str, outcome.at.values()),
            ", ".join(f"{number} {status}" for status, number in outcome.statuses.items() if number),
        ]
        if winner := outcome.winner:
            row += [f"{winner.val_loss:.4f}", "-" if winner.val_loss_se is None else f"{winner.val_loss_se:.4f}"]
            row += [_with_range(winner.values[path], outcome.near.get(path)) for path in fields]
        else:
            row += ["-"] * (2 + len(fields))
        rows.append(row)
    lines = [table(header, rows)] if settings.per else [table(["", *header], [["all trials", *row] for row in rows])]
    if any(outcome.winner and outcome.winner.val_loss_se for outcome in outcomes):
        lines.append(SEED_NOTE)
    lines += [
        f"no winner at {named(outcome.at) or 'all trials'}: no trial finished"
        for outcome in outcomes
        if not outcome.winner
    ]
    lines += [
        f"warning: the best loss at {named(outcome.at) or 'all trials'} is that of equally likely tokens: its trials "
        "learned nothing, so no value is better than another; search other values, or train longer"
        for outcome in outcomes
        if outcome.winner and not outcome.learned
    ]
    lines += [
        f"warning: the best loss at {named(outcome.at) or 'all trials'} is not clearly below that of token frequencies "
        f"alone ({outcome.frequencies:.3f} nats): its trials know nothing of the tokens' order, and another value may "
        "be best once they do; search other values, or train longer"
        for outcome in outcomes
        if outcome.winner and outcome.learned and outcome.frequencies is not None
    ]
    lines += [line for path in ranges for line in movements(outcomes, settings, path)]
    for winner in (outcome.winner for outcome in outcomes if outcome.winner):
        for path, why in winner.doubts().items():
            more = f"; tune with more trials, such as --set tune.trials={2 * settings.trials}"
            remedy = (
                f" ({_searched(settings, path)}); {_widened(settings, path, winner)}" if path in winner.edges else more
            )
            lines.append(f"warning: {path} {winner.values[path]} at {named(winner.at) or 'all trials'} {why}{remedy}")
    return "\n".join(lines)


def movements(outcomes: Sequence[Outcome], settings: Tune, path: str) -> list[str]:
    """How far the best value of a field moves along the last field of `per`, a line for each combination
    of the others.
    """
    if not settings.per:
        return []
    *others, axis = settings.per
    groups: dict[str, list[tuple[Winner, tuple[float, float]]]] = {}
    for outcome in outcomes:
        if outcome.winner:
            key = json.dumps([outcome.at[name] for name in others])
            groups.setdefault(key, []).append((outcome.winner, outcome.near[path]))
    lines = []
    for group in (group for group in groups.values() if len(group) > 1):
        low, high = (end((winner for winner, _ in group), key=lambda winner: winner.values[path]) for end in (min, max))
        least, most = low.values[path], high.values[path]
        where = f"along {axis}" + (f" at {named({name: low.at[name] for name in others})}" if others else "")
        factor = f", a factor of {most / least:.3g}" if least > 0 else ""
        line = (
            f"{where}: best {path} between {least} ({axis}={low.at[axis]}) and {most} ({axis}={high.at[axis]}){factor}"
        )
        if least == most:
            fewest = min((winner.tried.get(path, 0) for winner, _ in group), default=0)
            line = f"{where}: best {path} is {least} " + (
                "throughout" if fewest >= BRACKET else f"everywhere, of {fewest} values tried"
            )
        elif max(near[0] for _, near in group) <= min(near[1] for _, near in group):
            line += "; the values within one standard error overlap at all of them: no movement can be told"
        lines.append(line)
    return lines


def values_text(values: Mapping[str, Any]) -> str:
    """`lr 0.01, warmup 0.05`."""
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in values.items())


def _with_range(value: Any, near: tuple[float, float] | None) -> str:
    return f"{value}" if near is None or near[0] == near[1] else f"{value} ({near[0]} to {near[1]})"


def _widened(settings: Tune, path: str, winner: Winner) -> str:
    """What to type for a search that goes on beyond the end at which the winner lies."""
    search, value = settings.search[path], winner.values[path]
    if search.low is None or search.high is None:
        return f"add choices beyond {value} and tune again"
    upward = value > math.sqrt(search.low * search.high) if search.log else value > (search.low + search.high) / 2
    if upward:
        bounds = Train.model_fields[path.removeprefix("train.")].metadata
        most = min((getattr(bound, "le", math.inf) for bound in bounds), default=math.inf)
        end, now = "high", search.high
        wider = min(search.high * WIDER if search.log else 2 * search.high - search.low, most)
    else:
        end, now, wider = "low", search.low, search.low / (WIDER if search.log else 2)
    if wider == now:
        return f"{now:g} is as far as this field goes"
    return f"widen it and tune again: --set tune.search.{path}.{end}={wider:g}"


def _searched(settings: Tune, path: str) -> str:
    search = settings.search[path]
    return ", ".join(map(str, search.choices)) if search.choices else f"{search.low:g} to {search.high:g}"
