"""What only a prepared corpus or a finished trial can show is refused before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemem.api import run_study
from sparsemem.config import ConfigError, load_study


def test_a_text_shorter_than_one_batch_is_refused_and_nothing_is_written(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    study = load_study(write_study(), {"train.batch_tokens": 2**20, "budget.tokens": 2**21})
    with pytest.raises(ConfigError, match="batch"):
        run_study(study, tmp_path, tmp_path / "out", "local", lambda line: None)
    assert not (tmp_path / "out").exists()


def test_results_that_are_a_file_are_refused(write_study: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        run_study(load_study(write_study()), tmp_path, tmp_path / "out", "local", lambda line: None)


def test_precisions_are_not_mixed(write_study: Callable[..., Path], tmp_path: Path, engine: object) -> None:
    """`auto` is fp32 on a CPU and bf16 on a GPU: a study begun on one cannot be ended on the other."""
    study = load_study(write_study())
    ledger = run_study(study, tmp_path, tmp_path, "local", lambda line: None)
    result = next((ledger.folder / "trials").glob("*/result.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"precision": "bf16"}))
    with pytest.raises(ConfigError, match=f"{result.parent.name} was trained in bf16"):
        run_study(study, tmp_path, tmp_path, "local", lambda line: None)


def test_losses_that_do_not_make_the_result_are_damage(
    write_study: Callable[..., Path], tmp_path: Path, engine: object
) -> None:
    study = load_study(write_study())
    ledger = run_study(study, tmp_path, tmp_path, "local", lambda line: None)
    losses = sorted((ledger.folder / "trials").glob("*/val_losses.csv"))
    losses[0].unlink()
    losses[1].write_text("sequence,nats_per_token\n0,1.0\n")
    said: list[str] = []
    run_study(study, tmp_path, tmp_path, "local", said.append)
    assert [
        path.parent.name
        for path in losses[:2]
        if any(path.parent.name in line and "set aside" in line for line in said)
    ] == [path.parent.name for path in losses[:2]]
