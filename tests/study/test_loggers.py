"""Experiment trackers: what their own libraries read back. A tracker whose library is not installed is skipped."""

from __future__ import annotations

import importlib.util
import json
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsemem.api import run_study
from sparsemem.cli import main
from sparsemem.config import ConfigError, load_study
from sparsemem.study.ledger import Ledger

from .conftest import finish

HEADER = "step,tokens,train_loss,val_loss,lr,grad_norm,expert_load_max,tokens_per_second,seconds\n"
ROWS = [
    "4,1024,5.5,,0.01,1.5,,10000,0.1\n",
    "8,2048,5.25,5.375,0.005,1.25,,10000,0.2\n",
    "16,4096,5.125,5.25,0.001,1,,10000,0.4\n",
]
VAL_LOSS = [(8, 5.375), (16, 5.25)]
TRAIN_LOSS = [(4, 5.5), (8, 5.25), (16, 5.125)]
READERS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}  # the libraries that read what was told


def trackers(*slow: str) -> pytest.MarkDecorator:
    """Each tracker whose library is installed; a test of these takes long."""
    missing = {name: not importlib.util.find_spec(library) for name, library in READERS.items()}
    marks = {name: [pytest.mark.skipif(missing[name], reason=f"{name} is not installed")] for name in READERS}
    marks |= {name: [*marks[name], pytest.mark.slow] for name in slow}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=own) for name, own in marks.items()])


every_tracker = trackers()

TELL_AND_DIE = """
import os, signal, sys
from pathlib import Path
from sparsemem.config import load_study
from sparsemem.study.ledger import Ledger
from sparsemem.study.loggers import _Follower
from sparsemem.study.plan import plan

planned = plan(load_study(sys.argv[1]))
ledger = Ledger(Path(sys.argv[2]), [p.row() for p in planned])
_Follower(sys.argv[3], ledger, {p.trial.id: p.trial for p in planned}).look(last=False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _train(folder: Path) -> None:
    (folder / "curve.csv").write_text(HEADER + "".join(ROWS), encoding="utf-8")
    finish(folder)


def _run(file: Path, said: list[str] | None = None) -> Ledger:
    return run_study(load_study(file), file.parent, file.parent / "runs", say=(said if said is not None else []).append)


# --- reading back -----------------------------------------------------------------------------------------------------


Read = tuple[dict[str, list[tuple[int, float]]], dict[str, str], str, str, set[str]]
"""Name -> (step, value) in the order that they were told, config, status, the run's name, its tags."""


def _read(name: str, logs: Path, trial: str) -> Read:
    return {"tensorboard": _read_tensorboard, "mlflow": _read_mlflow, "wandb": _read_wandb}[name](logs / name, trial)


def _read_tensorboard(folder: Path, trial: str) -> Read:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (run,) = folder.glob(f"*{trial}")
    events = EventAccumulator(str(run))
    events.Reload()
    metrics = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    start = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    config = {
        path: str(value.string_value or value.number_value) for path, value in start.session_start_info.hparams.items()
    }
    (status,) = events.Tensors("status/text_summary")
    return metrics, config, status.tensor_proto.string_val[0].decode(), run.name.removesuffix(f" {trial}"), set()


def _read_mlflow(folder: Path, trial: str) -> Read:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name == "tiny")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.trial_id = '{trial}'")
    metrics = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert run.info.status == "FINISHED"
    tags = {f"{name} {value}" for name, value in run.data.tags.items() if name in ("rho", "seed")}
    return metrics, run.data.params, run.data.tags["status"], run.info.run_name, tags


