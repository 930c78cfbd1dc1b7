"""What each figure draws, as its CSV holds it, against the truth that the synthetic study was made from.

With next to no noise (none at all is refused as copied seeds) a run's loss is that truth plus an effect of its seed, so
the average seed's is the truth plus one constant: every expected number is derived here from the formula, none is
stored.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import load_trials
from analysis.results import Results
from analysis.studies import analyse

New = Callable[..., Path]
SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
QUIET = 1e-5  # nats/token


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """What the CSV of each figure holds."""
    drawings = analyse(Results(folder)).drawings()
    return {
        each.name: pd.read_csv(io.StringIO(each.data.to_csv(index=False)), dtype={"trial_id": str}) for each in drawings
    }


def drawn(folder: Path, name: str) -> dict[str, pd.DataFrame]:
    """The table of one figure by its series; its runs are checked against `trials.csv` first."""
    data = tables(folder)[name]
    if "trial_id" in data:
        runs = data[data["trial_id"].notna()].set_index("trial_id")
        losses = load_trials(folder).set_index("trial_id")["val_loss"]
        apart = (runs["loss"] - losses[runs.index]).groupby(runs["seed"])
        assert apart.max().to_numpy() == pytest.approx(
            apart.min().to_numpy(), abs=2e-6
        )  # a run, or that less its seed effect, to 7 digits
    return {str(key): group for key, group in data.groupby("series" if "series" in data else "quantity", sort=False)}


def same_but_for_a_constant(found: Iterable[float], truth: Iterable[float], tolerance: float = 10 * QUIET) -> bool:
    apart = np.asarray(list(found)) - np.asarray(list(truth))
    return bool(np.ptp(apart) < tolerance)


def curve(share: Any) -> Any:
    return 4.0 + 0.2 * (share - 0.35) ** 2


def test_allocation(new_study: New) -> None:
    series = drawn(new_study(noise=QUIET, loss=curve), "allocation")
    assert len(series["run"]) == 16
    for name in ("mean", "curve"):
        assert same_but_for_a_constant(series[name]["loss"], curve(series[name]["share"]))
    best = series["optimum"].iloc[0]
    assert best[["share", "low", "high"]].astype(float).to_numpy() == pytest.approx(0.35, abs=1e-3)


def test_differences_and_training_curves(new_study: New) -> None:
    folder = new_study(noise=QUIET, loss=curve)
    data = tables(folder)
    differences, lines = data["differences"], data["curves"]
    assert differences["difference"].to_numpy() == pytest.approx(
        (curve(differences["rho"]) - curve(1)).to_numpy(), abs=10 * QUIET
    )
    apart = lines[lines["quantity"] == "difference"]
    assert apart["mean"].to_numpy() == pytest.approx((curve(apart["rho"]) - curve(1)).to_numpy(), abs=10 * QUIET)
    loss = lines[lines["quantity"] == "val_loss"]
    falling = curve(loss["rho"]) + 4 * np.exp(-5 * loss["tokens"] / 500_000)
    assert len(loss) == 8 * 8  # shares by evaluations
    assert same_but_for_a_constant(loss["mean"], falling)
    effects = load_trials(folder).groupby("seed")["val_loss"].mean()  # the band is the standard error between two seeds
    assert (loss["high"] - loss["mean"]).to_numpy() == pytest.approx(abs(effects[0] - effects[1]) / 2, abs=10 * QUIET)
    assert set(loss["seeds"]) == {2}


@pytest.mark.slow
def test_compute_ratio(new_points: New) -> None:
    points = [
        {"memory_flops_share": share, "model.ultramem_v2.top_m": 4 * place, "loss": 4 + 2.5 * (share - 0.2) ** 2}
        for place, share in enumerate((0.08, 0.12, 0.17, 0.21, 0.26, 0.32, 0.4), 1)
    ]
    series = drawn(new_points("compute-ratio", points, noise=QUIET), "compute-ratio")
    assert same_but_for_a_constant(series["mean"]["loss"], [point["loss"] for point in points])
    assert same_but_for_a_constant(series["curve"]["loss"], 2.5 * (series["curve"]["share"] - 0.2) ** 2)
    assert series["optimum"]["share"].iloc[0] == pytest.approx(0.2, abs=1e-3)


def test_density(new_points: New) -> None:
    def plane(rows: Any, read: Any) -> Any:
        return 4.4 - 0.012 * np.log2(rows) - 0.02 * np.log2(read)

    grid = [(rows, read) for rows in (768, 3072, 12_288) for read in (6, 12, 24)]
    points = [
        {
            "memory_rows": rows,
            "memory_rows_read": read,
            "model.ultramem_v2.rows": rows / 3,
            "model.ultramem_v2.top_m": read / 3,
        }
        for rows, read in grid
    ]
    series = drawn(
        new_points(
            "density", [point | {"loss": plane(*at)} for point, at in zip(points, grid, strict=True)], noise=QUIET
        ),
        "density",
    )
    assert list(zip(series["mean"]["rows"], series["mean"]["read"], strict=True)) == grid
    for own in series.values():
        assert same_but_for_a_constant(own["loss"], plane(own["rows"], own["read"]))
    assert set(series["cut"]["read"].round(6)) == {6, 12, 24}


def test_slots(new_points: New) -> None:
    slopes = {"engram": ("Engram", -0.03), "ngram_embedding": ("n-gram embedding", -0.02)}
    points: list[dict[str, Any]] = [
        {"rho": 1.0, "memory_rows": 0, "memory_rows_read": 0, "memory_params": 0, "loss": 4.3}
    ]
    for pool, (_, slope) in slopes.items():
        for rows in 4.0 ** np.arange(6, 11):
            sizes = {
                "memory_rows": 4 * rows,
                "memory_rows_read": 4,
                "memory_params": 32 * rows,
                f"model.{pool}.rows": rows,
            }
            points.append({"rho": 1.0, **sizes, "loss": 4.25 + slope * math.log10(rows / 4096)})
    series = drawn(new_points("slots", points, noise=QUIET), "slots")
    for name, slope in slopes.values():
        own = {key: group[group["mechanism"] == name] for key, group in series.items()}
        for key in ("run", "mean", "line"):
            assert same_but_for_a_constant(own[key]["loss"], slope * np.log10(own[key]["rows"]))
            assert own[key]["params"].to_numpy() == pytest.approx(8 * own[key]["rows"].to_numpy())
        assert own["slope"]["loss"].iloc[0] == pytest.approx(slope, abs=10 * QUIET)
        top = own["mean"].sort_values("rows")["loss"].iloc[0]
        assert series["backbone"]["loss"].iloc[0] - top == pytest.approx(4.3 - 4.25, abs=10 * QUIET)


def test_simplex(new_points: New) -> None:
    names = ["share_moe", "share_engram", "share_ultramem_v2"]

    def surface(mixes: Any) -> Any:
        a, b, c = np.asarray(mixes, float).T
        return 4.05 * a + 4.02 * b + 4.06 * c - 0.25 * (a * b + a * c + b * c)

    mixes = [(i / 4, j / 4, 1 - (i + j) / 4) for i in range(5) for j in range(5 - i)]
    points = [
        {
            "rho": mix[0],
            **dict(zip(names, mix, strict=True)),
            "shares": json.dumps(mix[:2]),
            "loss": float(surface([mix])[0]),
        }
        for mix in mixes
    ]
    series = drawn(new_points("simplex", points, noise=QUIET), "simplex")
    assert len(series["mean"]) == 15
    for name in ("mean", "surface", "best"):
        assert same_but_for_a_constant(series[name]["loss"], surface(series[name][names]))
    best = series["surface"].loc[series["surface"]["loss"].idxmin(), names].to_numpy(float)
    assert series["best"][names].iloc[0].to_numpy(float) == pytest.approx(best, abs=0.03)  # a lattice of fiftieths


@pytest.mark.slow
def test_sparsity(new_points: New) -> None:
    best = {10: 0.75, 20: 0.5, 40: 0.3}
    points = [
        {
            **{"rho": share, "share_moe": share, "total_params": 135_000 * ratio, "active_params": 135_000},
            **{"budget.total_params": 135_000 * ratio, "loss": 4.2 + 0.15 * (share - best[ratio]) ** 2},
        }
        for ratio in best
        for share in SHARES
    ]
    data = tables(new_points("sparsity", points, noise=QUIET))["sparsity"]
    assert data["sparsity"].tolist() == pytest.approx(list(best))
    assert data["optimum"].tolist() == pytest.approx(list(best.values()), abs=1e-3)
    assert data["gain"].tolist() == pytest.approx([0.15 * (1 - share) ** 2 for share in best.values()], abs=10 * QUIET)


def test_ladder(new_points: New) -> None:
    losses = (4.4, 4.38, 4.385, 4.36)
    changes = ({"softmax": True, "cores": 1}, {"softmax": False}, {"cores": 2}, {"softmax": True})
    points, settings = [], {}
    for loss, change in zip(losses, changes, strict=True):
        settings = settings | {f"model.pkm.{name}": value for name, value in change.items()}
        points.append(settings | {"share_pkm": 1.0, "loss": loss})
    series = drawn(new_points("ladder", points, noise=QUIET), "ladder")
    for name, truth in (("step", np.diff(losses)), ("total", np.array(losses[1:]) - losses[0])):
        assert series[name]["value"].dropna().to_numpy() == pytest.approx(truth, abs=10 * QUIET)
    assert series["step"]["published"].tolist() == pytest.approx(
        [math.nan, -0.006, -0.003, math.nan], nan_ok=True
    )  # arXiv 2411.12364
