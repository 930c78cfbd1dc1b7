"""What the user writes: one base trial, the axes to vary, and how to run; read from YAML, or refused by file, field,
value and remedy.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sparsemem.config.nearest import nearest_path
from sparsemem.config.optimum import FIRST_SHARES, Optimum
from sparsemem.config.reading import read_mapping
from sparsemem.config.refusal import named_errors
from sparsemem.config.run import Run
from sparsemem.config.trial import REPLACED_BY, TOKENS_PER_ACTIVE_PARAM, Trial
from sparsemem.config.tune import Search, Tune, Tuned
from sparsemem.values import ConfigError, Strict, brief, shortened

MOST_POINTS = 10**5  # of a study


class Study(Strict):
    """What the user writes. `vary` spans a grid; a list of mappings is the union of several grids. `budget` may be a
    list, a ladder.
    """

    study: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    question: str = ""
    analysis: Literal[
        "allocation", "compute-ratio", "ladder", "density", "slots", "simplex", "sparsity", "memories", "scaling"
    ] = "allocation"
    """Which fits and figures `report` makes of the results."""
    base: dict[str, Any]
    """The trial's fields as written, shared by all trials before `vary` is applied."""
    vary: tuple[dict[str, tuple[Any, ...] | Optimum], ...] = ({},)
    run: Run = Run()
    tune: Tune | None = None
    """What `sparsemem tune` searches; `run` does not read it."""
    tuned: Tuned | None = None
    """Training fields that replace those of `base`, by point; in YAML the path of the file that `sparsemem
    tune` wrote.
    """

    @model_validator(mode="after")
    def _has_points(self) -> Study:
        if not self.vary:
            raise ValueError(
                "field `vary` is an empty list; leave it out, or name a grid such as {rho: [1.0, 0.5], seed: [0, 1]}"
            )
        for path in (path for grid in self.vary for path, values in grid.items() if not values):
            raise ValueError(
                f"field `vary.{path}` is an empty list, which leaves no trial; give it at least one value or leave it "
                "out"
            )
        for grid in self.vary:
            for path, values in grid.items():
                if path in REPLACED_BY and REPLACED_BY[path] in grid:
                    raise ValueError(
                        f"field `vary.{path}` stands beside `vary.{REPLACED_BY[path]}`, which sets the same; leave out "
                        "one of them"
                    )
                twice = (
                    [value for place, value in enumerate(values) if value in values[:place]]
                    if isinstance(values, tuple)
                    else []
                )
                if twice:
                    raise ValueError(f"field `vary.{path}` has {brief(twice[0])} twice; write each value once")
        points = sum(math.prod(len(values) for values in grid.values()) for grid in self._grids())
        if points > MOST_POINTS:
            raise ValueError(
                f"field `vary` spans {points:.3g} points, more than {MOST_POINTS:,}; shorten its lists, or split the "
                "study"
            )
        return self

    @model_validator(mode="after")
    def _searches_stay_apart(self) -> Study:
        for grid in (grid for grid in self.vary if isinstance(grid.get("rho"), Optimum)):
            for path, why in (
                ("seed", "`seeds` inside the search says how many; leave `seed` out"),
                ("shares", "both set the shares; leave one of them out"),
                ("train.lr", "every rate would choose shares of its own; find the rate first, by `sparsemem tune`"),
            ):
                if path in grid:
                    raise ValueError(f"field `vary.{path}` stands beside a search of `vary.rho`: {why}")
            if self.tuned and any("rho" in winner.at for winner in self.tuned.winners):
                raise ValueError(
                    "field `tuned` has a winner for each `rho`, and a search trains shares that have none; tune "
                    "without `per: [rho]`"
                )
        return self

    @model_validator(mode="after")
    def _tuning_stays_apart(self) -> Study:
        axes = self.axes
        for name, fields in (
            ("tune.search", self.tune and self.tune.search),
            ("tuned", self.tuned and self.tuned.fields),
        ):
            for path in fields or ():
                if path in axes:
                    raise ValueError(f"field `{name}` sets `{path}`, which `vary` sets too; leave one of them out")
        for path in self.tune.per if self.tune else ():
            if _resolved(path) not in axes:
                meant = (
                    "shares"
                    if path == "rho" and "shares" in axes
                    else next(iter(difflib.get_close_matches(path, axes, n=1)), "")
                )
                raise ValueError(
                    f"field `tune.per` names `{path}`, which `vary` does not set; it sets "
                    f"{', '.join(axes) or 'nothing'}" + f"; write per: [{meant}]" * bool(meant)
                )
        return self

    @model_validator(mode="before")
    @classmethod
    def _split(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError("a study is a mapping; it starts with `study: NAME`")
        if "base" in raw:
            raise ValueError("unknown field `base`")
        raw = dict(raw)
        raw["base"] = {key: raw.pop(key) for key in (*Trial.model_fields, "rho") if key in raw}
        if isinstance(raw.get("vary"), dict):
            raw["vary"] = [raw["vary"]]
        for grid in raw["vary"] if isinstance(raw.get("vary"), list) else []:
            for path, values in grid.items() if isinstance(grid, dict) else []:
                if isinstance(values, dict) and "search" in values:
                    if path != "rho":
                        raise ValueError(
                            f"field `vary.{path}` is a search, and only `vary.rho` can be searched; write a list of "
                            "values"
                        )
                    with named_errors("", Optimum, given={}, within="vary.rho."):
                        Optimum.model_validate(values)
                elif not isinstance(values, list | tuple | Optimum):
                    raise ValueError(
                        f"field `vary.{path}` has the value {brief(values)}: write a list of values, such as "
                        f"[{brief(values)}]"
                    )
        if isinstance(raw["base"].get("budget"), list):  # a ladder of budgets is an axis like any other
            ladder, grids = raw["base"].pop("budget"), raw.get("vary", [{}])
            raw["vary"] = [{"budget": ladder, **grid} if isinstance(grid, dict) else grid for grid in grids]
        return raw

    def trials(self) -> list[Trial]:
        """Every distinct trial of the study in the order of its axes.

        Raises:
            ConfigError: naming the field and the value that no trial can have.
        """
        return list({trial.id: trial for _, trial in self.points()}.values())

    @property
    def axes(self) -> list[str]:
        """Dotted paths of all fields that `vary` sets, also inside a varied group; tokens for each parameter are a
        number of tokens.
        """
        leaves = (leaf for grid in self._grids() for path, values in grid.items() for leaf in _leaves(path, values))
        return list(dict.fromkeys(map(_resolved, leaves)))

    @property
    def searches(self) -> list[tuple[Optimum, Study]]:
        """Each search of the shares, one for each combination of what is varied beside it, with the study of its first
        batch.
        """
        found = []
        for grid in (grid for grid in self.vary if isinstance(grid.get("rho"), Optimum)):
            search = grid["rho"]
            assert isinstance(search, Optimum)
            others = {path: values for path, values in grid.items() if path != "rho"}
            for values in itertools.product(*others.values()):
                own = {path: (value,) for path, value in zip(others, values, strict=True)}
                found.append(
                    (search, self.model_copy(update={"vary": ({**own, **_shares_and_seeds(search, FIRST_SHARES)},)}))
                )
        return found

    @property
    def most_trials(self) -> int:
        """Trials that the study may come to."""
        listed = self.model_copy(
            update={"vary": tuple(grid for grid in self.vary if not isinstance(grid.get("rho"), Optimum))}
        )
        return len(listed.trials()) + sum(search.most for search, _ in self.searches)

    def with_shares(self, shares: Sequence[Sequence[float]]) -> Study:
        """The study with the shares of each of its `searches` written out."""
        listed = [grid for grid in self.vary if not isinstance(grid.get("rho"), Optimum)]
        chosen = [{**first.vary[0], "rho": tuple(own)} for (_, first), own in zip(self.searches, shares, strict=True)]
        return self.model_copy(update={"vary": (*listed, *chosen)})

    def _grids(self) -> Iterator[dict[str, tuple[Any, ...]]]:
        """The grids with the first shares of a search in its place."""
        for grid in self.vary:
            plain: dict[str, tuple[Any, ...]] = {}
            for path, values in grid.items():
                plain |= _shares_and_seeds(values, FIRST_SHARES) if isinstance(values, Optimum) else {path: values}
            yield plain

    def points(self) -> Iterator[tuple[dict[str, Any], Trial]]:
        """Each grid point as (varied fields, trial), with the winners of `tuned` filled in; of a search its first
        shares.
        """
        for grid in self._grids():
            for values in itertools.product(*grid.values()):
                varied = dict(zip(grid, values, strict=True))
                raw = dict(self.base)
                for path, value in varied.items():
                    _assign(raw, path, value)
                with named_errors("vary" if varied else "", Trial, given=varied):
                    trial = Trial.model_validate(raw)
                if self.tuned:
                    try:
                        trial = changed(trial, self.tuned.winner(trial).values)
                    except ValueError as error:
                        raise ConfigError(f"field `tuned`: {error}") from None
                yield varied, trial


def changed(trial: Trial, values: Mapping[str, Any]) -> Trial:
    """The trial with other values at these dotted paths.

    Raises:
        ConfigError: no trial can have them.
    """
    raw = trial.model_dump(mode="json")
    for path, value in values.items():
        _assign(raw, path, value)
    with named_errors("values", Trial, given=values):
        return Trial.model_validate(raw)


def _shares_and_seeds(search: Optimum, shares: Sequence[float]) -> dict[str, tuple[Any, ...]]:
    return {"rho": tuple(shares), "seed": tuple(range(search.seeds))}


def _resolved(path: str) -> str:
    return "budget.tokens" if path == f"budget.{TOKENS_PER_ACTIVE_PARAM}" else path


def _leaves(path: str, values: Sequence[Any]) -> Iterator[str]:
    """A varied field, or the fields of a varied group: `budget: [{tokens: 1M}, ...]` varies `budget.tokens`."""
    for value in values:
        if isinstance(value, dict) and path != "shares":
            for name, inner in value.items():
                yield from _leaves(f"{path}.{name}", [inner])
        else:
            yield path


def _assign(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested mappings; groups on the way are replaced by copies, so that others that hold them
    stay as they are.

    Two ways to write one field replace each other (`REPLACED_BY`), so that one base serves both.
    """
    *parents, leaf = _names(path)
    other = REPLACED_BY.get(path, "").rpartition(".")[2]
    for depth, name in enumerate(parents):
        inner = raw.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"field `{'.'.join(parents[: depth + 1])}` in `vary.{path}`: it is {brief(inner)}, not a group of "
                "fields"
            )
        raw[name] = dict(inner)
        raw = raw[name]
    raw.pop(other, None)
    raw[leaf] = value


def _names(path: str) -> list[str]:
    """What leads to a value in nested mappings; in `tune.search` the dotted path of a field is one name.

    >>> _names("train.lr"), _names("tune.search.train.lr"), _names("tune.search.train.lr.low")
    (['train', 'lr'], ['tune', 'search', 'train.lr'], ['tune', 'search', 'train.lr', 'low'])
    """
    searched = re.fullmatch(rf"(tune)\.(search)\.(.+?)(?:\.({'|'.join(Search.model_fields)}))?", path)
    return [name for name in searched.groups() if name] if searched else path.split(".")


# --- reading ----------------------------------------------------------------------------------------------------------


def load_study(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study from YAML.

    Args:
        path: the YAML file.
        overrides: dotted path -> value, applied after reading (`--set path=value`).

    Raises:
        ConfigError: naming file, field, value and remedy. Every trial of the study has been validated when this
            returns.
    """
    path = Path(path)
    raw = read_mapping(path)
    try:
        for dotted, value in (overrides or {}).items():
            if _is_varied(raw.get("vary"), dotted):
                raise ConfigError(
                    f"`--set {dotted}` would change nothing: `vary` sets it; write `--set 'vary.{dotted}=[{value}]'`"
                )
            if dotted.startswith("vary."):  # the name of an axis is itself a dotted path
                grids, axis = raw.get("vary", {}), dotted.removeprefix("vary.")
                kept = [
                    {path: values for path, values in grid.items() if path != REPLACED_BY.get(axis)}
                    for grid in (grids if isinstance(grids, list) else [grids])
                ]
                raw["vary"] = [{**grid, axis: value} for grid in kept]
            else:
                for group in itertools.accumulate(dotted.split(".")[:-1], "{}.{}".format):
                    if isinstance(raw.get(group), list) or _is_varied(raw.get("vary"), group):
                        raise ConfigError(
                            f"`--set {dotted}` would change nothing: the file lists several of `{group}`, each whole; "
                            "change them there"
                        )
                _assign(raw, dotted, value)
        if isinstance(raw.get("tuned"), str):
            raw["tuned"] = load_tuned(raw["tuned"], path.parent)
        with named_errors("", Study, given=raw):
            study = Study.model_validate(raw)
        for _ in study.points():
            pass
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path}: holds a value that no field takes: {error}") from None
    return study


def load_tuned(name: str, base: Path) -> Tuned:
    """What `sparsemem tune` wrote.

    Args:
        name: the path of its file.
        base: the folder that a relative one starts from.

    Raises:
        ConfigError: there is no such file, or it is not one.
    """
    path = base / name
    if not os.path.isfile(path):  # `Path.is_file` fails at a name that is too long for a file's
        usual = (folder / "tune" / "winners.yaml" for folder in (Path(name), Path(name).parent))
        near = next(filter(None, (nearest_path(place, base) for place in (Path(name), *usual))), "")
        remedy = f"did you mean {near}?" if near else "`sparsemem tune` writes it, as RESULTS/STUDY/tune/winners.yaml"
        raise ConfigError(f"field `tuned`: {shortened(str(path))}: no such file; {remedy}")
    raw = read_mapping(path)
    try:
        with named_errors("", Tuned, given=raw):
            return Tuned.model_validate(raw)
    except ConfigError as error:
        raise ConfigError(f"field `tuned`: {path}: {error}") from None


def _is_varied(vary: Any, path: str) -> bool:
    """Whether every grid sets this field, in either of its two ways, so that its value in the base is never used."""
    grids, ways = vary if isinstance(vary, list) else [vary], {path, REPLACED_BY.get(path, path)}
    return bool(grids) and all(isinstance(grid, dict) and not ways.isdisjoint(grid) for grid in grids)
