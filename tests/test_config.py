"""The config: what a user may write, what is refused and in which words, and what a trial's identity depends on."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from sparsemem.config import (
    Budget,
    ConfigError,
    Data,
    Model,
    Study,
    Train,
    Trial,
    load_study,
    parse_quantity,
    parse_real,
    parse_share,
)
from sparsemem.config.nearest import COUNTED, OURS, nearest_path
from sparsemem.config.refusal import named_errors
from sparsemem.mechanisms.engram import Engram
from sparsemem.mechanisms.moe import MoE
from sparsemem.mechanisms.ngram_embedding import NgramEmbedding
from sparsemem.mechanisms.product_key.fields import PEER, PKM, MemoryPlus, UltraMem, UltraMemV2

STUDY: dict[str, Any] = {  # ARCHITECTURE.md's example
    "study": "allocation-quick",
    "question": "Which share?",
    "data": {"corpus": "python-source", "vocab_size": 4096, "context": 128},
    "model": {
        "layers": 3,
        "width": 64,
        "heads": 4,
        "moe": {"expert_width": 48, "top_k": 2, "shared_experts": 1},
        "engram": {"layers": [2], "orders": [2, 3], "heads": 4, "row_dim": 8},
    },
    "budget": {"total_params": "1.24M", "active_params": "135k", "tokens": "500k", "tolerance": "1%"},
    "train": {"batch_tokens": 2048, "lr": "1e-2", "table_lr_factor": 5, "warmup": "2%", "schedule": "cosine"},
    "vary": {"rho": [1.0, 0.5, 0.0], "seed": [0, 1]},
    "run": {"cpus_per_trial": 1, "max_failures": 2},
}
MISSING = object()


def _with(path: str, value: Any) -> dict[str, Any]:
    """The study with one dotted path set, or removed."""
    raw = copy.deepcopy(STUDY)
    *parents, leaf = path.split(".")
    inner = raw
    for name in parents:
        inner = inner[name]
    if value is MISSING:
        del inner[leaf]
    else:
        inner[leaf] = value
    return raw


def _load(tmp_path: Path, raw: Any, **overrides: Any) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return load_study(path, overrides)


def _refused(tmp_path: Path, raw: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        _load(tmp_path, raw)
    assert str(tmp_path / "study.yaml") in str(refused.value)
    return str(refused.value)


def _trial(**changes: Any) -> Trial:
    raw = {key: copy.deepcopy(STUDY[key]) for key in ("data", "model", "budget", "train")}
    return Trial.model_validate(raw | ({} if "shares" in changes else {"rho": 0.5}) | changes)


# --- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    (
        {"1.24M": 1_240_000, "135k": 135_000, "135K": 135_000, "26.7B": 26_700_000_000, "1G": 10**9, "2T": 2 * 10**12}
        | {"2e20": 2 * 10**20, "1e6": 10**6, " 7 ": 7, "1_000": 1000, "0.5k": 500, 5: 5, 6.0: 6}
    ).items(),
)
def test_counts_are_read_with_decimal_units(written: Any, read: int) -> None:
    assert parse_quantity(written) == read
    assert isinstance(parse_quantity(written), int)


@pytest.mark.parametrize(
    "written",
    ["1.24 MB", "m", "1,000", "-5k", "1.5", 1.5, True, None, [1], "1e-3", "", "0x10", float("nan"), float("inf")],
)
def test_nonsense_counts_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="write a"):
        parse_quantity(written)


@pytest.mark.parametrize(
    ("written", "read"), [("2%", 0.02), ("100%", 1), ("0.5 %", 0.005), (0.75, 0.75), ("1e-2", 0.01), (1, 1), (0, 0)]
)
def test_shares_are_read_with_percent(written: Any, read: float) -> None:
    assert parse_share(written) == pytest.approx(read)


@pytest.mark.parametrize("written", ["nan", "inf", float("nan"), True, "two", "%", "2%%", "1e999"])
def test_what_is_no_finite_number_is_refused(written: Any) -> None:
    for parse in (parse_real, parse_share):
        with pytest.raises(ValueError, match="write a"):
            parse(written)


def test_yaml_reads_1e_2_as_text_and_it_still_is_a_hundredth(tmp_path: Path) -> None:
    """YAML 1.1 wants a dot in a float: `1e-2` is a string to it."""
    assert yaml.safe_load("1e-2") == "1e-2"
    study = _load(tmp_path, yaml.safe_dump(STUDY).replace("lr: '1e-2'", "lr: 1e-2"))
    assert {trial.train.lr for trial in study.trials()} == {0.01}


def test_a_name_too_long_for_a_file_is_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as refused:
        _load(tmp_path, yaml.safe_dump(STUDY | {"tuned": "x" * 10_000}))
    assert len(str(refused.value)) < 1000


def test_a_refusal_names_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    layers = STUDY["model"]["engram"] | {"layers": list(range(1000, 1300))}
    with pytest.raises(ConfigError) as refused:
        _load(tmp_path, yaml.safe_dump(STUDY | {"model": STUDY["model"] | {"engram": layers}}))
    assert str(refused.value).count("field `") == 10
    assert "; and 290 more" in str(refused.value)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("modle", {}, ["unknown field `modle`", "did you mean `model`"]),
        ("rh", 0.5, ["unknown field `rh`", "did you mean `rho`"]),
        ("run.cpu_per_trial", 1, ["unknown field `run.cpu_per_trial`", "did you mean `cpus_per_trial`"]),
        ("data.vocabsize", 300, ["unknown field `data.vocabsize`", "did you mean `vocab_size`"]),
        ("data.vocab_size", "\uff11\uff10\uff12\uff14", ["(U+FF11) is not `1`"]),
        ("model.w\uff49dth", 64, ["unknown field", "(U+FF49) is not `i`"]),
        ("budget.tokens", "\u201c500k\u201d", ['(U+201C) is not `"`']),
        ("model.moe.topk", 2, ["unknown field `model.moe.topk`", "did you mean `top_k`"]),
        ("model.engram.rowdim", 8, ["unknown field `model.engram.rowdim`", "did you mean `row_dim`"]),
        ("budget.total_parms", 1, ["unknown field `budget.total_parms`", "did you mean `total_params`"]),
        ("train.zzz", 1, ["unknown field `train.zzz`", "known here", "weight_decay"]),
        ("train.learning_rate", 1, ["unknown field `train.learning_rate`", "did you mean `train.lr`?"]),
        ("learning_rate", 1, ["unknown field `learning_rate`", "did you mean `train.lr`?"]),
        ("train.batch-size", 32, ["did you mean `train.batch_tokens`, in tokens: sequences times `data.context`?"]),
        ("model.engram.n_heads", 4, ["did you mean `model.engram.heads`?"]),
        (
            "model.num_experts",
            8,
            ["did you mean `budget.total_params`, from which the number of routed experts is solved?"],
        ),
        ("data.vocab_size 300", None, ["write `vocab_size: 300`"]),
        ("data.vocab_size:300", None, ["write `vocab_size: 300`"]),
        ("model.heads", 3, ["write heads: 1, 2, 4, 8, 16, 32, or the width of a head, head_dim: 20"]),
        ("model.moe.top_k", MISSING, ["field `model.moe.top_k` is missing"]),
        ("budget", MISSING, ["field `budget` is missing"]),
        ("vary", MISSING, ["field `shares` is missing"]),
        ("study", MISSING, ["field `study` is missing"]),
        ("study", "Two Words", ["field `study`", "'Two Words'"]),
        ("model.width", "64", ["field `model.width`", "'64'"]),
        ("model.width", True, ["field `model.width`", "True"]),
        ("model.layers", 0, ["field `model.layers`", "0"]),
        ("model.width", 62, ["62", "multiple of 2 x `heads`"]),
        ("model.kv_heads", 3, ["`kv_heads` 3"]),
        ("model.engram.layers", [4], ["engram.layers", "[4]"]),
        ("model.engram.orders", [3, 2], ["`orders`", "[3, 2]"]),
        ("model.engram.orders", [1, 2], ["model.engram.orders", "1"]),
        ("model.engram.conv", "yes please", ["model.engram.conv"]),
        ("model.engram.fusion", "per_branch", ["`engram.fusion` is per_branch", "pre_norm", "leave `fusion` out"]),
        ("model.engram.fusion", "per-branch", ["model.engram.fusion", "did you mean `per_branch`?"]),
        ("model.residual", "hyper-connections", ["model.residual", "did you mean `hyper_connections`?"]),
        ("model.residual", "prenorm", ["model.residual", "did you mean `pre_norm`?"]),
        ("model.residual", "mhc", ["model.residual", "static, hyper_connections, manifold or gated"]),
        ("model.residual", ["static"], ["model.residual"]),
        ("model.hyper_connections", True, ["did you mean `model.residual`?"]),
        ("model.n_streams", 4, ["did you mean `model.streams`?"]),
        ("model.streams", 4, ["`streams` is 4", "`residual: pre_norm` has one stream", "leave `streams` out"]),
        ("model.streams", 0, ["model.streams", "0", "at least 2"]),
        ("model.streams", 1, ["model.streams", "1", "at least 2"]),
        ("model.streams", 2.5, ["model.streams", "2.5", "whole number"]),
        ("model.moe.leading_dense", 3, ["leading_dense", "3"]),
        ("model.moe.gate", "tanh", ["model.moe.gate", "'tanh'", "sigmoid"]),
        ("budget.total_params", "1.2 MB", ["budget.total_params", "1.2 MB", "1.24M"]),
        ("budget.active_params", "2M", ["2,000,000", "1,240,000"]),
        ("budget.tokens", 0, ["budget.tokens", "0"]),
        ("budget.tokens", 100, ["100", "context"]),
        ("budget.tolerance", "50%", ["budget.tolerance"]),
        ("train.batch_tokens", 2000, ["2,000", "multiple of `data.context` 128"]),
        ("train.lr", 0, ["train.lr"]),
        ("train.lr", True, ["train.lr", "True"]),
        ("train.warmup", "120%", ["train.warmup"]),
        ("train.schedule", "linear", ["train.schedule", "'linear'"]),
        ("data.corpus", "files", ["files", "globs"]),
        ("data.corpus", "hub", ["dataset", "revision"]),
        ("vary", {"rho": [1.5]}, ["rho", "1.5", "between 0"]),
        ("vary", {"rho": [-0.1]}, ["rho", "-0.1"]),
        ("vary", {"rho": [True]}, ["rho", "True"]),
        ("vary", {"rho": ["half"]}, ["rho", "'half'", "dense"]),
        ("vary", {"rho": 0.5}, ["vary"]),
        ("vary", {"shares": [{"moe": 0.5, "engram": 0.4}]}, ["sum to 0.9", "sum to 1"]),
        ("vary", {"shares": [{"moe": 0.5, "pkn": 0.5}]}, ["'pkn'", "did you mean `pkm`?"]),
        ("vary", {"shares": [{"moe": 0.5, "pkm": 0.5}]}, ["0.5 to pkm", "add `model.pkm`"]),
        ("vary", {"shares": [{"moe": 1.5, "engram": -0.5}]}, ["shares"]),
        ("vary", {"rho": [0.5], "model.engram": [None]}, ["rho", "memory"]),
        ("vary", {"shares": [{"moe": 0.5, "engram": 0.5}], "model.engram": [None]}, ["engram", "add `model.engram`"]),
        ("vary", {"rho": [0.5], "model.moe.topk": [1]}, ["unknown field `model.moe.topk`", "top_k"]),
        ("vary", {"rho": [0.5], "train.lr.x": [1]}, ["train.lr", "group"]),
        ("vary", {"rho": [0.5], "seed": [-1]}, ["seed", "-1"]),
    ],
)
def test_a_refusal_names_field_value_and_remedy(tmp_path: Path, path: str, value: Any, words: list[str]) -> None:
    message = _refused(tmp_path, _with(path, value))
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("answer", ["yes", "on", "true"])
def test_yaml_booleans_are_not_shares(tmp_path: Path, answer: str) -> None:
    """YAML 1.1 reads `yes` as true, and Python reads true as 1."""
    text = yaml.safe_dump(_with("vary", MISSING)) + f"rho: {answer}\n"
    assert "rho" in _refused(tmp_path, text)


def test_rho_and_shares_exclude_each_other(tmp_path: Path) -> None:
    both = _with("vary", MISSING) | {"rho": 0.5, "shares": {"moe": 1.0}}
    assert "not both" in _refused(tmp_path, both)


@pytest.mark.parametrize("vary", [[], {"seed": []}, [{"rho": [1.0]}, {"rho": []}]])
def test_an_axis_without_values_is_refused(tmp_path: Path, vary: Any) -> None:
    """Otherwise a study without a single trial would be accepted, and nothing in it checked."""
    assert "vary" in _refused(tmp_path, _with("vary", vary))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "just text",
        "study: [",
        "a: b: c",
        "\tx: 1",
        "? {a: 1}\n: 2",
        "&a [*a]",
        "%YAML 9\n---\n",
        "a: !!int x",
    ],
)
def test_what_is_no_mapping_of_fields_is_refused(tmp_path: Path, text: str) -> None:
    _refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("\tx: 1", "indent by spaces"),
        ("study: [", "is not closed"),
        ("study: a: b", "between quotes"),
        ("study: *a", "name it before by `&`"),
        ("study: {a: 1 b: 2}", "a comma is missing"),
        ("study: a\nx y z\n", "write `x: y z`"),
        ("", "this file holds nothing"),
    ],
)
def test_what_is_no_yaml_is_refused_with_a_remedy(tmp_path: Path, text: str, remedy: str) -> None:
    assert remedy in _refused(tmp_path, text)


def test_objects_are_never_built_from_yaml(tmp_path: Path) -> None:
    marker = tmp_path / "built"
    for tag in (
        f"!!python/object/apply:pathlib.Path.touch [{marker}]",
        "!!python/object:sparsemem.config.Run {}",
        "!!python/name:os.system",
    ):
        assert "not valid YAML" in _refused(tmp_path, f"study: x\nquestion: {tag}\n")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "value", "remedy"),
    [
        ("data.files", "mytext.txt", "write a list, such as files: [mytext.txt]"),
        ("data.corpus", "mytext.txt", "write corpus: files, and files: [mytext.txt]"),
        ("data.context", "1M", "such as context: 1000000"),
        ("data.context", "128", "without a unit or quotes, such as context: 128"),
        ("data.mask_document_start", "maybe", "such as mask_document_start: true"),
        ("study", "My Study!", "such as study: my-study"),
        ("study", 2024, "study: '2024'"),
        ("analysis", "memory", "did you mean `memories`?"),
        ("train.lr", "2,5e-3", "did you mean 2.5e-3?"),
        ("train.lr", True, "such as 0.01"),
        ("train.betas", 0.9, "such as betas: [0.9, 0.95]"),
        ("vary", {"rho": [50]}, "for 50% write 0.5"),
        ("train.schedule", "cosin", "did you mean `cosine`?"),
        ("train.warmup", 2, "such as 0.02, or 2%"),
        ("train.betas", [0.9, 0.95, 0.99], "write 2 values, not 3"),
        ("budget.tokens", "40k tokens", "did you mean 40k?"),
        ("budget.tokens", "1,000,000", "did you mean 1000000?"),
        ("budget.tokens", "30m", "did you mean 30M?"),
        ("budget.tokens", -5, "write more than 0"),
        ("model.heads", 0, "write at least 1"),
        ("model.moe", 50, "such as moe: {expert_width: 48, top_k: 2}"),
        ("model.expert_width", 48, "did you mean `model.moe.expert_width`?"),
        ("tokens", "40k", "did you mean `budget.tokens`?"),
        ("vary", "rho", "such as vary: {rho: "),
        ("vary", {"rho": [0.5], "seed": [0, 1, 0]}, "field `vary.seed` has 0 twice; write each value once"),
        ("vary", {"shares": [{"moe": 0.5, "engram": 0.6}]}, "lower one of them by 0.1"),
    ],
)
def test_a_refusal_says_what_to_write(tmp_path: Path, path: str, value: Any, remedy: str) -> None:
    message = _refused(tmp_path, _with(path, value))
    assert remedy in message


def test_a_point_is_named_only_where_it_matters(tmp_path: Path) -> None:
    assert "at the point" not in _refused(tmp_path, _with("train.lr", "fast"))
    assert "at the point" in _refused(tmp_path, _with("vary", {"train.lr": ["fast"]}))


def _groups(group: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A group of fields and all groups inside it."""
    yield group
    for field in group.model_fields.values():
        if inner := _group_of(field.annotation):
            yield from _groups(inner)


