"""What `sparsemem tune` searches and what it found. Neither is part of a trial's identity, but the fields that winners
set are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from sparsemem.config.nearest import named_elsewhere, nearest_name
from sparsemem.config.trial import Train, Trial
from sparsemem.values import Count, Real, Size, Strict, listed, parse_share

Bound = Annotated[float, BeforeValidator(parse_share)]

NOT_TUNED = ("betas", "precision", "evaluations")  # a pair; what the device decides; what the pruner reads

MOST_CORNERS = 10_000
FAR = 2.0
"""Factor between the best value and the next one tried from which on a better one may lie between them."""


class Search(Strict):
    """The values that a field may take: a range of real numbers, or a list."""

    low: Bound | None = None
    high: Bound | None = None
    log: StrictBool = False
    """Whether the range is searched by ratios."""
    choices: tuple[bool | int | float | str, ...] = ()
    """Written as in a study: `1k`, `2%`."""

    @model_validator(mode="after")
    def _one_form(self) -> Search:
        if self.choices and (self.low, self.high, self.log) == (None, None, False):
            return self
        if self.choices or self.low is None or self.high is None:
            raise ValueError("give `low` and `high`, with `log: true` for a search by ratios, or a list of `choices`")
        if self.low >= self.high:
            raise ValueError(f"`low` {self.low:g} is not below `high` {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"`low` {self.low:g} with `log: true`: ratios need a `low` above 0")
        return self


class Tune(Strict):
    """A search of training fields at each point of a study."""

    search: dict[str, Search]
    """Dotted path of a training field -> its values."""
    per: tuple[str, ...] = ()
    """Fields of `vary`; each distinct combination of their values is a point with a search of its own. Empty: one
    search.
    """
    trials: Annotated[Size, Field(le=10_000)] = 12
    """At each point."""
    pruner: Literal["asha", "hyperband", "none"] = "asha"
    """What stops trials early. The first judgement falls after a quarter of the evaluations."""
    seed: Count = 0
    """Of the sampler; the trials themselves have the study's first seed."""

    @model_validator(mode="after")
    def _fields_exist(self) -> Tune:
        if not self.search:
            raise ValueError("`search` is empty; name a field, such as train.lr: {low: 1e-3, high: 3e-2, log: true}")
        corners = math.prod(len(search.choices) or 2 for search in self.search.values())
        if corners > MOST_CORNERS:
            raise ValueError(
                f"`search` has {corners:,} combinations of ends and choices, each of which is checked before; at most "
                f"{MOST_CORNERS:,}"
            )
        for path, search in self.search.items():
            check_field(path)
            kind = Train.model_fields[path.removeprefix("train.")].annotation
            if kind is not float and not search.choices:
                raise ValueError(f"`search.{path}` is not a range of real numbers; list its `choices`")
        return self


class Winner(Strict):
    """What was best at one point."""

    at: dict[str, Any]
    """Dotted path -> value of the fields that name the point; `rho: dense` is the dense baseline."""
    values: dict[str, Any]
    """Dotted path of a training field -> its best value."""
    val_loss: Real | None = None
    val_loss_se: Real | None = None
    trial_id: str | None = None
    """Its folder under `tune/trials/`."""
    edges: tuple[str, ...] = ()
    """Fields whose best value lies at the edge of what was searched."""
    tried: dict[str, int] = Field(default_factory=dict)
    """Field of a range -> how many values were tried. Empty in files of before it was kept."""
    unbracketed: tuple[str, ...] = ()
    """Those whose best value is the least or the largest that was tried: no worse one bounds it on that side."""
    next_tried: dict[str, tuple[Real | None, Real | None]] = Field(default_factory=dict)
    """Field of a range -> the values tried next below and above the best one; None where there is none."""
    seed: int | None = None
    """The seed that all values were tried with."""
    searched: dict[str, Any] = Field(default_factory=dict)
    """`settings` of its trial. Empty in files of before it was kept."""

    @model_validator(mode="after")
    def _fields_exist(self) -> Winner:
        for path in self.values:
            check_field(path)
        return self

    def doubts(self) -> dict[str, str]:
        """Fields whose best value may lie beyond what was tried -> why."""
        found = dict.fromkeys(self.edges, "lies at the edge of what was searched")
        for path in self.unbracketed:
            tried = self.tried.get(path, 0)
            outermost = f"is the outermost of {tried} values tried, so a better one may lie beyond"
            found.setdefault(path, "is the only value tried" if tried == 1 else outermost)
        for path, nearest in self.next_tried.items():
            far = [value for value in nearest if value and not 1 / FAR <= value / self.values[path] <= FAR]
            if far:
                found.setdefault(
                    path, f"has no value tried within a factor of {FAR:g} of it on one side (next: {far[0]:g})"
                )
        return found


