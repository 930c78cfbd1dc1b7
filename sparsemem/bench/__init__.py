"""`sparsemem bench`: how fast this machine is at what a study does. Results to stdout, progress to stderr; nothing is
written.
"""

from __future__ import annotations

import json

from sparsemem.bench.data import bench_data
from sparsemem.bench.eval import bench_eval
from sparsemem.bench.fit import bench_fit
from sparsemem.bench.measure import line
from sparsemem.bench.memory import bench_memory
from sparsemem.bench.moe import bench_moe
from sparsemem.bench.profile import bench_profile
from sparsemem.bench.step import bench_step
from sparsemem.bench.sweep import bench_sweep
from sparsemem.study.jobs import processors
from sparsemem.train.step import prepare_process

BENCHES = {
    **{
        "step": bench_step,
        "profile": bench_profile,
        "moe": bench_moe,
        "memory": bench_memory,
        "data": bench_data,
        "eval": bench_eval,
    },
    **{"fit": bench_fit, "sweep": bench_sweep},
}


def bench(what: str, as_json: bool) -> None:
    """Print a table, or with `as_json` one object a line."""
    prepare_process(processors())  # as a trial does
    for row in BENCHES[what]():
        print(json.dumps(row) if as_json else line(row), flush=True)
