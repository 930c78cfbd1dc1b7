"""What a refused study says: the file's field, its value, what the field takes, and what to write in its place."""

from __future__ import annotations

import difflib
import re
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from sparsemem.config.nearest import named_elsewhere, nearest_name
from sparsemem.config.trial import TOKENS_PER_ACTIVE_PARAM, Train, Trial
from sparsemem.config.tune import Search
from sparsemem.mechanisms import EXPERTS, MEMORY_POOLS
from sparsemem.values import ConfigError, brief, parse_quantity, shortened

MOST_PROBLEMS = 10  # named in a refusal
QUOTES = dict.fromkeys("\u201c\u201d\u201e", '"') | dict.fromkeys("\u2018\u2019", "'") | {"\u3000": " "}

EXAMPLES: dict[str, str] = {
    "study": "my-study",
    "data": "{corpus: python-source, vocab_size: 4096, context: 128}",
    "files": "[corpus/*.txt]",
    "layers": "3",
    "width": "64",
    "heads": "4",
    "budget": "{total_params: 1.24M, active_params: 135k, tokens: 500k}",
    "total_params": "1.24M",
    "active_params": "135k",
    "tokens": "500k",
    "train": "{batch_tokens: 2048, lr: 2.5e-3}",
    "batch_tokens": "2048",
    "lr": "2.5e-3",
    "shares": f"{{{EXPERTS.name}: 0.6, {next(iter(MEMORY_POOLS))}: 0.4}}",
    "rho": "0.5",
    "seed": "0",
    "vary": "{rho: [1.0, 0.5, 0.0], seed: [0, 1]}",
    "search": "{train.lr: {low: 1e-3, high: 3e-2, log: true}}",
    "winners": "[{at: {rho: 0.5}, values: {train.lr: 5e-3}}]",
    "at": "{rho: 0.5}",
    "values": "{train.lr: 5e-3}",
}
"""What to write for a field, by its name. A mechanism has the examples of its own fields."""


class named_errors:
    """Turns pydantic's report into one ConfigError that names field, value and remedy.

    Args:
        prefix: what the problems' point is an instance of, such as `vary`; empty: of none, and no point is named.
        root: the model that is validated.
        given: the fields of the point, by dotted path.
        within: the dotted path of `root`, with its last dot.
    """

    def __init__(self, prefix: str, root: type[BaseModel], given: Mapping[str, Any], within: str = "") -> None:
        self.prefix, self.root, self.given, self.within = prefix, root, given, within

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if not isinstance(error, ValidationError):
            return
        lines, at_point = [], False
        for problem in error.errors()[:MOST_PROBLEMS]:
            parts = [str(part) for part in problem["loc"]]
            name = shortened(f"{self.within}{'.'.join(parts)}".rstrip("."))
            message = problem["msg"].removeprefix("Value error, ")
            of_group = problem["type"] == "value_error" and len(parts) <= 1 and isinstance(problem["input"], dict)
            at_point |= of_group or any(f"{name}.".startswith(f"{path}.") for path in self.given)
            if problem["type"] == "extra_forbidden":
                outside = parts[-2:-1] == ["model"] and isinstance(problem["input"], dict)
                lines.append(
                    f"unknown field `{name}`{_wide(name) or nearest_field(self.root, parts)}"
                    + " A mechanism from outside has to be installed here." * outside
                )
            elif problem["type"] == "missing":
                lines.append(f"field `{name}` is missing; add {parts[-1]}: {_example(self.root, parts)}")
            elif of_group:
                lines.append(f"field `{name}`: {message}" if name else message)
            else:
                value = brief(problem["input"])
                if name == "run.storage":  # it may hold a secret
                    value = re.sub(r"//[^/?]*@|\?.*", "...", value)
                remedy = _remedy(self.root, parts, problem) or message
                lines.append(f"field `{name}` has the value {value}: {remedy}{_wide(str(problem['input']))}")
        if error.error_count() > MOST_PROBLEMS:
            lines.append(f"and {error.error_count() - MOST_PROBLEMS} more")
        point = (
            ", ".join(f"{key}={brief(value)}" for key, value in self.given.items()) if self.prefix and at_point else ""
        )
        raise ConfigError("; ".join(lines) + (f" (at the point {point})" if point else "")) from None


