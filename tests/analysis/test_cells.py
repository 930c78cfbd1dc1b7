"""Nothing is pooled, chosen or paired across what a study compares: every value of every field has a curve
of its own.
"""

from __future__ import annotations

import itertools
import json
import typing
from collections.abc import Iterator
from typing import Any

import pandas as pd
from pydantic import BaseModel

from analysis.cells import RATE, split_cells
from sparsemem.config import MEMORY_POOLS, ConfigError, Study, Trial, changed
from sparsemem.mechanisms.product_key import PRODUCT_KEY

MEMORY = {
    **{"layers": [1, 2], "key_dim": 16, "placement": "parallel", "heads": 2},
    **{"tucker_rank": 2, "cores": 1, "softmax": False, "pre_values": "linear", "projection": "linear"},
}
"""One design that lets each field of it be another."""
BASE: dict[str, Any] = {
    "data": {"files": ["a.txt"], "tokenizer": "t.json", "dataset": "owner/name", "revision": "main"},
    "model": {
        **{"layers": 4, "width": 64, "heads": 4, "engram": {"layers": [2]}},
        "moe": {"expert_width": 48, "top_k": 2, "leading_dense": 1},
        **{"ngram_embedding": {}, "pkm": MEMORY, "memory_plus": MEMORY},
        **{"peer": MEMORY, "ultramem": MEMORY, "ultramem_v2": MEMORY},
    },
    "budget": {"total_params": "1.24M", "active_params": "135k", "tokens": "200k"},
    "train": {"batch_tokens": 2048, "lr": 2.5e-3},
}  # fmt: skip
GUESSES = (
    None,
    False,
    True,
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    64,
    300,
    4096,
    0.001,
    0.07,
    0.5,
    200_000,
    400_000,
    2_000_000,
    "a",
    "b",
)
LISTS = ([2], [3], [2, 3], ["a"], ["b"], [0.5, 0.5], [0.9, 0.99])
NOT_VARIED = ("budget.flops_per_token", *(f"model.{pool}.rows" for pool in MEMORY_POOLS))
"""A check that no identity depends on, and rows, which leave a memory without a share."""


NEEDED: dict[str, dict[str, Any]] = {
    "data.validation_files": {"data.corpus": "files"},
    "data.document_separator": {"data.corpus": "files"},
    "model.streams": {"model.residual": "static"},
    "model.engram.fusion": {"model.residual": "static"},
    **{f"model.{pool}.conv_reset_at_document_end": {f"model.{pool}.query_conv": 3} for pool in PRODUCT_KEY},
}
"""Other fields without which a field has but one value."""


