"""The compute-ratio study: the optimum over memory's share of the compute, proof of what is held, and the published
share marked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, summarize, write_report
from analysis.figures.compute_ratio import PUBLISHED, compute_ratio_figure
from analysis.results import Results
from analysis.studies.compute_ratio import ComputeRatio

New = Callable[..., Path]
SHARES = (0.081, 0.122, 0.168, 0.213, 0.262, 0.318, 0.402)


def points(best: float = 0.2, **columns: Any) -> list[dict[str, Any]]:
    return [
        {
            **{
                "rho": 0.0,
                "share_moe": 0.0,
                "memory_flops_share": share,
                "flops_per_token": 9.1e5 * (1 + 0.001 * (place % 3)),
            },
            **{"model.ultramem_v2.key_dim": 8 + 8 * place, "model.ultramem_v2.top_m": 4 + 4 * place},
            "loss": 4.0 + 2.5 * (share - best) ** 2,
            **columns,
        }
        for place, share in enumerate(SHARES)
    ]


def test_the_optimum_over_the_share_is_found_in_one_cell(new_points: New) -> None:
    folder = new_points("compute-ratio", points())
    write_report(folder)
    (fit,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert fit["cell"] == {}  # key width and top-m make up the share: they set no cells apart
    assert fit["conventions"]["x"] == "memory_flops_share"
    assert fit["shares"] == list(SHARES)
    assert fit["argmin"]["low"] < 0.2 < fit["argmin"]["high"]
    assert fit["depth"] is None  # there is no share of 1 to hold it against
    text = summarize(folder)
    assert "The loss is least at a compute share of 0.2" in text
    assert "The published optimum, 0.17 (UltraMemV2), lies" in text


def test_the_page_proves_what_was_held_and_says_how_the_share_was_moved(new_points: New) -> None:
    html = write_report(new_points("compute-ratio", points())).read_text()
    for part in ("Held fixed over the points", "0.200%", "moved by model.ultramem_v2.key_dim, model.ultramem_v2.top_m"):
        assert part in html


def test_the_figure_draws_its_table_and_the_published_share(new_points: New) -> None:
    (drawing,) = ComputeRatio(Results(new_points("compute-ratio", points()))).drawings()
    data = drawing.data
    axes = drawing.figure.axes[0]
    assert sorted(data[data["series"] == "mean"]["share"]) == list(SHARES)
    drawn = {tuple(np.round(line.get_xydata(), 9).ravel()) for line in axes.lines}
    for series in ("curve", "mean"):
        table = data[data["series"] == series]
        assert tuple(np.round(table[["share", "loss"]].to_numpy(), 9).ravel()) in drawn
    assert any(list(line.get_xdata()) == [PUBLISHED, PUBLISHED] for line in axes.lines)
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert "published optimum (UltraMemV2)" in labels
    assert "FLOPs" in axes.get_xlabel()


def test_the_published_share_is_not_drawn_where_it_was_not_sampled(new_points: New) -> None:
    (drawing,) = ComputeRatio(Results(new_points("compute-ratio", points()))).drawings()
    far = drawing.data[(drawing.data["series"] == "run") & (drawing.data["share"] > 0.2)]
    figure = compute_ratio_figure(far)
    assert not any("published" in text.get_text() for text in figure.legends[0].get_texts())


def test_the_rate_is_chosen_per_share(new_points: New) -> None:
    worse = [
        point | {"train.lr": 0.01, "loss": point["loss"] + (0.05 if place else -0.05)}
        for place, point in enumerate(points())
    ]
    folder = new_points("compute-ratio", [point | {"train.lr": 0.005} for point in points()] + worse)
    (cell,) = ComputeRatio(Results(folder)).cells
    assert cell.trials.groupby("memory_flops_share")["train.lr"].unique().map(list).tolist() == [[0.01], *[[0.005]] * 6]
    assert "Learning rate chosen per compute share" in write_report(folder).read_text()


def test_budgets_are_cells(new_points: New) -> None:
    both = [
        point | {"budget.tokens": tokens, "tokens": tokens} for tokens in (500_000, 2_000_000) for point in points()
    ]
    found = ComputeRatio(Results(new_points("compute-ratio", both)))
    assert [cell.label for cell in found.cells] == ["500k training tokens", "2M training tokens"]
    assert len(found.drawings()[0].figure.axes) == 2
    assert any("shifts by" in reading.sentences for reading in found.readings())


@pytest.mark.parametrize("unfinished", [range(2, 14), range(14)])
def test_a_study_in_progress_has_a_report(new_points: New, unfinished: range) -> None:
    folder = new_points("compute-ratio", points(), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too_few_points" in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_flops_share": 0.2}, "compute-ratio: column `memory_flops_share` is the same in all trials"),
        ({"flops_per_token": None}, "FLOPs/token of a training step differs by 30.0% between the points"),
        (
            {"active_params": None},
            "P_act differs by 30.0% between the points, but a compute-ratio study holds it within 2%; hold it",
        ),
    ],
)
def test_what_is_no_compute_ratio_study_is_refused(new_points: New, change: dict[str, Any], message: str) -> None:
    made = [
        point | {name: value or 1e5 * (1 + 0.05 * place) for name, value in change.items()}
        for place, point in enumerate(points())
    ]
    with pytest.raises(AnalysisError, match=message):
        write_report(new_points("compute-ratio", made))


def test_a_ledger_without_the_share_is_refused_by_column(new_points: New) -> None:
    folder = new_points("compute-ratio", points())
    table = pd.read_csv(folder / "trials.csv", dtype=str)
    table.drop(columns="memory_flops_share").to_csv(folder / "trials.csv", index=False)
    with pytest.raises(AnalysisError, match=r"trials.csv: column `memory_flops_share`.* is missing"):
        write_report(folder)