class Tuned(Strict):
    """The winners of a study's points, which a study takes by `tuned: PATH`."""

    study: str
    """The one they were searched for."""
    winners: tuple[Winner, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """Dotted paths that any winner sets."""
        return tuple(dict.fromkeys(path for winner in self.winners for path in winner.values))

    def elsewhere(self, trials: Sequence[Trial]) -> str:
        """Where trials have other settings than those at which their values were searched, such as another budget or
        text; "" where none has.
        """
        found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        others = 0
        for trial in trials:
            winner = self.winner(trial)
            there, here = winner.searched, settings(trial, (*winner.at, *winner.values)) if winner.searched else {}
            differing = [
                path for path in there | here if there.get(path) != here.get(path) and _in_both(path, there, here)
            ]
            others += bool(differing)
            for path in differing:
                for side, values in zip((there, here), found.setdefault(path, ({}, {})), strict=True):
                    values[_listed(side[path]) if path in side else "default"] = None
        if not found:
            return ""
        each = "; ".join(
            f"`{path}` {listed(there, most=1)} there, {listed(here, most=1)} here"
            for path, (there, here) in found.items()
        )
        return (
            f"Warning: {others} of {len(trials)} trials take values that `sparsemem tune` found at other settings: "
            f"{each}. What is best there need not be best here: tune these points too."
        )

    def winner(self, trial: Trial) -> Winner:
        """
        Raises:
            ValueError: no winner is at this trial's point.
        """
        for winner in self.winners:
            if point(trial, winner.at) == winner.at:
                return winner
        paths = dict.fromkeys(path for winner in self.winners for path in winner.at)
        held = "; ".join(named(winner.at) for winner in self.winners) or "none at all"
        raise ValueError(
            f"no winner for {named(point(trial, paths)) or 'any trial'}; the file holds {held}; tune that point too"
        )


def settings(trial: Trial, without: Sequence[str]) -> dict[str, Any]:
    """Dotted path -> value of a trial's fields that differ from their default, but the seed and those named."""
    left_out = {"seed", *without, *(("shares",) if "rho" in without else ())}
    fields = trial.model_dump(mode="json", exclude_defaults=True)
    return {path: value for path, value in _leaves(fields) if path not in left_out}


def _leaves(fields: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        path = f"{place}{name}"
        if isinstance(value, dict) and path != "shares":
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _in_both(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a field can be compared: that of a pool only where both have the pool."""
    pool = path.rpartition(".")[0]
    return pool.count(".") < 1 or all(any(name.startswith(f"{pool}.") for name in side) for side in (there, here))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def point(trial: Trial, paths: Mapping[str, Any] | tuple[str, ...]) -> dict[str, Any]:
    """The trial's values at these fields, as `Winner.at` has them."""
    values = trial.at(paths)
    return {path: "dense" if path == "rho" and value is None else value for path, value in values.items()}


def named(at: Mapping[str, Any]) -> str:
    """A point in words.

    >>> named({"budget.tokens": 500000, "rho": 0.5})
    'budget.tokens=500000, rho=0.5'
    """
    return ", ".join(f"{path}={value}" for path, value in at.items())


def check_field(path: str) -> None:
    """
    Raises:
        ValueError: it is not a field of `train` that a search may set.
    """
    names = [f"train.{name}" for name in Train.model_fields if name not in NOT_TUNED]
    if path not in names:
        leaf = path.rpartition(".")[2]
        meant = f"did you mean `train.{leaf}`?" if f"train.{leaf}" in names else named_elsewhere(leaf, "train.", names)
        raise ValueError(f"`{path}` is not a field that can be tuned; {meant or nearest_name(path, names)}")
