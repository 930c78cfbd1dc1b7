"""YAML as people mean it. PyYAML reads YAML 1.1, where `010` is 8, `3:20:00` is 12,000 and a date is no text; here
nothing is read so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparsemem.config.nearest import nearest_path
from sparsemem.values import ConfigError, brief

MOST_TEXT = 10**6  # characters of a YAML file
MOST_VALUES = 10**5  # in it, with what its aliases stand for written out
DEEPEST = 50  # groups inside groups
MOST_NAMED = 4  # files beside one that is not there
SWEEPS = Path("sweeps")
APART = re.compile(r"provenance|x-.*", re.DOTALL)
"""Fields at the top that are no part of a study: what `run` adds to the copy beside the results, and a place for
anchors (`&name`).
"""

_KIND = "tag:yaml.org,2002:"
_NAMES = {f"{_KIND}{kind}" for kind in ("int", "float", "bool", "null")}
_AS_TEXT = {f"{_KIND}timestamp", f"{_KIND}value"}
_WHOLE = re.compile(r"[-+]?(0|[1-9]\d*(_\d+)*|0x[0-9a-fA-F]+|0b[01]+)")

_YAML_REMEDIES = {
    r"'\t'": "indent by spaces, not by tabs",
    "mapping values are not allowed": "one `name: value` a line, fields of a group indented alike, a text that holds "
    "`: ` between quotes",
    "end of stream": "a quote, `[` or `{` is not closed",
    "stream end": "a quote, `[` or `{` is not closed",
    "expected ',' or": "a comma is missing between two values, a colon after a name, or a `]` or `}` at the end",
    "could not find expected ':'": "a field is written `name: value`, with a space after the colon",
    "undefined alias": "name it before by `&`, or put a text that begins with `*` between quotes",
    "cannot start any token": "put a text that begins with this character between quotes",
}
"""Words in the reader's report -> what to do."""


class _Loader(yaml.SafeLoader):
    """Builds plain values only. A date, and a lone `=`, are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _AS_TEXT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_mapping(path: Path) -> dict[Any, Any]:
    """The fields that a YAML file holds, but for those that are `APART`.

    Raises:
        ConfigError: it cannot be read, or holds no mapping, a field twice, a number that people read otherwise, or more
            than a study has use for.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_TEXT + 1)
        if len(text) > MOST_TEXT:
            raise ConfigError(f"{path}: has more than {MOST_TEXT:,} characters; a study's file is a page or two")
        raw = read_value(text)
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the study's YAML file{_studies_in(path)}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_studies_like(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    if not isinstance(raw, dict):
        held = {"NoneType": "nothing", "list": "a list", "str": f"the text {brief(raw)}"}.get(
            type(raw).__name__, brief(raw)
        )
        raise ConfigError(
            f"{path}: a study is a mapping of fields that starts with `study: NAME`; this file holds {held}"
        )
    return raw


def _studies_like(path: Path) -> str:
    """A remedy for a file that is not there: the nearest name, in its folder or among the sweeps; or what there is."""
    found = [
        near
        for folder in (path.parent, SWEEPS)
        if (near := nearest_path(folder / path.name)).endswith((".yaml", ".yml"))
    ]
    return f"; did you mean {found[0]}?" if found else _studies_in(path.parent) or _studies_in(SWEEPS)


def _studies_in(folder: Path) -> str:
    listed = sorted(map(str, folder.glob("*.yaml"))) if folder.is_dir() else []
    more = " and others" if len(listed) > MOST_NAMED else ""
    return f"; there are {', '.join(listed[:MOST_NAMED])}{more}" if listed else ""


