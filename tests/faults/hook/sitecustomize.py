"""Python imports this before anything else in every process of a driver under test: it makes the bad moment certain,
and short trials write checkpoints. The package knows nothing of it.

The variable FAULTS holds JSON: `checkpoint_seconds`; `clock`: true has the wall clock jump by a year, backwards and
forwards, every second; `moments`: at each of them, once in a test, the process that comes to it writes its id into a
file of that name in `marks` and waits to be killed. A moment is `half NAME` (that file is half written), `after NAME`
(it is in place just now) or `step N`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from typing import Any

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
MOMENTS = FAULTS.get("moments", [])
YEAR = 365 * 86400


def is_due(moment: str) -> bool:
    return moment in MOMENTS and not os.path.exists(os.path.join(FAULTS["marks"], moment))


def wait_to_be_killed(moment: str) -> None:
    try:
        mark = os.open(os.path.join(FAULTS["marks"], moment), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(mark, b"%d\n" % os.getpid())
    time.sleep(600)


def fsync(file: int, real: Any = os.fsync) -> None:
    name = os.path.basename(os.readlink(f"/proc/self/fd/{file}"))  # .NAME.RANDOM.tmp
    if is_due(moment := f"half {name[1:].rsplit('.', 2)[0]}"):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        wait_to_be_killed(moment)
    real(file)


def replace(source: Any, target: Any, real: Any = os.replace) -> None:
    real(source, target)
    if is_due(moment := f"after {os.path.basename(target)}"):
        wait_to_be_killed(moment)


def jumping(real: Any = time.time) -> float:
    now = real()
    return now + (YEAR if int(now) % 2 else -YEAR)


def change(loop: Any) -> None:
    loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_TIMES = FAULTS["checkpoint_seconds"], 0
    real, steps = loop.train_step, iter(range(10**9))

    def train_step(*arguments: Any) -> Any:
        if is_due(moment := f"step {next(steps)}"):
            wait_to_be_killed(moment)
        return real(*arguments)

    if MOMENTS:
        loop.train_step = train_step


class ChangesLoop(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "sparsemem.train.loop":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (real(module), change(module))
        return spec


if MOMENTS:
    os.fsync, os.replace = fsync, replace
if FAULTS.get("clock"):
    time.time = jumping
if FAULTS:
    sys.meta_path.insert(0, ChangesLoop())
