"""The law over several budgets: it finds what moves the optimum, its intervals cover, and it refuses what the data
cannot say.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.special import fdtrc

from analysis import AnalysisError, Status, fit_joint
from analysis.fits.laws import TwoPower
from analysis.fits.linear import holm

SHARES = np.array([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.1, 0.0])
Curve = Callable[[np.ndarray, float, float, float], np.ndarray]
"""Shares and decimal logarithms of size, tokens per activated parameter and sparsity from those of `FIRST` -> losses
less a level.
"""
Budget = tuple[float, float, float]
FIRST: Budget = (1e5, 10, 10)
THREE = tuple((1e5, ratio, 10) for ratio in (10, 40, 160))
GRID = tuple((1e5, ratio, sparsity) for ratio in (10, 40) for sparsity in (5, 10, 20))
GRID_OF_SIZES = tuple((size, ratio, 10) for size in (1e5, 4e5) for ratio in (10, 40))
LADDER = (
    *((1e5 * size, ratio, 10) for size in (1, 4) for ratio in (4, 15, 60)),
    *((1e5, 15, sparsity) for sparsity in (5, 20)),
)
"""What can be trained: two sizes, three lengths, three sparsities of the smaller one; a third size is to
be predicted.
"""
TPP = "tokens_per_active_param"
SIX = np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def two_power(position: float, by_tokens: float = 0.0, by_sparsity: float = 0.0, by_size: float = 0.0) -> Curve:
    """The depth rises with the tokens in any case; the best share is 1.1 / (1 + e^-m) - 0.1."""

    def curve(x: np.ndarray, size: float, tokens: float, sparsity: float) -> np.ndarray:
        m = position + by_tokens * tokens + by_sparsity * sparsity + by_size * size
        best, q = 1.1 / (1 + np.exp(-m)) - 0.1, np.array(2.0)
        slope = (TwoPower().fall(best + 1e-6, q) - TwoPower().fall(best - 1e-6, q)) / 2e-6
        weight = -0.5 * (1 - best) ** -0.5 / slope
        return 0.1 * np.exp(0.5 * tokens) * (weight * TwoPower().fall(x, q) - (1 - x) ** 0.5)

    return curve


def cubic(best: float, by_tokens: float = 0.0) -> Curve:
    def curve(x: np.ndarray, size: float, tokens: float, sparsity: float) -> np.ndarray:
        u = x - best - by_tokens * tokens
        return 0.2 * np.exp(0.5 * tokens) * u**2 * (1 + 0.3 * u)

    return curve


def apart(budget: Budget) -> list[float]:
    return [float(np.log10(each / first)) for each, first in zip(budget, FIRST, strict=True)]


def simulate(
    curve: Curve, budgets: tuple[Budget, ...] = THREE, noise: float = 0.0, random: int = 0, shares: np.ndarray = SHARES
) -> pd.DataFrame:
    """Two seeds, with effects of four times the noise."""
    rng = np.random.default_rng(random)
    tables = []
    for active, ratio, sparsity in budgets:
        size, tokens, others = apart((active, ratio, sparsity))
        for seed in range(2):
            clean = 5 - size - tokens + curve(shares, size, tokens, others)
            own = clean + 4 * noise * rng.standard_normal() + noise * rng.standard_normal(len(shares))
            total = sparsity * active
            sizes = {
                "tokens": ratio * active,
                "budget.total_params": total,
                "total_params": total,
                "active_params": active,
            }
            sizes |= {"budget.active_params": active} if len({budget[0] for budget in budgets}) > 1 else {}
            tables.append(pd.DataFrame({**sizes, "share_moe": shares, "seed": seed, "val_loss": own}))
    return pd.concat(tables, ignore_index=True).assign(trial_id=lambda runs: [f"t{i}" for i in runs.index])


def least(curve: Curve, ratio: float, sparsity: float = 10, active: float = 1e5) -> float:
    grid = np.linspace(0, 1, 10_001)
    return float(grid[curve(grid, *apart((active, ratio, sparsity))).argmin()])


@pytest.mark.parametrize(
    ("curve", "budgets", "law", "moves_with"),
    [
        (two_power(-0.7), THREE, "two-power", ()),
        (two_power(-0.7, -0.4), THREE, "two-power", (TPP,)),
        (cubic(0.5, -0.15), THREE, "cubic", (TPP,)),
        (two_power(-0.7, 0, 0.4), GRID, "two-power", ("sparsity",)),
        (two_power(-0.7, -0.4, 0.4), GRID, "two-power", (TPP, "sparsity")),
        (two_power(-0.7, 0, 0, 0.4), GRID_OF_SIZES, "two-power", ("active_params",)),
    ],
)
def test_a_nearly_noise_free_law_is_found(
    curve: Curve, budgets: tuple[Budget, ...], law: str, moves_with: tuple[str, ...]
) -> None:
    fit = fit_joint(simulate(curve, budgets, 1e-5), resamples=30)
    assert (fit.status, fit.law) == (Status.CONVERGED, law)
    assert set(moves_with) <= set(fit.moves_with)
    truths = [least(curve, budget[TPP], budget["sparsity"], budget["active_params"]) for budget in fit.budgets]
    assert [best.value for best in fit.optima] == pytest.approx(truths, abs=2e-3)
    assert fit.left_out.predicted.value == pytest.approx(fit.left_out.measured.value, abs=5e-3)
    assert fit.left_out.rms < 1e-4
    ratio, sparsity, active = 2 * max(budget[1] for budget in budgets), 25.0, 4e5
    given = {"active_params": active, TPP: ratio, "sparsity": sparsity}
    there = fit.extrapolate(**{name: given[name] for name in fit.factors})
    held = {"active_params": 1e5, TPP: ratio, "sparsity": 10.0} | {name: given[name] for name in fit.factors}
    best = least(curve, held[TPP], held["sparsity"], held["active_params"])
    assert there.optimum.value == pytest.approx(best, abs=5e-3)
    at_all, at_best = curve(np.array([1.0, best]), *apart((held["active_params"], held[TPP], held["sparsity"])))
    assert there.depth.value == pytest.approx(at_all - at_best, rel=0.02)
    behind = curve(np.array([0.4, 1.0]), *apart((held["active_params"], held[TPP], held["sparsity"])))
    assert there.differences[0.4].value == pytest.approx(behind[0] - behind[1], rel=0.02)
    assert there.tied[0].value <= there.optimum.value <= there.tied[1].value


def test_degrees_of_freedom_are_stated() -> None:
    fit = fit_joint(simulate(two_power(-0.7), GRID, 0.003), resamples=20)
    assert [model.moves_with for model in fit.models] == [(), (TPP,), ("sparsity",), (TPP, "sparsity")]
    # 48 means; 6 levels, position, and log amplitude, p and q with two slopes each
    assert [model.df for model in fit.models] == [48 - 16, 48 - 17, 48 - 17, 48 - 18]
    assert fit.models[0].same_optimum_p is None


def test_budgets_are_told_by_the_sizes_of_a_table_that_names_none() -> None:
    runs = simulate(two_power(-0.7), GRID, 0.003)
    rng = np.random.default_rng(0)
    integer = runs.assign(total_params=runs["total_params"] * (1 + 0.02 * rng.uniform(-1, 1, len(runs)))).drop(
        columns="budget.total_params"
    )
    other = integer.rename(columns={"tokens": "d", "total_params": "total", "active_params": "n"})
    named, found = fit_joint(runs, resamples=20), fit_joint(other, tokens="d", total="total", active="n", resamples=20)
    assert [budget[TPP] for budget in found.budgets] == [budget[TPP] for budget in named.budgets]
    assert [budget["sparsity"] for budget in found.budgets] == pytest.approx(
        [budget["sparsity"] for budget in named.budgets], rel=0.02
    )
    assert [best.value for best in found.optima] == pytest.approx([best.value for best in named.optima], abs=0.01)


def coverage(curve: Curve, noise: float, studies: int) -> tuple[float, float, float, float]:
    """Part of the studies whose intervals hold: the optima of the budgets (mean over them), one beyond, the shift, no
    error left out.
    """
    hits = np.zeros(4)
    for random in range(studies):
        fit = fit_joint(simulate(curve, THREE, noise, random), resamples=150)
        held = [
            best.low <= least(curve, budget[TPP]) <= best.high
            for best, budget in zip(fit.optima, fit.budgets, strict=True)
        ]
        there, truth = fit.extrapolate(tokens_per_active_param=320).optimum, least(curve, 320)
        shift, moved = fit.shifts[TPP], least(curve, 160) - least(curve, 10)
        error = fit.left_out.error
        hits += (
            np.mean(held),
            there.low <= truth <= there.high,
            shift.low <= moved <= shift.high,
            error.low <= 0 <= error.high,
        )
    return tuple(hits / studies)


@pytest.mark.slow
def test_intervals_cover() -> None:
    assert min(coverage(two_power(-0.7, -0.4), 0.01, 10)) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.003, 0.01])
@pytest.mark.parametrize("curve", [two_power(-0.7), two_power(-0.7, -0.4), cubic(0.45), cubic(0.5, -0.15)])
def test_intervals_cover_other_laws(curve: Curve, noise: float) -> None:
    assert min(coverage(curve, noise, 20)) >= 0.80


@pytest.mark.slow
def test_the_same_optimum_is_rarely_said_to_move() -> None:
    fits = [fit_joint(simulate(two_power(-0.7), THREE, 0.01, random), resamples=100) for random in range(10)]
    assert np.mean([fit.models[1].same_optimum_p < 0.05 for fit in fits]) <= 0.2
    assert np.mean(["it moves" in fit.summary() for fit in fits]) <= 0.2


def bending(bend: float) -> Curve:
    """Least at 0.6 whatever the budget, and the more lopsided the larger it is."""
    return lambda x, size, tokens, sparsity: 0.1 * (x - 0.6) ** 2 * (1 + bend * tokens / np.log10(4) * (x - 0.6))


def few(curve: Curve, random: int) -> pd.DataFrame:
    runs = simulate(curve, THREE, 0.003, random)
    return runs[runs["share_moe"].isin([0, 0.2, 0.4, 0.6, 0.9, 1])]


@pytest.mark.slow
@pytest.mark.parametrize("bend", [0.3, 0.8])
def test_a_growing_lean_is_rarely_taken_for_a_movement(bend: float) -> None:
    """With one shape for all budgets 11 and 15 of 15 such studies were said to move."""
    fits = [fit_joint(few(bending(bend), random), resamples=60) for random in range(40)]
    assert np.mean([bool(fit.moved) for fit in fits]) <= 0.1
    assert all(("it moves" in fit.summary()) == bool(fit.moved) for fit in fits)


def test_a_growing_lean_is_no_movement_and_a_movement_is_found() -> None:
    still = [fit_joint(few(bending(0.6), random), resamples=50) for random in range(3)]
    assert sum(bool(fit.moved) for fit in still) <= 1
    moved = [fit_joint(few(cubic(0.5, -0.15), random), resamples=50) for random in range(3)]
    assert sum(fit.moved == (TPP,) and "it moves" in fit.summary() for fit in moved) >= 2


def test_flat_losses_have_no_optimum() -> None:
    for random in range(3):
        fit = fit_joint(few(lambda x, size, tokens, sparsity: 0 * x, random), resamples=50)
        assert fit.status is not Status.CONVERGED
        assert len(fit.p_interior) == 3
        assert min(fit.p_interior) < 0.95
        assert fit.moved == ()
    assert "of the resamples, budget by budget" in fit.message


def test_extrapolation_is_the_less_sure_the_farther_it_goes() -> None:
    fit = fit_joint(simulate(two_power(-0.7, -0.4), THREE, 0.003), resamples=50)
    inside, near, far, beyond = (fit.extrapolate(tokens_per_active_param=ratio) for ratio in (20, 300, 1000, 1e5))
    assert (inside.message, inside.distance) == ("", 0)
    assert "an extrapolation" in near.message
    assert "barely more than a guess" in far.message
    assert 0 < near.distance < far.distance < 1 < beyond.distance
    assert "a guess; the law may change there" in beyond.message
    lengths = [each.optimum.high - each.optimum.low for each in (inside, near, far)]
    assert lengths == sorted(lengths)
    with pytest.raises(AnalysisError, match="give `tokens_per_active_param`"):
        fit.extrapolate()
    with pytest.raises(AnalysisError, match="effect of `sparsity` cannot be told"):
        fit.extrapolate(tokens_per_active_param=20, sparsity=40)
    with pytest.raises(AnalysisError, match="must be positive"):
        fit.extrapolate(tokens_per_active_param=-1.0)


def test_four_shares_at_two_budgets_leave_one_degree_of_freedom() -> None:
    fit = fit_joint(simulate(two_power(-0.7), THREE[:2], 0.003)[lambda runs: runs["share_moe"] < 0.5], resamples=20)
    assert fit.law == "cubic"
    assert fit.models[-1].df == 1
    assert "too few to let the curves change their shape" in fit.message
    assert fit.moved == ()


def test_factors_that_vary_only_together_are_not_told_apart() -> None:
    fit = fit_joint(simulate(two_power(-0.7), ((1e5, 10, 5), (1e5, 40, 20)), 0.003), resamples=20)
    assert fit.factors == (TPP,)
    assert "only together with tokens per activated parameter" in fit.conventions["dropped"]["sparsity"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda runs: runs[runs["tokens"] == 1e6], Status.TOO_FEW_POINTS, "needs two"),
        (lambda runs: runs[runs["seed"] == 0], Status.TOO_FEW_POINTS, "second seed"),
        (lambda runs: runs[runs["share_moe"] < 0.3], Status.TOO_FEW_POINTS, "needs two"),
        (lambda runs: runs.assign(val_loss=np.nan), Status.NOT_FINITE, "not a number"),
        (lambda runs: runs.assign(val_loss=4.0), Status.TOO_FEW_POINTS, "all losses are equal"),
        (lambda runs: runs.assign(val_loss=4 + runs["share_moe"]), Status.TOO_FEW_POINTS, "copies"),
        (
            lambda runs: runs.assign(
                val_loss=runs.groupby(["tokens", "total_params", "active_params"])["val_loss"].transform(
                    lambda own: runs["val_loss"].to_numpy()[: len(own)]
                )
            ),
            Status.TOO_FEW_POINTS,
            "are the same numbers in every run: copies",
        ),
    ],
)
def test_poor_data_have_a_status(change: Callable[[pd.DataFrame], pd.DataFrame], status: Status, message: str) -> None:
    fit = fit_joint(change(simulate(two_power(-0.7), THREE, 0.003)), resamples=20)
    assert fit.status is status
    assert message in fit.message
    with pytest.raises(AnalysisError, match="no law"):
        fit.extrapolate(tokens_per_active_param=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.drop(columns="tokens"), "`tokens`"),
        (lambda runs: runs.assign(tokens="many"), "`tokens` holds 'many' in trial t0"),
        (lambda runs: runs.assign(tokens=-runs["tokens"]), "`tokens` holds -1000000.0"),
        (lambda runs: runs.assign(active_params=0), "`active_params` holds 0"),
        (lambda runs: runs.assign(trial_id="same"), "same stands in several rows"),
        (lambda runs: runs.assign(embedding_params=np.arange(len(runs))), "`embedding_params` runs from"),
        (lambda runs: runs.assign(total_params=[1e6, 2e6] * (len(runs) // 2)), "`total_params` runs"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_joint(change(simulate(two_power(-0.7), THREE, 0.003)))


def test_the_record_is_json_and_the_fit_draws_itself() -> None:
    runs = simulate(two_power(-0.7), THREE, 0.003)
    fit = fit_joint(runs, resamples=20)
    record = json.loads(fit.to_json())
    assert {
        "law",
        "status",
        "parameters",
        "covariance",
        "objective",
        "rows",
        "conventions",
        "models",
        "left_out",
    } <= set(record)
    assert sorted(record["rows"]) == sorted(runs["trial_id"])
    assert len(record["covariance"]) == len(record["parameters"])
    axes = Figure().subplots()
    fit.plot(axes)
    assert axes.lines


def test_only_factors_that_vary_are_studied_and_the_others_are_named() -> None:
    found = fit_joint(few(two_power(-0.7), 0), resamples=20)
    assert (found.factors, list(found.movement_p)) == ((TPP,), [TPP])
    assert "Not studied, for want of values that can be told apart: size (P_act), sparsity." in found.summary()
    assert found.conventions["dropped"]["active_params"] == "does not vary between the budgets"
    assert [budget[TPP] for budget in found.budgets] == [10, 40, 160]


def test_the_movements_of_several_factors_are_corrected_for_their_number() -> None:
    fit = fit_joint(simulate(cubic(0.5, -0.15), GRID[:4], 0.003, shares=SIX), resamples=40)
    assert [model.moves_with for model in fit.models[1:3]] == [(TPP,), ("sparsity",)]
    df = len(SIX) - 1  # of the noise of one budget, with two seeds
    better = {TPP: fit.models[2], "sparsity": fit.models[1]}  # the one that lacks the factor
    own = {name: float(fdtrc(1, df, model.squares - fit.models[3].squares)) for name, model in better.items()}
    assert fit.movement_p == pytest.approx(holm(own), rel=1e-6)
    assert fit.movement_p[TPP] < 0.05 < fit.movement_p["sparsity"]
    assert f"p = {fit.movement_p[TPP]:.2g} after Holm's correction" in fit.summary()
    assert "sparsity" not in fit.moved


def test_the_nearest_noise_says_what_would_be_tied() -> None:
    runs = simulate(two_power(-0.7, -0.4), THREE, 0.003)
    noisy = runs["tokens"] == 16e6
    rng = np.random.default_rng(1)
    runs["val_loss"] += np.where(noisy, 0.03 * rng.standard_normal(len(runs)), 0)
    fit = fit_joint(runs, resamples=40)
    short, long = (fit.extrapolate(tokens_per_active_param=ratio) for ratio in (10, 160))
    assert (short.tie_width, long.tie_width) == (fit.tie_widths[0], fit.tie_widths[2])
    assert long.tie_width > 4 * short.tie_width
    assert long.tied[1].value - long.tied[0].value > short.tied[1].value - short.tied[0].value


SEVEN = np.array([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0])
MOVES: dict[str, tuple[Curve, tuple[str, ...]]] = {
    "none": (two_power(-0.4), ()),
    "one": (two_power(-0.4, -0.4), (TPP,)),
    "two": (two_power(-0.4, -0.4, 0, -0.3), ("active_params", TPP)),
}


def foretold(
    case: str, budgets: tuple[Budget, ...], studies: int, resamples: int, **at: float
) -> tuple[float, float, float]:
    """Part of the simulated studies whose intervals hold the best share and the depth at a budget that they lack; and
    of those that say of a factor that it moves the best share though it does not.
    """
    curve, moves = MOVES[case]
    place = dict(zip(("active_params", TPP, "sparsity"), FIRST, strict=True)) | at
    best = least(curve, place[TPP], place["sparsity"], place["active_params"])
    one, low = curve(np.array([1.0, best]), *apart(tuple(place.values())))
    hits = np.zeros(3)
    for random in range(studies):
        fit = fit_joint(simulate(curve, budgets, 0.01, random, SEVEN), resamples=resamples)
        there = fit.extrapolate(**{name: place[name] for name in fit.factors})
        hits += (
            there.optimum.low <= best <= there.optimum.high,
            there.depth.low <= one - low <= there.depth.high,
            bool(set(fit.moved) - set(moves)),
        )
    return tuple(hits / studies)


def test_a_budget_that_was_not_trained_is_foretold() -> None:
    optimum, depth, wrong = foretold("one", THREE, 4, 50, tokens_per_active_param=320)
    assert min(optimum, depth) >= 0.75
    assert wrong <= 0.25


@pytest.mark.slow
@pytest.mark.parametrize("case", list(MOVES))
def test_a_larger_model_is_foretold_from_two_sizes(case: str) -> None:
    """From two sizes, three lengths and three sparsities (`LADDER`), noise 0.01; the size that is foretold is 16 times
    the first.

    Measured over 100 studies, with none, one and two factors that move the optimum: intervals hold the optimum in 94,
    94 and 93, the depth in 95, 94 and 97; a factor is wrongly said to move it in 2, 0 and 1. Tokens are found to move
    it in 28 and 27, size in 11.
    """
    optimum, depth, wrong = foretold(case, LADDER, 10, 100, active_params=1.6e6, tokens_per_active_param=15)
    assert min(optimum, depth) >= 0.7
    assert wrong <= 0.2
