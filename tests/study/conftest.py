"""A study small enough to train in a second, an engine that does not train at all, and places to store what several
machines share.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import pytest
import yaml
from machine import Driver, drivers, write_corpus

from sparsemem.config import Run, load_study
from sparsemem.data import prepare
from sparsemem.study import launch
from sparsemem.study.jobs import Job

TINY: dict[str, Any] = machine.TINY | {
    "budget": machine.TINY["budget"] | {"tokens": 4096},
    "vary": {"rho": [1.0, 0.5, 0.0]},
}


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEMEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny study with the given fields replaced, beside its corpus, and returns the YAML's path."""
    write_corpus(tmp_path / "corpus")

    def write(file: str = "tiny.yaml", **fields: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(TINY | fields, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_job(write_study: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    """A trial of the tiny study with the given fields replaced, ready for a worker."""

    def make(name: str = "trial", **fields: Any) -> Job:
        study = load_study(write_study(**fields))
        trial, folder = study.trials()[0], tmp_path / name
        folder.mkdir()
        (folder / "trial.yaml").write_text(yaml.safe_dump(trial.model_dump(mode="json")), encoding="utf-8")
        return Job(folder, prepare(trial.data, tmp_path))

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    with drivers() as begin:
        yield begin


class FakeEngine:
    """Writes results in place of training; `outcomes` says otherwise for a trial by its place among the jobs."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.finish = finish
        self.outcomes: dict[int, Callable[[Path], None]] = {}

    def __call__(self, jobs: Sequence[Job], run: Run) -> None:
        for place, job in enumerate(jobs):
            self.ran.append(job.trial_folder.name)
            self.outcomes.get(place, finish)(job.trial_folder)


def finish(folder: Path, **fields: Any) -> None:
    """Leave a whole result that depends on the trial alone."""
    loss = 3 + int(folder.name, 16) % 1000 / 1000
    result = {
        "trial_id": folder.name,
        "status": "finished",
        "val_loss": loss,
        "val_loss_se": 0.01,
        "val_bpb": loss / 2,
        "train_loss": loss,
    }
    measured = {"tokens": 4096, "tokens_per_second": 1e4, "peak_memory_bytes": 10**8, "seconds": 0.4}
    (folder / "val_losses.csv").write_text(f"sequence,nats_per_token\n0,{loss}\n", encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result | measured | fields), encoding="utf-8")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Stands in for both engines; the report is left out too."""
    fake = FakeEngine()
    monkeypatch.setattr(launch, "find_engine", lambda name, address: fake)
    monkeypatch.setattr("sparsemem.api._report", lambda folder, say: None)
    return fake


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of the S3 protocol on loopback, in a process of its own, and the options of an address there; it has a
    bucket `bucket`.
    """
    pytest.importorskip("moto", reason="needs a server of the S3 protocol: pip install 'moto[server]'")
    serve = (
        "import time; from moto.server import ThreadedMotoServer; server = ThreadedMotoServer('127.0.0.1', 0, "
        "verbose=False)\n"
    )
    serve += "server.start(); print(server.get_host_and_port()[1], flush=True); time.sleep(1e6)"
    command = [sys.executable, "-c", serve]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert server.stdout is not None
        try:
            options = f"scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{server.stdout.readline().strip()}"
            from pyarrow.fs import FileSystem

            system, _ = FileSystem.from_uri(f"s3://bucket?{options}&allow_bucket_creation=true")
            system.create_dir("bucket")
            yield server, options
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for `run.storage`."""
    if request.param == "folder":
        (tmp_path / "shared").mkdir()
        return str(tmp_path / "shared")
    _, options = request.getfixturevalue("s3_server")
    return f"s3://bucket/{tmp_path.name}?{options}"
