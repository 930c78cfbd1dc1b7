"""A mechanism from outside of the package plans with its budget held, trains, resumes, is reported; and what is not one
is refused.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from machine import TINY, drivers, table, write_corpus

import sparsemem
from sparsemem.config import ConfigError, Model, Study, Trial, load_study
from sparsemem.data import prepare
from sparsemem.mechanisms import MEMORY_POOLS, POOLS, VARIABLE
from sparsemem.model import Transformer, check_account
from sparsemem.study.plan import plan
from sparsemem.study.plan.access import describe_access, memory_access
from sparsemem.train import loop, run_trial

HERE = Path(__file__).parent
SHARES = [{"moe": 1.0}, {"moe": 0.5, "unigram": 0.5}, {"unigram": 1.0}]
STUDY: dict[str, Any] = TINY | {
    "model": {name: group for name, group in TINY["model"].items() if name != "engram"}
    | {"unigram": {"layers": [1, 2]}},
    "budget": TINY["budget"] | {"tokens": 4096},
    "vary": {"shares": SHARES},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEMEM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv(VARIABLE, "")
    sparsemem.register("unigram:UNIGRAM")
    yield
    del MEMORY_POOLS["unigram"], POOLS["unigram"], Model.model_fields["unigram"]
    Model.model_rebuild(force=True)
    Trial.model_rebuild(force=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the study with the given fields replaced, beside its corpus, and returns the YAML's path."""
    write_corpus(tmp_path / "corpus")

    def written(**fields: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(STUDY | fields, sort_keys=False), encoding="utf-8")
        return path

    return written


def test_it_is_one_file_of_at_most_120_lines() -> None:
    assert len((HERE / "unigram.py").read_text(encoding="utf-8").splitlines()) <= 120


def test_its_plan_holds_the_budget_and_its_account_is_that_of_real_tensors(
    registered: None, write: Callable[..., Path]
) -> None:
    study: Study = load_study(write())
    for planned, shares in zip(plan(study), SHARES, strict=True):  # plans hold accounts against meta tensors
        row, account = planned.row(), planned.account
        assert abs(row["budget_error_total"]) < 0.05
        assert abs(row["budget_error_active"]) < 0.05
        assert account.share("unigram") == pytest.approx(shares.get("unigram", 0.0), abs=0.02)
        model = Transformer(planned.trial.model, planned.sizes, 16, torch.arange(300), separator=0).initialize(0)
        check_account(planned.trial.model, planned.sizes, model)
        held = sum(weight.numel() for name, weight in model.named_parameters() if name not in ("embedding", "head"))
        assert held == account.total_params
        assert row["memory_rows_read"] == 2 * ("unigram" in shares)
    wrong = planned.sizes.__class__(0, planned.sizes.shared_width + 8, planned.sizes.tables)
    with pytest.raises(RuntimeError, match="account"):
        check_account(planned.trial.model, wrong, model)
    assert "unigram" in describe_access(memory_access(plan(study)))


def test_it_resumes_bit_for_bit(
    registered: None, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = load_study(write()).trials()[1]
    tokens = prepare(trial.data, tmp_path)
    whole = run_trial(trial, tokens, tmp_path / "whole", threads=1)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(loop, "CHECKPOINT_TIMES", 0)
    real, left = loop.train_step, [6]

    def killed(*arguments: Any) -> tuple[float, float]:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial, tokens, tmp_path / "parts", threads=1)
    monkeypatch.setattr(loop, "train_step", real)
    parts = run_trial(trial, tokens, tmp_path / "parts", threads=1)
    assert parts["val_loss"] == whole["val_loss"]
    assert (tmp_path / "parts" / "usage.csv").read_text() == (tmp_path / "whole" / "usage.csv").read_text()


def test_installed_it_trains_in_workers_and_is_reported(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the entry point of its `pyproject.toml`, as pip would write it down; no line of the study or the command
    speaks of it.
    """
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((group, points),) = project["entry-points"].items()
    installed = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (installed / "entry_points.txt").write_text(
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
    )
    monkeypatch.setenv("PYTHONPATH", f"{installed.parent}:{HERE}")
    with drivers() as start:
        code, _, err = start(write(), "local", tmp_path / "runs").end()
    assert code == 0, err
    folder = tmp_path / "runs" / "tiny"
    rows = table(folder)
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert [float(row["share_unigram"]) for row in rows] == pytest.approx([0, 0.5, 1], abs=0.02)
    assert "Unigram memory" in (folder / "report.html").read_text(encoding="utf-8")
    assert list(folder.glob("figures/*.svg"))
    with open(folder / "trials" / rows[1]["trial_id"] / "usage.csv", newline="", encoding="utf-8") as file:
        assert {row["pool"] for row in csv.DictReader(file)} == {"unigram"}


def test_one_that_cannot_be_loaded_is_told_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('broken')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "broken:IT,absent:IT")
    done = subprocess.run([sys.executable, "-m", "sparsemem", "--help"], capture_output=True, text=True, check=True)
    told = done.stderr.splitlines()
    assert (
        told[0]
        == "warning: the mechanism `broken:IT` cannot be loaded: RuntimeError('broken'); mend it, or uninstall what "
        "brings it"
    )
    assert len(told) == 2


def test_what_is_registered_reaches_the_processes_that_start_later(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    code = "from sparsemem.config import POOLS, Trial; print(POOLS['unigram'].label)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "Unigram memory\n"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"`unigram\.layers` \[3\] must be a rising list of blocks from 1 to 2"),
        ({"layers": [1], "width": 8}, r"unknown field `model\.unigram\.width`"),
        ({}, r"field `model\.unigram\.layers` is missing; add layers: \[1\]"),
    ],
)
def test_its_fields_are_refused_by_name(
    registered: None, write: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(model=STUDY["model"] | {"unigram": change})).trials()


def test_without_it_the_study_is_refused(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"unknown field `model\.unigram`.* A mechanism from outside has to be"):
        load_study(write()).trials()


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "raise RuntimeError('broken')",
            ImportError,
            r"`other:OTHER` cannot be loaded: RuntimeError\('broken'\); mend it",
        ),
        ("OTHER = 1", ImportError, "is a int; name an instance of a subclass"),
        (
            "import unigram\nclass Other(unigram.UnigramMechanism):\n    name = 'width'\nOTHER = Other()",
            ValueError,
            "'width', which `model` cannot",
        ),
        (
            "import unigram\nclass Other(unigram.UnigramMechanism):\n    name = 'pkm'\nOTHER = Other()",
            ValueError,
            "'pkm', which `model` cannot",
        ),
    ],
)
def test_what_is_no_mechanism_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception], message: str
) -> None:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    (tmp_path / "other.py").write_text(text, encoding="utf-8")
    with pytest.raises(kind, match=message):
        sparsemem.register("other:OTHER")
    assert "unigram" not in POOLS
