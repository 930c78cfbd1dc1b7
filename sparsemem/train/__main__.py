"""`python -m sparsemem.train TRIAL_FOLDER TOKENS_FOLDER --threads N`: one trial as a process of its own.

Exit codes: 0 finished or diverged, 3 out of memory, 1 anything else; `failure.json` in the trial's folder says what.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import yaml

from sparsemem.config import Trial
from sparsemem.train import run_trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sparsemem.train", description=__doc__)
    parser.add_argument("trial_folder", type=Path, help="holds trial.yaml; receives curve.csv and result.json")
    parser.add_argument("tokens_folder", type=Path, help="a prepared corpus")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    trial = Trial.model_validate(yaml.safe_load((arguments.trial_folder / "trial.yaml").read_text(encoding="utf-8")))
    try:
        run_trial(trial, arguments.tokens_folder, arguments.trial_folder, threads=arguments.threads)
    except MemoryError:
        return 3
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
