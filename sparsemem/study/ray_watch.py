"""Notices that this machine's own Ray has lost a process that it cannot live without. It must not know studies.

Ray itself then waits: for ever for its raylet; for a minute for its control store, and then ends the whole Python process.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VITAL = ("raylet", "gcs_server")
POLL_SECONDS = 0.5


@contextmanager
def ends_with_ray() -> Iterator[None]:
    """Leave the body as soon as a vital process of the Ray that this process started is gone.

    Raises:
        ChildProcessError: that is so. In another thread than the main one nothing is watched: only the main one can be interrupted.
    """
    from ray._private import worker

    node: Any = worker._global_node
    left, gone = threading.Event(), list[str]()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            if found := [name for name, _ in node.dead_processes() if name in VITAL]:
                gone.extend(found)
                _thread.interrupt_main()
                return

    if node is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:
        if gone:
            raise ChildProcessError(f"Ray's {gone[0]} was killed; the same command goes on from the last checkpoints") from error
        raise
    finally:
        left.set()
        watcher.join()
