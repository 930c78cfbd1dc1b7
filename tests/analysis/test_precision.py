"""The law of precision: what it was made of comes back, its intervals cover, and tables that cannot tell have a status.

The form is that of Kumar et al. 2024, arXiv 2411.04330. Its coefficients are not at hand in a public text, so the law
is held to simulated runs.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from analysis import Status, fit_precision
from analysis.fits.precision import PrecisionFit

TRUE = {"E": 2.7, "A": 4300.0, "B": 18000.0, "alpha": 0.5, "beta": 0.49, "gamma": 2.5}
SIZES = ([3e7, 6e7, 1.1e8, 2.2e8], [1.5e9, 3e9, 6e9, 1.3e10, 2.6e10], [3, 4, 5, 6, 8, 12, 16])


def loss_of(n: float, d: float, p: float) -> float:
    """The law of one run, as the paper writes it."""
    e, a, b, alpha, beta, gamma = TRUE.values()
    return float(e + a * (n * (1 - np.exp(-p / gamma))) ** -alpha + b * d**-beta)


def runs(noise: float = 0.0, random: int = 0, sizes: tuple[list[float], ...] = SIZES) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    n, d, p = (each.ravel() for each in np.meshgrid(*sizes))
    losses = [loss_of(*each) * np.exp(noise * rng.standard_normal()) for each in zip(n, d, p, strict=True)]
    return pd.DataFrame({"n": n, "d": d, "bits": p, "loss": losses})


def fit(frame: pd.DataFrame, resamples: int = 60) -> PrecisionFit:
    return fit_precision(frame, params="n", tokens="d", bits="bits", loss="loss", resamples=resamples)


def test_the_law_is_given_back() -> None:
    found = fit(runs(), 5)
    assert found.status is Status.CONVERGED
    assert {name: each.value for name, each in found.parameters.items()} == pytest.approx(TRUE, rel=1e-5)
    assert found.predict([[1e9, 1e11, 4]])["loss"].iloc[0] == pytest.approx(loss_of(1e9, 1e11, 4), rel=1e-6)
    json.loads(found.to_json())
    assert "79.8% in 4, 95.9% in 8, 99.8% in 16 bits" in found.summary()


def test_its_intervals_cover() -> None:
    inside = []
    for random in range(24):
        found = fit(runs(noise=0.005, random=random))
        assert found.status is Status.CONVERGED
        inside += [
            found.parameters[name].low <= TRUE[name] <= found.parameters[name].high
            for name in ("gamma", "alpha", "beta", "E")
        ]
    assert 0.88 <= np.mean(inside) <= 0.99


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((SIZES[0], SIZES[1], [16]), "`bits` has 1 distinct value(s)"),
        (([3e7], SIZES[1], SIZES[2]), "`n` has 1 distinct value(s)"),
        (([3e7, 6e7], [1e9, 2e9], [4, 8]), "8 rows"),
    ],
)
def test_a_table_that_cannot_tell_has_a_status(sizes: tuple[list[float], ...], words: str) -> None:
    found = fit(runs(sizes=sizes))
    assert found.status is Status.TOO_FEW_POINTS
    assert words in found.message


def test_precisions_that_are_all_high_are_not_told_from_full_ones() -> None:
    """At 16 bits and more nothing is lost, so that no gamma below fits worse."""
    found = fit(runs(noise=0.003, sizes=(SIZES[0], SIZES[1], [16, 24, 32])))
    assert found.status is not Status.CONVERGED
