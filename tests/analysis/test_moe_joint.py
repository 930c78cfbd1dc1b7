"""The joint law of experts: the published one is given back exactly, and tables that cannot tell have a status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, Status, fit_moe_joint
from analysis.__main__ import main
from analysis.fits.moe_joint import MoeJointFit

PUBLISHED = {"A": 35.91, "alpha": -0.1889, "delta": -0.2285, "gamma": 0.0098}
PUBLISHED |= {
    "B": 35.98,
    "beta": -0.1775,
    "omega": 0.5529,
    "zeta": -0.0259,
    "E_start": 2.0732,
    "E_max": 290.4521,
    "C": 1.3637,
}
"""Ludziejewski et al. 2025, arXiv 2502.05172, Table 3."""
REDUCED = {
    1: (30.3640, -0.1817, 53.9838, -0.1965),
    4: (24.8462, -0.1731, 87.7022, -0.2192),
    32: (16.5424, -0.1557, 234.6726, -0.2652),
}
"""Their Table 4: experts -> m, mu, n, nu of `m N^mu + n D^nu + C`."""


def loss_of(n: float, d: float, e: float) -> float:
    """The published law, one run at a time, as the paper writes it."""
    a, alpha, delta, gamma, b, beta, omega, zeta, start, most, c = PUBLISHED.values()
    hat = 1 / (1 / (e - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    log = np.log(hat)
    return float(a * hat**delta * n ** (alpha + gamma * log) + b * hat**omega * d ** (beta + zeta * log) + c)


def runs(noise: float = 0.0, experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32), random: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    grid = np.meshgrid(np.geomspace(8e7, 2.7e9, 4), np.geomspace(5e8, 8e10, 5), experts)
    n, d, e = (each.ravel() for each in grid)
    frame = pd.DataFrame({"n": n, "d": d, "e": e})
    return frame.assign(
        loss=[loss_of(*each) * np.exp(noise * rng.standard_normal()) for each in zip(n, d, e, strict=True)]
    )


def fit(frame: pd.DataFrame, resamples: int = 20) -> MoeJointFit:
    return fit_moe_joint(frame, params="n", tokens="d", experts="e", loss="loss", resamples=resamples)


def test_the_published_law_is_given_back() -> None:
    found = fit(runs(), 3)
    assert found.status is Status.CONVERGED
    assert {name: each.value for name, each in found.parameters.items()} == pytest.approx(PUBLISHED, rel=1e-6)
    for sizes in ((7e9, 2e11, 64), (1e9, 1e10, 1), (3e8, 4e9, 256)):
        assert found.predict([sizes])["loss"].iloc[0] == pytest.approx(loss_of(*sizes), rel=1e-6)
    json.loads(found.to_json())


@pytest.mark.parametrize("experts", REDUCED)
def test_at_one_number_of_experts_it_is_the_law_published_for_that_number(experts: int) -> None:
    m, mu, n, nu = REDUCED[experts]
    found = fit(runs(), 3)
    for size, tokens in ((1e8, 2e9), (1e9, 2e10)):
        loss = m * size**mu + n * tokens**nu + PUBLISHED["C"]
        assert found.predict([[size, tokens, experts]])["loss"].iloc[0] == pytest.approx(
            loss, rel=2e-3
        )  # four digits are printed


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_units_and_the_order_of_rows_change_nothing(unit: float) -> None:
    frame = runs(0.001)
    scaled = frame.assign(n=unit * frame["n"], d=frame["d"] / unit, loss=3 * frame["loss"]).sample(
        frac=1, random_state=1
    )
    plain, other = fit(frame, 2), fit(scaled, 2)
    for name in ("alpha", "beta", "gamma", "zeta", "E_start", "E_max"):
        assert other.parameters[name].value == pytest.approx(plain.parameters[name].value, rel=1e-4)
    assert other.predict([[1e9 * unit, 1e10 / unit, 8]])["loss"].iloc[0] == pytest.approx(
        3 * plain.predict([[1e9, 1e10, 8]])["loss"].iloc[0], rel=1e-6
    )


def test_noise_widens_the_band_and_it_holds_the_truth() -> None:
    found = fit(runs(0.002))
    sizes = ((5e8, 5e9, 4), (2e9, 5e10, 16))
    for each in sizes:
        band = found.predict([each]).iloc[0]
        assert band["low"] < band["high"]
        assert band["loss"] == pytest.approx(loss_of(*each), rel=0.005)
    assert found.scatter == pytest.approx(0.002, rel=0.3)


@pytest.mark.parametrize(
    ("frame", "status", "words"),
    [
        (runs(experts=(1, 8)), Status.TOO_FEW_POINTS, "`e` has 2 distinct"),
        (runs().iloc[:13], Status.TOO_FEW_POINTS, "13 rows"),
        (runs().query("n < 9e7"), Status.TOO_FEW_POINTS, "`n` has 1 distinct"),
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
        found.predict([[1e9, 1e9, 1]])


def test_fewer_than_one_expert_is_refused() -> None:
    with pytest.raises(AnalysisError, match="`e` must hold 1"):
        fit(runs().assign(e=0.5))


def test_the_command_fits_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, figure = tmp_path / "runs.csv", tmp_path / "law.svg"
    runs(experts=(1, 2, 8, 32)).to_csv(table, index=False)
    columns = ["--n", "n", "--d", "d", "--experts", "e", "--loss", "loss"]
    assert (
        main(
            ["fit", "--law", "moe-joint", str(table), *columns, "--interval", "0.9", "--json", "--figure", str(figure)]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"]["E_max"]["value"] == pytest.approx(PUBLISHED["E_max"], rel=1e-4)
    assert said["conventions"]["interval"].startswith("90%")
    assert pd.read_csv(figure.with_suffix(".csv"))["series"].value_counts().to_dict() == {"curve": 4 * 61, "run": 80}
