"""`python -m sparsemem.study.worker`: `python -m sparsemem.train` in a process that dies with its driver.

The driver holds the other end of this process's standard input and never writes to it: it closes when the driver ends, even by
`kill -9`. That holds on every system, where a parent-death signal exists on Linux only.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_driver() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin: the interpreter could not close it at the end
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_driver, daemon=True).start()
    runpy.run_module("sparsemem.train", run_name="__main__", alter_sys=True)