def _group_of(annotation: Any) -> type[BaseModel] | None:
    kinds = [annotation, *typing.get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


@pytest.mark.parametrize("group", list(dict.fromkeys(_groups(Trial))), ids=lambda group: group.__name__)
def test_each_field_of_a_group_is_asked_for_with_an_example(group: type[BaseModel]) -> None:
    """A list and a group that are given as one value, and every required field that is missing."""
    for name, field in group.model_fields.items():
        is_list = any(
            typing.get_origin(kind) is tuple for kind in (field.annotation, *typing.get_args(field.annotation))
        )
        if (_group_of(field.annotation) or is_list) and group is not Trial:
            with pytest.raises(ConfigError) as refused, named_errors("", group, given={}):
                group.model_validate({name: 7})
            example = (
                str(refused.value)
                .split(f"field `{name}` has the value 7: ")[1]
                .split(f"such as {name}: ")[1]
                .split("; ")[0]
            )
            assert isinstance(yaml.safe_load(example), list if is_list else dict), (name, example)
    if required := [name for name, field in group.model_fields.items() if field.is_required()]:
        with pytest.raises(ConfigError) as refused, named_errors("", group, given={}):
            group.model_validate({"shares": {}} if group is Trial else {})
        assert [
            name
            for name in required
            if f"`{name}` is missing; add {name}: " not in str(refused.value) and name != "shares"
        ] == []


def test_what_other_trainers_call_a_field_is_no_name_of_ours_and_means_one() -> None:
    groups = {*_groups(Study), *_groups(Trial)}
    assert not OURS.keys() & {name for group in groups for name in group.model_fields}
    assert set(COUNTED) <= set(OURS.values())
    for path in OURS.values():
        group: Any = Trial if path.split(".")[0] in Trial.model_fields else Study
        for name in path.split("."):
            assert group is not None
            assert name in group.model_fields, path
            group = _group_of(group.model_fields[name].annotation)


def test_files_that_cannot_be_read_are_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "allocation.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such file.*allocation\.yaml"):
        load_study(tmp_path / "alocation.yaml")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file; there are .*allocation\.yaml$"):
        load_study(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_study(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("study: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(tmp_path / "latin.yaml")


def test_a_study_that_is_not_there_is_looked_for_among_the_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "license.yaml").write_text("")
    for wrong, said in (
        ("licence.yaml", "did you mean sweeps/license.yaml?"),
        ("elsewhere/x.yaml", "there are sweeps/license.yaml"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_study(wrong)
        assert str(refused.value) == f"{wrong}: no such file; {said}"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        *(
            ("mixd.txt", "mixed.txt"),
            ("mixed.text", "mixed.txt"),
            ("corps/mixd.txt", "corpus/mixed.txt"),
            ("corps/*.txt", "corpus/*.txt"),
        ),
        *(("corps/*.csv", ""), ("abc.txt", ""), (".", ""), ("corpus", ""), ("x" * 5000, "")),
        ("here.txt", "../here.txt"),  # written from the working folder on
    ],
)
def test_the_file_that_was_meant_is_found_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, near: str
) -> None:
    (tmp_path / "mine" / "corpus").mkdir(parents=True)
    for name in ("mixed.txt", "mixed.yaml", "corpus/mixed.txt", "../here.txt"):
        (tmp_path / "mine" / name).touch()
    monkeypatch.chdir(tmp_path)
    assert nearest_path(wrong, Path("mine")) == near


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_vary_spans_a_grid_in_the_order_of_its_axes(tmp_path: Path) -> None:
    trials = _load(tmp_path, STUDY).trials()
    assert [(trial.rho, trial.seed) for trial in trials] == [(1, 0), (1, 1), (0.5, 0), (0.5, 1), (0, 0), (0, 1)]
    assert len({trial.id for trial in trials}) == 6
    assert trials[0].budget.total_params == 1_240_000


TPP = "budget.tokens_per_active_param"


def test_tokens_for_each_active_parameter_are_the_same_trial_as_their_number(tmp_path: Path) -> None:
    plain = {key: STUDY["budget"][key] for key in ("total_params", "active_params", "tolerance")}
    ids = [_trial(budget=plain | {"tokens": tokens}).id for tokens in (540_000, 2_025_000)]
    assert [_trial(budget=plain | {"tokens_per_active_param": each}).id for each in (4, "15")] == ids
    assert _trial(budget=plain | {"tokens_per_active_param": 0.0333333}).budget.tokens == 4500
    study = STUDY | {"budget": plain, "vary": {TPP: [4, 15], "rho": [0.5]}}
    assert [trial.id for trial in _load(tmp_path, study).trials()] == ids
    assert _load(tmp_path, study).axes == ["budget.tokens", "rho"]
    varied = STUDY | {"vary": {TPP: [4, 15], "rho": [0.5]}}  # in place of the base's `tokens`
    assert [trial.id for trial in _load(tmp_path, varied).trials()] == ids
    assert [trial.id for trial in _load(tmp_path, varied, **{"vary.budget.tokens": ["540k"]}).trials()] == ids[:1]
    ladder = STUDY | {"budget": [plain | {"tokens_per_active_param": each} for each in (4, 15)], "vary": {"rho": [0.5]}}
    assert [trial.id for trial in _load(tmp_path, ladder).trials()] == ids
    assert _load(tmp_path, STUDY, **{TPP: 4}).trials()[0].budget.tokens == 540_000
    assert _trial(budget=plain | {"tokens_per_active_param": 4}).at([TPP]) == {TPP: 4.0}


def test_points_may_be_tuned_by_tokens_for_each_active_parameter(tmp_path: Path) -> None:
    study = STUDY | {
        "vary": {TPP: [4, 15], "rho": [0.5]},
        "tune": {"search": {"train.lr": {"choices": [0.01, 0.02]}}, "per": [TPP]},
    }
    assert [trial.at(_load(tmp_path, study).tune.per) for trial in _load(tmp_path, study).trials()] == [
        {TPP: 4.0},
        {TPP: 15.0},
    ]
    winners = [{"at": {TPP: ratio}, "values": {"train.lr": rate}} for ratio, rate in ((4.0, 0.01), (15.0, 0.02))]
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({"study": "a", "winners": winners}))
    found = _load(tmp_path, {**study, "tuned": "tuned.yaml"} | {"tune": None}).trials()
    assert [trial.train.lr for trial in found] == [0.01, 0.02]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (TPP, 4, ["`tokens` '500k' and `tokens_per_active_param` 4 both say how long to train; leave out one"]),
        (
            "budget",
            {"total_params": "1M", "active_params": "135k", "tokens_per_active_param": 0},
            ["is 0; write a number above 0"],
        ),
        (
            "budget",
            {"total_params": "1M", "active_params": "135k", "tokens_per_active_param": "4x"},
            ["is '4x'; write a number above 0"],
        ),
        (
            "budget",
            {"total_params": "1M", "active_params": "13 5k", "tokens_per_active_param": 4},
            ["`budget.active_params`", "'13 5k'"],
        ),
        (
            "budget",
            {"total_params": "1M", "active_params": "135k", "tokens_per_active_params": 4},
            ["mean `tokens_per_active_param`"],
        ),
        ("budget", {"total_params": "1M", "active_params": "135k"}, ["field `budget.tokens` is missing"]),
        ("vary", {TPP: [4], "budget.tokens": ["1M"]}, ["vary.budget.tokens", TPP, "leave out one of them"]),
        (
            "vary",
            {"rho": [1.0], "shares": [{"moe": 1.0}]},
            ["`vary.rho` stands beside `vary.shares`, which sets the same"],
        ),
    ],
)
def test_a_length_is_said_once(tmp_path: Path, path: str, value: Any, words: list[str]) -> None:
    message = _refused(tmp_path, _with(path, value))
    assert all(word in message for word in words), message


