"""What no line of the packages may do (run what data says, or unpickle it), and where a study's file may lead."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemem.api import run_study
from sparsemem.config import ConfigError, load_study
from sparsemem.data import prepare
from sparsemem.study import launch

SMALL: dict[str, Any] = {
    "study": "small",
    "data": {"corpus": "files", "files": ["*.txt"], "vocab_size": 300, "context": 16, "validation_tokens": 2048},
    "model": {"layers": 2, "width": 16, "heads": 2, "moe": {"expert_width": 8, "top_k": 2}},
    "budget": {"total_params": "30k", "active_params": "7k", "tokens": 4096, "tolerance": "5%"},
    "train": {"batch_tokens": 256, "lr": 0.01},
    "vary": {"rho": [1.0]},
}
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


def test_no_code_runs_or_unpickles_what_it_reads() -> None:
    assert len(FILES) > 100
    assert {path: found for path in FILES if (found := list(offences(path.read_text(encoding="utf-8"))))} == {}


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


# --- paths in a study's file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["..", "../up", "a/b", "/etc", "~", ".hidden", "a\\b", "a\0b", "", "a b", "a\n", "\u202ea"]
)
def test_a_study_is_named_like_a_folder_of_its_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"study": name}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"field `study`"):
        load_study(path)


def test_a_study_writes_into_its_results_and_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read what it names, wherever that lies."""
    inside, outside = tmp_path / "sweeps", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        for number in range(8):
            (folder / f"{number}.txt").write_text(
                " ".join(str(n * (number + 3)) for n in range(3000)), encoding="utf-8"
            )
    (outside / "winners.yaml").write_text(
        yaml.safe_dump({"study": "x", "winners": [{"at": {}, "values": {"train.lr": 0.02}}]})
    )
    (inside / "link").symlink_to(outside)
    files = ["*.txt", "../outside/1.txt", str(outside / "2.txt"), "link/3.txt"]
    (inside / "s.yaml").write_text(
        yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"files": files}, "tuned": "../outside/winners.yaml"})
    )
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(inside)
    monkeypatch.setattr(launch, "find_engine", lambda *asked: lambda jobs, run: None)
    before = {path: path.lstat().st_mtime_ns for folder in (inside, outside) for path in (folder, *folder.rglob("*"))}
    folder = run_study(load_study(inside / "s.yaml"), inside, tmp_path / "runs", say=lambda line: None).folder
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert {path for root in (inside, outside) for path in (root, *root.rglob("*"))} == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "outside", "runs", "sweeps"]
    assert list((tmp_path / "runs").iterdir()) == [folder]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless file")
def test_an_endless_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"tuned": "/dev/zero"}))
    with pytest.raises(ConfigError, match="field `tuned`: /dev/zero: no such file"):
        load_study(path)
    with pytest.raises(ConfigError, match="more than 1,000,000 characters"):
        load_study("/dev/zero")
    path.write_text(yaml.safe_dump(SMALL | {"data": SMALL["data"] | {"tokenizer": "/dev/zero"}}))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"`data\.tokenizer` has the value '/dev/zero'"):
        prepare(load_study(path).trials()[0].data, tmp_path, tmp_path / "cache")
