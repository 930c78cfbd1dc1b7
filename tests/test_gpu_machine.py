"""A GPU machine without a network has torch and little else: what runs there needs no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("ray", "optuna", "hypothesis", "pytest_timeout", "transformers", "moto")
COLLECT = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import pytest
options = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, *sys.argv[1:], "tests/gpu"]))
"""


def test_the_gpu_tests_import_only_what_such_a_machine_has() -> None:
    """Every bench is imported with them. Of the tests, those on a GPU are skipped here."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, "-rs"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sees no CUDA device" in done.stdout
    assert "failed" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_a_given_interpreter_is_taken_as_it_is() -> None:
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "--always-make",
        "test-gpu",
        "PYTHON=an-interpreter",
        "VENV=",
    ]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [["an-interpreter", "-m", "pytest", "-o"]]