def test_what_is_varied_in_one_way_is_not_set_in_the_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`--set budget\.tokens` would change nothing"):
        _load(tmp_path, STUDY | {"vary": {TPP: [4, 15]}}, **{"budget.tokens": "1M"})
    ladder = [STUDY["budget"] | {"tokens": each} for each in ("1M", "2M")]
    for listed in (STUDY | {"budget": ladder}, STUDY | {"vary": {"budget": ladder}}):
        with pytest.raises(ConfigError, match=r"`--set budget\.tokens` would change nothing: .* several of `budget`"):
            _load(tmp_path, listed, **{"budget.tokens": "3M"})


def test_several_grids_are_united_and_a_common_point_is_one_trial(tmp_path: Path) -> None:
    grids = [{"rho": [1.0, "50%"], "seed": [0]}, {"rho": [0.5, "dense"], "seed": [0, 1], "train.lr": [0.01, "2e-2"]}]
    trials = _load(tmp_path, _with("vary", grids)).trials()
    assert len(trials) == 2 + 8 - 1  # the grids meet in rho 0.5, seed 0, lr 0.01
    assert trials[1].rho == 0.5
    assert sum(trial.rho is None for trial in trials) == 4


def test_trials_leave_the_study_as_it_was_written(tmp_path: Path) -> None:
    """A value of one axis that another axis reaches into must not carry over to the next grid."""
    other = {"layers": [1], "heads": 4, "row_dim": 8}
    grids = [
        {"rho": [0.5], "model.engram": [other], "model.engram.heads": [2]},
        {"rho": [0.5], "model.engram": [other]},
    ]
    study = _load(tmp_path, _with("vary", grids))
    trials = study.trials()
    assert [trial.model.engram and trial.model.engram.heads for trial in trials] == [2, 4]
    assert study.vary[1]["model.engram"][0] == other
    assert study.vary[0]["model.engram"][0] == other


