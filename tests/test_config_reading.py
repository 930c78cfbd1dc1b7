"""How YAML is read: numbers, dates and names as people write them, and a place for anchors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsemem.cli import main
from sparsemem.config import ConfigError, load_study
from sparsemem.config.reading import read_value

TEXT = """\
study: {name}
data: {{corpus: python-source, vocab_size: 4096, context: 128}}
model: {{layers: 3, width: 64, heads: 4, moe: {{expert_width: 48, top_k: 2}}, engram: {{layers: [2], row_dim: 8}}}}
budget: {{total_params: 1.24M, active_params: 135k, tokens: {tokens}}}
train: {{batch_tokens: 2048, lr: 2.5e-3}}
vary: {{rho: [1.0, 0.5, 0.0], seed: [{seed}]}}
{more}
"""


def _write(tmp_path: Path, **fields: str) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(TEXT.format(**{"name": "a", "tokens": "200k", "seed": "0", "more": ""} | fields), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": "010"}, "field `vary.seed` has the value '010' (line 6), which YAML 1.1 reads to base 8"),
        ({"seed": "-017"}, "field `vary.seed` has the value '-017'"),
        ({"seed": "00"}, "field `vary.seed` has the value '00'"),
        ({"seed": "!!int 010"}, "field `vary.seed` has the value '010'"),
        ({"seed": "1__0"}, "field `vary.seed` has the value '1__0'"),
        (
            {"tokens": "3:20:00"},
            "field `budget.tokens` has the value '3:20:00' (line 4), which YAML 1.1 reads to base 60",
        ),
        ({"tokens": "1:30"}, "field `budget.tokens` has the value '1:30'"),
        ({"tokens": "3:20:00.5"}, "field `budget.tokens` has the value '3:20:00.5'"),
        ({"more": "on: 1"}, "unknown field `on`"),
        ({"more": "1: 1"}, "unknown field `1`"),
        ({"more": "y-anchors: 1"}, "unknown field `y-anchors`"),
    ],
)
def test_a_number_that_people_read_otherwise_is_refused_by_its_field(
    tmp_path: Path, fields: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_study(_write(tmp_path, **fields))
    assert str(refused.value).startswith(f"{tmp_path / 'study.yaml'}: ")
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "line", "meant"),
    [
        ("study x\ndata: {}\n", 1, "study: x"),
        ("study: x\nmodel:\n  layers 2\n  width: 8\n", 3, "layers: 2"),
        ("study: x\nmodel:\n  layers:2\n  width: 8\n", 3, "layers: 2"),
        ("study: x\nmodel\n  layers: 2\n", 2, "model:"),
        ("study: x\ndata {corpus: hub, split: all}\n", 2, "data: {corpus: hub, split: all}"),
        ("study: x\ntune:\n  per: [rho]\n\n  # how many\n  trials 2\n", 6, "trials: 2"),
        ("study = x\ndata: {}\n", 1, "study: x"),
        ("vary:\n  - rho [0.5]\n    seed: [0]\n", 2, "rho: [0.5]"),
    ],
)
def test_a_line_without_its_colon_is_shown_with_it(text: str, line: int, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_value(text)
    lacking = text.splitlines()[line - 1].strip()
    assert (
        str(refused.value)
        == f"line {line}: `{lacking}` lacks a colon and a space after the field's name; write `{meant}`"
    )


@pytest.mark.parametrize(
    "text",
    [
        "question: where\n  parameters live: here\n",
        "question: 'where\nparameters\n",
        "files: [a,\n  b\nseed: 1\n",
        "study: x\n seed: 1\n",
    ],
)
def test_a_text_that_goes_on_is_no_field_without_its_colon(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^not valid YAML at line \d"):
        read_value(text)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *(
            ("10", 10),
            ("0", 0),
            ("+7", 7),
            ("1_000", 1000),
            ("0x1f", 31),
            ("0b11", 3),
            (".5", 0.5),
            ("1.", 1.0),
            ("1_000.5", 1000.5),
        ),
        *(
            ("2026-11-28", "2026-11-28"),
            ("2026-11-28 10:00:00", "2026-11-28 10:00:00"),
            ("=", "="),
            ("1e-3", "1e-3"),
            ("'010'", "010"),
        ),
        *(("~", None), ("", None), ("yes", True), ("{on: off}", {"on": False}), ("{1: 2, ~: 3}", {"1": 2, "~": 3})),
        ("[&n 1, {*n : 2}]", [1, {"1": 2}]),
    ],
)
def test_other_values_are_read_as_they_stand(written: str, read: Any) -> None:
    assert read_value(written) == read
    assert type(read_value(written)) is type(read)


def test_a_date_may_name_a_study(tmp_path: Path) -> None:
    assert load_study(_write(tmp_path, name="2026-11-28")).study == "2026-11-28"


def test_anchors_have_a_place_at_the_top(tmp_path: Path) -> None:
    path = _write(tmp_path, seed="*first", more="")
    anchors = "x-seeds: [&first 3]\nx-run: &run {max_failures: 4}\n"
    path.write_text(f"{anchors}{path.read_text()}run: {{<<: *run, cpus_per_trial: 1}}\n")
    study = load_study(path)
    assert {trial.seed for trial in study.trials()} == {3}
    assert study.run.max_failures == 4
    assert "x-seeds" not in study.base


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("budget.tokens=3:20:00", "--set budget.tokens=3:20:00: has the value '3:20:00'"),
        ("seed=010", "which YAML 1.1 reads to base 8"),
        ("vary.seed=[010]", "which YAML 1.1 reads to base 8"),
        ("run={max_failures: 1, max_failures: 2}", "field `max_failures` stands twice"),
    ],
)
def test_settings_are_read_by_the_same_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    assert main(["plan", str(_write(tmp_path)), "--set", setting]) == 2
    assert said in capsys.readouterr().err
