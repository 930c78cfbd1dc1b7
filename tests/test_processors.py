"""What holds on one processor holds on the others: the numerical tests under the instruction sets that this one can
stand in for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUMERICAL = ("layers", "memory", "train/test_golden.py", "train/test_optim.py", "test_parameter.py", "test_model.py")
PROCESSORS = {  # each library inside torch has a switch of its own
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "mixed": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_numerical_tests_pass_on_other_processors(processor: str, threads: str) -> None:
    """A switch to instructions that this processor lacks does nothing: the test then repeats another one."""
    settings = PROCESSORS[processor] | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--quiet",
        "-p",
        "no:cacheprovider",
        *(str(TESTS / name) for name in NUMERICAL),
    ]
    done = subprocess.run(
        command, env=os.environ | settings, cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