def test_shares_and_rho_are_two_ways_to_write_one_trial() -> None:
    assert _trial(shares={"moe": 0.5, "engram": 0.5}).id == _trial().id
    assert _trial(shares={"moe": 1, "engram": 0}).id == _trial(rho=1).id == _trial(rho="100%").id
    assert _trial(shares={}).rho is None
    assert _trial(shares={"engram": 1.0}).rho == _trial(rho=0).rho == 0


def test_overrides_are_set_before_the_trials_are_made(tmp_path: Path) -> None:
    study = _load(tmp_path, STUDY, **{"budget.tokens": "1M", "run.max_failures": 0, "vary.seed": [5]})
    assert {(trial.budget.tokens, trial.seed) for trial in study.trials()} == {(1_000_000, 5)}
    assert study.run.max_failures == 0
    with pytest.raises(ConfigError, match=r"budget\.tokns"):
        _load(tmp_path, STUDY, **{"budget.tokns": 1})


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_id_of_a_trial_is_what_it_was() -> None:
    """Golden: results are found again by it."""
    assert _trial().id == "7478d22d261d"


@pytest.mark.parametrize("path", ["study", "question", "run.max_failures", "run.cpus_per_trial"])
def test_names_questions_and_placement_are_not_part_of_the_id(tmp_path: Path, path: str) -> None:
    changed = _with(path, {"study": "other", "question": "Other?"}.get(path, 3))
    assert [trial.id for trial in _load(tmp_path, changed).trials()] == [
        trial.id for trial in _load(tmp_path, STUDY).trials()
    ]


