"""Tables that are no runs of one kind: sweeps, pooled experiments, single budgets, budgets in other units. Told, with
what to do.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import Status, fit_isoflop, fit_power, fit_routing, fit_surface
from analysis.__main__ import main
from analysis.fits.counting import by_heading, unit_of_flops


def grid(noise: float = 0.0, repeats: int = 1, random: int = 0) -> pd.DataFrame:
    n, d = (np.repeat(x.ravel(), repeats) for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5)))
    loss = 1.7 + 400 * n**-0.34 + 410 * d**-0.28
    return pd.DataFrame(
        {"n": n, "d": d, "loss": loss * np.exp(noise * np.random.default_rng(random).standard_normal(len(n)))}
    )


def sweep() -> pd.DataFrame:
    """Six settings of each cell, the first of them the best."""
    frame = grid(0.002, repeats=6)
    return frame.assign(
        loss=frame["loss"] * np.tile([1, 1.01, 1.03, 1.1, 1.4, 2.5], 25), setting=np.tile(np.arange(6), 25)
    )


def profiles(noise: float = 0.002) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        (c, 0.1 * c**0.5 * np.exp(z), 60 * c**-0.07 + 0.05 * z**2)
        for c in (1e18, 1e19, 1e20, 1e21)
        for z in np.linspace(-1, 1, 7)
    ]
    frame = pd.DataFrame(rows, columns=["flops", "n", "loss"])
    return frame.assign(loss=frame["loss"] * np.exp(noise * rng.standard_normal(len(frame))))


def surface(frame: pd.DataFrame) -> tuple[Status, str]:
    found = fit_surface(frame, params="n", tokens="d", loss="loss", resamples=50)
    return found.status, found.message


def test_a_sweep_in_one_table_is_a_poor_fit_of_every_law() -> None:
    by_n = sweep().query("d == 1e9")
    budgets = pd.concat([profiles().assign(loss=lambda frame, by=by: frame["loss"] * by) for by in (1, 1.02, 1.5, 3)])
    routed = sweep().assign(experts=lambda frame: frame["d"] / 1e9)
    for found in (
        fit_surface(sweep(), params="n", tokens="d", loss="loss", resamples=50),
        fit_power(by_n, x="n", loss="loss", floor=False, resamples=50),
        fit_isoflop(budgets, flops="flops", params="n", loss="loss", resamples=50),
        fit_routing(routed, params="n", experts="experts", loss="loss", resamples=50),
    ):
        assert found.status is Status.POOR_FIT
        assert "runs of one size differ by up to" in found.message
        assert "--best-of-cell" in found.message
        assert found.summary().startswith("Status poor_fit")


@pytest.mark.parametrize("same_sizes", [True, False])
def test_pooled_experiments_are_a_poor_fit(same_sizes: bool) -> None:
    other = grid().assign(loss=lambda frame: frame["loss"] / 3)
    if not same_sizes:
        other = other.assign(n=other["n"] * 1.1, d=other["d"] * 1.1)
    status, message = surface(pd.concat([grid(0.002), other], ignore_index=True))
    assert status is Status.POOR_FIT
    assert "--group" in message
    assert ("runs lie" in message) != same_sizes
    assert same_sizes or "(median; index " in message


def test_seeds_are_no_sweep_and_one_odd_run_is_named() -> None:
    assert all(surface(grid(0.01, repeats=3, random=random))[0] is Status.CONVERGED for random in range(4))
    frame = grid(0.005)
    frame.loc[7, "loss"] *= 3
    status, message = surface(frame)
    assert status is Status.CONVERGED
    assert (
        "far off the law, which hardly heeds them: index 7 (+200%)" in message
        or "index 7 (+19" in message
        or "index 7 (+20" in message
    )


def test_a_law_that_repeats_refute_is_a_poor_fit() -> None:
    x = np.repeat(np.geomspace(1e7, 1e10, 8), 3)
    bent = 2 + 30 * x**-0.2 + 0.05 * np.sin(np.log(x))
    frame = pd.DataFrame({"x": x, "loss": bent * np.exp(0.001 * np.random.default_rng(0).standard_normal(24))})
    found = fit_power(frame, x="x", loss="loss", resamples=50)
    assert found.status is Status.POOR_FIT
    assert "more than repeats of a size differ" in found.message


def test_a_true_law_is_seldom_refuted() -> None:
    x = np.repeat(np.geomspace(1e7, 1e10, 8), 3)
    refuted = 0
    for random in range(30):
        noise = np.exp(0.01 * np.random.default_rng(random).standard_normal(24))
        refuted += (
            fit_power(
                pd.DataFrame({"x": x, "loss": (2 + 30 * x**-0.2) * noise}), x="x", loss="loss", resamples=2
            ).status
            is Status.POOR_FIT
        )
    assert refuted <= 2


def test_copied_rows_are_told() -> None:
    assert "50 rows repeat each other to the last digit" in surface(pd.concat([grid(0.005)] * 2, ignore_index=True))[1]


def test_sizes_that_hardly_differ_are_told_as_such() -> None:
    total = np.tile(2150612992 * np.array([1, 1.003, 1.006, 1.02, 1.04]), 5)
    found = fit_surface(
        grid(0.001).assign(total=total), params="n", tokens="d", total="total", loss="loss", resamples=50
    )
    assert found.status is Status.TOO_FEW_POINTS
    assert "`total`" in found.message
    assert "spans a factor of 1.04" in found.message
    assert "leave this column out" in found.message


# --- IsoFLOP profiles -------------------------------------------------------------------------------------------------


def isoflop(frame: pd.DataFrame, flops: str = "flops") -> tuple[Status, str, list[float], float]:
    found = fit_isoflop(frame, flops=flops, params="n", loss="loss", resamples=100)
    return found.status, found.message, [each.flops for each in found.budgets], found.parameters["exponent"].value


def test_single_runs_at_other_budgets_are_no_failed_profiles() -> None:
    single = pd.DataFrame(
        {"flops": [3e18, 3e19, 3e20, 3e21, 3e22], "n": [2e8, 5e8, 2e9, 5e9, 2e10], "loss": [3.05, 2.6, 2.2, 1.9, 1.6]}
    )
    alone, both = isoflop(profiles()), isoflop(pd.concat([profiles(), single], ignore_index=True))
    assert both[0] is Status.CONVERGED
    assert both[3] == pytest.approx(alone[3])
    assert "5 budget(s) of fewer than 4 sizes (5 run(s)) are no profiles and are not used: 3e+18 FLOPs" in both[1]


@pytest.mark.parametrize(
    ("heading", "unit"),
    [("train_gflops", 1e9), ("TFLOPs", 1e12), ("PF-days", 8.64e19), ("flops_1e18", 1e18), ("exaflop", 1e18)],
)
def test_a_budget_is_in_the_unit_of_its_heading(heading: str, unit: float) -> None:
    status, message, budgets, exponent = isoflop(
        profiles().assign(**{heading: lambda frame: frame["flops"] / unit}), heading
    )
    assert status is Status.CONVERGED
    assert budgets == pytest.approx([1e18, 1e19, 1e20, 1e21])
    assert f"units of {unit:g} FLOPs, by its heading" in message
    assert exponent == pytest.approx(isoflop(profiles())[3])


def test_a_budget_that_cannot_be_flops_is_never_called_so() -> None:
    frame = profiles().assign(c=lambda frame: frame["flops"] / 1e9)
    single = pd.DataFrame({"c": [3e9], "n": [2e8], "loss": [3.05]})
    message = isoflop(pd.concat([frame, single], ignore_index=True), "c")[1]
    assert "not used: 3e+09 of `c`" in message
    assert "If it is GFLOPs, name it so" in message
    with_tokens = profiles().assign(
        tokens=lambda frame: frame["flops"] / frame["n"] / 6, c=lambda frame: frame["flops"] / 1e9
    )
    assert "units of 1e+09 FLOPs, as C = 6 N D asks" in isoflop(with_tokens, "c")[1]
    assert isoflop(with_tokens, "c")[2] == pytest.approx([1e18, 1e19, 1e20, 1e21])


def test_a_heading_that_contradicts_its_numbers_is_told() -> None:
    n, d = np.array([1e8, 2e8]), np.array([1e10, 1e10])
    assert unit_of_flops("gflops", 6 * n * d, n, d)[0] is None
    assert unit_of_flops("gflops", 6e-9 * n * d, n, d)[0] == 1e9
    assert unit_of_flops("flops", 6 * n * d, n, d) == (1.0, "")
    assert by_heading("model_flops") is None


# --- the command ------------------------------------------------------------------------------------------------------

COLUMNS = ["--law", "chinchilla", "--n", "n", "--d", "d", "--loss", "loss"]


def test_the_best_of_each_cell_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep().to_csv(tmp_path / "runs.csv", index=False)
    assert main(["fit", str(tmp_path / "runs.csv"), *COLUMNS, "--best-of-cell", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "converged"
    assert record["left_out"] == ["Left out: 125 of 150 rows, which are not the best of their cell (equal n, d)."]
    assert record["parameters"]["alpha"]["value"] == pytest.approx(0.34, abs=0.05)
    assert (
        main(
            [
                "fit",
                str(tmp_path / "runs.csv"),
                "--law",
                "allocation",
                "--best-of-cell",
                "--share=n",
                "--loss=loss",
                "--seed=d",
            ]
        )
        == 2
    )
    assert "repeats are seeds" in capsys.readouterr().err


def test_each_group_is_fitted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = grid().query("d == 1e9")
    pooled = pd.concat([sizes.assign(data="web"), sizes.assign(data="code", loss=sizes["loss"] / 3)])
    pooled.to_csv(tmp_path / "runs.csv", index=False)
    command = ["fit", str(tmp_path / "runs.csv"), "--law", "power", "--x", "n", "--loss", "loss"]
    assert main([*command, "--group", "data", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {name: (each["status"], len(each["rows"])) for name, each in groups.items()} == {
        "code": ("converged", 5),
        "web": ("converged", 5),
    }
    assert groups["web"]["parameters"]["A"]["value"] == pytest.approx(3 * groups["code"]["parameters"]["A"]["value"])
    assert main([*command, "--group", "data"]) == 0
    assert capsys.readouterr().out.count("power: converged") == 2
    assert main([*command, "--group", "data", "--figure", str(tmp_path / "fit.svg")]) == 2
    pooled.assign(loss=pooled["loss"].where(pooled["data"] == "web")).to_csv(tmp_path / "runs.csv", index=False)
    capsys.readouterr()
    assert main([*command, "--group", "data"]) == 2
    assert "data code" in capsys.readouterr().err
