"""What a reader of an allocation fit relies on: it finds a known optimum, its intervals cover, and poor data get a
status.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, Status, fit_allocation
from analysis.fits.laws import Akima, Cubic, Quadratic, TwoPower

SHARES = np.array([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1, 0.0])
Curve = Callable[[np.ndarray], np.ndarray]


def two_power(*theta: float) -> Curve:
    return lambda x: TwoPower().value(np.atleast_1d(x), np.array([theta]))[0]


def parabola(best: float, bend: float = 0.5) -> Curve:
    return lambda x: 4 + bend * (x - best) ** 2


ASYMMETRIC = two_power(
    4.1, -0.25, 0.10, 0.5, 2.0
)  # steep at both ends, least at 0.146: the shape of the first real curves


def least(curve: Curve) -> float:
    grid = np.linspace(0, 1, 20_001)
    return float(grid[np.argmin(curve(grid))])


def simulate(curve: Curve, noise: float, seeds: int = 2, random: int = 0, extra: bool = False) -> pd.DataFrame:
    """Runs with effects of seeds four times the noise; `extra` repeats only four shares once more."""
    rng = np.random.default_rng(random)
    rows = []
    for seed in range(seeds + extra):
        together = 4 * noise * rng.standard_normal()
        for share in SHARES if seed < seeds else SHARES[[0, 4, 5, 7]]:
            rows.append((share, seed, float(curve(np.array([share]))[0]) + together + noise * rng.standard_normal()))
    return pd.DataFrame(rows, columns=["share_moe", "seed", "val_loss"])


# --- recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "law"),
    [
        (parabola(0.45), "quadratic"),
        (parabola(0.12, 0.2), "quadratic"),
        (ASYMMETRIC, "two-power"),
        (two_power(4.0, -0.3, 0.3, 0.7, 5.3), "two-power"),
        (two_power(4.0, -0.2, 0.2, 1.0, 1.0), "two-power"),
        (lambda x: 4 + 0.6 * (x - 0.6) ** 2 * (1.2 - x), "cubic"),
    ],
)
def test_a_noise_free_curve_is_found_exactly(curve: Curve, law: str) -> None:
    fit = fit_allocation(simulate(curve, 1e-6), resamples=100)
    assert (fit.law, fit.status) == (law, Status.CONVERGED)
    assert fit.argmin is not None
    assert fit.argmin.value == pytest.approx(least(curve), abs=5e-5)  # the grid that `least` searches
    assert fit.argmin.high - fit.argmin.low < 1e-3
    assert fit.objective < 1e-9
    assert fit.predict(SHARES)["loss"].to_numpy() == pytest.approx(curve(SHARES), abs=2e-5)


@pytest.mark.parametrize(
    "theta",
    [(4.1, -0.25, 0.1, 0.5, 2.0), (4.0, -0.1, 0.3, 0.3, 0.4), (4.0, -0.2, 0.2, 0.93, 1.3), (4.0, -0.2, 0.2, 1.0, 1.0)],
)
def test_the_two_power_law_recovers_its_parameters(theta: tuple[float, ...]) -> None:
    found = TwoPower().fit(SHARES, np.ones(8), two_power(*theta)(SHARES)[None])[0]
    assert found == pytest.approx(theta, abs=1e-9)


def test_the_two_power_fit_is_as_good_as_a_search_from_many_starts() -> None:
    from scipy.optimize import minimize

    y = ASYMMETRIC(SHARES) + np.random.default_rng(3).normal(0, 0.02, 8)
    law = TwoPower()

    def squares(theta: np.ndarray) -> float:
        return float(np.sum((law.value(SHARES, theta[None])[0] - y) ** 2))

    bounds = [(3, 5), (-1, 0), (0, 1), law.P, law.Q]
    starts = [(4.1, -0.2, 0.1, p, q) for p in (0.3, 0.6, 0.95) for q in (0.5, 2, 5, 7.5)]
    best = min(
        minimize(squares, start, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "maxiter": 5000}).fun
        for start in starts
    )
    assert squares(law.fit(SHARES, np.ones(8), y[None])[0]) <= best * (1 + 1e-6)


def test_the_derived_minimum_is_that_of_the_curve() -> None:
    theta = np.array(
        [[4.1, -0.25, 0.1, 0.5, 2.0], [4.0, -0.3, 0.3, 0.7, 5.3], [4.0, -0.2, 0.0, 0.5, 1.0], [4.0, 0.0, 0.2, 1.0, 1.0]]
    )
    grid = np.linspace(0, 1, 200_001)
    expected = grid[TwoPower().value(grid, theta).argmin(1)]
    assert TwoPower().vertex(theta, 0, 1)[:2] == pytest.approx(expected[:2], abs=1e-5)
    assert np.isnan(TwoPower().vertex(theta, 0, 1)[2:]).all()  # with one term alone the least loss is at an end
    assert Quadratic().vertex(np.array([[4, -0.6, 0.5], [4, 0.6, -0.5], [4, 0.6, 0.5]]), 0, 1) == pytest.approx(
        [0.6, np.nan, np.nan], nan_ok=True
    )


@pytest.mark.parametrize("law", [Cubic(), Akima().on(np.sort(SHARES))])
def test_the_minimum_of_a_piecewise_cubic_is_that_of_a_fine_grid(law: Cubic | Akima) -> None:
    """Also where an end is lower than the minimum inside."""
    x = np.sort(SHARES)
    y = 4 + 0.2 * (x - 0.4) ** 2 + np.random.default_rng(0).normal(0, 0.03, (200, 8))
    theta, grid = law.fit(x, np.ones(8), y), np.linspace(0, 1, 20_001)
    expected = grid[law.value(grid, theta).argmin(1)]
    expected = np.where((expected > 0.01) & (expected < 0.99), expected, np.nan)
    assert law.vertex(theta, 0, 1) == pytest.approx(expected, abs=5e-5, nan_ok=True)
    assert 0 < np.isnan(expected).sum() < 200


def test_akima_passes_through_the_means_and_is_that_of_scipy() -> None:
    from scipy.interpolate import Akima1DInterpolator

    fit = fit_allocation(simulate(ASYMMETRIC, 0.01), law="akima", resamples=50)
    assert fit.predict(fit.shares)["loss"].to_numpy() == pytest.approx(fit.means, abs=1e-12)
    grid = np.linspace(0, 1, 50)
    assert fit.predict(grid)["loss"].to_numpy() == pytest.approx(
        Akima1DInterpolator(fit.shares, fit.means)(grid), abs=1e-12
    )
    (akima,) = fit.candidates
    assert (akima.aicc, akima.lack_of_fit_p) == (None, None)
    assert "no AICc" in akima.note
    assert list(fit.parameters) == [f"loss at {share:.4g}" for share in fit.shares]


def test_the_fit_draws_itself() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    fit_allocation(simulate(ASYMMETRIC, 0.01), resamples=50).plot(axes)
    assert axes.lines


def test_seed_effects_do_not_move_an_unbalanced_study() -> None:
    runs = simulate(parabola(0.45), 1e-5, extra=True)
    runs["val_loss"] += runs["seed"].map({0: 0.0, 1: 0.05, 2: -0.08})
    fit = fit_allocation(runs, resamples=50)
    assert fit.argmin.value == pytest.approx(0.45, abs=1e-4)
    assert fit.paired_sd < 3e-5
    assert fit.seed_sd > 0.03


def test_the_same_input_gives_the_same_fit() -> None:
    runs = simulate(ASYMMETRIC, 0.01)
    assert fit_allocation(runs, resamples=200) == fit_allocation(runs.sample(frac=1, random_state=0), resamples=200)
    assert fit_allocation(runs, resamples=200).to_dict() == fit_allocation(runs.copy(), resamples=200).to_dict()


# --- intervals --------------------------------------------------------------------------------------------------------


def coverage(curve: Curve, noise: float, studies: int, **options: bool) -> tuple[float, float, float]:
    """Part of the studies whose interval holds the true optimum, the true depth, and whose tied shares hold the true
    best.
    """
    truth, best = least(curve), SHARES[np.argmin(curve(SHARES))]
    depth = float(curve(np.array([1.0]))[0] - curve(np.array([truth]))[0])
    hits = np.zeros(3)
    for random in range(studies):
        fit = fit_allocation(simulate(curve, noise, random=random, **options), resamples=200)
        low, high = np.quantile(fit.argmin_draws(), (0.025, 0.975))
        hits += low <= truth <= high, fit.depth.low <= depth <= fit.depth.high, best in fit.tied
    return tuple(hits / studies)


@pytest.mark.slow
def test_intervals_cover_an_asymmetric_optimum() -> None:
    optimum, depth, tied = coverage(ASYMMETRIC, 0.01, 200)
    assert 0.90 <= optimum <= 0.98
    assert depth >= 0.90
    assert tied >= 0.93


LEANING: Curve = lambda x: 4 + 0.6 * (x - 0.6) ** 2 * (1.2 - x)  # noqa: E731


@pytest.mark.slow
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("noise", [0.003, 0.01])
@pytest.mark.parametrize(
    "curve",
    [parabola(0.45), ASYMMETRIC, two_power(4.1, -0.2, 0.2, 1.0, 1.0), two_power(4.1, -0.3, 0.3, 0.7, 5.0), LEANING],
)
def test_intervals_cover_other_curves(curve: Curve, noise: float, extra: bool) -> None:
    optimum, depth, tied = coverage(curve, noise, 200, extra=extra)
    assert 0.90 <= optimum <= 0.99
    assert depth >= 0.90
    assert tied >= 0.93


def test_fewer_seeds_widen_the_interval() -> None:
    def width(seeds: int) -> float:
        fits = [
            fit_allocation(simulate(ASYMMETRIC, 0.01, seeds=seeds, random=random), resamples=200) for random in range(5)
        ]
        return float(np.mean([np.ptp(np.quantile(fit.argmin_draws(), (0.025, 0.975))) for fit in fits]))

    assert width(2) > 1.3 * width(6)


# --- status -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "end"), [(0.1, 0.0), (-0.1, 1.0)])
def test_a_boundary_optimum_says_which_end_wins(slope: float, end: float) -> None:
    fit = fit_allocation(simulate(lambda x: 4 + slope * x, 0.003), resamples=200)
    assert fit.status is Status.NO_INTERIOR_MINIMUM
    assert fit.argmin is None
    assert fit.best_end == end
    assert fit.p_interior < 0.5
    assert f"at the end {end:.2f}" in fit.summary()


def test_depth_is_that_of_the_end_where_a_minimum_inside_is_not_established() -> None:
    """One seed, four shares: the curve turns inside, but its noise does not let that be said."""
    runs = pd.DataFrame({"share_moe": [0, 0.2, 0.6, 1.0], "val_loss": [8.06, 8.055, 8.05, 8.066], "seed": 0})
    fit = fit_allocation(runs, resamples=200)
    assert (fit.argmin, fit.best_end) == (None, 0.0)
    curve = fit.predict([0.0, 1.0])["loss"]
    assert fit.depth is not None
    assert fit.depth.value == pytest.approx(curve[1] - curve[0])
    assert "is not established; of their ends, 0.00" in fit.summary()


def test_a_hill_has_no_minimum_inside() -> None:
    fit = fit_allocation(simulate(lambda x: 4.2 - 0.3 * (x - 0.4) ** 2, 0.003), law="quadratic", resamples=200)
    assert (fit.status, fit.argmin, fit.best_end) == (Status.NO_INTERIOR_MINIMUM, None, 1.0)


@pytest.mark.slow
def test_a_flat_curve_is_rarely_claimed_to_have_an_optimum() -> None:
    fits = [fit_allocation(simulate(lambda x: 4 + 0 * x, 0.01, random=random), resamples=200) for random in range(40)]
    assert np.mean([fit.status is Status.NO_INTERIOR_MINIMUM for fit in fits]) >= 0.75
    assert np.mean([bool(fit.message) for fit in fits]) >= 0.9
    assert np.mean([len(fit.tied) == len(SHARES) for fit in fits]) >= 0.75


def test_equal_losses_have_a_status() -> None:
    fit = fit_allocation(simulate(lambda x: 4 + 0 * x, 0.0))
    assert (fit.status, fit.argmin) == (Status.NO_INTERIOR_MINIMUM, None)
    assert "equal" in fit.summary()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -4.0, 4e200])
def test_a_loss_that_is_none_has_a_status_and_names_the_run(bad: float) -> None:
    runs = simulate(ASYMMETRIC, 0.01).assign(trial_id=lambda frame: [f"t{i}" for i in frame.index])
    runs.loc[3, "val_loss"] = bad
    fit = fit_allocation(runs)
    assert fit.status is Status.NOT_FINITE
    assert ("4e+200" if bad == 4e200 else "t3") in fit.message


def test_three_shares_are_too_few() -> None:
    fit = fit_allocation(simulate(ASYMMETRIC, 0.01)[lambda frame: frame["share_moe"].isin([0, 0.4, 1])])
    assert (fit.status, fit.argmin) == (Status.TOO_FEW_POINTS, None)
    with pytest.raises(AnalysisError, match="no law"):
        fit.predict([0.5])


def test_five_shares_are_too_few_for_the_two_power_law_but_not_for_a_parabola() -> None:
    runs = simulate(parabola(0.45), 0.001)[lambda frame: frame["share_moe"].isin([0, 0.2, 0.4, 0.75, 1])]
    assert fit_allocation(runs, law="two-power").status is Status.TOO_FEW_POINTS
    assert fit_allocation(runs, resamples=100).law in ("quadratic", "cubic")


def test_one_seed_is_never_converged() -> None:
    fit = fit_allocation(simulate(ASYMMETRIC, 0.01, seeds=1), resamples=200)
    assert fit.status is Status.TOO_FEW_POINTS
    assert fit.paired_sd is None
    assert fit.argmin is None or fit.argmin.high > fit.argmin.low
    assert "second seed" in fit.summary()


def test_seeds_that_no_share_links_are_not_paired() -> None:
    runs = simulate(ASYMMETRIC, 0.01, seeds=1).assign(seed=[0, 1] * 4)
    assert fit_allocation(runs, resamples=100).status is Status.TOO_FEW_POINTS


def test_a_curve_that_no_law_follows_is_said_to_miss() -> None:
    fit = fit_allocation(simulate(lambda x: 4 + 0.05 * np.cos(9 * x), 0.0005), resamples=200)
    assert fit.law == "akima"
    assert all(law.lack_of_fit_p < 0.01 for law in fit.candidates if law.law != "akima")
    assert "every other law misses" in fit.message
    parabola = fit_allocation(simulate(lambda x: 4 + 0.05 * np.cos(9 * x), 0.0005), law="quadratic", resamples=200)
    assert parabola.lack_of_fit_p < 0.01
    assert "misses" in parabola.message
    leaning = fit_allocation(simulate(ASYMMETRIC, 0.0005), law="cubic", resamples=100)
    assert leaning.status is Status.POOR_FIT
    assert leaning.summary().startswith("Status poor_fit: the curve misses")


def test_copied_seeds_have_no_noise_to_speak_of() -> None:
    fit = fit_allocation(simulate(ASYMMETRIC, 0.0), resamples=50)
    assert (fit.status, fit.argmin) == (Status.TOO_FEW_POINTS, None)
    assert "copies" in fit.summary()


def test_shares_that_scatter_more_are_named() -> None:
    runs = simulate(parabola(0.45), 0.001, seeds=3)
    runs.loc[(runs["share_moe"] == 1) & (runs["seed"] == 0), "val_loss"] += 0.05
    fit = fit_allocation(runs, resamples=50)
    assert "1.00 scatters more" in fit.message
    calm = [
        fit_allocation(simulate(parabola(0.45), 0.003, random=random), resamples=20).message for random in range(40)
    ]
    assert sum("scatters more" in message for message in calm) <= 6


def test_few_shares_do_not_hide_a_lean() -> None:
    """AICc forbids the cubic at five shares and two seeds; its interval held this optimum in 48% of the studies."""
    held = 0
    for random in range(40):
        rng, x = np.random.default_rng(random), np.linspace(0, 1, 5)
        clean = 4 + 0.15 * (x - 0.6) ** 2 - 0.1 * (x - 0.6) ** 3
        runs = [
            pd.DataFrame({"share_moe": x, "seed": s, "val_loss": clean + 0.003 * rng.standard_normal(5)})
            for s in range(2)
        ]
        low, high = np.quantile(
            fit_allocation(pd.concat(runs, ignore_index=True), resamples=100).argmin_draws(), (0.025, 0.975)
        )
        held += low <= 0.6 <= high
    assert held >= 34


# --- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"val_loss": "valloss"}), r"`val_loss` \(is it `valloss`\?\)"),
        (lambda frame: frame.assign(trial_id="same"), "same stands in several rows"),
        (lambda frame: frame.assign(share_moe=frame["share_moe"] * 100), "between 0 and 1"),
        (
            lambda frame: frame.assign(share_moe=frame["share_moe"] + 1e-6 * frame["seed"] * (frame["share_moe"] < 1)),
            "nearer than",
        ),
        (lambda frame: frame.assign(val_loss="low"), "a number belongs there"),
        (lambda frame: frame.assign(seed=0), "one cell at a time"),
        (
            lambda frame: frame.assign(tokens=[500_000, 2_000_000] * 8),
            "`tokens` runs from 500,000 to 2,000,000.*fit_joint",
        ),
        (
            lambda frame: frame.assign(total_params=np.where(frame["seed"] == 1, 4e6, 2e6)),
            "`total_params` runs from 2,000,000 to 4,000,000",
        ),
        (lambda frame: frame.assign(embedding_params=[1, 2] * 8), "`embedding_params`"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_allocation(change(simulate(ASYMMETRIC, 0.01)))


def test_an_unknown_law_is_refused() -> None:
    with pytest.raises(AnalysisError, match="two-power"):
        fit_allocation(simulate(ASYMMETRIC, 0.01), law="quartic")  # type: ignore[arg-type]


def test_unfinished_runs_and_the_dense_baseline_are_left_out() -> None:
    runs = simulate(ASYMMETRIC, 0.01).assign(status="finished")
    others = pd.DataFrame(
        {"share_moe": [0.3, np.nan], "seed": [0, 0], "val_loss": [np.nan, 4.5], "status": ["pending", "finished"]}
    )
    assert fit_allocation(pd.concat([runs, others]), resamples=50).rows == fit_allocation(runs, resamples=50).rows


def test_prediction_stays_inside_the_sampled_range() -> None:
    fit = fit_allocation(simulate(ASYMMETRIC, 0.01), resamples=100)
    band = fit.predict([0.0, 0.33, 1.0])
    assert (band["low"] < band["loss"]).all()
    assert (band["loss"] < band["high"]).all()
    with pytest.raises(AnalysisError, match="outside the sampled range"):
        fit.predict(1.2)


def test_the_record_is_json_and_complete() -> None:
    runs = simulate(ASYMMETRIC, 0.01).assign(trial_id=lambda frame: [f"t{i}" for i in frame.index])
    record = json.loads(json.dumps(fit_allocation(runs, resamples=100).to_dict(), allow_nan=False))
    assert {"law", "status", "parameters", "objective", "rows", "conventions"} <= set(record)
    assert sorted(record["rows"]) == sorted(runs["trial_id"])
    assert set(record["parameters"]["p"]) == {"value", "low", "high", "se"}
    assert {candidate["law"] for candidate in record["candidates"]} == {"quadratic", "cubic", "two-power", "akima"}


def test_a_gap_between_tied_shares_is_neither_shaded_nor_said_to_be_tied() -> None:
    """Two wells of one depth with a hill between them."""
    fit = fit_allocation(
        simulate(lambda x: 4 + 0.3 * np.minimum(np.abs(x - 0.1), np.abs(x - 0.9)), 0.002), resamples=100
    )
    assert {0.1, 0.9} <= set(fit.tied)
    assert not {0.4, 0.6} & set(fit.tied)
    spans = fit.drawn()[lambda data: data["series"] == "tied"][["low", "high"]].to_numpy()
    shaded = [share for share in fit.shares if ((spans[:, 0] <= share) & (share <= spans[:, 1])).any()]
    assert shaded == list(fit.tied)
    assert not ((spans[:, 0] < 0.5) & (spans[:, 1] > 0.5)).any()
    assert ", ".join(f"{low:.2f} to {high:.2f}" if low < high else f"{low:.2f}" for low, high in spans) in fit.summary()


def test_where_both_ends_are_tied_that_comes_first_and_no_end_is_said_to_win() -> None:
    said = 0
    for random in range(12):
        fit = fit_allocation(
            simulate(lambda x: 4 - 0.03 * (x - 0.45) ** 2, 0.008, random=random), law="quadratic", resamples=60
        )
        if fit.argmin is None and {0.0, 1.0} <= set(fit.tied):
            said += 1
            assert "all the way" not in fit.summary()
            assert "the loss is least at the end" not in fit.summary()
            first = fit.message.split(": ")[0].split(",")[0]
            assert first in (
                "no sampled share can be told from the best",
                "the noise does not tell which end of the sampled shares is better",
            )
    assert said >= 6


def test_a_hill_is_not_said_to_fall_all_the_way() -> None:
    fit = fit_allocation(simulate(lambda x: 4.2 - 0.3 * (x - 0.4) ** 2, 0.003), law="quadratic", resamples=200)
    assert "all the way" not in fit.message
    assert fit_allocation(simulate(lambda x: 4.2 - 0.3 * x, 0.003), resamples=200).message.startswith(
        "the loss falls all the way to 1.00"
    )
