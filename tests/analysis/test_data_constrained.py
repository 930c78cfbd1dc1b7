"""The law of repeated data: the published one is given back exactly, noise is told from it, and tables that cannot tell
have a status.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, Status, fit_data_constrained
from analysis.fits.data_constrained import DataConstrainedFit

PUBLISHED = {"E": 1.87, "A": 521.0, "B": 1488.0, "alpha": 0.353, "beta": 0.353, "R_D": 15.39, "R_N": 5.31}
"""Muennighoff et al. 2023, arXiv 2305.16264: the coefficients of their law, fitted to C4."""


def loss_of(n: float, d: float, u: float) -> float:
    """The published law, one run at a time, as the paper writes it."""
    e, a, b, alpha, beta, r_d, r_n = PUBLISHED.values()
    u = min(u, d)  # unique tokens that are seen
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    u_n = min(n, (u * g) ** (beta / alpha) * g)
    repeats, excess = d / u - 1, n / u_n - 1
    return float(
        e
        + a / (u_n * (1 + r_n * (1 - np.exp(-excess / r_n)))) ** alpha
        + b / (u * (1 + r_d * (1 - np.exp(-repeats / r_d)))) ** beta
    )


def runs(noise: float = 0.0, epochs: tuple[float, ...] = (0.5, 1, 3, 8, 20, 60), random: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    grid = np.meshgrid([1e8, 4e8, 1.5e9, 4e9], epochs, np.geomspace(1e7, 8e9, 5))
    u, epoch, n = (each.ravel() for each in grid)
    frame = pd.DataFrame({"n": n, "u": u, "d": u * epoch})
    return frame.assign(
        loss=[loss_of(*each) * np.exp(noise * rng.standard_normal()) for each in zip(n, u * epoch, u, strict=True)]
    )


def fit(frame: pd.DataFrame, resamples: int = 50) -> DataConstrainedFit:
    return fit_data_constrained(frame, params="n", tokens="d", unique="u", loss="loss", resamples=resamples)


def test_the_published_law_is_given_back() -> None:
    found = fit(runs(), 5)
    assert found.status is Status.CONVERGED
    assert {name: each.value for name, each in found.parameters.items()} == pytest.approx(PUBLISHED, rel=1e-6)
    for sizes in ((9e9, 2e11, 25e9), (6e9, 1e11, 1e11), (1e8, 4e9, 1e8)):
        assert found.predict([sizes])["loss"].iloc[0] == pytest.approx(loss_of(*sizes), rel=1e-6)
    json.loads(found.to_json())


def test_four_epochs_are_nearly_as_good_as_new_data_and_forty_are_not() -> None:
    """The paper's finding: up to 4 epochs change the loss by next to nothing; far beyond 16, more repeats
    add nothing.
    """
    found = fit(runs(), 5)
    fresh, four, forty, eighty = (
        found.predict([[1e9, d, u]])["loss"].iloc[0]
        for d, u in ((1e11, 1e11), (1e11, 25e9), (1e12, 25e9), (2e12, 25e9))
    )
    assert four / fresh - 1 < 0.01
    assert forty - eighty < 0.1 * (four - forty)


def test_noise_widens_the_intervals_and_they_hold_the_truth() -> None:
    found = [fit(runs(0.005, random=random)) for random in range(8)]
    assert all(each.status is Status.CONVERGED for each in found)
    inside = [
        each.parameters[name].low <= PUBLISHED[name] <= each.parameters[name].high
        for each in found
        for name in ("R_D", "alpha", "beta")
    ]
    assert np.mean(inside) > 0.7


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_and_the_order_of_rows_change_nothing(unit: float) -> None:
    frame = runs(0.005)
    scaled = frame.assign(n=unit * frame["n"], d=frame["d"] / unit, u=frame["u"] / unit, loss=3 * frame["loss"]).sample(
        frac=1, random_state=1
    )
    plain, other = fit(frame, 2), fit(scaled, 2)
    for name in ("alpha", "beta", "R_D", "R_N"):
        assert other.parameters[name].value == pytest.approx(plain.parameters[name].value, rel=1e-4)


@pytest.mark.parametrize(
    ("frame", "status", "words"),
    [
        (runs(0.002, epochs=(0.5, 1)), Status.TOO_FEW_POINTS, "nothing says what repeats are worth"),
        (runs().iloc[:9], Status.TOO_FEW_POINTS, "9 rows"),
        (runs().query("n < 2e7"), Status.TOO_FEW_POINTS, "`n` has 1 distinct"),
        (runs().assign(loss=3.0), Status.TOO_FEW_POINTS, "all losses are equal"),
        (runs().assign(loss=lambda frame: frame["loss"].where(frame.index != 3)), Status.NOT_FINITE, "index 3"),
    ],
)
def test_poor_data_give_a_status_and_words(frame: pd.DataFrame, status: Status, words: str) -> None:
    found = fit(frame)
    assert found.status is status
    assert words in found.summary()
    assert not found.parameters
    with pytest.raises(AnalysisError, match="has no law"):
        found.predict([[1e9, 1e9, 1e9]])


def test_without_excess_parameters_their_worth_is_not_quoted() -> None:
    few = runs(0.002).query("n < 1.2 * (u * 0.2264) * 0.2264")  # below N_opt(U)
    assert len(few) > 20
    assert fit(few).status is not Status.CONVERGED


def test_a_figure_shows_a_curve_for_each_amount_of_unique_tokens() -> None:
    drawn = fit(runs(0.005), 20).drawn()
    assert drawn["series"].value_counts().to_dict() == {"curve": 4 * 61, "run": 120}


def test_unique_tokens_in_another_unit_are_refused() -> None:
    frame = runs()
    with pytest.raises(AnalysisError, match="write `u` in the unit of `d`"):
        fit(frame.assign(u=frame["u"] / 1e6))