@pytest.mark.parametrize(
    ("path", "same"),
    [
        ("budget.total_params", 1_240_000),
        ("train.lr", 0.01),
        ("train.warmup", 0.02),
        ("train.table_lr_factor", 5.0),
        ("budget.tolerance", 0.01),
    ],
)
def test_ways_to_write_a_value_do_not_change_the_id(tmp_path: Path, path: str, same: Any) -> None:
    assert [trial.id for trial in _load(tmp_path, _with(path, same)).trials()] == [
        trial.id for trial in _load(tmp_path, STUDY).trials()
    ]


@pytest.mark.parametrize(
    ("path", "other"), [("data.context", 64), ("model.moe.top_k", 3), ("budget.tokens", "501k"), ("train.lr", 0.02)]
)
def test_every_setting_of_a_trial_is_part_of_its_id(tmp_path: Path, path: str, other: Any) -> None:
    before, after = ({trial.id for trial in _load(tmp_path, raw).trials()} for raw in (STUDY, _with(path, other)))
    assert not before & after


def test_settings_of_a_memory_that_is_not_built_do_not_change_the_id() -> None:
    other = copy.deepcopy(STUDY["model"])
    other["engram"]["heads"] = 2
    without = {key: value for key, value in other.items() if key != "engram"}
    assert _trial(rho=1).id == _trial(rho=1, model=other).id == _trial(rho=1, model=without).id
    assert _trial(rho="dense").id == _trial(rho="dense", model=without).id
    assert _trial(rho=0.5).id != _trial(rho=0.5, model=other).id


