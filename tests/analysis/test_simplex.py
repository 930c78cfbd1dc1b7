"""What a reader of a simplex fit relies on: it finds a known best mix, says truly whether a third pool helps, and
doubts poor data.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, SimplexFit, Status, fit_simplex
from analysis.fits.mixture import lattice, terms

POOLS = ("moe", "engram", "ultramem_v2")
POINTS = np.vstack([lattice(4), [[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]]])
INSIDE = (4.05, 4.02, 4.06, -0.3, -0.25, -0.3)
NEAR_EDGE = (4.05, 4.02, 4.06, -0.3, -0.17, -0.2)
ON_EDGE = (4.05, 4.02, 4.06, -0.2, -0.125, -0.125)  # a third pool only just fails to help: the slope inward is nearly 0
CORNER = (4.0, 4.02, 4.06, 0.1, 0.1, 0.1)
Beta = tuple[float, ...]


def loss(beta: Beta, mixes: np.ndarray) -> np.ndarray:
    x, y, z = mixes.T
    columns = [x, y, z, x * y, x * z, y * z, x * y * z]
    return sum(b * column for b, column in zip(beta, columns, strict=False))


def simulate(beta: Beta, noise: float, *, seeds: int = 2, random: int = 0, points: np.ndarray = POINTS) -> pd.DataFrame:
    """Runs with effects of seeds twice the noise. Without noise the first two seeds differ a little, and their mean is
    exact.
    """
    rng = np.random.default_rng(random)
    tables, apart = [], 2e-6 * rng.standard_normal(len(points)) if noise == 0 and seeds > 1 else 0.0
    for seed in range(seeds):
        losses = (
            loss(beta, points)
            + (1, -1, 0)[min(seed, 2)] * apart
            + 2 * noise * rng.standard_normal()
            + noise * rng.standard_normal(len(points))
        )
        tables.append(
            pd.DataFrame(points, columns=[f"share_{pool}" for pool in POOLS]).assign(seed=seed, val_loss=losses)
        )
    return pd.concat(tables, ignore_index=True)


def least(beta: Beta) -> tuple[np.ndarray, float]:
    """Best mix and its loss, by brute force."""
    grid = lattice(1000)
    values = loss(beta, grid)
    return grid[values.argmin()], float(values.min())


def best_of(fit: SimplexFit) -> np.ndarray:
    return np.array([share.value for share in fit.argmin.values()])


# --- recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [INSIDE, NEAR_EDGE, ON_EDGE, CORNER, (4.0, 4.0, 4.0, 0.3, -0.2, 0.1)])
def test_a_noise_free_surface_is_found_exactly(beta: Beta) -> None:
    fit = fit_simplex(simulate(beta, 0.0), POOLS, resamples=20)
    assert [estimate.value for estimate in fit.parameters.values()] == pytest.approx(beta, abs=1e-9)
    mix, value = least(beta)
    assert best_of(fit) == pytest.approx(mix, abs=2e-3)  # the grid of the brute force
    assert fit.loss_at_best.value == pytest.approx(value, abs=1e-5)
    assert fit.predict(POINTS)["loss"].to_numpy() == pytest.approx(loss(beta, POINTS), abs=1e-9)


def test_the_least_loss_is_never_above_that_of_any_mix() -> None:
    """Random surfaces, also saddles and hills: the exact minimum against a fine grid."""
    rng, grid = np.random.default_rng(0), lattice(200)
    for _ in range(30):
        beta = (*rng.normal(4, 0.03, 3), *rng.normal(0, 0.2, 3))
        fit = fit_simplex(simulate(beta, 0.0), POOLS, resamples=2)
        assert fit.loss_at_best.value == pytest.approx(loss(beta, best_of(fit)[None])[0], abs=1e-9)
        assert loss(beta, grid).min() - 3e-5 < fit.loss_at_best.value < loss(beta, grid).min() + 1e-9


def test_gains_are_those_of_a_brute_force() -> None:
    fit, grid = fit_simplex(simulate(INSIDE, 0.0), POOLS, resamples=20), lattice(1000)
    _, value = least(INSIDE)
    for k, pool in enumerate(POOLS):
        assert fit.corner_gains[pool].value == pytest.approx(INSIDE[k] - value, abs=1e-5)
        edge = " + ".join(other for other in POOLS if other != pool)
        assert fit.edge_gains[edge].value == pytest.approx(loss(INSIDE, grid[grid[:, k] == 0]).min() - value, abs=1e-5)
        assert fit.edge_bests[edge][k] == 0
    assert fit.third_pool_gain.value == min(gain.value for gain in fit.edge_gains.values())


def test_seed_effects_do_not_move_an_unbalanced_study() -> None:
    runs = simulate(INSIDE, 0.0, seeds=3).drop(index=[2, 20, 40, 41])
    runs["val_loss"] += runs["seed"].map({0: 0.0, 1: 0.05, 2: -0.08})
    assert best_of(fit_simplex(runs, POOLS, resamples=20)) == pytest.approx(least(INSIDE)[0], abs=2e-3)


def test_the_same_input_gives_the_same_fit() -> None:
    runs = simulate(INSIDE, 0.008)
    assert fit_simplex(runs, POOLS, resamples=50) == fit_simplex(runs.copy(), POOLS, resamples=50)


# --- intervals --------------------------------------------------------------------------------------------------------


def coverage(beta: Beta, studies: int) -> tuple[float, float, float]:
    """Part of the studies whose tied mixes hold the true best, whose interval holds the third pool's true gain, and
    that say it helps.
    """
    mix, value = least(beta)
    grid = lattice(1000)
    gain = min(loss(beta, grid[grid[:, k] == 0]).min() for k in range(3)) - value
    hits = np.zeros(3)
    for random in range(studies):
        fit = fit_simplex(simulate(beta, 0.008, random=random), POOLS, resamples=200)
        held = fit.predict(mix)["tie"][0] <= 1
        third = fit.third_pool_gain
        hits += held, third.low - 1e-6 <= gain <= third.high + 1e-6, third.low > 0
    return tuple(hits / studies)


@pytest.mark.slow
def test_the_tied_mixes_hold_the_best_and_a_third_pool_is_credited_only_where_it_helps() -> None:
    tied, gain, helps = coverage(INSIDE, 20)
    assert tied >= 0.8
    assert gain >= 0.8
    assert helps == 1
    tied, gain, helps = coverage(ON_EDGE, 20)
    assert tied >= 0.8
    assert gain >= 0.8
    assert helps <= 0.15


@pytest.mark.slow
@pytest.mark.parametrize("beta", [INSIDE, NEAR_EDGE, ON_EDGE, CORNER, (4.03, 4.03, 4.03, -0.1, -0.1, -0.1)])
def test_intervals_cover_other_surfaces(beta: Beta) -> None:
    tied, gain, _ = coverage(beta, 150)
    assert tied >= 0.90
    assert gain >= 0.90


def test_more_seeds_narrow_what_is_tied() -> None:
    parts = [fit_simplex(simulate(INSIDE, 0.02, seeds=seeds), POOLS, resamples=50).tied_part for seeds in (2, 8)]
    assert parts[0] > 2 * parts[1] > 0


# --- status -----------------------------------------------------------------------------------------------------------


def test_three_pools_converge_and_the_summary_says_that_the_third_helps() -> None:
    fit = fit_simplex(simulate(INSIDE, 0.008), POOLS)
    assert (fit.status, fit.message) == (Status.CONVERGED, "")
    text = fit.summary({"moe": "routed experts"})
    assert "routed experts" in text
    assert "a third pool helps" in text


@pytest.mark.parametrize(("beta", "place"), [((4.05, 4.02, 4.06, -0.2, 0.0, 0.0), "moe + engram"), (CORNER, "moe")])
def test_a_best_mix_without_a_pool_is_no_interior_minimum(beta: Beta, place: str) -> None:
    fit = fit_simplex(simulate(beta, 0.004), POOLS, resamples=200)
    assert fit.status is Status.NO_INTERIOR_MINIMUM
    assert fit.places[place] > 0.9
    assert "a third pool is not shown to help" in fit.summary()
    assert fit.third_pool_gain.low == 0


def test_a_flat_surface_is_tied_nearly_everywhere() -> None:
    fits = [
        fit_simplex(simulate((4.0,) * 3 + (0.0,) * 3, 0.008, random=random), POOLS, resamples=200)
        for random in range(10)
    ]
    assert np.mean([fit.tied_part for fit in fits]) > 0.5
    assert all(fit.third_pool_gain.low < 0.002 for fit in fits)


def test_one_seed_is_never_converged() -> None:
    fit = fit_simplex(simulate(INSIDE, 0.008, seeds=1), POOLS, resamples=100)
    assert fit.status is Status.TOO_FEW_POINTS
    assert fit.paired_sd is None
    assert "second seed" in fit.summary()


@pytest.mark.parametrize("points", [POINTS[:4], lattice(10)[:11], POINTS[POINTS[:, 0] == 0]])
def test_mixes_that_leave_the_surface_open_are_too_few(points: np.ndarray) -> None:
    fit = fit_simplex(simulate(INSIDE, 0.008, points=points), POOLS)
    assert (fit.status, fit.argmin) == (Status.TOO_FEW_POINTS, {})
    with pytest.raises(AnalysisError, match="no law"):
        fit.predict(points)


def test_without_a_corner_nothing_is_said_of_it() -> None:
    points = POINTS[POINTS.max(1) < 1]
    fit = fit_simplex(simulate(INSIDE, 0.004, points=points), POOLS, resamples=100)
    assert fit.status is Status.CONVERGED
    assert fit.corner_gains == {}
    with pytest.raises(AnalysisError, match="outside the sampled region"):
        fit.predict([[1.0, 0.0, 0.0]])


def test_the_border_of_what_was_sampled_is_named() -> None:
    inner = 0.5 * POINTS + np.array([0.0, 0.0, 0.5])  # only mixes with at least half in the worst pool
    fit = fit_simplex(simulate(INSIDE, 0.002, points=inner), POOLS, resamples=100)
    assert fit.status is Status.NO_INTERIOR_MINIMUM
    assert "sample beyond it" in fit.message


def test_a_surface_that_misses_says_so_and_names_the_better_law() -> None:
    fit = fit_simplex(simulate((*INSIDE, 2.0), 0.002), POOLS, resamples=100)
    assert fit.lack_of_fit_p < 0.01
    assert "special-cubic law predicts left-out mixes better" in fit.message
    errors = {law.law: law.left_out_error for law in fit.candidates}
    assert errors["special-cubic"] < errors["quadratic"]
    assert {law.law: law.aicc for law in fit.candidates}["special-cubic"] == min(law.aicc for law in fit.candidates)


def test_left_out_errors_are_those_of_fits_without_the_point() -> None:
    runs = simulate(INSIDE, 0.008)
    fit, squares = fit_simplex(runs, POOLS, resamples=10), []
    means = runs.groupby([f"share_{pool}" for pool in POOLS])["val_loss"].mean()
    mixes = np.array(list(means.index))
    for i in range(len(mixes)):
        if mixes[i].max() < 1:
            kept = np.arange(len(mixes)) != i
            beta = np.linalg.lstsq(terms(mixes[kept], "quadratic"), means.to_numpy()[kept], rcond=None)[0]
            squares.append((loss(tuple(beta), mixes[i : i + 1])[0] - means.iloc[i]) ** 2)
    assert {law.law: law.left_out_error for law in fit.candidates}["quadratic"] == pytest.approx(
        np.mean(squares) ** 0.5, rel=1e-6
    )


@pytest.mark.parametrize("bad", [np.nan, -4.0])
def test_a_loss_that_is_none_has_a_status_and_names_the_run(bad: float) -> None:
    runs = simulate(INSIDE, 0.01).assign(trial_id=lambda frame: [f"t{i}" for i in frame.index])
    runs.loc[3, "val_loss"] = bad
    fit = fit_simplex(runs, POOLS)
    assert fit.status is Status.NOT_FINITE
    assert "t3" in fit.message


# --- input and output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"share_moe": "sharemoe"}), r"`share_moe` \(is it `sharemoe`\?\)"),
        (lambda frame: frame.assign(trial_id="same"), "same stands in several rows"),
        (lambda frame: frame.assign(share_engram=frame["share_engram"] / 2), "do not sum to 1"),
        (lambda frame: frame.assign(share_moe=frame["share_moe"] * 100), "between 0 and 1"),
        (lambda frame: frame.assign(seed=0), "one cell at a time"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fit_simplex(change(simulate(INSIDE, 0.01)), POOLS)


def test_the_record_is_json_and_complete() -> None:
    runs = simulate(INSIDE, 0.01).assign(trial_id=lambda frame: [f"t{i}" for i in frame.index])
    record = json.loads(json.dumps(fit_simplex(runs, POOLS, resamples=50).to_dict(), allow_nan=False))
    assert {
        "law",
        "status",
        "parameters",
        "objective",
        "rows",
        "conventions",
        "argmin",
        "places",
        "third_pool_gain",
    } <= set(record)
    assert sorted(record["rows"]) == sorted(runs["trial_id"])
    assert set(record["argmin"]["moe"]) == {"value", "low", "high", "se"}
    assert [candidate["law"] for candidate in record["candidates"]] == ["linear", "quadratic", "special-cubic"]


def test_copied_seeds_have_no_noise_to_speak_of() -> None:
    runs = simulate(INSIDE, 0.01, seeds=1)
    fit = fit_simplex(pd.concat([runs, runs.assign(seed=1)], ignore_index=True), POOLS, resamples=20)
    assert fit.status is Status.TOO_FEW_POINTS
    assert "copies" in fit.summary()
