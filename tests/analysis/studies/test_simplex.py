"""The simplex study: its three pools, its ternary figure, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import AnalysisError, summarize, write_report
from analysis.figures.simplex import CORNERS, to_plane
from analysis.fits.mixture import lattice
from analysis.results import Results
from analysis.studies.simplex import Simplex

New = Callable[..., Path]
NAMES = ["share_moe", "share_engram", "share_ultramem_v2"]


def points(bend: float = -0.25, mixes: np.ndarray | None = None) -> list[dict[str, Any]]:
    made = []
    for moe, engram, values in lattice(4) if mixes is None else mixes:
        loss = 4.05 * moe + 4.02 * engram + 4.06 * values + bend * (moe * engram + moe * values + engram * values)
        shares = {"share_moe": moe, "share_engram": engram, "share_ultramem_v2": values}
        made.append({"rho": moe, **shares, "shares": json.dumps({"moe": moe, "engram": engram}), "loss": loss})
    return made


def test_the_best_mix_is_found_and_named(new_points: New) -> None:
    folder = new_points("simplex", points())
    html = write_report(folder).read_text()
    (fit,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert (fit["status"], fit["pools"], fit["cell"]) == ("converged", ["moe", "engram", "ultramem_v2"], {})
    assert sum(share["value"] for share in fit["argmin"].values()) == pytest.approx(1)
    assert "a third pool helps" in summarize(folder)
    for part in ("gain over UltraMemV2 alone", "special-cubic", "routed experts + Engram"):
        assert part in html


def test_the_plane_keeps_distances_and_puts_pools_at_corners() -> None:
    assert np.allclose(to_plane(np.eye(3)), CORNERS)
    sides = np.linalg.norm(CORNERS - np.roll(CORNERS, 1, axis=0), axis=1)
    assert np.allclose(sides, 1)
    assert np.allclose(to_plane(np.full((1, 3), 1 / 3)), CORNERS.mean(0))


def test_the_figure_draws_its_table(new_points: New) -> None:
    (drawing,) = Simplex(Results(new_points("simplex", points()))).drawings()
    data, axes = drawing.data, drawing.figure.axes[0]
    series = dict(list(data.groupby("series")))
    assert {name: len(group) for name, group in series.items() if name != "tie"} == {
        "surface": 1326,
        "mean": 15,
        "two": 3,
        "best": 1,
    }
    assert np.allclose(data[NAMES].sum(axis=1), 1)
    offsets = [np.asarray(collection.get_offsets()) for collection in axes.collections]
    assert any(xy.shape == (15, 2) and np.allclose(xy, to_plane(series["mean"][NAMES].to_numpy())) for xy in offsets)
    lines = [np.array(line.get_xydata()) for line in axes.lines]
    for name in ("two", "best"):
        assert any(
            xy.shape[0] == len(series[name]) and np.allclose(xy, to_plane(series[name][NAMES].to_numpy()))
            for xy in lines
        )
    assert series["best"]["loss"].iloc[0] <= series["surface"]["loss"].min() + 1e-9
    written = [text.get_text() for text in axes.texts]
    assert {"routed experts", "Engram", "UltraMemV2"} <= set(written)
    assert written.count("0.2") == 3  # a scale on every side
    assert "nats/token" in drawing.figure.axes[1].get_xlabel()


def test_ticks_stand_where_the_pools_share_is_what_they_say(new_points: New) -> None:
    (drawing,) = Simplex(Results(new_points("simplex", points()))).drawings()
    grid = [np.array(line.get_xydata()) for line in drawing.figure.axes[0].lines if line.get_linestyle() == ":"]
    shares = [np.linalg.solve(np.vstack([CORNERS.T, np.ones(3)]), np.vstack([xy.T, np.ones(2)])) for xy in grid]
    for place, along in enumerate(shares):  # four lines a pool
        pool, value = place // 4, (0.2, 0.4, 0.6, 0.8)[place % 4]
        assert along[pool] == pytest.approx([value, value])
    ticks = [text for text in drawing.figure.axes[0].texts if text.get_text() == "0.8"]
    nearest = [int(np.linalg.norm(CORNERS - text.get_position(), axis=1).argmin()) for text in ticks]
    assert nearest == [0, 1, 2]


def test_a_best_mix_of_two_is_drawn_as_in_doubt(new_points: New) -> None:
    made = points()
    for point in made:
        point["loss"] = 4.0 + 0.1 * point["share_ultramem_v2"] - 0.2 * point["share_moe"] * point["share_engram"]
    (drawing,) = Simplex(Results(new_points("simplex", made))).drawings()
    assert any("no interior minimum" in text.get_text() for text in drawing.figure.legends[0].get_texts())


def test_budgets_are_triangles_of_their_own(new_points: New) -> None:
    both = [
        point | {"budget.tokens": tokens, "tokens": tokens} for tokens in (500_000, 2_000_000) for point in points()
    ]
    found = Simplex(Results(new_points("simplex", both)))
    (drawing,) = found.drawings()
    assert [axes.get_title() for axes in drawing.figure.axes[:2]] == ["500k training tokens", "2M training tokens"]
    assert len(found.readings()) == 2


@pytest.mark.parametrize("unfinished", [range(3, 30), range(30)])
def test_a_study_in_progress_has_a_report(new_points: New, unfinished: range) -> None:
    folder = new_points("simplex", points(), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too_few_points" in write_report(folder).read_text()


def test_the_rate_is_chosen_per_mix(new_points: New) -> None:
    tried = [
        point | {"train.lr": rate, "loss": point["loss"] + penalty}
        for rate, penalty in ((0.005, 0.0), (0.01, 0.1))
        for point in points()
    ]
    html = write_report(new_points("simplex", tried)).read_text()
    assert "Learning rate chosen per mix" in html
    assert "share of UltraMemV2" in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"share_ultramem_v2": 0.0},
            r"simplex: the shares of 2 pools vary \(moe, engram\), but a simplex study has exactly three; vary",
        ),
        (
            {"share_pkm": 0.2},
            r"simplex: the shares of moe, engram, ultramem_v2 do not sum to 1 in trial 000000000002; leave",
        ),
    ],
)
def test_what_is_no_simplex_study_is_refused(new_points: New, change: dict[str, float], message: str) -> None:
    made = points()
    if "share_pkm" in change:  # the same share in all trials: it does not vary, but it is there
        made = [point | change for point in made]
        made[2]["share_moe"] -= 0.2
    else:
        made = [point | change for point in made]
    with pytest.raises(AnalysisError, match=message):
        write_report(new_points("simplex", made))


def test_a_small_part_of_the_triangle_is_drawn_too(new_points: New) -> None:
    mixes = 0.03 * lattice(4) + np.array([0.32, 0.33, 0.32])
    (drawing,) = Simplex(Results(new_points("simplex", points(mixes=mixes)))).drawings()
    assert {"surface", "mean", "best"} <= set(drawing.data["series"])
