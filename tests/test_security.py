"""What no line of the packages may do: run what data says, or unpickle it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for package in ("sparsemem", "analysis") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "pty"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "pd.read_pickle",
}


def offences(source: str) -> Iterator[str]:
    """Each way in which data could become code.

    >>> list(offences("import pickle"))
    ['line 1: pickle']
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = called in CALLS or called.endswith(".read_pickle")
        bad |= called == "torch.load" and keywords.get("weights_only") != "True"
        bad |= called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False"
        bad |= keywords.get("shell", "False") != "False"
        bad |= called.endswith((".to_pickle", "Environment")) and keywords.get("autoescape") != "True"
        if bad:
            yield f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_runs_or_unpickles_what_it_reads(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "pandas.read_pickle(path)",
        "jinja2.Environment(loader=loader)",
    ],
)
def test_what_is_looked_for_is_found(source: str) -> None:
    assert len(list(offences(source))) == 1
