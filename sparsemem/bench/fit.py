"""The fit of a loss surface with all its refits, against SciPy run from every start (`analysis.fits.reference`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from sparsemem.bench.measure import Row, progress


def bench_fit() -> Iterator[Row]:
    """One measurement, in processor seconds; its ratio is that of the slow way, scaled up from a sample of its starts
    and refits.

    In a process of its own with one thread: those of a linear-algebra library would spin beside SciPy's small products.
    """
    progress("fit: loss surface of 240 runs, 4,000 refits, in one of")
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "analysis.fits.reference"]
    found = json.loads(
        subprocess.run(command, env=os.environ | one_thread, stdout=subprocess.PIPE, text=True, check=True).stdout
    )
    seconds = {"median": found["fast_s"], "low": found["fast_low_s"], "high": found["fast_high_s"]}
    yield {
        **{"name": "fit/chinchilla", "shape": "240x4000", "threads": 1, "device": "cpu", "dtype": "fp64"},
        **{name: round(spent, 4) for name, spent in seconds.items()},
        "unit": "s",
        "ratio_to_scipy": round(found["ratio"], 1),
        "ratio_to_scipy_range": [round(found["slow_s"] / seconds[end], 1) for end in ("high", "low")],
        "excess": found["excess"],
    }
