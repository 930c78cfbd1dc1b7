"""Where the next share is placed, on studies simulated from known curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.adaptive import STEPS, Truth, recorded, simulate, summary
from analysis.errors import AnalysisError
from analysis.fits.allocation import fit_allocation
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.placement import next_shares

ROOT = Path(__file__).resolve().parents[2]
GRID = np.arange(STEPS + 1) / STEPS
FIRST = [0, 0.25, 0.5, 0.75, 1]


def parabola(best: float = 0.4, noise: float = 0.01) -> Truth:
    return Truth("parabola", GRID, 4 + 0.5 * (GRID - best) ** 2, best, noise, 0.02)


def runs(truth: Truth, shares: list[float] = FIRST, seeds: int = 2) -> pd.DataFrame:
    every = truth.study(0, seeds)
    return every[every["share_moe"].isin(shares)]


def fitted(table: pd.DataFrame) -> AllocationFit:
    return fit_allocation(table, resamples=400)


def test_the_same_runs_give_the_same_shares_whatever_their_order_and_level() -> None:
    table, free = runs(parabola()), GRID[1:14].tolist()
    chosen = next_shares(fitted(table), free, 2, 2)
    assert next_shares(fitted(table.sample(frac=1, random_state=1)), free, 2, 2) == chosen
    assert next_shares(fitted(table.assign(val_loss=table["val_loss"] + 64)), free, 2, 2) == chosen


def test_a_batch_holds_distinct_candidates_that_begin_with_the_best_one() -> None:
    fit, free = fitted(runs(parabola())), GRID[1:14].tolist()
    batch = next_shares(fit, free, 3, 2)
    assert len(set(batch)) == 3
    assert batch[:1] == next_shares(fit, free, 1, 2)
    assert next_shares(fit, [0.2], 3, 2) == [0.2]


@pytest.mark.parametrize(("shares", "seeds"), [([0, 0.5, 1], 2), (FIRST, 1)])
def test_without_a_curve_or_its_noise_nothing_is_placed(shares: list[float], seeds: int) -> None:
    with pytest.raises(AnalysisError, match="no share can be placed"):
        next_shares(fitted(runs(parabola(), shares, seeds)), [0.2], 1, seeds)


def test_the_committed_figure_shows_the_committed_studies() -> None:
    folder = ROOT / "docs" / "searched-shares"
    shown = summary(pd.read_csv(folder / "studies.csv"))
    pd.testing.assert_frame_equal(shown, pd.read_csv(folder / "adaptive.csv"), check_dtype=False, atol=1e-5)


@pytest.mark.slow
def test_a_search_of_a_recorded_curve_reaches_the_full_grid_s_interval_with_three_quarters_of_its_trials() -> None:
    """Of the seven recorded curves this is the one that a search serves best; docs/searched-shares has all."""
    truth = recorded(ROOT / "results" / "allocation-cpu")[1]
    shown = summary(pd.DataFrame([row for number in range(20) for row in simulate(truth, number, 2)])).set_index(
        ["design", "trials"]
    )
    assert shown.loc[("search", 16), "length"] <= shown.loc[("grid", 22), "length"]
    assert shown.loc[("search", 16), "holds"] >= 0.9
