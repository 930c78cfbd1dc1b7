"""A study's file from a stranger: whatever it holds, it is a plan or a refusal. Nothing else happens, and it does not
take long.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemem.config import ConfigError, Trial, load_study
from sparsemem.config import study as study_module
from sparsemem.mechanisms.product_key.fields import ProductKey
from sparsemem.study.plan import plan

PATIENCE = 20.0  # seconds for one file: what hangs takes hours


def _thinned(study: dict[str, Any], most: int) -> dict[str, Any]:
    """The study with so many values an axis."""
    vary = study.get("vary", {})
    grids = [
        {axis: v[:most] if isinstance(v, list) else v for axis, v in grid.items()}
        for grid in (vary if isinstance(vary, list) else [vary])
    ]
    return study | {"vary": grids}


SWEEPS = sorted((Path(__file__).resolve().parents[1] / "sweeps").glob("*.yaml"))
BASES = [_thinned(yaml.safe_load(path.read_text(encoding="utf-8")), 2) for path in SWEEPS]
for base in BASES:
    base.setdefault(
        "tune", {"search": {"train.decay": {"low": 0.1, "high": 0.3}, "train.schedule": {"choices": ["wsd"]}}}
    )

NAMES = sorted(
    {name for group in (Trial, study_module.Study, ProductKey) for name in group.model_fields}
    | {
        name
        for group in (Trial, study_module.Study)
        for f in group.model_fields.values()
        for name in getattr(f.annotation, "model_fields", ())
    }
    | {
        "rho",
        "base",
        "provenance",
        "<<",
        "",
        ".",
        "a.b",
        "__class__",
        "model.",
        ".model",
        "train.lr",
        "model.engram.rows",
        "budget.tokens",
    }
)
LAUGHS = (
    "["
    + ", ".join([f"&a0 [{', '.join('x' * 9)}]", *(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])
    + "]"
)
MERGES = (
    "{a0: &m0 {k: 1}, "
    + ", ".join(f"a{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))
    + "}"
)
HOSTILE = [
    *(
        "!!python/object/apply:os.system ['touch PWNED']",
        "!!python/object/new:os.system [touch PWNED]",
        "!!python/name:os.system",
    ),
    *(
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!ruby/object:Gem {}",
        "!!int x",
        "!!int ''",
        "!!bool x",
        "!!float x",
        "!!null x",
    ),
    *(
        "!!timestamp x",
        "2024-99-99",
        "2024-01-01",
        "2001-12-14t21:59:43.10-05:00",
        "!!binary xx",
        "!!binary aGk=",
        "!!set {a, b}",
    ),
    *(
        "!!omap [a: 1]",
        "!!pairs [a: 1]",
        "!!str 1",
        "!!map [a]",
        "!!seq {a: 1}",
        "0x" + "f" * 5000,
        "1" * 5000,
        "1" * 400,
        "-1",
        "0",
        "1",
    ),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "1e400",
        "1e-400",
        "'1e400'",
        "'inf'",
        "'nan'",
        "190:20:30",
        "0o777",
        "0b1",
        "~",
        "''",
        "true",
        "'true'",
    ),
    *(
        '"\\0"',
        '"\\ud800"',
        '"a\\nb"',
        "'" + "x" * 10_000 + "'",
        "\u202edesrever",
        "\u0660",
        "é",
        "\U0001f4a9",
        "'1_000'",
        "1k",
    ),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "~/x",
        "/dev/zero",
        "/dev/stdin",
        "..",
        ".",
        "/",
        "$(touch PWNED)",
        "'`touch PWNED`'",
        "'{{7*7}}'",
    ),
    *(
        "1T",
        "999T",
        "1e15",
        "1000000000000",
        str(2**31 - 1),
        str(2**31),
        str(2**63),
        "3",
        "7",
        "8",
        "64",
        "256",
        "4096",
        "100000",
    ),
    *(
        "0.5",
        "1.0",
        "100%",
        "-5%",
        "1e9%",
        "dense",
        "all",
        "replace",
        "parallel",
        "ultramem_v2",
        "[]",
        "{}",
        "[[]]",
        "[{}]",
        "{1: 2}",
    ),
    *(
        "{null: 1}",
        "{? [a] : 1}",
        "{? {a: 1} : 1}",
        "{true: 1}",
        "[1, 2, 3]",
        "[2, 1]",
        "{moe: 0.5, engram: 0.5}",
        "{moe: 1}",
        "&x [*x]",
    ),
    *(
        "&y {a: *y}",
        LAUGHS,
        MERGES,
        "*nowhere",
        "{low: 1, high: 2}",
        "[" * 2000 + "]" * 2000,
        "[" * 40 + "]" * 40,
        "{a: " * 60 + "1" + "}" * 60,
    ),
    *(f"[{', '.join(map(str, range(n)))}]" for n in (30, 3000)),
]
FRAGMENTS = [
    "study: a",
    "vary:",
    "- ",
    ": ",
    "? ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!!int ",
    "!!map ",
    "!",
    "<<: ",
    "\n",
    "\n  ",
    ", ",
    "# ",
]
FRAGMENTS += [
    "'",
    '"',
    "|",
    ">",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
    "%TAG ! tag:x,2000:\n",
    "\t",
    "\x00",
    "\ufeff",
    "\x85",
    "\u2028",
    *NAMES,
    *HOSTILE,
]


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested groups and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*place, key)
        yield from _places(inner, (*place, key))


@st.composite
def _scaled(draw: st.DrawFn, value: Any) -> Any:
    """Another number, which its field may well take."""
    if isinstance(value, str) and re.fullmatch(r"[0-9.e-]+[kMB]?", value):
        return draw(st.sampled_from(["1", "2", "7k", "100k", "1.5M", "300M", "2B", "1T", "900T"]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return draw(
        st.sampled_from(
            [value + 1, value * 2, value * 3, value // 2, value * 8, value * 100, value * 10**4, value * 10**7, 0, 1]
        )
    )


@st.composite
def _spoiled(draw: st.DrawFn) -> str:
    """A good study with a few values replaced, dropped, moved or written twice."""
    raw = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(1, 3))):
        *parents, leaf = draw(st.sampled_from(list(_places(raw)) or [("study",)]))
        group: Any = raw
        for name in parents:
            group = group[name]
        kind = draw(st.sampled_from(["scale", "scale", "scale", "scale", "replace", "drop", "add", "copy", "list"]))
        hostile = f"@{draw(st.integers(0, len(HOSTILE) - 1))}@"
        if kind == "scale":
            group[leaf] = draw(_scaled(group[leaf]))
        elif kind == "drop":
            del group[leaf]
        elif kind == "add" and isinstance(group, dict):
            group[draw(st.sampled_from(NAMES))] = hostile
        elif kind == "copy" and isinstance(group, dict):
            group[draw(st.sampled_from(NAMES))] = copy.deepcopy(group.get(leaf))
        elif kind == "list" and isinstance(group, dict):
            group[leaf] = [group.get(leaf), hostile]
        elif isinstance(group, dict) or leaf < len(group):
            group[leaf] = hostile
    text = yaml.safe_dump(raw, sort_keys=False, width=10**6)
    text = re.sub(r"'@(\d+)@'", lambda found: HOSTILE[int(found[1])], text)
    if draw(st.integers(0, 9)):
        return text
    lines = text.splitlines(keepends=True)
    return "".join([*lines, draw(st.sampled_from(lines or ["\n"]))])


_SCALARS = (
    st.sampled_from([f"@{number}@" for number in range(len(HOSTILE))])
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3) | st.integers(), inner, max_size=5)
    ),
    max_leaves=20,
).map(lambda tree: re.sub(r"'@(\d+)@'", lambda found: HOSTILE[int(found[1])], yaml.safe_dump(tree, allow_unicode=True)))
_SOUP = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=30).map("".join)
_KINDS = {
    "spoiled": _spoiled().map(str.encode),
    "trees": _TREES.map(lambda text: text.encode("utf-8", "surrogatepass")),
    "soup": _SOUP.map(str.encode),
    "bytes": st.binary(),
}
CONTENTS = st.sampled_from(["spoiled"] * 8 + ["trees", "trees", "soup", "bytes"]).flatmap(_KINDS.__getitem__)


# --- what must not happen ---------------------------------------------------------------------------------------------

_seen: list[str] | None = None
FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
)
FORBIDDEN += ("shutil.", "socket.", "exec", "compile", "import", "pickle.", "ctypes.", "urllib.")


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(FORBIDDEN):
        _seen.append(f"{event} {arguments[:1]!r:.200}")


@contextmanager
def _nothing_happens() -> Iterator[None]:
    """No file is written, no process or module is started, and it ends."""
    global _seen

    def too_long(number: int, frame: Any) -> None:
        raise AssertionError(f"still not done after {PATIENCE:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    _seen = happened = []
    try:
        yield
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert happened == []


@pytest.fixture(scope="session")
def _watched() -> None:
    sys.addaudithook(_watch)  # for as long as the process lives; it does nothing elsewhere


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize("files", [150, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_any_file_is_a_plan_or_a_refusal(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "MOST_POINTS", 64)
    path = tmp_path / "study.yaml"
    for base in BASES:  # what is imported late is imported now
        path.write_text(yaml.safe_dump(_thinned(base, 1)), encoding="utf-8")
        plan(load_study(path))

    @settings(max_examples=files, deadline=None, suppress_health_check=list(HealthCheck))
    @given(CONTENTS)
    def read(content: bytes) -> None:
        path.write_bytes(content)
        with _nothing_happens():
            try:
                answer = "" if plan(load_study(path)) else "no trial and no refusal"
            except ConfigError as refusal:
                answer = str(refusal)[10_000:]  # nobody reads more
        assert answer == ""

    read()
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.yaml"]