def leaves(group: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a trial that holds no group: dotted path, annotation."""
    for name, field in group.model_fields.items():
        inner = [each for each in (field.annotation, *typing.get_args(field.annotation)) if isinstance(each, type)]
        models = [each for each in inner if issubclass(each, BaseModel)]
        if models:
            yield from leaves(models[0], f"{path}{name}.")
        elif path:  # `shares` and `seed` are what the points are
            yield f"{path}{name}", field.annotation


def shares_of(path: str) -> list[dict[str, float]]:
    """Pure experts, a mixture with a memory of the field's own kind, and one with another kind at the same share."""
    own = path.split(".")[1] if path.split(".")[1] in MEMORY_POOLS else "engram"
    other = "ngram_embedding" if own != "ngram_embedding" else "engram"
    return [{"moe": 1.0}, {"moe": 0.5, own: 0.5}, {"moe": 0.5, other: 0.5}]


def two_values(path: str, annotation: Any) -> list[Any]:
    """Values of a field that make two trials of one."""
    trial = changed(Trial.model_validate(BASE | {"shares": shares_of(path)[1]}), NEEDED.get(path, {}))
    literals = [value for each in (annotation, *typing.get_args(annotation)) for value in typing.get_args(each)]
    found: dict[str, Any] = {}
    for value in (*(value for value in literals if isinstance(value, str)), *GUESSES, *LISTS):
        try:
            found.setdefault(changed(trial, {path: value}).id, value)
        except ConfigError:
            continue
    return list(found.values())[:2]


def planned(study: Study) -> pd.DataFrame:
    """The study's trials as they stand in `trials.csv`, every loss another; sizes, which no cell depends on, are left
    out.
    """
    rows: dict[str, dict[str, Any]] = {}
    for _, trial in study.points():
        values = {
            path: json.dumps(value) if isinstance(value, dict | list) else value
            for path, value in trial.at(study.axes).items()
        }
        row = {
            "trial_id": trial.id,
            "status": "finished",
            "seed": trial.seed,
            "rho": trial.rho,
            "tokens": trial.budget.tokens,
        }
        row |= {f"share_{pool}": trial.shares.get(pool, 0.0) for pool in ("moe", *MEMORY_POOLS)}
        rows.setdefault(trial.id, row | {path: value for path, value in values.items() if path != "seed"})
    return pd.DataFrame(list(rows.values())).assign(val_loss=lambda frame: 3 + 0.01 * frame.index, sparse_params=1)


def drawn_fields() -> dict[str, Any]:
    """All fields; of those that the product-key memories share, each from one of the memories."""
    fields, kinds = dict(leaves(Trial)), itertools.cycle(PRODUCT_KEY)
    shared = dict.fromkeys(
        path.split(".")[2] for path in fields if path.startswith(tuple(f"model.{pool}." for pool in PRODUCT_KEY))
    )
    own = {f"model.{next(kinds)}.{name}" for name in shared}
    return {path: kind for path, kind in fields.items() if path.split(".")[1] not in PRODUCT_KEY or path in own}


def test_every_value_of_every_field_has_a_curve_of_its_own() -> None:
    """Also of fields that are yet to come, and where an analysis says that a field makes up its axis, and
    it does not.
    """
    fields, tried = drawn_fields(), []
    for path, annotation in fields.items():
        values = two_values(path, annotation)
        if len(values) < 2:
            assert path in NOT_VARIED, f"{path}: no two values of it were found; add some to GUESSES or LISTS"
            continue
        tried.append(path)
        needed = {name: [value] for name, value in NEEDED.get(path, {}).items()}
        study = Study.model_validate(
            {"study": "drawn", **BASE, "vary": {"shares": shares_of(path), path: values} | needed}
        )
        trials = planned(study)
        for along in (lambda name: False, lambda name: True):
            cells = split_cells(trials, along=along)
            for cell in cells:
                assert cell.trials["rho"].is_unique, (
                    f"{path} {values}: several trials are one point of the curve {cell.label!r}"
                )
            labels = [cell.label for cell in cells]
            assert len(labels) == len(set(labels)), f"{path} {values}: curves of one name, {labels}"
            if path == RATE:  # its loser is named beside the winner, each kind of memory having its own
                assert [set(cell.rates[RATE]) for cell in cells] == [set(values)] * 2
            else:
                left = set(trials["trial_id"]) - {trial for cell in cells for trial in cell.trials["trial_id"]}
                assert not left, f"{path} {values}: {len(left)} trials are in no curve"
    assert len(tried) > 0.9 * len(fields)


def test_a_label_leaves_out_what_follows_from_the_others() -> None:
    """Sizes that go together are named by P_act, and a batch that goes with the tokens by these."""
    small = {"model.width": [64], "budget.active_params": ["150k"], "budget.total_params": ["2M"]}
    large = {"model.width": [128], "budget.active_params": ["600k"], "budget.total_params": ["8M"]}
    short = {"budget.tokens": ["100k"], "train.batch_tokens": [1024]}
    long = {"budget.tokens": ["400k"], "train.batch_tokens": [2048]}
    shares = {"shares": [{"moe": 1.0}, {"moe": 0.5, "engram": 0.5}]}
    vary = [size | length | shares for size in (small, large) for length in (short, long)]
    trials = planned(Study.model_validate({"study": "sizes", **BASE, "vary": vary}))
    cells = split_cells(trials)
    assert [cell.label for cell in cells] == [
        *("P_act 150k, 100k training tokens", "P_act 150k, 400k training tokens"),
        *("P_act 600k, 100k training tokens", "P_act 600k, 400k training tokens"),
    ]
    assert "model.width" in cells[0].fields  # what `fits.json` names is all


def test_memories_at_one_share_are_curves_of_their_own_and_have_the_pure_experts_in_common() -> None:
    grid = [{"moe": rho, pool: 1 - rho} for rho, pool in itertools.product((0.75, 0.5), ("engram", "ngram_embedding"))]
    study = Study.model_validate({"study": "pools", **BASE, "vary": {"shares": [{"moe": 1.0}, *grid], "seed": [0, 1]}})
    cells = split_cells(planned(study))
    assert [cell.label for cell in cells] == ["Engram", "n-gram embedding"]
    assert [sorted(cell.trials["rho"]) for cell in cells] == [[0.5, 0.5, 0.75, 0.75, 1.0, 1.0]] * 2


def test_mixes_of_two_memories_are_told_apart_by_their_proportion() -> None:
    shares = [{"moe": 0.5, "engram": part, "pkm": 0.5 - part} for part in (0.5, 0.25, 0.125, 0.127)]
    cells = split_cells(planned(Study.model_validate({"study": "mixes", **BASE, "vary": {"shares": shares}})))
    assert [cell.label for cell in cells] == [
        "Engram",
        "Engram + PKM (0.5 : 0.5)",
        "Engram + PKM (0.25 : 0.75)",
        "Engram + PKM (0.254 : 0.746)",
    ]
    assert [len(cell.trials) for cell in cells] == [1, 1, 1, 1]


def test_an_axis_of_fields_is_kept_where_it_tells_all_values_apart_and_split_where_not() -> None:
    """Rows read are `heads` times `top_m`: 1 x 16 and 2 x 8 are one point of the axis, so heads set cells apart."""
    rows = [
        {
            "trial_id": f"{heads} {top_m}",
            "status": "finished",
            "seed": 0,
            "rho": 0.0,
            "tokens": 1,
            "share_moe": 0.0,
            "share_pkm": 1.0,
        }
        | {"model.pkm.heads": heads, "model.pkm.top_m": top_m, "read": heads * top_m, "val_loss": 3.0}
        for heads, top_m in itertools.product((1, 2), (8, 16))
    ]
    trials = pd.DataFrame(rows)
    assert [cell.label for cell in split_cells(trials, ("read",), lambda name: True)] == [
        "model.pkm.heads 1",
        "model.pkm.heads 2",
    ]
    assert [cell.label for cell in split_cells(trials[1:], ("read",), lambda name: True)] == [
        "model.pkm.heads 1",
        "model.pkm.heads 2",
    ]
    assert [cell.label for cell in split_cells(trials.drop(1), ("read",), lambda name: True)] == [""]
