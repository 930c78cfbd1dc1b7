"""`python-source` is the same text whatever else is installed beside what `sparsemem` requires."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from sparsemem.config import ConfigError, Data
from sparsemem.data import python_source
from sparsemem.data.python_source import open_python_source, required_distributions

SOURCE = "".join(f"def function_{number}(value):\n    return value + {number}\n" for number in range(12))


def install(
    folder: Path, name: str, requires: Iterable[str] = (), pure: bool = True, record: bool = True, text: str = SOURCE
) -> None:
    """A distribution as pip leaves it."""
    module = name.replace("-", "_")
    info = folder / f"{module}-1.0.dist-info"
    (folder / module).mkdir(parents=True, exist_ok=True)
    info.mkdir(exist_ok=True)
    (folder / module / "__init__.py").write_text(text)
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0+cpu",
        *(f"Requires-Dist: {line}" for line in requires),
    ]
    (info / "METADATA").write_text("\n".join(metadata) + "\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(pure).lower()}\nTag: py3-none-any\n")
    digest = python_source._recorded(text.encode()) if record else ""
    rows = [f"{module}/__init__.py,{digest},{len(text) if record else ''}", f"{info.name}/RECORD,,"]
    rows += [
        "../../bin/tool.py,sha256=abc,9999",
        f"{module}/tests/test_it.py,sha256=abc,9999",
        f"{module}/__pycache__/a.pyc,,",
    ]
    (info / "RECORD").write_text("\n".join(rows) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that holds a `sparsemem` with two requirements, and theirs."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(python_source, "_standard_library", dict)
    requires = ["one>=1,<2", "Two_Packages[fast,slow]~=1.0", 'tensorboard; extra == "tensorboard"', "setuptools>=77"]
    install(tmp_path, "sparsemem", requires)
    install(
        tmp_path, "one", ["three (>=1)", 'greenlet ; platform_machine == "x86_64"', 'four; python_version < "3.13"']
    )
    install(
        tmp_path,
        "two-packages",
        ['five ; extra == "fast"', "six; extra == 'other'", "seven; python_version < '4' and extra == 'fast'"],
    )
    for name in ("three", "four", "five", "six", "seven", "greenlet", "setuptools"):
        install(tmp_path, name)
    return tmp_path


def test_what_every_installation_requires_is_taken_and_nothing_else(site: Path) -> None:
    assert set(required_distributions("sparsemem")) == {"one", "two-packages", "three", "five"}
    corpus = open_python_source(Data(), site)
    assert {document.name for document in corpus.documents()} == {
        f"{name}/__init__.py" for name in ("one", "two_packages", "three", "five")
    }
    assert set(corpus.versions.values()) == {"1.0"}  # without the name of a build


def test_the_corpus_stays_what_it_is_when_others_are_installed(site: Path) -> None:
    before = open_python_source(Data(), site).identity
    install(site, "tensorboard", ["grpcio"])
    install(site, "pip")
    install(site, "three", pure=True, record=False)  # another installer wrote no digests
    assert open_python_source(Data(), site).identity == before
    install(site, "three", text=SOURCE + "\n# another text under one version\n")
    assert open_python_source(Data(), site).identity != before


def test_a_build_for_one_platform_is_no_part_of_it(site: Path) -> None:
    install(site, "one", ["three"], pure=False)
    names = open_python_source(Data(), site).versions
    assert set(names) == {"two-packages", "three", "five"}


def test_without_an_installation_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(
        ConfigError, match=r"`data.corpus` has the value 'python-source'.*not installed here; install it"
    ):
        open_python_source(Data(), tmp_path)


def test_of_this_environment_it_holds_no_extra_and_no_developers_tool() -> None:
    corpus = open_python_source(Data(), Path())
    only_extra = {
        "pytest",
        "hypothesis",
        "mypy",
        "flask",
        "moto",
        "mlflow-skinny",
        "transformers",
        "datasets",
        "tensorboard",
    }
    assert not only_extra & set(corpus.versions)
    assert {"jinja2", "optuna", "rich"} <= set(corpus.versions)
    parts = {part for document in corpus.documents() for part in document.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "__pycache__", "site-packages"}
    modules = {name.removeprefix("stdlib/") for name in corpus.versions if name.startswith("stdlib/")}
    assert {"json", "argparse"} <= modules
    assert not modules & {"tkinter", "idlelib", "ensurepip", "sitecustomize"}
    assert not [name for name in modules if name.startswith("_sysconfigdata")]