def _read_wandb(folder: Path, trial: str) -> Read:
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob(f"offline-run-*-{trial}/run-{trial}.wandb")
    metrics: dict[str, list[tuple[int, float]]] = {}
    config: dict[str, str] = {}
    status, run, tags = "", "", set[str]()
    for content in _leveldb_records(file.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("run"):
            run, tags = record.run.display_name or run, tags | set(record.run.tags)
            config |= {
                item.key or item.nested_key[0]: str(json.loads(item.value_json)) for item in record.run.config.update
            }
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() - {"_step", "_timestamp", "_runtime", "_wandb"}:
                metrics.setdefault(name, []).append((row["_step"], row[name]))
        if record.HasField("summary"):
            for item in record.summary.update:
                key, value = item.key or item.nested_key[0], json.loads(item.value_json)
                status = value if key == "status" else status
                if key.startswith("result/"):
                    metrics[key] = [(16, value)]
    return metrics, config, status, run, tags


def _leveldb_records(content: bytes) -> list[bytes]:
    """W&B's own file: blocks of 32 KiB with records that may span them, after a header of 7 bytes."""
    records, place, held = [], 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # a block's tail holds no header
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        held += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(held)
            held = b""
    return records


# --- what is told -----------------------------------------------------------------------------------------------------


@trackers("mlflow", "wandb")
def test_each_trial_is_told_once_also_after_a_killed_driver(
    write_study: Callable[..., Path], engine: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine.outcomes = {place: (lambda folder: None) for place in range(3)}
    file = write_study()
    _run(file)  # lays the folders out
    folder = tmp_path / "runs" / "tiny"
    begun = folder / "trials" / engine.ran[1]
    (begun / "curve.csv").write_text(HEADER + "".join(ROWS[:2]), encoding="utf-8")
    dead = subprocess.run([sys.executable, "-c", TELL_AND_DIE, file, folder, name], capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr

    engine.outcomes = dict.fromkeys(range(3), _train)
    said: list[str] = []
    told = write_study(run={"loggers": [name]})
    _run(told, said)
    assert not [line for line in said if "logger" in line]
    ledger = _run(told, said)  # once more: nothing is told twice
    rows = {row["trial_id"]: row for row in ledger.rows}
    for id_ in engine.ran[:3]:
        metrics, config, status, run, tags = _read(name, folder / "logs", id_)
        row = rows[id_]
        assert run == f"rho {row['rho']}, seed {row['seed']}"
        assert tags == ({f"rho {row['rho']}", f"seed {row['seed']}"} if name != "tensorboard" else set())
        assert metrics["train_loss"] == TRAIN_LOSS
        assert metrics["val_loss"] == VAL_LOSS
        assert metrics["tokens"] == [(4, 1024), (8, 2048), (16, 4096)]
        assert {"lr", "grad_norm", "tokens_per_second"} <= metrics.keys()
        assert "expert_load_max" not in metrics  # never measured
        ((step, loss),) = metrics["result/val_loss"]
        assert (step, loss) == (16, pytest.approx(3 + int(id_, 16) % 1000 / 1000))
        assert status == "finished"
        assert float(config["train.lr"]) == 0.01
        assert float(config["model.moe.expert_width"]) == 8
        assert config["data.files"] == '["corpus/*.txt"]'
    assert Counter((folder / "logs" / name / "done.txt").read_text().split()) == dict.fromkeys(engine.ran[:3], 1)
    assert not list((tmp_path / "elsewhere").iterdir())


@every_tracker
def test_a_tracker_that_fails_costs_one_line_and_no_trial(
    write_study: Callable[..., Path], engine: Any, name: str, tmp_path: Path
) -> None:
    def spoil(folder: Path) -> None:
        (folder.parents[1] / "logs").write_text("where a folder should be", encoding="utf-8")
        _train(folder)

    engine.outcomes = {0: spoil, 1: _train, 2: _train}
    said: list[str] = []
    ledger = _run(write_study(run={"loggers": [name]}), said)
    assert ledger.counts() == {"finished": 3}
    (line,) = (line for line in said if "logger" in line)
    assert line.startswith(f"logger {name} is off (")


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_an_mlflow_server_that_is_not_there_costs_one_line_and_no_trial(
    write_study: Callable[..., Path], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    engine.outcomes = dict.fromkeys(range(3), _train)
    said: list[str] = []
    assert _run(write_study(run={"loggers": ["mlflow"]}), said).counts() == {"finished": 3}
    assert len([line for line in said if line.startswith("logger mlflow is off (")]) == 1


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_without_its_library_is_refused_before_anything_is_written(
    write_study: Callable[..., Path], engine: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None)
    with pytest.raises(ConfigError, match=rf"`run.loggers` names {name}.*pip install 'sparsemem\[{name}\]'"):
        _run(write_study(run={"loggers": [name]}))
    assert not (tmp_path / "runs").exists()


def test_loggers_are_no_part_of_a_trial(write_study: Callable[..., Path]) -> None:
    plain, told = write_study("plain.yaml"), write_study("told.yaml", run={"loggers": ["tensorboard"]})
    assert [trial.id for trial in load_study(plain).trials()] == [trial.id for trial in load_study(told).trials()]
    with pytest.raises(ConfigError, match=r"field `run.loggers.0` has the value 'tensorbord'"):
        load_study(write_study(run={"loggers": ["tensorbord"]}))


@pytest.mark.slow
def test_no_secret_of_the_environment_is_in_what_a_run_leaves(
    write_study: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret, home = "hunter2-never-to-be-seen", tmp_path / "home"
    home.mkdir()
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": secret,
        "HF_TOKEN": secret,
        "WANDB_API_KEY": 40 * "5",
        "HOME": str(home),
    }.items():
        monkeypatch.setenv(name, value)
    installed = [name for name, library in READERS.items() if importlib.util.find_spec(library)]
    file = write_study(vary={"rho": [1.0, 0.5]}, run={"loggers": installed, "max_failures": 0})
    assert main(["run", str(file), "--engine", "local", "--results", str(tmp_path / "runs")]) == 0
    said = capfd.readouterr()
    assert "logger" not in said.err
    left = {
        path: path.read_bytes()
        for folder in ("runs", "home")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    }
    assert {path.name for path in left} >= {
        "study.yaml",
        "result.json",
        "report.html",
        *(["mlflow.db"] if "mlflow" in installed else []),
    }
    for text in [*left.values(), said.out.encode(), said.err.encode()]:
        assert secret.encode() not in text
        assert 40 * b"5" not in text
    for path, text in left.items():
        assert sys.executable.encode() not in text, path
