"""A thousand trials: their report is written within a gigabyte. The seconds are printed, not judged: a test machine is
busy.

`python tests/analysis/test_scale.py FOLDER` measures the report of any study.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

CODE = """
import resource, sys, time
start = time.process_time()
from analysis import write_report
write_report(sys.argv[1])
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # kB on Linux
"""


def measure(folder: Path) -> tuple[float, float]:
    """CPU seconds and peak memory (GB) of writing a report in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, check=True)
    seconds, size = map(float, done.stdout.split())
    return seconds, size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
def test_the_report_of_a_thousand_trials_takes_less_than_a_gigabyte(new_study: Callable[..., Path]) -> None:
    """20 shares, 10 budgets, 5 seeds; 1,024 sequences a trial and curves of 400 records."""
    folder = new_study(
        tokens=tuple(200_000 * 2**k for k in range(10)),
        seeds=5,
        shares=tuple(np.linspace(1, 0, 20).round(4).tolist()),
        records=400,
        sequences=1024,
    )
    seconds, size = measure(folder)
    print(f"1,000 trials: {seconds:.1f} CPU seconds, {size:.2f} GB")
    assert size < 1
    assert len(pd.read_csv(folder / "trials.csv")) == 1000
    assert (folder / "report.html").read_text().count("<tr data-status=") == 1000
    assert max(path.stat().st_size for path in (folder / "figures").iterdir()) < 3e6


if __name__ == "__main__":
    print("CPU seconds, GB:", *measure(Path(sys.argv[1])))
