"""The report of a study with tuned settings says what its trials had, and which settings to doubt."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.report import summarize, write_report

POOLS = ("engram", "ngram_embedding")


def words(folder: Path) -> str:
    page = write_report(folder).read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page[page.index("<body") :]))


def tuned_study(new_points: Callable[..., Path], winners: list[dict[str, Any]], rates: list[float]) -> Path:
    points = [
        {
            "rho": rho,
            "share_moe": rho,
            "loss": 4.0,
            "train.lr": rate,
            **{f"share_{other}": (1 - rho) * (other == pool) for other in POOLS},
        }
        for pool, rate in zip(POOLS, rates, strict=True)
        for rho in (0.75, 0.5)
    ]
    train = {"batch_tokens": 256, "lr": 0.0025}
    tuned = {"study": "before", "winners": winners}
    return new_points("memories", points, described={"train": train, "tuned": tuned})


def test_a_tuned_rate_is_told_and_the_written_one_is_not(new_points: Callable[..., Path]) -> None:
    winners = [
        {"at": {"rho": 0.75}, "values": {"train.lr": 0.0071}, "val_loss": 4.01, "tried": {"train.lr": 8}},
        {"at": {"rho": 0.5}, "values": {"train.lr": 0.0093}, "tried": {"train.lr": 2}, "unbracketed": ["train.lr"]},
    ]
    page = words(tuned_study(new_points, winners, [0.0071, 0.0093]))
    assert "0.0025" not in page
    assert "Tuned before the study: train.lr 0.0071, 0.0093." in page
    assert "train.lr tuned, see Tuned settings" in page
    assert "One learning rate for every" not in page
    assert "tuned apart for each value of rho, on the held-out set itself" in page
    assert "Rates to doubt: 1 of 2 is the outermost value tried." in page
    table = page[page.index("Tuned settings", page.index("Settings") if "Tuned settings" not in page else 0) :]
    assert "0.0093" in table
    assert "train.lr is the outermost of 2 values tried" in table


def test_points_of_any_field_are_told(new_points: Callable[..., Path]) -> None:
    """Of memories the point is a mix of shares, others are text."""
    winners = [
        {"at": {"shares": {"moe": 0.5, pool: 0.5}, "train.schedule": "wsd"}, "values": {"train.lr": rate}}
        for pool, rate in zip(POOLS, (0.0071, 0.0093), strict=True)
    ]
    page = words(tuned_study(new_points, winners, [0.0071, 0.0093]))
    assert "moe 0.5, ngram_embedding 0.5" in page
    assert "tuned apart for each value of shares and train.schedule, on" in page


def test_one_tuned_rate_for_all_is_told_as_one(new_points: Callable[..., Path]) -> None:
    page = words(
        tuned_study(
            new_points, [{"at": {}, "values": {"train.lr": 0.0071}, "tried": {"train.lr": 8}}], [0.0071, 0.0071]
        )
    )
    assert "tuned once for every memory and share, on" in page
    assert "at the edge" not in page


@pytest.mark.parametrize("described", [None, {"train": {"batch_tokens": 256, "lr": 0.0025}}])
def test_an_untuned_study_says_that_one_rate_served_all(
    new_points: Callable[..., Path], described: dict[str, Any] | None
) -> None:
    points = [
        {"rho": 0.5, "share_moe": 0.5, "loss": 4.0, **{f"share_{other}": 0.5 * (other == pool) for other in POOLS}}
        for pool in POOLS
    ]
    page = words(new_points("memories", points, described=described))
    assert "One learning rate for every memory and share" in page
    assert "Tuned settings" not in page


def test_trials_that_learned_nothing_are_told(new_points: Callable[..., Path]) -> None:
    """At a rate far too high they may finish a little above the loss of equally likely tokens, here ln 4096 = 8.318."""
    points = [
        {"rho": 0.5, "share_moe": 0.5, "loss": loss, **{f"share_{other}": 0.5 * (other == pool) for other in POOLS}}
        for pool, loss in zip(POOLS, (8.4, 4.0), strict=True)
    ]
    folder = new_points("memories", points)
    page = words(folder)
    assert (
        "2 of 4 trained trials, such as 000000000000, end above, or within 0.05 nats of, the loss of equally likely "
        "tokens (8.318" in page
    )
    assert "learned nothing" in summarize(folder).splitlines()[1]
    assert "2 of 4 trials finished; 2 learned nothing." in page
    assert "its loss is that of equally likely tokens" in page
    (fit,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert all(level["loss"] < 4.1 for level in fit["levels"])  # no level of trials that learned nothing


def test_trials_that_know_token_frequencies_alone_are_told(new_points: Callable[..., Path]) -> None:
    points = [
        {
            "rho": 0.5,
            "share_moe": 0.5,
            "loss": loss,
            "train.lr": loss / 1000,
            **{f"share_{other}": 0.5 * (other == pool) for other in POOLS},
        }
        for pool, loss in zip(POOLS, (5.79, 4.0), strict=True)
    ]
    folder = new_points("memories", points)
    worst = pd.read_csv(folder / "trials.csv")["val_loss"].max()  # all but one lie below
    told = "2 of 4 finished trials, such as 000000000000"
    assert told not in words(folder)  # of an old study, where that loss is not known
    manifest = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(manifest | {"token_frequency_loss": 5.8}))
    page = words(folder)
    assert f"{told} (2 of the 2 with train.lr 0.00579)" in page
    assert "the loss of token frequencies alone (5.800 nats). They know at most which tokens are common" in page
    (folder / "data.json").write_text(json.dumps(manifest | {"token_frequency_loss": worst + 0.019}))
    assert re.search(
        r"1 of 4 finished trials, such as \w+ \(1 of the 2 with train.lr 0.00579\), end within", words(folder)
    )
    (folder / "data-0.json").write_text("{}")  # a study of several texts: whose loss that is is not known
    assert "loss of token frequencies" not in words(folder)


def test_each_doubt_of_a_tuned_rate_is_told_by_its_own_name(new_points: Callable[..., Path]) -> None:
    rate = {"train.lr": 0.01}
    winners = [
        {
            "at": {"rho": 0.75},
            "values": rate,
            "tried": {"train.lr": 8},
            "edges": ["train.lr"],
            "unbracketed": ["train.lr"],
            "seed": 0,
        },
        {
            "at": {"rho": 0.5},
            "values": rate,
            "tried": {"train.lr": 8},
            "next_tried": {"train.lr": [0.0095, 0.025]},
            "seed": 0,
        },
    ]
    page = words(tuned_study(new_points, winners, [0.01, 0.01]))
    assert "1 of 2 lies at the edge of what was searched; 1 of 2 has no value tried close to it on one side." in page
    assert "train.lr has no value tried within a factor of 2 of it on one side (next: 0.025)" in page
    assert "Seed 0 served the search and is compared too" in page


def test_seeds_are_counted_for_each_memory(new_points: Callable[..., Path]) -> None:
    """Memories at one share have one rho: five seeds of the one are no five of the other."""
    points = [
        {"rho": 0.5, "share_moe": 0.5, "loss": 4.0, **{f"share_{other}": 0.5 * (other == pool) for other in POOLS}}
        for pool in POOLS
    ]
    page = words(new_points("memories", points, seeds=5, statuses=dict.fromkeys((5, 7, 9), "failed")))
    assert "2 to 5 seeds a memory and share" in page