def test_a_trial_survives_its_own_dump() -> None:
    """`trial.yaml` is the dump; a worker reads the same trial, with the same id, from it."""
    for rho in (1, 0.5, 0, "dense", 0.15, 1 / 3):
        trial = _trial(rho=rho)
        again = Trial.model_validate(yaml.safe_load(yaml.safe_dump(trial.model_dump(mode="json"))))
        assert again == trial
        assert again.id == trial.id


def test_a_field_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("study: a\nvary: {rho: [1.0], rho: [0.5]}\n")
    with pytest.raises(ConfigError, match=r"study.yaml: field `vary.rho` stands twice \(line 2\)"):
        load_study(path)


def test_an_override_that_an_axis_would_hide_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("study: a\nvary: {budget.tokens: [1M, 2M]}\n")
    with pytest.raises(ConfigError, match=r"--set 'vary.budget.tokens=\[50k\]'"):
        load_study(path, {"budget.tokens": "50k"})


def test_an_axis_without_a_list_is_refused_in_the_words_of_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("study: a\nvary: {rho: 0.5}\n")
    with pytest.raises(
        ConfigError, match=r"field `vary.rho` has the value 0.5: write a list of values, such as \[0.5\]"
    ):
        load_study(path)


# --- memories of the product-key family -------------------------------------------------------------------------------

