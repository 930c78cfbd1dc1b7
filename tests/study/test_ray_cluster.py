"""Studies on Ray clusters of several nodes, all on 127.0.0.1, and what they survive. Only processes that a test started
are ended.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import table

from sparsemem.cli import main

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
LONG = {"total_params": "30k", "active_params": "7k", "tokens": 150_000, "tolerance": "5%"}  # seconds a trial
SIX = {"rho": [1.0, 0.5, 0.0], "seed": [0, 1]}

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")


class Nodes:
    """A cluster with its own token. Its processes are known by the path of the token in their environment."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets live in it
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        self.mark = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.environment = (
            os.environ
            | self.mark
            | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        )
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.parents: dict[str, subprocess.Popen[bytes]] = {}

    def head(self, name: str = "first", dashboard: bool = False) -> None:
        place = ("--head", f"--port={self.port}", f"--temp-dir={self.folder}")
        self._start(name, *place, f"--include-dashboard={dashboard}", f"--dashboard-port={self.dashboard}")
        wait_for(lambda: answers(self.port))
        if dashboard:
            wait_for(lambda: answers(self.dashboard))

    def join(self, name: str) -> None:
        self._start(name, f"--address={self.address}")

    def _start(self, name: str, *options: str) -> None:
        command = [
            sys.executable,
            str(ROOT / "sweeps/cluster/loopback.py"),
            "start",
            "--block",
            f"--node-name={name}",
            "--num-cpus=1",
        ]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.parents[name] = subprocess.Popen(
                [*command, "--object-store-memory=80000000", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """As a power cut does."""
        parent = self.parents.pop(name)
        for pid in [parent.pid, *(pid for pid in self.processes() if _parent(pid) == parent.pid)]:
            os.kill(pid, signal.SIGKILL)
        parent.wait()

    def processes(self) -> list[int]:
        wanted = f"RAY_AUTH_TOKEN_PATH={self.mark['RAY_AUTH_TOKEN_PATH']}".encode()
        return [
            int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if wanted in _read(path).split(b"\0")
        ]

    def training(self) -> list[int]:
        return [pid for pid in self.processes() if b"TrialProcess" in _read(Path(f"/proc/{pid}/cmdline"))]

    def end(self) -> None:
        for parent in self.parents.values():
            parent.terminate()
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for parent in self.parents.values():
            parent.wait()

    def run(self, study: Path, results: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sparsemem", "run", str(study), "--results", str(results), *options]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.1)
    return found


def running(folder: Path) -> dict[str, str]:
    """Node -> trial, of trials that are being trained."""
    found = {}
    for place in folder.glob("trials/*/worker.json"):
        if (place.parent / "curve.csv").exists() and not (place.parent / "result.json").exists():
            found[json.loads(_read(place) or b'{"node": ""}')["node"]] = place.parent.name
    return {node: trial for node, trial in found.items() if node}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    return int((_read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split() or [b"", b"0"])[1])


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.end()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--address", "auto", "--engine", "local"), "names a Ray cluster; leave out --engine local"),
        (("--address", "ray://127.0.0.1:10001"), "give HOST:PORT of a cluster's head"),
        (("--address", "127.0.0.1"), "give HOST:PORT of a cluster's head"),
        (("--address", "ray-job:http://127.0.0.1:8265"), "give the absolute path of a folder on the cluster"),
    ],
)
def test_an_address_that_cannot_be_is_refused(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: Any,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(write_study()), *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_not_there_is_said_at_once(
    write_study: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    assert main(["run", str(write_study()), "--address", address]) == 1
    assert f"there is no Ray cluster at {address} " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_proc
def test_trials_spread_over_the_nodes_of_a_cluster_which_status_shows(
    write_study: Callable[..., Path], nodes: Nodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = write_study(budget=LONG, vary=SIX), tmp_path / "runs" / "tiny"
    nodes.head()
    nodes.join("second")
    driver = nodes.run(study, tmp_path / "runs", "--address", nodes.address)
    wait_for(lambda: {"first", "second"} <= running(folder).keys() or driver.poll() is not None)
    assert main(["status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "second" in shown
    driver.terminate()  # Ray takes this signal for itself
    driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130
    wait_for(lambda: not nodes.training())
    driver = nodes.run(study, tmp_path / "runs", "--address", nodes.address)
    driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0
    assert [row["status"] for row in table(folder)] == ["finished"] * 6
    assert not list(folder.glob("trials/*/worker.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_proc
def test_what_ends_a_node_or_the_head_changes_no_result(
    write_study: Callable[..., Path], nodes: Nodes, tmp_path: Path
) -> None:
    study, runs = write_study(budget=LONG, vary=SIX), tmp_path / "runs"
    local = nodes.run(study, tmp_path / "undisturbed", "--engine", "local")
    local.communicate(timeout=PATIENCE)
    assert local.returncode == 0

    nodes.head()
    nodes.join("second")
    driver = nodes.run(study, runs, "--address", nodes.address)
    wait_for(lambda: "second" in running(runs / "tiny") or driver.poll() is not None)
    nodes.kill("second")
    nodes.join("third")
    wait_for(lambda: "third" in running(runs / "tiny") or driver.poll() is not None)
    nodes.kill("first")
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 1
    assert "the same command goes on from the last checkpoints" in said
    for name in list(nodes.parents):
        nodes.kill(name)
    wait_for(lambda: not nodes.training())

    nodes.head()
    nodes.join("second")
    driver = nodes.run(study, runs, "--address", nodes.address)
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    assert table(runs / "tiny") == table(tmp_path / "undisturbed" / "tiny")
    assert not list(runs.rglob("*.corrupt-*"))
    wait_for(lambda: not nodes.training())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not importlib.util.find_spec("aiohttp"),
    reason="Ray's job client is not installed: pip install 'sparsemem[cluster]'",
)
@needs_proc
def test_a_study_runs_as_a_job_which_is_followed_and_can_be_stopped(
    write_study: Callable[..., Path], nodes: Nodes, tmp_path: Path
) -> None:
    study, folder = write_study(budget=LONG, vary={"rho": [1.0, 0.5]}), tmp_path / "on-the-cluster" / "tiny"
    nodes.head(dashboard=True)
    where = ("--address", f"ray-job:http://127.0.0.1:{nodes.dashboard}")
    driver = nodes.run(study, folder.parent, *where)
    wait_for(lambda: running(folder) or driver.poll() is not None)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 130, said
    wait_for(lambda: not nodes.training())
    driver = nodes.run(study, folder.parent, *where)
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    assert "2 of 2 trials done" in said
    assert [row["status"] for row in table(folder)] == ["finished"] * 2


@pytest.mark.slow
@needs_proc
def test_a_process_that_ended_a_trial_well_is_given_another_one(
    write_study: Callable[..., Path], nodes: Nodes, tmp_path: Path
) -> None:
    study, folder = write_study(budget=LONG, vary={"seed": [0, 1]}, rho=0.5), tmp_path / "runs" / "tiny"
    nodes.head()
    driver = nodes.run(study, tmp_path / "runs", "--address", nodes.address)
    seen = set()
    while driver.poll() is None:
        seen |= {
            (place.parent.name, json.loads(_read(place) or b'{"pid": 0}')["pid"])
            for place in folder.glob("trials/*/worker.json")
        }
        time.sleep(0.05)
    driver.communicate()
    assert driver.returncode == 0
    trials, pids = zip(*(each for each in seen if each[1]), strict=True)
    assert len(set(trials)) == 2
    assert len(set(pids)) == 1
