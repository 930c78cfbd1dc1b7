"""Loss against a memory's rows: slopes that are right and cover, an honest word on whether the fall slows, one line a
mechanism.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import AnalysisError, Status, summarize, write_report
from analysis.figures.slots import ASIDE, slots_figure
from analysis.fits.slots import fit_slots
from analysis.fits.slots_result import LINE, POWER, MechanismFit

New = Callable[..., Path]
Curve = Callable[[np.ndarray], np.ndarray]
ROWS = 4.0 ** np.arange(6, 12)
BACKBONE = 4.30


def line(slope: float, start: float = 4.25) -> Curve:
    return lambda rows: start + slope * np.log10(rows / ROWS[0])


def power(alpha: float, floor: float = 4.05, scale: float = 0.2) -> Curve:
    return lambda rows: floor + scale * (rows / ROWS[0]) ** -alpha


CURVES = {"Engram": line(-0.03), "n-gram embedding": line(-0.02, 4.27), "UltraMemV2": power(0.35)}


def simulate(
    curves: dict[str, Curve] = CURVES,
    noise: float = 0.008,
    seeds: int = 2,
    random: int = 0,
    backbone: int = 2,
    rows: np.ndarray = ROWS,
) -> pd.DataFrame:
    """Runs with effects of seeds four times the noise."""
    rng = np.random.default_rng(random)
    together = 4 * max(noise, 0.01) * rng.standard_normal(max(seeds, backbone))
    runs = [(None, np.nan, seed, BACKBONE + together[seed]) for seed in range(backbone)]
    for name, curve in curves.items():
        runs += [(name, count, seed, float(curve(count)) + together[seed]) for count in rows for seed in range(seeds)]
    frame = pd.DataFrame(runs, columns=["mechanism", "memory_rows", "seed", "val_loss"])
    frame["val_loss"] += noise * rng.standard_normal(len(frame))
    return frame.assign(trial_id=[f"t{i}" for i in frame.index], memory_params=frame["memory_rows"] * 32)


def only(frame: pd.DataFrame, **options: int) -> MechanismFit:
    (fit,) = fit_slots(frame, **options).mechanisms
    return fit


# --- recovery ---------------------------------------------------------------------------------------------------------


def test_noise_free_lines_and_gains_are_found_exactly() -> None:
    fit = fit_slots(simulate(noise=0.0), resamples=20)
    engram, ngram, ultramem = fit.mechanisms
    assert engram.slope.value == pytest.approx(-0.03, abs=1e-12)
    assert ngram.slope.value == pytest.approx(-0.02, abs=1e-12)
    assert engram.beyond.value == pytest.approx(0, abs=1e-12)
    assert ultramem.beyond.value > 0.02  # the line through the others misses a fall that slows
    assert engram.gain.value == pytest.approx(BACKBONE - CURVES["Engram"](ROWS[-1]), abs=1e-12)
    assert fit.differences[0].difference.value == pytest.approx(-0.01, abs=1e-12)
    assert [pair.first + pair.second for pair in fit.differences] == [
        "Engramn-gram embedding",
        "EngramUltraMemV2",
        "n-gram embeddingUltraMemV2",
    ]
    assert engram.predict(ROWS)["loss"] - engram.means == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.35, 1.0, 2.5])
def test_a_noise_free_power_law_gives_back_its_floor_and_exponent(alpha: float) -> None:
    fit = only(simulate({"Engram": power(alpha)}, noise=0.0, backbone=0), resamples=20)
    law = fit.laws[1]
    offset = fit.means[0] - power(alpha)(ROWS[0])  # of the average seed
    assert law.law == POWER == fit.preferred
    assert law.parameters["alpha"].value == pytest.approx(alpha, rel=1e-6)
    assert law.parameters["E"].value == pytest.approx(4.05 + offset, rel=1e-6)
    assert law.parameters["A"].value == pytest.approx(0.2 * ROWS[0] ** alpha, rel=1e-5)
    assert fit.predict(ROWS)["power"] == pytest.approx(np.array(fit.means), abs=1e-9)


def test_the_power_fit_is_as_good_as_a_search_from_many_starts() -> None:
    from scipy.optimize import minimize

    fit = only(simulate({"Engram": power(0.35)}, backbone=0), resamples=20)
    x, y = np.log(ROWS / ROWS[0]), np.array(fit.means)

    def squares(theta: np.ndarray) -> float:
        return float(2 * np.sum((theta[0] + theta[1] * np.exp(-theta[2] * x) - y) ** 2))  # each mean is worth two runs

    starts = [(4.0, 0.2, alpha) for alpha in (0.05, 0.2, 0.5, 1.5)]
    best = min(
        minimize(squares, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-16, "maxiter": 4000}).fun
        for start in starts
    )
    assert fit.laws[1].objective <= best * (1 + 1e-6)


def test_slopes_of_an_unbalanced_study_are_those_of_least_squares_over_its_runs() -> None:
    """Reference: all runs at once on an indicator a seed, and a constant and a slope a mechanism."""
    runs = simulate(CURVES | {"UltraMemV2": line(-0.01)}, seeds=3, backbone=3).drop(index=[5, 9, 10, 20, 31, 40])
    names = list(CURVES)
    design = [(runs["seed"] == seed).to_numpy(float) for seed in (1, 2)] + [runs["mechanism"].isna().to_numpy(float)]
    for name in names:
        own = (runs["mechanism"] == name).to_numpy(float)
        design += [own, own * np.log10(runs["memory_rows"].fillna(1).to_numpy())]
    theta = np.linalg.lstsq(np.stack(design, axis=1), runs["val_loss"].to_numpy(), rcond=None)[0]
    # Each mechanism alone leaves a little of the seeds' effects to the others' means, so the slopes agree closely, not
    # to the last digit.
    assert [fit.slope.value for fit in fit_slots(runs, resamples=20).mechanisms] == pytest.approx(
        theta[4::2], abs=0.001
    )


def test_left_out_points_are_those_of_refits_without_them() -> None:
    law = (fit := only(simulate({"Engram": line(-0.03)}), resamples=2)).laws[0]
    x, y = np.log10(ROWS), np.array(fit.means)
    errors = [y[i] - np.polyval(np.polyfit(np.delete(x, i), np.delete(y, i), 1), x[i]) for i in range(len(x))]
    assert law.left_out_error == pytest.approx(np.sqrt(np.mean(np.square(errors[1:-1]))))
    assert law.beyond == pytest.approx(errors[-1])


def test_seed_effects_change_nothing_but_the_level() -> None:
    runs = simulate()
    moved = runs.assign(val_loss=runs["val_loss"] + runs["seed"].map({0: 0.4, 1: -0.1}))
    first, second = fit_slots(runs, resamples=20), fit_slots(moved, resamples=20)
    assert second.paired_sd == pytest.approx(first.paired_sd)
    assert [fit.slope.value for fit in second.mechanisms] == pytest.approx(
        [fit.slope.value for fit in first.mechanisms]
    )
    assert [fit.gain.low for fit in second.mechanisms] == pytest.approx([fit.gain.low for fit in first.mechanisms])


def test_seeds_of_the_backbone_alone_change_nothing() -> None:
    runs = simulate(backbone=4)
    fit, without = fit_slots(runs, resamples=20), fit_slots(runs[~runs["seed"].isin([2, 3])], resamples=20)
    assert fit.rows == without.rows
    assert fit.mechanisms == without.mechanisms


# --- intervals --------------------------------------------------------------------------------------------------------


def test_intervals_cover_slopes_their_difference_and_the_gain() -> None:
    curves = {"Engram": line(-0.03), "n-gram embedding": line(-0.02)}
    hits = np.zeros(4)
    for random in range(150):
        fit = fit_slots(
            simulate(curves, random=random, rows=ROWS[:4])
        )  # too few for the power law, which takes the time
        first, second = fit.mechanisms
        estimates = (first.slope, second.slope, fit.differences[0].difference, first.gain)
        truth = (-0.03, -0.02, -0.01, BACKBONE - curves["Engram"](ROWS[3]))
        hits += [each.low <= true <= each.high for each, true in zip(estimates, truth, strict=True)]
    assert (hits / 150 >= 0.90).all()
    assert (hits / 150 <= 0.99).all()


def test_a_straight_line_is_rarely_said_to_slow() -> None:
    preferred = [only(simulate({"Engram": line(-0.03)}, random=random), resamples=2).preferred for random in range(40)]
    assert preferred.count(POWER) <= 3
    assert preferred.count(LINE) >= 30


def test_a_fall_that_slows_is_told() -> None:
    fit = only(simulate({"Engram": power(0.35)}), resamples=200)
    assert fit.preferred == POWER
    assert fit.beyond.low > 0
    assert "The fall slows" in fit.summary()
    assert "the next tenfold will bring less" in fit.message


def test_no_floor_is_given_where_noise_allows_the_line() -> None:
    law = only(simulate({"Engram": line(-0.03)}), resamples=200).laws[1]
    assert set(law.parameters) == {"alpha"}
    assert law.note


def test_a_line_that_the_means_miss_is_said_to() -> None:
    fit = only(simulate({"Engram": lambda rows: 4.2 - 0.02 * np.sin(np.log10(rows) * 2.5)}, noise=0.002), resamples=20)
    assert fit.laws[0].lack_of_fit_p < 0.01
    assert "miss the line" in fit.message or fit.preferred == POWER


# --- status and words -------------------------------------------------------------------------------------------------


def test_one_seed_is_never_converged() -> None:
    fit = fit_slots(simulate(seeds=1, backbone=1), resamples=20)
    assert fit.status is Status.TOO_FEW_POINTS
    assert (fit.paired_sd, fit.differences) == (None, ())
    assert fit.mechanisms[0].slope.low < fit.mechanisms[0].slope.high
    assert fit.mechanisms[0].gain is None
    assert "second seed" in fit.summary()


def test_two_row_counts_are_too_few_and_say_so() -> None:
    runs = simulate()
    fit = fit_slots(runs[(runs["mechanism"] != "Engram") | (runs["memory_rows"] < 20_000)], resamples=20)
    assert [each.status for each in fit.mechanisms] == [Status.TOO_FEW_POINTS, Status.CONVERGED, Status.CONVERGED]
    assert fit.status is Status.TOO_FEW_POINTS
    with pytest.raises(AnalysisError, match="has no line"):
        fit.mechanisms[0].predict(np.array([10_000]))
    assert len(fit.differences) == 1


def test_no_runs_and_the_backbone_alone_have_a_status() -> None:
    for runs in (simulate().iloc[:0], simulate({})):
        assert fit_slots(runs).status is Status.TOO_FEW_POINTS


@pytest.mark.parametrize("bad", [np.nan, np.inf, -4.0])
def test_a_loss_that_is_none_has_a_status_and_names_the_run(bad: float) -> None:
    runs = simulate()
    runs.loc[7, "val_loss"] = bad
    fit = fit_slots(runs)
    assert fit.status is Status.NOT_FINITE
    assert "t7" in fit.summary()


def test_copied_seeds_measure_no_noise() -> None:
    runs = simulate(seeds=1, backbone=1)
    for offset in (0.0, 0.02):
        copies = runs.assign(seed=1, val_loss=runs["val_loss"] + offset, trial_id="copy of " + runs["trial_id"])
        fit = fit_slots(pd.concat([runs, copies], ignore_index=True), resamples=20)
        assert fit.status is Status.TOO_FEW_POINTS
        assert "different seeds have the same losses" in fit.message
        assert fit.summary().startswith("Engram: Status too_few_points")  # the doubt comes before every number


def test_equal_losses_are_told() -> None:
    fit = fit_slots(simulate().assign(val_loss=3.0))
    assert fit.status is Status.TOO_FEW_POINTS
    assert "all losses are equal" in fit.summary()


def test_a_line_that_the_noise_refutes_is_no_converged_fit() -> None:
    fit = only(simulate({"Engram": lambda rows: 4.2 + 0.05 * (np.log10(rows) - 4.5) ** 2}, noise=0.001), resamples=20)
    assert fit.status is Status.POOR_FIT


def test_seeds_are_codes_of_any_type() -> None:
    runs = simulate()
    plain = fit_slots(runs, resamples=20)
    for seeds in (
        runs["seed"].map({0: "first", 1: "second"}),
        runs["seed"].map({0: "a", 1: 1}),
        runs["seed"].astype(float),
    ):
        fit = fit_slots(runs.assign(seed=seeds), resamples=20)
        assert [each.slope.value for each in fit.mechanisms] == pytest.approx(
            [each.slope.value for each in plain.mechanisms]
        )
        assert fit.drawn().shape == plain.drawn().shape
    with pytest.raises(AnalysisError, match="column `seed` is empty in trial t3"):
        fit_slots(runs.assign(seed=runs["seed"].where(runs.index != 3)))


def test_the_order_of_the_rows_changes_nothing() -> None:
    runs = simulate()
    fit, shuffled = fit_slots(runs, resamples=50), fit_slots(runs.sample(frac=1, random_state=1), resamples=50)
    assert {each.mechanism: each for each in fit.mechanisms} == {each.mechanism: each for each in shuffled.mechanisms}


def test_one_run_has_a_message_and_no_resamples_are_refused() -> None:
    fit = fit_slots(simulate().iloc[[4]])
    assert fit.status is Status.TOO_FEW_POINTS
    assert "row counts with a finished run: 1" in fit.message
    with pytest.raises(AnalysisError, match="resamples is 0"):
        fit_slots(simulate(), resamples=0)


def test_words_of_doubt_follow_the_intervals() -> None:
    flat = fit_slots(simulate({"Engram": line(0.0), "PKM": line(0.0)}, random=1), resamples=20)
    assert "it may change nothing" in flat.mechanisms[0].summary()
    assert "no difference of slope can be told from noise" in flat.differences[0].summary()
    steep = fit_slots(simulate({"Engram": line(-0.01), "PKM": line(-0.05), "PEER": line(0.05)}), resamples=20)
    assert "faster in PKM than in Engram" in steep.differences[0].summary()
    assert "raises the loss" in steep.mechanisms[2].summary()


def test_prediction_stays_inside_the_sampled_rows() -> None:
    fit = only(simulate({"Engram": line(-0.03)}), resamples=20)
    band = fit.predict(ROWS)
    assert (band["low"] < band["loss"]).all()
    assert (band["loss"] < band["high"]).all()
    with pytest.raises(AnalysisError, match="outside the sampled"):
        fit.predict(np.array([1e9]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"mechanism": "mechanisms"}), r"`mechanism` \(is it `mechanisms`\?\)"),
        (lambda frame: frame.assign(trial_id="same"), "same stands in several rows"),
        (
            lambda frame: frame.assign(memory_rows=frame["memory_rows"].where(frame.index != 5, 0)),
            "must hold positive row counts",
        ),
        (lambda frame: frame.assign(val_loss="low"), "trial t0, column `val_loss` holds 'low'"),
        (
            lambda frame: frame.assign(memory_rows=frame["memory_rows"].where(frame.index != 5, np.inf)),
            "must hold positive row counts",
        ),
        (lambda frame: frame.assign(seed=0), "one cell at a time"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_slots(change(simulate()))


def test_the_record_is_json_and_the_same_again() -> None:
    first, second = (fit_slots(simulate(), resamples=50).to_dict() for _ in range(2))
    record = json.loads(json.dumps(first, allow_nan=False))
    assert first == second
    assert set(record["mechanisms"][0]["slope"]) == {"value", "low", "high", "se"}
    assert not any(name.startswith("_") for name in record["mechanisms"][0])
    assert len(record["rows"]) == 38


def test_parameters_have_the_covariance_of_their_errors_and_of_the_differences() -> None:
    fit = fit_slots(simulate().drop(index=[5, 20]), resamples=20)
    assert list(fit.parameters) == [f"{name} of {memory}" for memory in CURVES for name in "ab"]
    assert np.diag(fit.covariance) == pytest.approx([each.se**2 for each in fit.parameters.values()])
    contrast = np.array([0, 1, 0, -1, 0, 0])  # slope of the first less that of the second
    assert contrast @ fit.covariance @ contrast == pytest.approx(fit.differences[0].difference.se ** 2)
    assert json.loads(fit.to_json())["parameters"]["b of Engram"]["value"] == pytest.approx(
        fit.mechanisms[0].slope.value
    )


def test_a_fit_draws_itself() -> None:
    axes = Figure().subplots()
    fit = fit_slots(simulate(), resamples=20)
    fit.plot(axes)
    assert [text.get_text().partition(":")[0] for text in axes.get_legend().get_texts()][:1] == ["Engram"]
    assert "nats/token" in axes.get_ylabel()
    fit_slots(simulate({})).plot(axes)  # no line: nothing to draw, and no error


# --- figure -----------------------------------------------------------------------------------------------------------


def test_the_figure_draws_exactly_its_table() -> None:
    runs = simulate()
    fit = fit_slots(runs, resamples=50)
    memories = runs[runs["mechanism"].notna()]
    data = fit.table(memories, ("OverEncoding", -0.0256)).assign(cell="")
    counts = data.groupby("series").size()
    assert counts[["run", "mean", "slope", "backbone", "published"]].tolist() == [36, 18, 3, 1, 1]
    assert sorted(data[data["series"] == "run"]["trial_id"]) == sorted(memories["trial_id"])
    assert data["params"].dropna().to_numpy() == pytest.approx(32 * data["rows"].dropna().to_numpy())
    assert set(data[data["series"] == "power"]["mechanism"]) == {
        each.mechanism for each in fit.mechanisms if each.preferred == POWER
    }
    figure = slots_figure(data)
    for axes, column in zip(figure.axes, ("rows", "params"), strict=True):
        drawn = {tuple(np.round(line.get_xydata(), 6).ravel()) for line in axes.lines}
        for series in ("run", "mean", "line", "power"):
            for name, own in data[data["series"] == series].groupby("mechanism"):
                aside = ASIDE ** (list(CURVES).index(name) - 1) if series in ("run", "mean") else 1
                assert tuple(np.round(own[[column, "loss"]].to_numpy(float) * [aside, 1], 6).ravel()) in drawn
    assert "nats/token" in figure.axes[0].get_ylabel()
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[0].startswith("Engram: \N{MINUS SIGN}0.0")
    assert {"backbone alone", "OverEncoding: \N{MINUS SIGN}0.0256 a tenfold"} <= set(legend)


def test_means_and_runs_agree_once_the_seeds_are_taken_off() -> None:
    runs = simulate()
    data = fit_slots(runs, resamples=20).table(runs[runs["mechanism"].notna()])
    means = data[data["series"] == "mean"].set_index(["mechanism", "rows"])["loss"]
    paired = data[data["series"] == "run"].groupby(["mechanism", "rows"])["loss"].mean()
    assert (paired - means).to_numpy() == pytest.approx(0, abs=1e-9)


# --- study ------------------------------------------------------------------------------------------------------------


def points() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"rho": 1.0, "memory_rows": 0, "memory_rows_read": 0, "memory_params": 0, "loss": BACKBONE}
    ]
    for pool, curve, read in (
        ("engram", CURVES["Engram"], 4),
        ("ngram_embedding", CURVES["n-gram embedding"], 4),
        ("ultramem_v2", line(-0.01), 16),
    ):
        for rows in ROWS:
            tables = 4 if read == 4 else 1
            grows = {"active_params": 135_000 + round(30 * rows**0.5)} if pool == "ultramem_v2" else {}
            sizes = {
                "memory_rows": tables * rows,
                "memory_rows_read": read,
                "memory_params": rows * 32,
                f"model.{pool}.rows": rows,
            }
            found.append({"rho": 1.0, **sizes, **grows, "loss": float(curve(rows))})
    return found


def test_the_report_compares_the_mechanisms(new_points: New) -> None:
    folder = new_points("slots", points())
    write_report(folder)
    (record,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert [each["mechanism"] for each in record["mechanisms"]] == ["Engram", "n-gram embedding", "UltraMemV2"]
    assert [each["slope"]["value"] for each in record["mechanisms"]] == pytest.approx([-0.03, -0.02, -0.01], abs=0.004)
    assert record["status"] == "converged"
    said = summarize(folder)
    for part in (
        "Engram: Every tenfold of the rows lowers",
        "faster in Engram than in UltraMemV2",
        "published for OverEncoding's 2-gram table",
    ):
        assert part in said
    page = (folder / "report.html").read_text()
    for part in (
        "UltraMemV2: P_act grows from",
        "Engram 8, n-gram embedding 8, UltraMemV2 32",
        "touch all of the largest tables (12% of them",
    ):
        assert part in page
    assert {path.stem for path in (folder / "figures").iterdir()} == {"slots"}


def test_designs_of_one_memory_are_mechanisms_of_their_own(new_points: New) -> None:
    wide = [
        {**point, "model.engram.row_dim": width, "memory_params": point["memory_rows"] * width}
        for width in (8, 16)
        for point in points()
        if "model.engram.rows" in point
    ]
    said = summarize(write_report(new_points("slots", wide)).parent)
    assert "Engram (row_dim 8): Every tenfold" in said
    assert "Engram (row_dim 16): Every tenfold" in said


@pytest.mark.parametrize("unfinished", [range(38), range(5, 38)])
def test_a_study_in_progress_has_a_report_with_a_status(new_points: New, unfinished: range) -> None:
    folder = new_points("slots", points(), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too_few_points" in write_report(folder).read_text()


def test_results_of_another_kind_are_refused_by_folder_and_remedy(new_points: New) -> None:
    without = [{name: value for name, value in point.items() if not name.startswith("model.")} for point in points()]
    with pytest.raises(AnalysisError, match=r"slots: no trial varies the `rows` of a memory; vary `model.POOL.rows`"):
        write_report(new_points("slots", without))


def test_two_memories_in_one_trial_are_refused_by_name(new_points: New) -> None:
    both = [point | {"model.pkm.rows": 4096} for point in points()]
    with pytest.raises(
        AnalysisError, match=r"trial 000000000001, .* gives `rows` to several memories.*grid of its own"
    ):
        write_report(new_points("slots", both))


def test_two_budgets_are_refused_and_copies_are_told() -> None:
    runs = simulate()
    with pytest.raises(AnalysisError, match=r"fit_slots: column `tokens` runs from 1,000,000 to 2,000,000"):
        fit_slots(runs.assign(tokens=np.where(runs["mechanism"].isna(), 1e6, 2e6)))
    one = runs[runs["mechanism"] == "Engram"]
    both = pd.concat([runs, one.assign(mechanism="other", trial_id="c" + one["trial_id"])])
    assert "the losses of Engram and other are the same numbers in every run" in fit_slots(both, resamples=20).summary()
    two = runs.assign(active_params=np.where(runs["seed"] == 0, 1e5, 2e5))  # at equal tokens
    with pytest.raises(AnalysisError, match=r"fit_slots: column `active_params` runs from 100,000 to 200,000"):
        fit_slots(two)