def _wide(text: str) -> str:
    """What to type for a character of East Asian width or a typographic quote; '' where there is none."""
    for wide, plain in ((each, QUOTES.get(each) or unicodedata.normalize("NFKC", each)) for each in text):
        if wide in QUOTES or unicodedata.east_asian_width(wide) == "F":
            return f"; `{wide}` (U+{ord(wide):04X}) is not `{plain}`: type the latter"
    return ""


def nearest_field(root: type[BaseModel], parts: list[str]) -> str:
    """A remedy for an unknown field: our name of what others call so, the closest in the same group, or where a field
    of that name lies.
    """
    *above, leaf = parts
    group = _group(root, above)
    if group is None:
        return ""
    if above and f"{above[-1]}.{leaf}" in _paths(Trial):  # the name of a field that is the key of a mapping
        return f"; write `{above[-1]}.{leaf}` as one name, such as {above[-1]}.{leaf}: {_example(root, above)}"
    if found := re.fullmatch(r"(\w+)(?:\s+|:)(\S.*)", leaf):
        return f"; a colon and a space end a field's name: write `{found[1]}: {found[2]}`"
    names = _written(group)
    if ours := named_elsewhere(leaf, "".join(f"{name}." for name in above), [*_written(root), *_paths(root)]):
        return f"; {ours}"
    elsewhere = [path for path in _paths(root) if path.split(".")[-1] == leaf]
    if elsewhere and not difflib.get_close_matches(leaf, names, n=1, cutoff=0.75):
        return f"; did you mean {_any_of([f'`{path}`' for path in elsewhere[:3]])}?"
    return f"; {nearest_name(leaf, names)}"


def _written(group: type[BaseModel]) -> list[str]:
    """Names that a group may hold as people write it: a study holds its trials' fields beside its own, and `rho` is
    short for `shares`, tokens for each parameter for `tokens`.
    """
    names = list(group.model_fields)
    if "base" in names:
        names = [name for name in names if name != "base"] + list(Trial.model_fields)
    others = {"shares": "rho", "tokens": TOKENS_PER_ACTIVE_PARAM}
    return [*names, *(other for name, other in others.items() if name in names)]


