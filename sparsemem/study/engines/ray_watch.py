"""Notices that Ray has lost a process that it cannot live without. It must not know studies.

Ray itself then waits: for ever for this machine's raylet; for a minute for the control store, and then ends the whole
Python process.
"""

from __future__ import annotations

import _thread
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VITAL = ("raylet", "gcs_server")
POLL_SECONDS = 0.5
GRACE = 10.0
REMEDY = "; the same command goes on from the last checkpoints"
PATIENCE = 20.0
"""Seconds that the head of a cluster may be away: one that keeps its state elsewhere is back by then, and
Ray goes on.
"""


@contextmanager
def ends_with_ray() -> Iterator[None]:
    """Leave the body as soon as this process's Ray is lost.

    Raises:
        ChildProcessError: that is so. In another thread than the main one nothing is watched: only the main one can be
            interrupted.
    """
    from ray._private import worker

    node: Any = worker._global_node
    left, lost = threading.Event(), list[str]()

    def watch() -> None:
        loss = _killed if node.is_head() else _Reach(node)
        while not left.wait(POLL_SECONDS):
            if found := loss(node):
                lost.append(found)
                _thread.interrupt_main()
                # The main thread may wait for the head inside Ray, deaf to signals; at 60 seconds Ray would end us
                # anyway.
                if not left.wait(GRACE):
                    print(f"sparsemem: {found}{REMEDY}", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    if node is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if lost:
            raise ChildProcessError(f"{lost[0]}{REMEDY}") from error
        raise
    finally:
        left.set()
        watcher.join()


def _killed(node: Any) -> str:
    """What the Ray that this process started has lost; '' for nothing."""
    return next((f"Ray's {name} was killed" for name, _ in node.dead_processes() if name in VITAL), "")


class _Reach:
    """What of a cluster that this process joined cannot be reached any more."""

    def __init__(self, node: Any) -> None:
        self._seen = time.monotonic()
        self._cluster = _cluster(node)

    def __call__(self, node: Any) -> str:
        if not _answers(socket.AF_UNIX, node.raylet_socket_name):
            return "the cluster's raylet on this machine was killed"
        if (cluster := _cluster(node)) == self._cluster:
            self._seen = time.monotonic()
        elif cluster:
            return "the cluster's head was started anew and does not know its nodes any more: start them anew too"
        return "the cluster's head was lost" if time.monotonic() - self._seen > PATIENCE else ""


def _cluster(node: Any) -> str:
    """The id of the cluster whose head answers; '' where none does."""
    from ray import _raylet  # its stub lacks this class

    host, _, port = node.gcs_address.rpartition(":")
    if not _answers(socket.AF_INET6 if ":" in host else socket.AF_INET, (host.strip("[]"), int(port))):
        return ""  # at once, where the client would try for long
    try:
        return str(vars(_raylet)["GcsClient"](address=node.gcs_address).cluster_id)
    except Exception:  # it went away meanwhile
        return ""


def _answers(family: int, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(PATIENCE)
        return probe.connect_ex(address) == 0
