"""A mechanism is one place: no code outside of `sparsemem/mechanisms` names a pool.

The rule. In the syntax tree of every file of `sparsemem` and `analysis`, a pool's name may not stand as a word of a
text, as a name, an attribute, an argument or a part of an import. Docstrings and comments may speak of anything.
`share_moe` and `moe_bytes_...` are columns of result files and do not count as the word; nor do labels such as
`Engram`, nor `experts`: what routed experts and memory share is what the project is about, and `mechanisms.EXPERTS` is
how code speaks of the former. Exempt is one measurement, `sparsemem bench moe`, whose subject is how tokens are sent to
experts: its file, and its name where measurements are listed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsemem.mechanisms import POOLS

ROOT = Path(__file__).parents[2]
EXEMPT = {("sparsemem/bench/moe.py", None), ("sparsemem/bench/__init__.py", "moe"), ("sparsemem/cli/parser.py", "moe")}
FILES = sorted(
    path
    for folder in ("sparsemem", "analysis")
    for path in (ROOT / folder).rglob("*.py")
    if "mechanisms" not in path.parts
)


def named(code: str) -> Iterator[tuple[int, str]]:
    """Line and name of each pool that code names."""
    tree, word = ast.parse(code), re.compile(rf"(?<![\w-])({'|'.join(POOLS)})(?![\w-])")
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            texts = [node.value] if isinstance(node.value, str) and id(node) not in prose else []
        elif isinstance(node, ast.ImportFrom):
            texts = [node.module or ""]
        else:
            texts = [
                value for _, value in ast.iter_fields(node) if isinstance(value, str)
            ]  # of names, attributes, arguments, aliases
        yield from ((getattr(node, "lineno", 0), found) for text in texts for found in word.findall(text))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_outside_of_it_names_a_pool(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    if (file, None) not in EXEMPT:
        found = [(line, pool) for line, pool in named(path.read_text(encoding="utf-8")) if (file, pool) not in EXEMPT]
        assert not found, f"{file} names {found}; ask the mechanism through `sparsemem.mechanisms`"


@pytest.mark.parametrize(
    "code",
    [
        *(
            "model.moe.top_k",
            "x = {'engram': 1}",
            "from sparsemem.mechanisms.moe import layer",
            "import a.pkm as b",
            "def f(peer): 0",
        ),
        *("f(ultramem=1)", "x = f'model.moe.{name}'", "engram = 1"),
    ],
)
def test_the_search_finds_each_way_to_name_one(code: str) -> None:
    assert list(named(code))


def test_the_search_lets_prose_columns_and_labels_be() -> None:
    assert not list(
        named('"""The moe pool."""\nx = ["share_moe", "moe-joint", "moe_bytes_1", "Engram", experts]  # moe')
    )
