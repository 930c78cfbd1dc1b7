"""What a search may be, and what its winners do to the study that takes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsemem.config import ConfigError, Study, load_study

STUDY: dict[str, Any] = {
    "study": "small",
    "data": {"vocab_size": 300, "context": 16, "validation_tokens": "2k"},
    "model": {
        "layers": 2,
        "width": 16,
        "heads": 2,
        "moe": {"expert_width": 8, "top_k": 2},
        "engram": {"layers": [2], "orders": [2, 3], "heads": 2, "row_dim": 4},
    },
    "budget": {"total_params": "30k", "active_params": "7k", "tokens": "4k", "tolerance": "5%"},
    "train": {"batch_tokens": 256, "lr": 0.01},
    "vary": {"budget.tokens": ["4k", "8k"], "rho": [1.0, 0.5, "dense"], "seed": [0, 1]},
}
TUNE: dict[str, Any] = {
    "search": {"train.lr": {"low": "1e-3", "high": "3e-2", "log": True}},
    "per": ["rho"],
    "trials": 4,
}


def _load(folder: Path, **fields: Any) -> Study:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(STUDY | fields, sort_keys=False), encoding="utf-8")
    return load_study(path)


def _refused(folder: Path, **fields: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        _load(folder, **fields)
    assert str(folder / "small.yaml") in str(refused.value)
    return str(refused.value)


def _tune(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(TUNE) | changes


def _search(path: str, **search: Any) -> dict[str, Any]:
    return _tune(search={path: search})


def test_a_search_is_read_with_units_and_changes_no_trial(tmp_path: Path) -> None:
    search = TUNE["search"] | {
        "train.batch_tokens": {"choices": ["256", 512]},
        "train.warmup": {"low": "2%", "high": 0.2},
    }
    study = _load(tmp_path, tune=_tune(search=search))
    assert study.tune is not None
    assert (study.tune.search["train.lr"].low, study.tune.search["train.warmup"].low) == (0.001, 0.02)
    assert [trial.id for trial in study.trials()] == [trial.id for trial in _load(tmp_path).trials()]


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        (_search("train.rate", low=1, high=2), ["`train.rate` is not a field that can be tuned", "train.lr"]),
        (_search("model.width", choices=[16]), ["`model.width` is not a field that can be tuned"]),
        (_search("train.evaluations", choices=[4, 8]), ["`train.evaluations` is not a field"]),
        (_search("train.lr", low=0.1, high=0.1), ["tune.search.train.lr", "`low` 0.1 is not below `high` 0.1"]),
        (_search("train.lr", low=0, high=0.1, log=True), ["ratios need a `low` above 0"]),
        (_search("train.lr", low=0.1), ["`low` and `high`"]),
        (_search("train.lr", low=0.1, high=1, choices=[1]), ["`low` and `high`"]),
        (_search("train.lr", low="small", high=1), ["tune.search.train.lr.low", "'small'"]),
        (
            _search("train.batch_tokens", low=256, high=1024),
            ["`search.train.batch_tokens` is not a range", "`choices`"],
        ),
        (_search("train.lr", low=0.1, high=1, step=1), ["unknown field", "step"]),
        (_tune(search={}), ["`search` is empty"]),
        (_tune(trials=0), ["tune.trials", "0"]),
        (_tune(pruner="median"), ["tune.pruner", "'median'", "asha"]),
        (
            _tune(per=["train.lr"]),
            ["`tune.per` names `train.lr`, which `vary` does not set", "budget.tokens, rho, seed"],
        ),
        (_search("lr", low=0.1, high=1), ["`lr` is not a field that can be tuned; did you mean `train.lr`?"]),
        (_search("train.learning_rate", low=0.1, high=1), ["did you mean `train.lr`?"]),
        (
            _tune(search={"train": {"lr": {"low": 0.1}}}),
            ["unknown field `tune.search.train.lr`; write `train.lr` as one name"],
        ),
        (
            _tune(search={"train.lr": ["1e-3", "1e-2"]}),
            ["train.lr: {low: 1e-3, high: 1e-2, log: true}", "{choices: [1e-3, 1e-2]}"],
        ),
        (_tune(search={"train.schedule": ["wsd"]}), ["write train.schedule: {choices: [wsd]}"]),
        (_tune(per=["rh"]), ["write per: [rho]"]),
        (_tune(trails=3), ["unknown field `tune.trails`", "trials"]),
    ],
)
def test_a_search_that_cannot_be_is_refused(tmp_path: Path, tune: dict[str, Any], words: list[str]) -> None:
    message = _refused(tmp_path, tune=tune)
    assert all(word in message for word in words), message


def test_points_of_several_memories_are_named_by_their_shares(tmp_path: Path) -> None:
    vary = {"shares": [{"moe": 1}, {"moe": 0.5, "engram": 0.5}]}
    assert _refused(tmp_path, vary=vary, tune=_tune(per=["rho"])).endswith("it sets shares; write per: [shares]")


def test_a_search_is_set_by_its_dotted_path(tmp_path: Path) -> None:
    _load(tmp_path, tune=TUNE)
    ranges = {"tune.search.train.lr.low": "1e-4", "tune.search.train.warmup": {"low": 0, "high": 0.1}}
    study = load_study(tmp_path / "small.yaml", ranges)
    assert study.tune is not None
    assert {path: search.low for path, search in study.tune.search.items()} == {"train.lr": 1e-4, "train.warmup": 0}


def test_a_field_that_is_varied_is_neither_searched_nor_filled_in(tmp_path: Path) -> None:
    vary = {"rho": [1.0], "train": [{"lr": 0.01, "batch_tokens": 256}]}  # inside a group
    assert "`tune.search` sets `train.lr`, which `vary` sets too" in _refused(tmp_path, vary=vary, tune=TUNE)
    tuned = {"study": "small", "winners": [{"at": {}, "values": {"train.lr": 0.02}}]}
    assert "`tuned` sets `train.lr`, which `vary` sets too" in _refused(tmp_path, vary=vary, tuned=tuned)


def _write_winners(folder: Path, *points: tuple[dict[str, Any], float]) -> str:
    winners = [{"at": at, "values": {"train.lr": lr}} for at, lr in points]
    (folder / "winners.yaml").write_text(yaml.safe_dump({"study": "small", "winners": winners}))
    return "winners.yaml"


def test_winners_fill_in_the_trials_of_their_point_and_change_their_ids(tmp_path: Path) -> None:
    plain = _load(tmp_path)
    path = _write_winners(tmp_path, ({"rho": 1.0}, 0.02), ({"rho": 0.5}, 0.03), ({"rho": "dense"}, 0.01))
    study = _load(tmp_path, tuned=path)
    assert [trial.train.lr for trial in study.trials()] == [0.02, 0.02, 0.03, 0.03, 0.01, 0.01] * 2
    same = [old.id == new.id for old, new in zip(plain.trials(), study.trials(), strict=True)]
    assert same == [False, False, False, False, True, True] * 2  # 0.01 is what the study had
    assert [trial.budget.tokens for trial in study.trials()] == [4000] * 6 + [8000] * 6


def test_a_point_without_a_winner_is_refused_by_name(tmp_path: Path) -> None:
    path = _write_winners(
        tmp_path, ({"budget.tokens": 4000, "rho": 1.0}, 0.02), ({"budget.tokens": 8000, "rho": 1.0}, 0.02)
    )
    message = _refused(tmp_path, tuned=path)
    assert (
        "no winner for budget.tokens=4000, rho=0.5; the file holds budget.tokens=4000, rho=1.0; budget.tokens=8000"
        in message
    )


def test_winners_that_are_not_there_or_not_winners_are_refused(tmp_path: Path) -> None:
    assert "`sparsemem tune` writes it" in _refused(tmp_path, tuned="nowhere.yaml")
    (tmp_path / "runs" / "tune").mkdir(parents=True)
    (tmp_path / "runs" / "tune" / "winners.yaml").touch()
    for wrong in ("runs/tune/winner.yaml", "rnus/tune/winners.yaml", "runs", "runs/winners.yaml"):
        assert _refused(tmp_path, tuned=wrong).endswith("no such file; did you mean runs/tune/winners.yaml?")
    (tmp_path / "other.yaml").write_text("study: small\nwinners: [{at: {}, values: {train.depth: 3}}]")
    message = _refused(tmp_path, tuned="other.yaml")
    assert "other.yaml" in message
    assert "`train.depth` is not a field" in message
    (tmp_path / "other.yaml").write_text("study: small\nwinners: [{at: {}, values: {train.lr: -1}}]")
    assert "train.lr" in _refused(tmp_path, tuned="other.yaml")
