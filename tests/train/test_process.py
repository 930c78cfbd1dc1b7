"""A process that trains one trial after another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GROW = """
import re, torch
from pathlib import Path
from sparsemem.train.allocator import keep_freed_memory
from sparsemem.train.process import make_as_new
keep_freed_memory()
peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024
random, before = torch.rand(1), peak()
blocks = [torch.ones(250_000) for _ in range(400)]
big = peak()
del blocks
make_as_new()
print(big - before > 300, peak() - before < 40, bool(torch.rand(1) == random))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset on Linux alone"
)
def test_a_trial_leaves_neither_memory_nor_its_peak_nor_random_numbers_to_the_next() -> None:
    assert (
        subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True).stdout.split()
        == ["True"] * 3
    )
