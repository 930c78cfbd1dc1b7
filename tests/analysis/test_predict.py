"""Predictions of a budget: written down with what shows when they were made, and held against it only where they came
before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, split_cells, summarize, write_report
from analysis.__main__ import main
from analysis.fits.joint import fit_joint
from analysis.fits.types import Estimate
from analysis.predict import read_point
from analysis.results import Results
from analysis.studies import analyse
from analysis.studies.foretold import Compared, foretold, why_afterwards

New = Callable[..., Path]
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
BEST = {500_000: 0.6, 2_000_000: 0.5, 8_000_000: 0.4}
AT = "tokens_per_active_param=59.26"


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.predict.fit_joint", functools.partial(fit_joint, resamples=60))


def points(lengths: tuple[int, ...], **columns: Any) -> list[dict[str, Any]]:
    return [
        {"rho": share, "share_moe": share, "share_engram": 1 - share, "tokens": tokens, "budget.tokens": tokens}
        | {
            "total_params": 1_240_000,
            "active_params": 135_000,
            "loss": 4 + 0.3 * (share - BEST[tokens]) ** 2,
            **columns,
        }
        for tokens in lengths
        for share in SHARES
    ]


@pytest.fixture
def small(new_points: New) -> Path:
    """Two lengths that are trained, one that is planned."""
    return new_points("allocation", points(tuple(BEST)), statuses=dict.fromkeys(unfinished(), "pending"))


def unfinished() -> list[int]:
    each = 3 * len(SHARES)
    return [row for row in range(2 * each) if row % each >= 2 * len(SHARES)]


def finish(folder: Path, new_points: New, **ended: str) -> None:
    """The third length too; its results bear the time when they ended."""
    kept = (folder / "predictions.json").read_bytes()
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    new_points("allocation", points(tuple(BEST)))
    (folder / "predictions.json").write_bytes(kept)
    for trial in pd.read_csv(folder / "trials.csv", dtype=str)["trial_id"]:
        (folder / "trials" / trial / "result.json").write_text(json.dumps(ended))


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "predictions.json").read_text())["predictions"]


def test_a_prediction_is_written_down_with_what_shows_when_it_was_made(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(small), "--at", AT]) == 0
    assert "best share" in (said := capsys.readouterr().out)
    assert "beyond the data" in said
    (made,) = written(small)
    assert made["at"] == pytest.approx(
        {"active_params": 135_000, "tokens_per_active_param": 59.26, "sparsity": 1_240_000 / 135_000}
    )
    ledger = Results(small)
    assert sorted(made["rows"]) == sorted(ledger.finished["trial_id"]) == made["studies"][0]["finished"]
    assert len(made["studies"][0]["trials_csv_sha256"]) == 64
    assert {"made", "git_commit", "tied", "tie_width", "depth", "moved", "message"} <= made.keys()
    assert set(made["differences"]) == {"0.0", "0.2", "0.4", "0.6", "0.8"}
    main(["predict", str(small), "--at", AT])
    assert written(small)[0] == made  # nothing is replaced
    assert len(written(small)) == 2
    assert foretold(ledger, analyse(ledger).fitted) == []  # its budget has no results yet


def test_the_report_holds_a_prediction_against_what_came_after_it(small: Path, new_points: New) -> None:
    main(["predict", str(small), "--at", AT])
    finish(small, new_points, ended="2999-01-01T00:00:00+00:00")
    page = write_report(small).read_text()
    (line,) = [line for line in summarize(small).splitlines() if "made before any of its results" in line]
    assert "a hit" in line
    assert "hits" in line
    assert "extrapolation" in line
    assert "Predicted and measured" in page
    assert page.count("<td>hit</td>") + page.count("<td>miss</td>") == 7  # optimum, depth, five differences
    (found,) = analyse(Results(small)).foretold
    assert found.numbers[0].measured.value == pytest.approx(0.4, abs=0.05)


LATE = "one of the budget's"
BEFORE, AFTER = "2001-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("change", "ended", "why"),
    [
        ({}, AFTER, ""),
        ({"rows": [LATE]}, AFTER, "1 of the budget's 12 runs were among those that it was made from"),
        ({"finished": [LATE]}, AFTER, "1 of the budget's 12 runs had finished in the ledger that it was made from"),
        ({}, BEFORE, "12 of the budget's 12 runs had finished by then"),
        ({}, None, ""),  # the ledger that it was made from lists them as unfinished
        (
            {"study": "other"},
            None,
            "when the budget's runs finished is not recorded, and it was made from another ledger",
        ),
        ({"study": "other"}, AFTER, ""),
        ({"trials_csv_sha256": "own"}, AFTER, "the ledger that it was made from holds the budget's results"),
    ],
)
def test_what_may_have_known_the_results_is_no_prediction(
    new_points: New, change: dict[str, Any], ended: str | None, why: str
) -> None:
    folder = new_points("allocation", points((500_000, 8_000_000)))
    results = Results(folder)
    cell = split_cells(results.trials)[1]
    for trial in cell.trials["trial_id"]:
        (folder / "trials" / trial / "result.json").write_text(json.dumps({"ended": ended} if ended else {}))
    late = cell.trials["trial_id"].iloc[0]
    given = {name: [late] if value == [LATE] else value for name, value in change.items()}
    if given.get("trials_csv_sha256"):
        given["trials_csv_sha256"] = hashlib.sha256((folder / "trials.csv").read_bytes()).hexdigest()
    made = {"made": "2026-01-01T00:00:00+00:00", "rows": given.pop("rows", [])}
    study = {"study": "allocation", "trials_csv_sha256": "", "finished": []} | given
    assert why_afterwards(made | {"studies": [study]}, cell, results) == why


def test_a_trial_that_learned_nothing_was_there_too(small: Path, new_points: New) -> None:
    idle = [point | {"loss": 9.0 if point["tokens"] == max(BEST) else point["loss"]} for point in points(tuple(BEST))]
    folder = new_points("idle", idle, described={"analysis": "allocation"})
    main(["predict", str(folder), "--at", AT])
    (made,) = written(folder)
    assert len(made["rows"]) == 4 * len(SHARES)
    assert len(made["studies"][0]["finished"]) == 6 * len(SHARES)
    results = Results(folder)
    cell = split_cells(results.trials)[-1]
    assert not len(cell.trials)
    assert "runs had finished in the ledger that it was made from" in why_afterwards(made, cell, results)


def test_a_prediction_from_the_budget_itself_is_shown_without_hits(new_points: New) -> None:
    folder = new_points("allocation", points((500_000, 2_000_000)))
    main(["predict", str(folder), "--at", "tokens_per_active_param=14.8"])
    found = analyse(Results(folder)).foretold
    assert [each.summary().partition(": ")[2][:16] for each in found] == ["made afterwards,"]
    assert "hit" not in found[0].summary()
    assert "" not in found[0].table().rows
    assert "made afterwards, no prediction" in found[0].table().title


def test_studies_of_several_folders_make_one_law(new_study: New, new_points: New, tmp_path: Path) -> None:
    first = new_points("allocation", points((500_000, 2_000_000)))
    second = first.rename(tmp_path / "first")
    larger = points((2_000_000,), active_params=540_000, total_params=4_960_000)
    rows = pd.read_csv((third := new_points("allocation", larger)) / "trials.csv", dtype=str)
    rows.assign(trial_id="f" + rows["trial_id"].str[1:]).to_csv(third / "trials.csv", index=False)
    into = tmp_path / "new"
    at = "active_params=540k,tokens_per_active_param=15"
    assert main(["predict", str(second), str(third), "--at", at, "--into", str(into)]) == 0
    (made,) = written(into)
    assert [study["study"] for study in made["studies"]] == ["allocation", "allocation"]
    assert made["at"]["active_params"] == pytest.approx(540_000)
    assert len(made["rows"]) == 6 * len(SHARES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "active_param=540k"], "did you mean `active_params`"),
        (["--at", "tokens_per_active_param=many"], "is 'many'; write a number above 0"),
        (["--at", f"{AT},{AT}"], "stands twice"),
        (["--at", f"active_params=540k,{AT}"], "effect of `active_params` cannot be told"),
        (["--at", "active_params=135k"], "give `tokens_per_active_param`"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    small: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(small), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (small / "predictions.json").exists()


def test_several_curves_at_one_budget_are_refused(new_points: New, capsys: pytest.CaptureFixture[str]) -> None:
    both = [point | {"train.warmup": warmup} for warmup in (0.02, 0.1) for point in points((500_000, 2_000_000))]
    assert main(["predict", str(new_points("allocation", both)), "--at", AT]) == 2
    assert "has several curves at one budget (train.warmup 0.02; train.warmup 0.1)" in capsys.readouterr().err


def test_a_damaged_file_is_refused_by_name(small: Path) -> None:
    (small / "predictions.json").write_text('{"predictions": [{"made": "today"}]}')
    with pytest.raises(
        AnalysisError, match=r"predictions.json: prediction 1 is not what .* \(field `at`\); set the file aside"
    ):
        write_report(small)


def test_units_are_read_as_people_write_them() -> None:
    assert read_point("active_params=540k, tokens_per_active_param=15") == {
        "active_params": 540_000,
        "tokens_per_active_param": 15,
    }


def test_a_hit_is_a_difference_that_both_intervals_explain() -> None:
    def estimate(value: float, half: float) -> Estimate:
        return Estimate(value, value - half, value + half, np.nan)

    assert Compared("", estimate(0.5, 0.3), estimate(0.89, 0.4), 2).hit  # 0.39 of 0.5
    assert not Compared("", estimate(0.5, 0.3), estimate(1.01, 0.4), 2).hit
    lopsided = Estimate(0.5, 0.4, 0.9, np.nan)
    assert Compared("", lopsided, estimate(0.88, 0.01), 2).hit
    assert not Compared("", lopsided, estimate(0.3, 0.01), 2).hit