V2 = {"key_dim": 16, "top_m": 8, "value_dim": 16, "pre_value_dim": 16}


@pytest.mark.parametrize(
    ("pool", "fields", "words"),
    [
        (
            "ultramem_v2",
            {**V2, "rows": 4099},
            ["`ultramem_v2.rows` 4,099", "product of two key counts", "4,096 (64 x 64)", "4,160 (65 x 64)"],
        ),
        ("ultramem_v2", {**V2, "rows": 64, "top_m": 65}, ["`ultramem_v2.top_m` 65", "64 candidate rows"]),
        ("ultramem_v2", {**V2, "value_dim": 15}, ["`ultramem_v2.value_dim` 15", "multiple", "cores` 2"]),
        ("ultramem_v2", {**V2, "virtual_tables": 3}, ["`virtual_tables` 3", "square"]),
        ("ultramem_v2", {**V2, "layers": [2, 4]}, ["[2, 4]", "beyond the 3 blocks"]),
        ("ultramem_v2", {**V2, "layers": []}, ["`layers`", "rising"]),
        (
            "ultramem_v2",
            {**V2, "layers_per_table": 2},
            ["`ultramem_v2.layers_per_table` 2", "3 memory layers [1, 2, 3]"],
        ),
        ("ultramem_v2", {**V2, "softmax": True}, ["`cores` 2", "softmax: false"]),
        ("ultramem_v2", {**V2, "tucker_rank": 0, "query_per_rank": False}, ["`cores` 2", "tucker_rank"]),
        ("ultramem_v2", {**V2, "tucker_rank": 0}, ["`query_per_rank`", "tucker_rank"]),
        ("ultramem_v2", {**V2, "pre_values": "none"}, ["`pre_value_dim` 16", "pre_values"]),
        ("ultramem_v2", {**V2, "topm": 3}, ["unknown field `model.ultramem_v2.topm`", "top_m"]),
        ("ultramem", {"key_dim": 16, "heads": 3, "value_dim": 32}, ["`heads` 3", "even"]),
        (
            "ultramem",
            {"key_dim": 16, "value_dim": 32, "layers": [2], "skip": 2},
            ["`ultramem.skip` 2", "beyond the 3 blocks"],
        ),
        (
            "ultramem",
            {"key_dim": 16, "value_dim": 32, "layers": [1], "skip": 1, "placement": "replace"},
            ["`skip` 1", "parallel"],
        ),
        ("pkm", {"layers": [2], "top_m": 8}, ["`model.pkm.key_dim` is missing"]),
        (
            "pkm",
            {"layers": [2], "key_dim": 8, "value_dim": 32},
            ["`pkm.value_dim` 32", "width` 64", "projection: linear"],
        ),
        ("pkm", {"key_dim": 8}, ["leave no block", "placement: parallel"]),
        ("pkm", {"key_dim": 8, "layers": [2], "rows": 64}, ["`rows` 64", "placement: parallel"]),
        ("ngram_embedding", {"orders": [3, 2]}, ["`orders`", "[3, 2]"]),
    ],
)
def test_a_memory_that_cannot_be_built_is_refused_by_name(
    tmp_path: Path, pool: str, fields: dict[str, Any], words: list[str]
) -> None:
    message = _refused(tmp_path, _with(f"model.{pool}", fields) | {"vary": {"shares": [{"moe": 0.5, pool: 0.5}]}})
    assert [word for word in words if word not in message] == [], message


