"""Where the next share is placed, on studies simulated from known curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.adaptive import Truth, simulate, summary
from analysis.errors import AnalysisError
from analysis.fits.noise import seed_model
from analysis.fits.placement import next_shares, posterior

GRID = np.arange(51) / 50
RESULTS = Path(__file__).resolve().parents[2] / "results"


def parabola(best: float = 0.4, noise: float = 0.01) -> Truth:
    return Truth("parabola", GRID, 4 + 0.5 * (GRID - best) ** 2, best, noise, 0.02)


def runs(truth: Truth, shares: list[float], seeds: int = 2, number: int = 0) -> pd.DataFrame:
    every = truth.study(number, seeds)
    return every[every["share_moe"].isin(shares)]


def test_the_posterior_passes_near_the_runs_and_is_unsure_between_them() -> None:
    model = seed_model(*runs(parabola(noise=1e-3), [0, 0.5, 1])[["share_moe", "val_loss", "seed"]].to_numpy().T)
    curves = posterior(model, GRID, 500, np.random.default_rng(0)).curves_DX
    assert curves[:, [0, 25, 50]].mean(0) == pytest.approx(model.mean_I, abs=2e-3)
    assert curves[:, 12].std() > 3 * curves[:, 25].std()


def test_the_posterior_s_interval_holds_the_best_share() -> None:
    holds = []
    for number in range(40):
        model = seed_model(*runs(parabola(), [0, 0.24, 0.5, 0.76, 1], number=number)[["share_moe", "val_loss", "seed"]].to_numpy().T)
        low, high = np.quantile(posterior(model, GRID, 400, np.random.default_rng(0)).best_D, (0.025, 0.975))
        holds.append(low - 0.02 <= 0.4 <= high + 0.02)
    assert np.mean(holds) >= 0.9


def test_the_same_runs_give_the_same_shares_whatever_their_order_unit_and_level() -> None:
    table = runs(parabola(), [0, 0.5, 1])
    chosen = next_shares(table, GRID[1:25], 2, 2)
    assert next_shares(table.sample(frac=1, random_state=1), GRID[1:25], 2, 2) == chosen
    assert next_shares(table.assign(val_loss=table["val_loss"] * 8 + 64), GRID[1:25], 2, 2) == chosen


def test_a_batch_holds_distinct_candidates_that_begin_with_the_best_one() -> None:
    table = runs(parabola(), [0, 0.5, 1])
    batch = next_shares(table, GRID[1:25], 3, 2)
    assert len(set(batch)) == 3
    assert batch[:1] == next_shares(table, GRID[1:25], 1, 2)
    assert next_shares(table, [0.2], 3, 2) == [0.2]


@pytest.mark.parametrize("shares", [[0, 1], [0, 0.5, 1]])
def test_too_few_runs_are_refused(shares: list[float]) -> None:
    with pytest.raises(AnalysisError, match="three shares with two seeds"):
        next_shares(runs(parabola(), shares, seeds=1), [0.2], 1, 1)


def test_a_search_is_surer_than_a_grid_of_as_many_trials() -> None:
    studies = pd.DataFrame([row for number in range(6) for row in simulate(parabola(noise=0.02), number, 2)])
    shown = summary(studies).set_index(["design", "trials"])["length"]
    assert shown["search"].mean() < shown["grid"].mean()
