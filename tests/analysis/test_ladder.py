"""A ladder of changes: steps with honest intervals, labels that say what changed, the published step beside the right
one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import AnalysisError, Status, summarize, write_report
from analysis.figures.ladder import ladder_figure
from analysis.fits.ladder import LadderFit, fit_ladder
from analysis.studies.ladder import PUBLISHED, published_change, written
from sparsemem.config import load_study

New = Callable[..., Path]
TRUE = np.array([0.0, -0.02, -0.02, -0.05, -0.04])


def simulate(noise: float = 0.008, seeds: int = 2, random: int = 0) -> pd.DataFrame:
    """Runs with effects of seeds four times the noise."""
    rng = np.random.default_rng(random)
    rows = [
        (rung, seed, 4.4 + loss + together + noise * rng.standard_normal())
        for seed, together in enumerate(0.032 * rng.standard_normal(seeds))
        for rung, loss in enumerate(TRUE)
    ]
    return pd.DataFrame(rows, columns=["rung", "seed", "val_loss"]).assign(
        trial_id=lambda frame: [f"t{i}" for i in frame.index]
    )


# --- fit --------------------------------------------------------------------------------------------------------------


def test_steps_and_totals_are_paired_differences() -> None:
    runs = simulate()
    fit = fit_ladder(runs)
    by_rung = runs.pivot(index="seed", columns="rung", values="val_loss")
    steps = by_rung.diff(axis=1)
    assert [rung.step.value for rung in fit.rungs if rung.step] == pytest.approx(steps.mean().dropna())
    assert [rung.total.value for rung in fit.rungs if rung.total] == pytest.approx(
        (by_rung - by_rung[[0]].to_numpy()).mean()[1:]
    )
    centred = by_rung.sub(by_rung.mean(axis=1), axis=0)
    centred -= centred.mean()
    sd = np.sqrt((centred.to_numpy() ** 2).sum() / 4)  # 10 runs, 5 rungs, 1 free seed effect
    assert (fit.paired_sd, fit.noise_df) == (pytest.approx(sd), 4)
    half = 2.7764 * sd  # t with 4 degrees of freedom; sqrt(2 / 2 seeds) = 1
    assert fit.rungs[1].step.high - fit.rungs[1].step.value == pytest.approx(half, rel=1e-4)


def test_parameters_are_the_steps_with_their_covariance() -> None:
    fit = fit_ladder(simulate())
    assert list(fit.parameters) == ["step 1", "step 2", "step 3", "step 4"]
    assert np.diag(fit.covariance) == pytest.approx([each.se**2 for each in fit.parameters.values()])
    assert fit.covariance[0][1] == pytest.approx(-(fit.paired_sd**2) / 2)  # steps share a rung of two runs
    assert np.ones(4) @ fit.covariance @ np.ones(4) == pytest.approx(fit.rungs[4].total.se ** 2)
    assert "by rung 3" in fit.summary()
    assert json.loads(fit.to_json())["law"] == "paired steps"
    axes = Figure().subplots()
    fit.plot(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rung {place}" for place in range(5)]
    fit_ladder(simulate(seeds=1)).plot(axes)  # no step: nothing to draw, and no error


def test_noise_free_steps_are_exact_whatever_the_seeds_add() -> None:
    fit = fit_ladder(simulate(0.0).assign(val_loss=lambda frame: frame["val_loss"] + frame["seed"]))
    assert [rung.step.value for rung in fit.rungs[1:]] == pytest.approx(np.diff(TRUE), abs=1e-12)
    assert [rung.told for rung in fit.rungs] == [False, True, False, True, True]


def test_intervals_cover_and_few_null_steps_are_told() -> None:
    covered, false = [], []
    for random in range(200):
        fit = fit_ladder(simulate(random=random))
        covered += [
            rung.step.low <= true <= rung.step.high for rung, true in zip(fit.rungs[1:], np.diff(TRUE), strict=True)
        ]
        false.append(fit.rungs[2].told)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(false) <= 0.05


def test_holm_keeps_the_order_and_never_falls() -> None:
    fit = fit_ladder(simulate(0.02, seeds=3))
    raw = sorted((rung.step_p, -abs(rung.step.value)) for rung in fit.rungs[1:])
    assert [size for _, size in raw] == sorted(size for _, size in raw)
    assert all(0 <= rung.step_p <= 1 for rung in fit.rungs[1:])


def test_no_step_is_taken_over_a_gap() -> None:
    fit = fit_ladder(simulate()[lambda frame: frame["rung"] != 2])
    assert [rung.rung for rung in fit.rungs] == [0, 1, 3, 4]
    assert [rung.step is None for rung in fit.rungs] == [True, False, True, False]
    assert fit.rungs[2].total.value == pytest.approx(-0.05, abs=0.03)


def test_one_seed_has_no_interval_and_a_status() -> None:
    fit = fit_ladder(simulate(seeds=1))
    assert fit.status is Status.TOO_FEW_POINTS
    assert "second seed" in fit.message
    assert all(rung.step is None and not rung.told for rung in fit.rungs)
    assert fit_ladder(simulate()[:1]).status is Status.TOO_FEW_POINTS


def test_a_loss_that_is_none_has_a_status_and_names_the_run() -> None:
    runs = simulate()
    runs.loc[3, "val_loss"] = np.inf
    fit = fit_ladder(runs)
    assert (fit.status, fit.rungs) == (Status.NOT_FINITE, ())
    assert "t3" in fit.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"rung": "rang"}), r"`rung` \(is it `rang`\?\)"),
        (lambda frame: frame.assign(seed=0), "one cell at a time"),
        (lambda frame: frame.assign(val_loss="low"), "a number belongs there"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_ladder(change(simulate()))


# --- figure -----------------------------------------------------------------------------------------------------------


def drawn_fit() -> tuple[LadderFit, pd.DataFrame]:
    fit = fit_ladder(simulate()[lambda frame: frame["rung"] != 4])
    labels = ["PKM", "softmax: false", "norm: layer", "cores: 2", "init: ultramem"]
    return fit, fit.table(labels, [None, -0.006, 0.0, None, -0.003])


def test_the_drawn_table_holds_every_rung_and_adds_up_what_is_published() -> None:
    fit, data = drawn_fit()
    assert data.groupby("quantity").size().to_dict() == {"step": 5, "total": 5}
    totals = data[data["quantity"] == "total"].set_index("rung")
    assert totals["published"].tolist() == pytest.approx([np.nan, -0.006, -0.006, np.nan, np.nan], nan_ok=True)
    steps = data[data["quantity"] == "step"].set_index("rung")
    assert steps.loc[1, ["value", "low", "high"]].tolist() == [
        fit.rungs[1].step.value,
        fit.rungs[1].step.low,
        fit.rungs[1].step.high,
    ]
    assert steps.loc[[0, 4], "value"].isna().all()
    assert set(steps["verdict"]) <= {"", "lowers the loss", "raises the loss", "not told from noise"}


def test_the_figure_draws_exactly_its_table() -> None:
    _, data = drawn_fit()
    figure = ladder_figure(data)
    for axes, quantity in zip(figure.axes, ("step", "total"), strict=True):
        own = data[data["quantity"] == quantity]
        points = {round(x, 9) for line in axes.lines for x in np.atleast_1d(line.get_xdata())}
        for column in ("value", "published"):
            assert set(own[column].dropna().round(9)) <= points
        bars = {round(end, 9) for bar in axes.collections for segment in bar.get_segments() for end in segment[:, 0]}
        assert bars == {*own["low"].dropna().round(9), *own["high"].dropna().round(9)}
        assert "nats/token" in axes.get_xlabel()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][1].replace(
        "\N{NO-BREAK SPACE}", " "
    ) == "softmax: false"
    heights = figure.axes[0].get_yticks()
    assert (np.diff(heights) > 0).all()  # the axis runs downward
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]


# --- study ------------------------------------------------------------------------------------------------------------

LADDER: tuple[dict[str, Any], ...] = (
    {"softmax": True, "skip": 0, "layers": "[2]", "value_dim": None, "value_rate": "[10.0, 10.0]", "query_conv": 0},
    {"softmax": False},
    {"skip": 1, "layers": "[1, 2]"},
    {"value_rate": "[10.0, 1.0]"},
    {"query_conv": 4},
    {"query_conv": 0, "skip": 0, "layers": None},
    {"value_dim": 16},
)


def points() -> list[dict[str, Any]]:
    rungs, settings = [], {}
    for place, change in enumerate(LADDER):
        settings = settings | {f"model.pkm.{name}": value for name, value in change.items()}
        rungs.append(
            settings | {"share_pkm": 1.0, "memory_rows_read": 32 * (1 + place // 3), "loss": 4.4 - 0.02 * place}
        )
    return rungs


def test_the_report_says_each_change_and_what_is_told(new_points: New) -> None:
    folder = new_points("ladder", points())
    write_report(folder)
    (record,) = json.loads((folder / "fits.json").read_text())["fits"]
    labels = [rung["label"] for rung in record["ladder"]]
    assert labels == [
        "PKM",
        "softmax: false",
        "skip: 1, layers: [1, 2]",
        "value_rate: [10, 1]",
        "query_conv: 4",
        "skip: 0, layers: every block, query_conv: 0",
        "value_dim: 16",
    ]
    assert [rung["published"] for rung in record["ladder"]] == [None, -0.006, -0.015, -0.022, 0.0, None, None]
    assert record["status"] == "converged"
    assert len(record["rows"]) == 14
    assert [rung["step"]["value"] < 0 for rung in record["rungs"][1:]] == [True] * 6
    assert "From PKM to rung 6 (value_dim: 16) the loss falls by 0.1" in summarize(folder)
    page = (folder / "report.html").read_text()
    for part in ("One order of the changes", "the rows that a token reads (32 to 96)", "2411.12364"):
        assert part in page
    assert {path.stem for path in (folder / "figures").iterdir()} == {"ladder"}


def test_a_ladder_in_progress_has_a_report(new_points: New) -> None:
    folder = new_points(
        "ladder", points(), statuses={**dict.fromkeys(range(14), "pending"), 0: "finished", 7: "finished"}
    )
    write_report(folder)
    assert "too_few_points" in summarize(folder)


def test_a_rung_that_diverged_takes_no_part_in_steps(new_points: New) -> None:
    folder = new_points("ladder", points(), statuses={2: "diverged", 9: "diverged"})
    write_report(folder)
    assert "No finished run of rung 2: the steps to and from there are left out" in summarize(folder)


def test_token_budgets_are_ladders_of_their_own(new_points: New) -> None:
    both = [point | {"tokens": tokens, "budget.tokens": tokens} for tokens in (400_000, 800_000) for point in points()]
    folder = new_points("ladder", both)
    write_report(folder)
    assert [fit["cell"] for fit in json.loads((folder / "fits.json").read_text())["fits"]] == [
        {"budget.tokens": 400_000},
        {"budget.tokens": 800_000},
    ]
    assert {path.stem for path in (folder / "figures").iterdir()} == {"ladder-1", "ladder-2"}


def test_trials_that_differ_in_no_model_field_are_refused(new_points: New) -> None:
    folder = new_points("ladder", [{"model.pkm.heads": 2, "loss": 4.0}])
    with pytest.raises(AnalysisError, match=r"the same `model`, so there is no ladder; vary `model.POOL`"):
        write_report(folder)
    assert not (folder / "fits.json").exists()


def test_a_step_of_several_published_changes_has_their_sum_and_others_none() -> None:
    def step(**change: tuple[str, str]) -> float | None:
        return published_change(
            *({f"model.pkm.{name}": values[end] for name, values in change.items()} for end in (0, 1))
        )

    assert step(tucker_rank=("0", "2"), tucker_penalty=("0", "0.001"), cores=("1", "2")) == pytest.approx(-0.011)
    assert step(projection=("none", "linear"), value_dim=("default", "32")) == -0.022
    assert step(projection=("none", "linear")) is None  # only half of the change
    assert step(softmax=("true", "false"), heads=("2", "1")) is None  # another change beside it
    assert step(init=("ultramem", "ultramem_v2")) is None  # not from PKM's
    assert step(value_rate=("[10, 1]", "[10, 10]")) is None


def test_the_published_ablation_ends_where_its_lines_lead() -> None:
    """UltraMem's lines sum to -0.093 (MECHANISMS, 3.4)."""
    assert sum(line.loss for line in PUBLISHED) == pytest.approx(-0.093)
    assert len({name for line in PUBLISHED for name in line.fields}) == 12


