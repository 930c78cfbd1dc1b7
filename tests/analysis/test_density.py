"""A grid of rows by rows read: which doubling gains more, with intervals that cover and a status for what
is no grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import AnalysisError, Status, summarize, write_report
from analysis.figures.density import density_figure
from analysis.fits.density import fit_density

New = Callable[..., Path]
Surface = Callable[[float, float], float]
SIZES, READS = 3 * 4.0 ** np.arange(4, 8), 3 * 2.0 ** np.arange(1, 5)


def plane(size: float = 0.012, density: float = 0.02) -> Surface:
    """Gains of a doubling of the table and of the rows read."""
    return lambda rows, read: 4.4 - size * math.log2(rows / SIZES[0]) - density * math.log2(read / READS[0])


FLAT = plane()


def bent(rows: float, read: float) -> float:
    return plane()(rows, read) + 0.006 * math.log2(read / READS[0]) ** 2


def simulate(surface: Surface = FLAT, noise: float = 0.008, seeds: int = 2, random: int = 0) -> pd.DataFrame:
    """Runs with effects of seeds four times the noise."""
    rng = np.random.default_rng(random)
    rows = [
        (size, read, seed, surface(size, read) + together + noise * rng.standard_normal())
        for seed, together in enumerate(4 * max(noise, 0.01) * rng.standard_normal(seeds))
        for size in SIZES
        for read in READS
    ]
    frame = pd.DataFrame(rows, columns=["memory_rows", "memory_rows_read", "seed", "val_loss"])
    return frame.assign(trial_id=[f"t{i}" for i in frame.index])


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_a_noise_free_plane_is_found_exactly() -> None:
    fit = fit_density(simulate(noise=0.0))
    assert fit.size_gain.value == pytest.approx(0.012, abs=1e-12)
    assert fit.density_gain.value == pytest.approx(0.02, abs=1e-12)
    assert fit.advantage.value == pytest.approx(0.008, abs=1e-12)
    assert fit.exchange.value == pytest.approx(
        0.012 - math.log2(3) * 0.02, abs=1e-12
    )  # half the table, three times the rows read
    assert fit.predict([[SIZES[1], READS[2]]])["loss"][0] - fit.means[6] == pytest.approx(0, abs=1e-12)


def test_exponents_are_those_of_a_power_law_of_the_loss() -> None:
    runs = simulate().assign(
        val_loss=lambda frame: 5.0 * frame["memory_rows"] ** -0.004 * frame["memory_rows_read"] ** -0.007
    )
    exponents = fit_density(runs).exponents
    assert [exponents[name].value for name in ("alpha", "beta", "beta - alpha")] == pytest.approx(
        [0.004, 0.007, 0.003], abs=1e-12
    )


def test_slopes_are_those_of_least_squares_over_all_runs() -> None:
    """Reference: every run on an indicator a seed and both logarithms; unbalanced."""
    runs = simulate(seeds=3).drop(index=[3, 18, 19, 40])
    design = [(runs["seed"] == seed).to_numpy(float) for seed in range(3)]
    design += [np.log2(runs[name]).to_numpy() for name in ("memory_rows", "memory_rows_read")]
    theta = np.linalg.lstsq(np.stack(design, axis=1), runs["val_loss"].to_numpy(), rcond=None)[0]
    fit = fit_density(runs)
    assert [fit.size_gain.value, fit.density_gain.value] == pytest.approx(-theta[3:], abs=1e-12)


def test_a_bent_surface_is_told_and_its_gains_range() -> None:
    fit = fit_density(simulate(bent, noise=0.002))
    assert fit.law == "quadratic"
    low, high = fit.gain_ranges["density_gain"]
    assert (low, high) == (
        pytest.approx(0.02 - 0.036, abs=0.004),
        pytest.approx(0.02, abs=0.004),
    )  # slopes at both ends of the grid
    assert "the surface bends (quadratic)" in fit.summary()
    assert fit.density_gain.value == pytest.approx(0.02 - 0.018, abs=0.002)  # mean over the grid


def test_a_plane_is_rarely_said_to_bend() -> None:
    surfaces = [fit_density(simulate(random=random)).law for random in range(20)]
    assert surfaces.count("plane") >= 17


def test_parameters_are_the_surface_with_its_covariance() -> None:
    fit = fit_density(simulate(bent, noise=0.002))
    assert list(fit.parameters) == ["c", "r", "k", "r k", "r^2", "k^2"]
    assert np.diag(fit.covariance) == pytest.approx([each.se**2 for each in fit.parameters.values()])
    centre = fit.predict([[math.sqrt(axis[0] * axis[-1]) for axis in (SIZES, READS)]])
    assert fit.parameters["c"].value == pytest.approx(centre["loss"][0])
    assert json.loads(fit.to_json())["law"] == "quadratic"
    axes = Figure().subplots()
    fit.plot(axes)
    assert "rows" in axes.get_xlabel()
    fit_density(simulate()[:3]).plot(axes)  # no surface: nothing to draw, and no error


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_cover_gains_difference_exchange_and_exponents() -> None:
    exponent = 0.012 / math.log(2) / 4.34  # d log L / d log rows, about the middle of the grid
    hits = np.zeros(5)
    for random in range(150):
        fit = fit_density(simulate(random=random))
        estimates = (fit.size_gain, fit.density_gain, fit.advantage, fit.exchange, fit.exponents["alpha"])
        truth = (0.012, 0.02, 0.008, 0.012 - math.log2(3) * 0.02, exponent)
        hits += [each.low <= true <= each.high for each, true in zip(estimates, truth, strict=True)]
    assert (hits / 150 >= 0.90).all()
    assert (hits / 150 <= 0.99).all()


# --- status and words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("surface", "words"),
    [
        (plane(0.005, 0.03), "density beats size"),
        (plane(0.03, 0.005), "size beats density"),
        (plane(0.01, 0.01), "neither is shown to beat the other"),
        (plane(0.0, 0.0), "it may change nothing"),
    ],
)
def test_the_verdict_follows_the_interval(surface: Surface, words: str) -> None:
    assert words in fit_density(simulate(surface)).summary()


def test_one_seed_is_never_converged() -> None:
    fit = fit_density(simulate(seeds=1))
    assert fit.status is Status.TOO_FEW_POINTS
    assert (fit.paired_sd, fit.errors) == (None, ())
    assert fit.advantage.low < fit.advantage.high
    assert "second seed" in fit.summary()


@pytest.mark.parametrize(
    "kept",
    [lambda f: f["memory_rows"] == SIZES[0], lambda f: f["memory_rows"] / SIZES[0] == (f["memory_rows_read"] / 6) ** 2],
)
def test_what_is_no_grid_has_a_status(kept: Callable[[pd.DataFrame], pd.Series]) -> None:
    """One size only; or size and rows read that rise together."""
    fit = fit_density(simulate()[kept])
    assert (fit.status, fit.advantage, fit.surfaces) == (Status.TOO_FEW_POINTS, None, ())
    with pytest.raises(AnalysisError, match="no law"):
        fit.predict([[SIZES[0], READS[0]]])


def test_no_runs_have_a_status() -> None:
    assert fit_density(simulate().iloc[:0]).status is Status.TOO_FEW_POINTS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -4.0])
def test_a_loss_that_is_none_has_a_status_and_names_the_run(bad: float) -> None:
    runs = simulate()
    runs.loc[3, "val_loss"] = bad
    fit = fit_density(runs)
    assert fit.status is Status.NOT_FINITE
    assert "t3" in fit.message


def test_a_surface_that_the_means_miss_is_said_to() -> None:
    fit = fit_density(
        simulate(lambda rows, read: 4.3 + 0.03 * math.sin(3 * math.log2(rows) + 2 * math.log2(read)), noise=0.002)
    )
    assert "miss the surface" in fit.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"memory_rows_read": "rows_read"}), "`memory_rows_read`.* is missing"),
        (
            lambda frame: frame.assign(memory_rows=frame["memory_rows"].where(frame.index != 3, 0)),
            "must hold positive counts",
        ),
        (lambda frame: frame.assign(seed=0), "one cell at a time"),
        (lambda frame: frame.assign(val_loss="low"), "a number belongs there"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_density(change(simulate()))


def test_prediction_stays_inside_the_sampled_rectangle() -> None:
    fit = fit_density(simulate())
    assert len(fit.predict(dict(zip(fit.predictors, (SIZES, READS[0]), strict=True)))) == 4
    with pytest.raises(AnalysisError, match="outside the sampled rows"):
        fit.predict([[SIZES[0], 1000]])


def test_the_record_is_json() -> None:
    record = json.loads(json.dumps(fit_density(simulate()).to_dict(), allow_nan=False))
    assert {each["surface"] for each in record["surfaces"]} == {"plane", "twisted", "quadratic"}
    assert set(record["advantage"]) == {"value", "low", "high", "se"}
    assert len(record["rows"]) == 32


# --- figure -----------------------------------------------------------------------------------------------------------


def test_the_figure_draws_exactly_its_table() -> None:
    fit = fit_density(simulate())
    data = fit.table().assign(cell="")
    means = data[data["series"] == "mean"]
    assert len(means) == 16
    contours, cuts, bar = density_figure(data).axes
    (circles,) = [
        each for each in contours.collections if hasattr(each, "get_offsets") and len(each.get_offsets()) == 16
    ]
    assert np.asarray(circles.get_offsets()) == pytest.approx(means[["rows", "read"]].to_numpy())
    assert np.asarray(circles.get_array()) == pytest.approx(means["loss"].to_numpy())
    drawn = {tuple(np.round(line.get_xydata(), 6).ravel()) for line in cuts.lines}
    for _, cut in data[data["series"] == "cut"].groupby("read"):
        assert tuple(np.round(cut[["rows", "loss"]].to_numpy(), 6).ravel()) in drawn
    heights = {round(float(y), 9) for line in cuts.lines for y in np.atleast_1d(line.get_ydata())}
    assert set(means["loss"].round(9)) <= heights
    assert "nats/token" in bar.get_title()
    assert "nats/token" in cuts.get_ylabel()
    assert [text.get_text() for text in cuts.get_legend().get_texts()] == ["6", "12", "24", "48"]


# --- study ------------------------------------------------------------------------------------------------------------


def points() -> list[dict[str, Any]]:
    found = []
    for size in SIZES:
        for read in READS:
            fields = {
                "model.ultramem_v2.rows": size / 3,
                "model.ultramem_v2.top_m": read / 3,
                "memory_rows": size,
                "memory_rows_read": read,
            }
            costs = {"memory_flops_share": 0.1 + 0.001 * size**0.5, "active_params": 150_000 + round(200 * size**0.5)}
            found.append({"rho": None, **fields, **costs, "loss": plane()(size, read)})
    return found


def test_the_report_answers_the_question(new_points: New) -> None:
    folder = new_points("density", points())
    write_report(folder)
    (record,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert record["status"] == "converged"
    assert record["advantage"]["value"] == pytest.approx(0.008, abs=0.003)
    said = summarize(folder)
    for part in (
        "density beats size",
        "Half the table with three times the rows read",
        "UltraMemV2 60B top-768 against 120B top-256",
    ):
        assert part in said
    page = (folder / "report.html").read_text()
    for part in (
        "more rows take the memory&#39;s share of the blocks&#39; FLOPs from 13% to 32% (keys)",
        "P_act goes from 155.5k to 194.3k",
    ):
        assert part in page
    assert {path.stem for path in (folder / "figures").iterdir()} == {"density"}


def test_the_learning_rate_is_chosen_per_grid_point(new_points: New) -> None:
    rates = [
        point | {"train.lr": rate, "loss": point["loss"] + penalty}
        for rate, penalty in ((0.005, 0.0), (0.01, 0.1))
        for point in points()
    ]
    folder = new_points("density", rates)
    write_report(folder)
    (record,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert "chosen per grid point" in record["conventions"]["learning_rate"]
    assert len(record["rows"]) == 32
    assert len(record["learning_rates"]) == 32


@pytest.mark.parametrize("unfinished", [range(32), range(3, 32)])
def test_a_study_in_progress_has_a_report_with_a_status(new_points: New, unfinished: range) -> None:
    folder = new_points("density", points(), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too_few_points" in write_report(folder).read_text()


def test_results_of_another_kind_are_refused_by_folder_and_remedy(new_points: New) -> None:
    one = [point for point in points() if point["memory_rows_read"] == READS[0]]
    with pytest.raises(
        AnalysisError,
        match=r"density: column `memory_rows_read` has one value in all trials.*; vary `model.POOL.top_m`",
    ):
        write_report(new_points("density", one))


def test_a_refuted_surface_copies_equal_losses_and_two_budgets_are_told_before_any_number() -> None:
    runs = simulate(lambda size, read: 4 + 0.1 * float((np.log2(size) + np.log2(read)) % 4 > 1), noise=0.002)
    poor = fit_density(runs)
    assert poor.status is Status.POOR_FIT
    assert poor.summary().startswith("Status poor_fit: the means miss the surface")
    one = simulate(seeds=1)
    copies = fit_density(pd.concat([one, one.assign(seed=1, trial_id="c" + one["trial_id"])]))
    assert copies.status is Status.TOO_FEW_POINTS
    assert copies.summary().startswith("Status too_few_points: different seeds have the same losses")
    assert "all losses are equal" in fit_density(one.assign(val_loss=4.0)).summary()
    with pytest.raises(AnalysisError, match=r"fit_density: column `tokens` runs from 1,000,000 to 2,000,000"):
        fit_density(runs.assign(tokens=np.where(runs["memory_rows"] == SIZES[0], 1e6, 2e6)))
    with pytest.raises(AnalysisError, match=r"fit_density: column `total_params` runs from 1,000,000 to 2,000,000"):
        fit_density(runs.assign(total_params=np.where(runs["seed"] == 0, 1e6, 2e6)))
