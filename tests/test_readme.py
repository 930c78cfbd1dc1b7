"""The README says what the committed results say, and its example is a study."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparsemem.config import load_study
from sparsemem.study.plan import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


READINGS = re.findall(r"^### [^\n]*\(`results/([a-z0-9-]+)`\)\n(.*?)^!\[", README, re.DOTALL | re.MULTILINE)
PUBLISHED = {"0.75", "0.80", "0.01"}  # numbers of papers, and rates, that a reading quotes beside its own


@pytest.mark.parametrize(("study", "reading"), READINGS, ids=[study for study, _ in READINGS])
def test_every_measured_number_of_a_reading_stands_in_the_summary_of_its_study(study: str, reading: str) -> None:
    from analysis.report import summarize

    sentences = reading.partition("\n1. ")[2]
    quoted = set(re.findall(r"[-+]?\d+\.\d{2,}", sentences)) - PUBLISHED
    assert len(quoted) >= 3
    assert quoted <= set(re.findall(r"[-+]?\d+\.\d{2,}", summarize(ROOT / "results" / study)))
    assert len(re.findall(r"^\d\. ", reading, re.MULTILINE)) <= 5


def test_every_study_that_has_results_is_read() -> None:
    held = {path.name for path in (ROOT / "results").iterdir() if path.is_dir()} - {
        "allocation-quick",
        "allocation-cpu-lr",
    }  # the demo's; a check
    assert held == {study for study, _ in READINGS}


def test_the_soak_is_quoted_as_it_was_measured() -> None:
    soaks = json.loads((ROOT / "results" / "soak.json").read_text(encoding="utf-8"))
    assert soaks.keys() == {"local", "ray"}
    for engine, soak in soaks.items():
        left = soak["processes_left"] + len(soak["files_left"])
        cells = (
            f"`{engine}`",
            soak["finished"],
            soak["twice"],
            soak["lost"],
            left,
            soak["killed"],
            soak["restarts"],
            soak["seconds"],
        )
        assert f"| {' | '.join(map(str, cells))} |" in README
        assert (soak["trials"], soak["equal_to_undisturbed"], soak["processes_left"], soak["files_left"]) == (
            200,
            True,
            0,
            [],
        )


ROWS = [json.loads(line) for line in (ROOT / "results" / "bench.jsonl").read_text(encoding="utf-8").splitlines()]
BENCH = {(row["name"], row["shape"], row["threads"]): row for row in ROWS}


def test_no_speed_was_measured_twice() -> None:
    assert len(BENCH) == len(ROWS)
    assert {row["dtype"] for row in ROWS} == {"fp32"}


@pytest.mark.parametrize(
    ("label", "name", "value", "form", "threads"),
    [
        ("mixture of experts, tokens/s", "step/moe", "median", ",.0f", (1, 2)),
        ("over the dense model of the same P_act", "step/moe", "ratio_to_dense", ".3f", (1, 2)),
        ("over `transformers`, as its users run it", "step/moe", "ratio_to_transformers", ".2f", (1, 2)),
        ("over `transformers`, with our allocator's settings", "step/moe", "ratio_to_transformers-kept", ".2f", (1, 2)),
        ("share of the machine's matrix-product peak", "step/moe", "share_of_peak", ".2f", (1, 2)),
        ("with Engram, over without", "step/engram", "ratio_to_moe", ".2f", (1, 2)),
        ("with UltraMemV2 in every block, over without", "step/ultramem_v2", "ratio_to_moe", ".2f", (1, 2)),
        ("evaluation over training, tokens/s (two threads)", "eval/moe", "ratio_to_training", ".2f", (2,)),
        (
            "evaluation with UltraMemV2 over training with it (two threads)",
            "eval/ultramem_v2",
            "ratio_to_training",
            ".2f",
            (2,),
        ),
    ],
)
def test_speeds_are_quoted_as_they_were_measured(
    label: str, name: str, value: str, form: str, threads: tuple[int, ...]
) -> None:
    cells = [
        " / ".join(format(BENCH[name, shape, number][value], form) for number in threads)
        for shape in ("quick", "1M", "10M")
    ]
    row = re.search(rf"^\| {re.escape(label)} \| ([^|]*) \|(.*) \|$", README, re.MULTILINE)
    assert row
    assert row[2].replace("*", "").strip() == " | ".join(cells)
    for cell, shape in zip(row[2].split("|"), ("quick", "1M", "10M"), strict=True):
        target = re.fullmatch(rf"(\d[\d.]*)( at {shape})?", row[1].strip())
        short = [target is not None and BENCH[name, shape, number][value] < float(target[1]) for number in threads]
        assert ["**" in part for part in cell.split("/")] == short, cell


def test_the_share_of_data_is_quoted_as_it_was_measured() -> None:
    shares = [
        sum(BENCH[f"data/{part}", shape, 2]["share_of_step"] for part in ("batch", "hash"))
        for shape in ("quick", "1M", "10M")
    ]
    assert f"share of a step (two threads) | 0.01 | {' | '.join(f'{share:.3f}' for share in shares)} |" in README


def test_orchestration_is_quoted_as_it_was_measured() -> None:
    found = {name: row["median"] for (name, _, _), row in BENCH.items() if name.startswith("sweep/")}
    assert f"| 1 | {found['sweep/local/overhead']:.2f} | {found['sweep/ray/overhead']:.2f} |" in README
    assert f"| 0.97 | {found['sweep/local/busy']:.3f} | {found['sweep/ray/busy']:.3f} |" in README
    assert f"planning 10,000 trials, seconds | 5 | {found['sweep/plan']:.2f} |" in README
    assert f"finding 10,000 trials finished, seconds | 5 | {found['sweep/resume']:.2f} |" in README


def test_the_example_study_plans(tmp_path: Path) -> None:
    path = tmp_path / "my-study.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])  # type: ignore[index]
    assert (
        len(plan(load_study(path))) == 22
    )  # 6 shares x 2 widths x 2 seeds; rho = 1 has no memory, so its two widths are one trial


def test_the_example_search_is_one(tmp_path: Path) -> None:
    study, search = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[:2]
    (tmp_path / "my-study.yaml").write_text(study + search)
    tune = load_study(tmp_path / "my-study.yaml").tune
    assert tune is not None
    assert tune.per == ("rho",)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_committed_sweep_plans(path: Path) -> None:
    for planned in plan(load_study(path)):
        assert abs(planned.row()["budget_error_total"]) <= 0.005
        assert abs(planned.row()["budget_error_active"]) <= 0.005