def test_the_sweep_makes_all_published_steps_in_their_order() -> None:
    """The sweep in the repository: every line of the ablation is one of its rungs."""
    study = load_study(Path(__file__).parents[2] / "sweeps" / "ultramem-ladder.yaml")
    rungs = list({json.dumps(pkm := point["model.pkm"]): pkm for point, _ in study.points()}.values())
    trials = {
        json.dumps(point["model.pkm"]): trial.model.pkm.model_dump(mode="json") for point, trial in study.points()
    }
    settings = [
        {
            f"model.pkm.{name}": written(f"model.pkm.{name}", json.dumps(value) if isinstance(value, list) else value)
            for name, value in values.items()
        }
        for values in (trials[json.dumps(rung)] for rung in rungs)
    ]
    steps = [published_change(*pair) for pair in pairwise(settings)]
    assert steps[:11] == [line.loss for line in PUBLISHED]
    assert steps[11:] == [None] * 7


def test_copies_equal_losses_and_two_budgets_are_told_before_any_number() -> None:
    one = simulate(seeds=1)
    copies = fit_ladder(pd.concat([one, one.assign(seed=1, trial_id="c" + one["trial_id"])]))
    assert copies.status is Status.TOO_FEW_POINTS
    assert copies.summary().startswith("Status too_few_points: different seeds have the same losses")
    assert "all losses are equal" in fit_ladder(one.assign(val_loss=4.0)).summary()
    with pytest.raises(AnalysisError, match=r"fit_ladder: column `embedding_params` runs from 1,000 to 2,000"):
        fit_ladder(one.assign(embedding_params=np.where(one["rung"] == 0, 1000, 2000)))
    two = simulate()
    with pytest.raises(AnalysisError, match=r"fit_ladder: column `active_params` runs from 100,000 to 200,000"):
        fit_ladder(two.assign(active_params=np.where(two["seed"] == 0, 1e5, 2e5)))
