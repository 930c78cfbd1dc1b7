"""The house stays readable: no long file, no long function, and a path through it that takes an afternoon."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("sparsemem", "analysis") for path in (ROOT / package).rglob("*.py"))
MOST_LINES, MOST_OF_A_FUNCTION, MOST_OF_THE_PATH = 400, 80, 4500


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long() -> None:
    assert len(FILES) > 200
    assert {str(path.relative_to(ROOT)): lines(path) for path in FILES if lines(path) > MOST_LINES} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.name}": size
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or 0) - node.lineno + 1) > MOST_OF_A_FUNCTION
    }
    assert long == {}


def test_the_path_that_the_readme_names_takes_an_afternoon() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"\*\*An afternoon's reading\*\*.*?\n\n", readme, re.DOTALL)
    path = [ROOT / name for name in re.findall(r"`((?:sparsemem|analysis)/[\w/]+\.py)`", paragraph)]
    assert len(path) > 10
    assert sum(map(lines, path)) <= MOST_OF_THE_PATH
