"""The README says what the committed results say, and its example is a study."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sparsemem.config import load_study
from sparsemem.study.plan import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_measured_number_of_the_reading_stands_in_the_summary_of_the_study() -> None:
    from analysis.report import summarize

    reading = README.partition("(`results/allocation-cpu`)")[2].partition("![")[0].partition("\n1. ")[2]
    published = {"0.75", "0.80"}
    quoted = set(re.findall(r"[-+]?\d+\.\d{2,}", reading)) - published
    measured = set(re.findall(r"[-+]?\d+\.\d{2,}", summarize(ROOT / "results" / "allocation-cpu")))
    assert len(quoted) > 12
    assert quoted <= measured


def test_the_example_study_plans(tmp_path: Path) -> None:
    path = tmp_path / "my-study.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])  # type: ignore[index]
    assert len(plan(load_study(path))) == 22  # 6 shares x 2 widths x 2 seeds; rho = 1 has no memory, so its two widths are one trial


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_sweep_plans(path: Path) -> None:
    for planned in plan(load_study(path)):
        assert abs(planned.row()["budget_error_total"]) <= 0.005
        assert abs(planned.row()["budget_error_active"]) <= 0.005