def _remedy(root: type[BaseModel], parts: list[str], problem: Any) -> str | None:
    """What to write in place of a refused value; None: pydantic's or the validator's own words say it."""
    value, kind, bounds = problem["input"], problem["type"], problem.get("ctx", {})
    leaf = next((part for part in reversed(parts) if not part.isdigit()), "")
    if kind in ("tuple_type", "list_type"):
        example = _example(root, parts)
        several = leaf == "vary" or len(_default(root, parts) or ()) > 1  # one value would be too few
        own = f"[{_yaml(value)}]" if _is_plain(value) and not several else example
        return f"write a list, such as {leaf}: {own}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        if _group(root, parts) is Search and isinstance(value, list) and value:
            field = Train.model_fields.get(leaf.removeprefix("train."))
            ends = (
                f"{leaf}: {{low: {_yaml(value[0])}, high: {_yaml(value[-1])}, log: true}}, or what to choose among as "
            )
            return (
                f"write {'a range as ' + ends if field and field.annotation is float else ''}{leaf}: {{choices: "
                f"{_yaml(value)}}}"
            )
        return f"write a group of fields, such as {leaf}: {_example(root, parts)}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", bounds["expected"])
        own = _yaml(value)
        if leaf == "corpus" and isinstance(value, str) and re.search(r"[./*]", value):
            return f"for text of your own write corpus: files, and files: [{own}]"
        return f"write {_any_of(names)}" + (
            f"; did you mean `{near[0]}`?" if (near := difflib.get_close_matches(own, names, n=1)) else ""
        )
    if kind == "string_pattern_mismatch" and leaf == "study":
        better = re.sub(r"[^a-z0-9._-]+", "-", str(value).lower()).strip("-._")[:64]
        return (
            "write at most 64 lower-case letters, digits, `.`, `_` and `-`, the first one a letter or a digit, "
            f"such as {leaf}: {better or EXAMPLES['study']}"
        )
    if kind == "string_type":
        return (
            f"write a text, between quotes if it looks like a number: {leaf}: '{_yaml(value)}'"
            if _is_plain(value)
            else "write a text"
        )
    if kind in ("int_type", "int_parsing", "int_from_float"):
        return (
            f"write a whole number without a unit or quotes, such as {leaf}: {_whole(value) or _example(root, parts)}"
        )
    if kind in ("bool_type", "bool_parsing"):
        return f"write true or false, such as {leaf}: true"
    if kind in ("too_long", "too_short"):
        return f"write {bounds.get('max_length', bounds.get('min_length'))} values, not {bounds['actual_length']}"
    limits = {
        "greater_than": ("gt", "more than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
    }
    limits["less_than_equal"] = ("le", "at most")
    if kind in limits:
        bound, words = limits[kind]
        percent = isinstance(value, int | float) and bounds[bound] == 1 < value <= 100
        return f"write {words} {bounds[bound]:,}" + (f", such as {value / 100:g}, or {value:g}%" if percent else "")
    return None


def _example(root: type[BaseModel], parts: list[str]) -> str:
    """What to write for a field: its own example, or as `EXAMPLES` has it, of a group its required fields, else its
    default.
    """
    *before, leaf = [part for part in parts if not part.isdigit()]
    group, holder = _group(root, parts), _group(root, before)
    if group is Search:
        return EXAMPLES["search"].removeprefix("{train.lr: ").removesuffix("}")
    own = holder.model_fields[leaf].examples if holder and leaf in holder.model_fields else None
    if known := own[0] if own else EXAMPLES.get(leaf):
        return str(known)
    if group:
        required = [name for name, field in group.model_fields.items() if field.is_required()] or list(
            group.model_fields
        )[:2]
        return "{" + ", ".join(f"{name}: {_example(root, [*parts, name])}" for name in required) + "}"
    default = _default(root, parts)
    return _yaml(default) if default not in (None, ()) else "1"


def _default(root: type[BaseModel], parts: list[str]) -> Any:
    """Of a field; None where it has none."""
    holder = _group(root, parts[:-1])
    field = holder.model_fields.get(parts[-1]) if holder else None
    return field.get_default(call_default_factory=True) if field and not field.is_required() else None


def _group(root: type[BaseModel], parts: list[str]) -> type[BaseModel] | None:
    """The model at a path of fields, keys of mappings and places in lists; None where none is."""
    group: type[BaseModel] | None = root
    item: type[BaseModel] | None = None  # of the mapping or list that the path has come to
    for part in parts:
        if item:
            group, item = item, None
            continue
        field = group.model_fields.get(part) if group else None
        candidates = [field.annotation, *typing.get_args(field.annotation)] if field else []
        group = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if field and typing.get_origin(field.annotation) in (dict, tuple):
            group, item = None, group
    return group


def _paths(group: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted paths of the fields of a group, those of groups inside it included; of a study also those of
    its trials.
    """
    for name in group.model_fields:
        if inner := _group(group, [name]):
            yield from _paths(inner, f"{above}{name}.")
        elif above:
            yield f"{above}{name}"
    if "base" in group.model_fields:
        yield from _paths(Trial)


def _any_of(names: list[str]) -> str:
    return " or ".join(", ".join(names).rsplit(", ", 1))


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _yaml(value: Any) -> str:
    """A value as a study would write it, roughly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return shortened(str(value))


def _whole(value: Any) -> str | None:
    """The whole number that was meant by `1M`, `'128'` or 32.0, if it can be told."""
    try:
        return str(parse_quantity(value.replace(",", "") if isinstance(value, str) else value))
    except (ValueError, OverflowError):
        return None
