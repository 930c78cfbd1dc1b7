"""IsoFLOP profiles: known optima and exponents, edges named, published regressions, intervals that cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import linregress, t

from analysis import AnalysisError, Status, fit_isoflop, fit_log_log
from analysis.fits.isoflop import IsoflopFit

BUDGETS = (1e17, 3e17, 1e18, 3e18, 1e19)


def profiles(
    noise: float = 0.0, seeds: int = 1, random: int = 0, shift: float = 0.2, exponent: float = 0.52
) -> pd.DataFrame:
    """Parabolas in log size, optimum 0.05 C^exponent, on grids whose middle lies `shift` above it."""
    rng = np.random.default_rng(random)
    rows = [
        (c, 0.05 * c**exponent * np.exp(off), 2 + 30 * c**-0.06 + 0.03 * off**2)
        for c in BUDGETS
        for off in np.linspace(-1.2, 1.2, 7) + shift
        for _ in range(seeds)
    ]
    frame = pd.DataFrame(rows, columns=["c", "n", "loss"])
    return frame.assign(loss=frame["loss"] + noise * rng.standard_normal(len(frame)))


def fit(frame: pd.DataFrame, **options: str) -> IsoflopFit:
    return fit_isoflop(frame, flops="c", params="n", loss="loss", resamples=500, **options)


def test_noise_free_profiles_give_back_optima_and_exponent() -> None:
    found = fit(profiles())
    assert found.status is Status.CONVERGED
    assert found.parameters["exponent"].value == pytest.approx(0.52, abs=1e-9)
    assert [each.optimum.value for each in found.budgets if each.optimum] == pytest.approx(
        [0.05 * c**0.52 for c in BUDGETS], rel=1e-6
    )
    assert found.predict(1e20)["n"].iloc[0] == pytest.approx(0.05 * 1e20**0.52, rel=1e-6)
    json.loads(found.to_json())


def test_a_budget_with_its_optimum_at_the_edge_is_left_out_and_named() -> None:
    frame = profiles(noise=0.002, seeds=2)
    frame.loc[frame["c"] == 1e17, "n"] *= np.exp(2.0)  # all sizes above the optimum
    frame.loc[frame["c"] == 1e17, "loss"] += 0.2 * np.log(frame["n"][frame["c"] == 1e17] / 3e7)
    found = fit(frame)
    assert found.budgets[0].optimum is None
    assert "1e+17 FLOPs (the least loss lies at the smallest size)" in found.message
    assert found.status is Status.CONVERGED
    assert found.line is not None
    assert len(found.line.rows) == 4


def test_statuses() -> None:
    assert fit(profiles(shift=4)).status is Status.NO_INTERIOR_MINIMUM
    assert fit(profiles().query("c < 1e18")).status is Status.TOO_FEW_POINTS
    assert fit(profiles().iloc[::3]).status is Status.TOO_FEW_POINTS
    broken = fit(profiles().assign(loss=lambda frame: frame["loss"].where(frame.index != 2)))
    assert broken.status is Status.NOT_FINITE
    assert broken.parameters == {}
    with pytest.raises(AnalysisError, match="has no law"):
        broken.predict(1e20)


def test_noise_is_that_of_repeats_or_as_given_or_left_over() -> None:
    frame = profiles(noise=0.004, seeds=4)
    assert fit(frame).noise_sd == pytest.approx(0.004, rel=0.2)
    assert "stands in" in fit(profiles(noise=0.004)).message
    errors = [fit(frame.assign(se=se), loss_se="se").budgets[2].log_se for se in (0.002, 0.004)]
    assert errors[1] == pytest.approx(2 * errors[0], rel=0.05)  # type: ignore[operator]


def test_profiles_that_are_no_parabolas_are_told() -> None:
    frame = profiles(noise=0.001, seeds=3)
    off = np.log(frame["n"] / (0.05 * frame["c"] ** 0.52))
    found = fit(frame.assign(loss=frame["loss"] + 0.03 * off**4))
    assert found.lack_of_fit_p is not None
    assert found.lack_of_fit_p < 0.01
    assert "nearer the optimum" in found.message

    assert found.status is Status.POOR_FIT
    assert found.summary().startswith("Status poor_fit")


def test_random_losses_are_never_converged() -> None:
    rng = np.random.default_rng(0)
    for seeds in (1, 2):
        found = [fit(profiles(seeds=seeds).assign(loss=lambda frame: rng.uniform(2, 3, len(frame)))) for _ in range(10)]
        assert all(
            each.status is not Status.CONVERGED or "do not show that the best size grows" in each.message
            for each in found
        )
        assert sum(each.status is Status.CONVERGED for each in found) <= 1


def test_copies_and_equal_losses_have_a_status() -> None:
    copied = fit(pd.concat([profiles(noise=0.01)] * 2, ignore_index=True))
    assert copied.status is Status.TOO_FEW_POINTS
    assert "different seeds have the same losses" in copied.message
    equal = fit(profiles().assign(loss=3.0))
    assert equal.status is Status.TOO_FEW_POINTS
    assert "all losses are equal" in equal.summary()


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_the_unit_of_the_loss_changes_nothing(unit: float) -> None:
    frame = profiles(noise=0.004, seeds=2)
    plain, scaled = fit(frame), fit(frame.assign(loss=unit * frame["loss"]))
    assert scaled.parameters["exponent"].value == pytest.approx(plain.parameters["exponent"].value)
    assert plain.noise_sd is not None
    assert scaled.noise_sd == pytest.approx(unit * plain.noise_sd)
    json.loads(scaled.to_json())


def test_the_order_of_the_rows_changes_nothing() -> None:
    frame = profiles(noise=0.004, seeds=2).assign(trial_id=lambda frame: [f"t{i}" for i in frame.index])
    assert fit(frame).to_json() == fit(frame.sample(frac=1, random_state=1)).to_json()


def test_near_budgets_are_one() -> None:
    frame = profiles()
    moved = frame.assign(c=frame["c"] * np.random.default_rng(0).uniform(0.98, 1.02, len(frame)))
    assert len(fit(moved).budgets) == len(BUDGETS)


def test_the_interval_of_the_exponent_covers() -> None:
    estimates = [fit(profiles(noise=0.01, seeds=2, random=random)).parameters["exponent"] for random in range(100)]
    assert np.mean([each.low <= 0.52 <= each.high for each in estimates]) >= 0.9


def test_the_plain_regression_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 8)
    y = 3 * x**0.4 * np.exp(0.1 * rng.standard_normal(8))
    found, expected = fit_log_log(pd.DataFrame({"x": x, "y": y}), x="x", y="y"), linregress(np.log(x), np.log(y))
    assert found.parameters["exponent"].value == pytest.approx(expected.slope)
    assert found.parameters["exponent"].se == pytest.approx(expected.stderr)
    assert found.parameters["log_coefficient"].se == pytest.approx(expected.intercept_stderr)
    assert found.parameters["exponent"].high == pytest.approx(expected.slope + t.ppf(0.975, 6) * expected.stderr)
    band = found.predict([1.0])
    assert np.log(band["high"].iloc[0]) == pytest.approx(found.parameters["log_coefficient"].high)


def test_published_regressions_are_reached(published: Path) -> None:
    """Porian et al. 2024, arXiv 2406.19146: exponents of the optimal size, to 4 digits."""
    optima = pd.read_csv(published / "porian_optimal_n.csv")
    for answer in json.loads((published / "porian_published.json").read_text()):
        own = optima[optima["config"] == answer["config"]]
        found = fit_log_log(own, x="flops", y="n_star_median", log_se="n_star_log_std")
        assert found.parameters["exponent"].value == pytest.approx(answer["n_exponent"], abs=5e-5)


def test_a_figure_shows_profiles_and_optima() -> None:
    found = fit(profiles(noise=0.002, seeds=2))
    drawn = found.drawn()
    assert drawn["series"].value_counts().to_dict() == {"curve": 61 * 5, "run": 70, "optimum": 5}
    axes = Figure().subplots()
    found.plot(axes)
    assert axes.get_xlabel() == "n"