def read_value(text: str) -> Any:
    """What a YAML text stands for.

    Raises:
        ConfigError: as `read_mapping`, without the name of a file.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            node.value = [(key, value) for key, value in node.value if not _is_apart(key)]
        if _written_out(node, "", {}) > MOST_VALUES:
            raise ConfigError(
                f"holds more than {MOST_VALUES:,} values with its aliases (`*name`) written out; use fewer"
            )
        return loader.construct_document(node) if node else None
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
    ) as error:  # `!!int x` and the like
        if isinstance(error, ConfigError):
            raise
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = str(getattr(error, "problem", None) or error)
        of_colon = re.search("mapping values are not allowed|expected ':'|<block end>", problem)
        if where and of_colon and (lacking := _without_colon(text.splitlines()[: where.line + 1])):
            raise ConfigError(lacking) from None
        remedy = next((f"; {words}" for part, words in _YAML_REMEDIES.items() if part in problem), "")
        raise ConfigError(f"not valid YAML{place}: {problem}{remedy}") from None


def _without_colon(lines: list[str]) -> str:
    """Of the line at which reading stopped, the last, or of the one before: that its field lacks a colon, and what to
    write; else empty.

    A line that is indented more than the one before continues the text there, unless that one ends in a colon.
    """
    written = [
        (number, line.rstrip()) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"
    ]
    for (_, before), (number, line) in zip([(0, ":"), *written][-2:-4:-1], written[:-3:-1], strict=False):
        continues = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip()) and before[-1] != ":"
        if not continues and (found := re.fullmatch(r"\s*(?:- )?(\w+)(?:(?:\s*=\s*|\s+|:)([^\s:].*))?", line)):
            meant = f"{found[1]}: {found[2]}" if found[2] else f"{found[1]}:"
            return (
                f"line {number}: `{brief(line.strip())[1:-1]}` lacks a colon and a space after the field's name; write "
                f"`{meant}`"
            )
    return ""


def _is_apart(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and bool(APART.fullmatch(key.value))


def _written_out(node: yaml.Node | None, place: str, counted: dict[yaml.Node, int | None], depth: int = 0) -> int:
    """Values under a node with its aliases written out: a few lines may stand for billions. Names become text, also
    `on` and `1`.

    Args:
        place: the fields that lead here, for messages.
        counted: nodes that have been counted; None for those that are being counted.

    Raises:
        ConfigError: a field stands twice (YAML's own reader keeps the last and says nothing), a group holds itself,
            groups are too deep, or a number is written as YAML 1.1 alone reads it.
    """
    if node in counted:
        if (known := counted[node]) is None:
            raise ConfigError(f"field `{place.rstrip('.')}` holds itself, by an alias (`*name`); write it out")
        return known
    if depth > DEEPEST:
        raise ConfigError(f"field `{brief(place.rstrip('.'))}` lies more than {DEEPEST} groups deep")
    total = 1
    if isinstance(node, yaml.MappingNode):
        counted[node] = None
        seen = set()
        for number, (key, value) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"the name of a field in `{place.rstrip('.')}` is a group (line {key.start_mark.line + 1}); names "
                    "are text"
                )
            if key.value in seen:
                raise ConfigError(
                    f"field `{place}{key.value}` stands twice (line {key.start_mark.line + 1}); keep one of them"
                )
            seen.add(key.value)
            if key.tag in _NAMES:
                node.value[number] = (yaml.ScalarNode(f"{_KIND}str", key.value, key.start_mark, key.end_mark), value)
            total += 1 + _written_out(value, f"{place}{key.value}.", counted, depth + 1)
        counted[node] = total
    elif isinstance(node, yaml.SequenceNode):
        counted[node] = None
        total += sum(_written_out(item, place, counted, depth + 1) for item in node.value)
        counted[node] = total
    elif isinstance(node, yaml.ScalarNode):
        _refuse_other_bases(node, place.rstrip("."))
    return total


def _refuse_other_bases(node: yaml.ScalarNode, field: str) -> None:
    if node.tag == f"{_KIND}int" and not _WHOLE.fullmatch(node.value):
        how = (
            "to base 60"
            if ":" in node.value
            else "to base 8"
            if re.match(r"[-+]?0", node.value)
            else "though its `_` do not part digits"
        )
    elif node.tag == f"{_KIND}float" and ":" in node.value:
        how = "to base 60"
    else:
        return
    subject = f"field `{field}` has" if field else "has"
    raise ConfigError(
        f"{subject} the value {brief(node.value)} (line {node.start_mark.line + 1}), which YAML 1.1 reads {how}; "
        "write a plain number such as 10 or 12_000, and a text between quotes"
    )