def test_two_memories_cannot_replace_the_same_feed_forward(tmp_path: Path) -> None:
    raw = _with("model.pkm", {"key_dim": 8, "layers": [2]})
    raw["model"]["peer"] = {"key_dim": 8, "layers": [1, 2]}
    message = _refused(tmp_path, raw | {"vary": {"shares": [{"pkm": 0.5, "peer": 0.5}]}})
    assert "`pkm` and `peer` both replace the feed-forward of block 2" in message


def test_a_memory_of_given_rows_takes_no_share(tmp_path: Path) -> None:
    message = _refused(tmp_path, _with("model.engram.rows", 4096) | {"vary": {"shares": [{"moe": 0.5, "engram": 0.5}]}})
    assert "0.5 to engram" in message
    assert "on top of the budget" in message
    study = _load(tmp_path, _with("model.engram.rows", 4096) | {"vary": {"rho": [1]}})
    assert study.trials()[0].model.on_top == ("engram",)  # kept although its share is none


def test_each_published_design_is_a_point_in_the_fields_of_one(tmp_path: Path) -> None:
    """UltraMemV2 written out field by field over PKM is UltraMemV2, so that a ladder can go from one to the other."""
    fields = {**UltraMemV2(**V2).model_dump()}
    assert PKM(**fields).model_dump() == fields
    differing = {
        name
        for name, value in PKM(key_dim=16).model_dump().items()
        if value != UltraMemV2(key_dim=16).model_dump()[name]
    }
    changes = {
        "placement",
        "heads",
        "query_per_rank",
        "norm",
        "softmax",
        "tucker_rank",
        "cores",
        "virtual_tables",
        "projection_per_table",
    }
    assert differing == changes | {"projection", "pre_values", "init", "value_rate"}


def test_an_id_depends_on_no_field_that_keeps_its_default() -> None:
    """So a release may add fields without giving every finished trial a new name."""
    assert _trial(train=STUDY["train"] | {"weight_decay": 0.1}).id == _trial().id
    assert _trial(train=STUDY["train"] | {"weight_decay": 0.2}).id != _trial().id


def test_a_residual_is_the_same_trial_whether_its_default_is_written_or_not() -> None:
    assert _trial(model=STUDY["model"] | {"residual": "pre_norm"}).id == _trial().id
    gated = STUDY["model"] | {"residual": "gated"}
    assert _trial(model=gated | {"streams": 4}).id == _trial(model=gated).id
    assert len({_trial(model=gated | {"streams": n}).id for n in (2, 3, 4)} | {_trial().id}) == 4


def test_the_defaults_that_ids_rest_on_have_not_changed() -> None:
    """An id stands for fields that differ from these. A new field joins the file; a changed default would give two
    trials one name.
    """
    models = (Data, MoE, Engram, NgramEmbedding, PKM, MemoryPlus, PEER, UltraMem, UltraMemV2, Model, Budget, Train)
    fields = ((model.__name__, name, field) for model in models for name, field in model.model_fields.items())
    defaults = {
        f"{model}.{name}": json.loads(json.dumps(field.get_default()))
        for model, name, field in fields
        if not field.is_required()
    }
    assert defaults == json.loads(Path(__file__).with_name("trial_defaults.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("address", ["s3://bucket/a#b", "file:///mnt/a#b/c", "s3://bucket/a#"])
def test_an_address_is_not_cut_at_its_number_sign(tmp_path: Path, address: str) -> None:
    assert "write # as %23" in _refused(tmp_path, _with("run", {"storage": address}))
    assert _load(tmp_path, _with("run", {"storage": address.replace("#", "%23")})).run.storage == address.replace(
        "#", "%23"
    )
    assert _load(tmp_path, _with("run", {"storage": "/mnt/a#b"})).run.storage == "/mnt/a#b"
