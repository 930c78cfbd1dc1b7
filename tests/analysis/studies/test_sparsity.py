"""The sparsity study: where memory begins to pay, whether the best share moves, and how doubtful points are drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import AnalysisError, summarize, write_report
from analysis.results import Results
from analysis.studies.sparsity import Sparsity

New = Callable[..., Path]
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
BEST = {4: 1.3, 10: 0.75, 20: 0.5, 40: 0.3}  # P_tot/P_act -> share of the least loss; beyond 1: pure experts are best
BEND = 0.15


def points(order: tuple[int, ...] = (40, 4, 10, 20), **columns: Any) -> list[dict[str, Any]]:
    return [
        {
            **{
                "rho": share,
                "share_moe": share,
                "share_engram": 1 - share,
                "total_params": 135_100 * ratio,
                "active_params": 135_000,
            },
            **{
                "budget.total_params": 135_000 * ratio,
                "loss": 4.2 - 0.1 * np.log(ratio) + BEND * (share - BEST[ratio]) ** 2,
            },
            **columns,
        }
        for ratio in order
        for share in SHARES
    ]


def test_curves_in_the_order_of_their_sparsity_say_where_memory_begins_to_pay_and_that_the_optimum_moves(
    new_points: New,
) -> None:
    folder = new_points("sparsity", points())
    write_report(folder)
    fits = json.loads((folder / "fits.json").read_text())["fits"]
    assert [fit["cell"] for fit in fits[:-1]] == [{"P_tot/P_act": ratio} for ratio in (4, 10, 20, 40)]
    assert fits[-1]["factors"] == ["sparsity"]
    assert [fit["status"] for fit in fits[:-1]] == ["no_interior_minimum", *["converged"] * 3]
    lines = summarize(folder).splitlines()
    (pays,) = [line for line in lines if "to pay" in line]
    assert pays.startswith(
        "Memory begins to pay between P_tot/P_act 4 (pure experts are best) and P_tot/P_act 10 (gain 0.0"
    )
    (moves,) = [line for line in lines if line.startswith("All budgets: ")]
    assert moves.startswith("All budgets: Status ")  # at one budget the optimum is an end
    assert "From 4 to 40 of sparsity the best share shifts by -0." in moves
    assert ": it moves." in moves, moves


@pytest.mark.parametrize(
    ("best", "sentence"),
    [
        (0.4, "Memory pays from the lowest sampled sparsity on, P_tot/P_act 10 (gain 0.0"),
        (1.5, "At no sampled sparsity is memory shown to pay; at the highest, P_tot/P_act 20 (pure experts are best)."),
    ],
)
def test_where_it_pays_everywhere_or_nowhere_it_says_so(new_points: New, best: float, sentence: str) -> None:
    made = [point | {"loss": 4 + BEND * (point["rho"] - best) ** 2} for point in points((10, 20))]
    assert any(line.startswith(sentence) for line in Sparsity(Results(new_points("sparsity", made))).remarks())


def test_the_figure_draws_its_table_and_opens_what_is_in_doubt(new_points: New) -> None:
    drawing = Sparsity(Results(new_points("sparsity", points()))).drawings()[0]
    data = drawing.data
    assert drawing.name == "sparsity"
    assert data["sparsity"].tolist() == [4, 10, 20, 40]
    assert data["optimum"].iloc[0] == 1
    assert (data["optimum_low"] <= data["optimum"] + 1e-9).all()
    for axes, quantity in zip(drawing.figure.axes, ("optimum", "gain"), strict=True):
        assert axes.get_xscale() == "log"
        drawn = [np.array(line.get_xydata()) for line in axes.lines]
        assert any(len(xy) == 4 and np.allclose(xy, data[["sparsity", quantity]]) for xy in drawn)
        (doubtful,) = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert np.allclose(doubtful.get_xydata(), data[["sparsity", quantity]].iloc[:1])
    labels = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert {"in doubt or at an end", "published optimum (Engram)", "published threshold (LongCat)"} <= set(labels)


def test_the_allocation_curves_are_drawn_too_one_panel_a_sparsity(new_points: New) -> None:
    drawings = {
        drawing.name: drawing for drawing in Sparsity(Results(new_points("sparsity", points((40, 10))))).drawings()
    }
    assert set(drawings) == {"sparsity", "allocation", "optimum-sparsity", "differences", "curves", "diagnostics"}
    assert [axes.get_title() for axes in drawings["allocation"].figure.axes] == [
        f"P_tot/P_act {ratio}" for ratio in (10, 40)
    ]


def test_another_varied_field_makes_another_line(new_points: New) -> None:
    both = [
        point | {"budget.tokens": tokens, "tokens": tokens}
        for tokens in (500_000, 2_000_000)
        for point in points((10, 20))
    ]
    found = Sparsity(Results(new_points("sparsity", both)))
    assert found.points.groupby("series", sort=False)["sparsity"].apply(list).to_dict() == {
        "500k training tokens": [10, 20],
        "2M training tokens": [10, 20],
    }
    (over_all,) = [reading.sentences for reading in found.readings() if reading.label == "All budgets"]
    assert "From 10 to 20 of sparsity the best share shifts by" in over_all
    assert "tokens per activated parameter the best share shifts by" in over_all


@pytest.mark.parametrize("unfinished", [range(9, 24), range(24)])
def test_a_study_in_progress_has_a_report(new_points: New, unfinished: range) -> None:
    folder = new_points("sparsity", points((4, 10)), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too_few_points" in write_report(folder).read_text()


@pytest.mark.parametrize(
    ("order", "wider", "message"),
    [
        ((10,), 1.0, r"sparsity: `budget.total_params` is the same in all trials.*; vary `budget.total_params`"),
        (
            (10, 20),
            1.3,
            r"P_act differs by 30\.0% between the trials, but a sparsity study holds it within 5%; give all trials one",
        ),
    ],
)
def test_what_is_no_sparsity_study_is_refused(
    new_points: New, order: tuple[int, ...], wider: float, message: str
) -> None:
    made = [
        point | {"active_params": 135_000 * (wider if place > 6 else 1)} for place, point in enumerate(points(order))
    ]
    with pytest.raises(AnalysisError, match=message):
        write_report(new_points("sparsity", made))
