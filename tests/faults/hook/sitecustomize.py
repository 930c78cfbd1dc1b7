"""Python imports this before anything else in every process of a driver under test: it makes the bad moment certain, and short trials
write checkpoints. The package knows nothing of it.

The variable FAULTS holds JSON: `checkpoint_seconds`; `moment`, at which the first process that reaches it writes its id into the file
`marker` and waits to be killed; `clock`: true has the wall clock jump by a year, backwards and forwards, every second. A moment is
`half:NAME` (that file is half written), `after:NAME` (it is in place just now) or `step:N`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import sys
import time

FAULTS = json.loads(os.environ.get("FAULTS", "{}"))
KIND, _, WHAT = FAULTS.get("moment", "").partition(":")
YEAR = 365 * 86400


def wait_to_be_killed() -> None:
    try:
        marker = os.open(FAULTS["marker"], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return  # once a test
    os.write(marker, b"%d\n" % os.getpid())
    time.sleep(600)


def fsync(file: int, real=os.fsync) -> None:  # type: ignore[no-untyped-def]
    if os.path.basename(os.readlink(f"/proc/self/fd/{file}")).startswith(f".{WHAT}.") and not os.path.exists(FAULTS["marker"]):
        os.ftruncate(file, os.fstat(file).st_size // 2)
        wait_to_be_killed()
    real(file)


def replace(source, target, real=os.replace) -> None:  # type: ignore[no-untyped-def]
    real(source, target)
    if os.path.basename(target) == WHAT:
        wait_to_be_killed()


def jumping(real=time.time) -> float:  # type: ignore[no-untyped-def]
    now = real()
    return now + (YEAR if int(now) % 2 else -YEAR)


def change(loop) -> None:  # type: ignore[no-untyped-def]
    loop.CHECKPOINT_SECONDS, loop.CHECKPOINT_TIMES = FAULTS["checkpoint_seconds"], 0
    if KIND == "step":
        real, steps = loop.train_step, iter(range(10**9))

        def train_step(*arguments):  # type: ignore[no-untyped-def]
            if next(steps) == int(WHAT):
                wait_to_be_killed()
            return real(*arguments)

        loop.train_step = train_step


class ChangesLoop(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # type: ignore[no-untyped-def]
        if name != "sparsemem.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (real(module), change(module))
        return spec


if KIND == "half":
    os.fsync = fsync
if KIND == "after":
    os.replace = replace
if FAULTS.get("clock"):
    time.time = jumping
if FAULTS:
    sys.meta_path.insert(0, ChangesLoop())
