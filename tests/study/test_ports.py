"""Who may talk to a running study: this machine alone."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from machine import Driver

from .test_engines import both_engines

LISTENING = "0A"


def _family(root: int) -> set[int]:
    """A process and all that it and its children have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _names(pids: set[int]) -> set[str]:
    names = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


def _listening(pids: set[int]) -> set[str]:
    """Addresses on which these processes wait for connections."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for handle in list(Path(f"/proc/{pid}/fd").iterdir()):
                with contextlib.suppress(OSError):  # closed by now
                    inodes.add(str(handle.readlink()))
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])  # words of the host's byte order
                address = b"".join(struct.pack("!I", word) for word in struct.unpack(f"={len(words) // 4}I", words))
                found.add(socket.inet_ntop(family, address))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds sockets through /proc")
@both_engines
def test_nothing_listens_beyond_this_machine(
    write_study: Callable[..., Path], start: Callable[..., Driver], tmp_path: Path, engine: str
) -> None:
    driver = start(write_study(vary={"rho": [1.0]}), engine, tmp_path / "runs")
    addresses: set[str] = set()
    names: set[str] = set()
    with ThreadPoolExecutor(1) as reader:
        ended = reader.submit(driver.end)
        while not ended.done():
            family = _family(driver.process.pid)
            names |= _names(family)
            addresses |= _listening(family)
            time.sleep(0.3)
    code, _, err = ended.result()
    assert code == 0, err
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert ("raylet" in names and "gcs_server" in names and bool(addresses)) == (engine == "ray")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds sockets through /proc")
@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_waiting_socket_is_found(address: str) -> None:
    with socket.create_server((address, 0)):
        assert address in _listening(_family(os.getpid()))
