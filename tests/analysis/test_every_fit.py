"""All fits are used alike: `params`, `conf_int`, `predict`, `summary`, `plot`, `to_json`, and a form for notebooks."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

import analysis
from analysis.errors import AnalysisError
from analysis.fits.comparison import fit_comparison
from analysis.fits.types import Fit


def noisy(frame: pd.DataFrame, loss: Callable[[pd.DataFrame], pd.Series], noise: float = 0.002) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return frame.assign(val_loss=loss(frame) + noise * rng.standard_normal(len(frame)))


def crossed(**columns: object) -> pd.DataFrame:
    return pd.DataFrame(itertools.product(*columns.values()), columns=list(columns))


SHARES = crossed(share_moe=[0, 0.2, 0.4, 0.6, 0.8, 1.0], seed=[0, 1])
MIXES = pd.DataFrame(
    [
        (a, b, 1 - a - b, seed)
        for a, b in itertools.product((0, 0.25, 0.5, 0.75, 1), repeat=2)
        if a + b <= 1
        for seed in (0, 1)
    ],
    columns=["share_a", "share_b", "share_c", "seed"],
)
SIZES = crossed(params=[1e7, 4e7, 1.6e8, 6.4e8], tokens=[1e9, 4e9, 1.6e10, 6.4e10])


def valley(frame: pd.DataFrame) -> pd.Series:
    return 4 + 0.3 * (frame["share_moe"] - 0.4) ** 2


def power(frame: pd.DataFrame) -> pd.Series:
    return 1.7 + 400 * frame["params"] ** -0.34 + 410 * frame["tokens"] ** -0.28


def paired_runs(name: str) -> pd.DataFrame:
    """Runs for a fit that pairs them by seed."""
    match name:
        case "allocation":
            return noisy(SHARES, valley)
        case "simplex":
            return noisy(MIXES, lambda mix: 4 + (mix["share_a"] - 0.4) ** 2 + (mix["share_b"] - 0.3) ** 2)
        case "joint":
            frame = SHARES.merge(crossed(tokens=[4e5, 1.6e6, 6.4e6]), how="cross")
            return noisy(frame.assign(total_params=1e6, active_params=1e5), valley)
        case "slots":
            frame = crossed(mechanism=["a", "b"], memory_rows=[1e3, 1e4, 1e5], seed=[0, 1])
            return noisy(frame, lambda each: 4 - 0.02 * np.log10(each["memory_rows"]))
        case "scaling":
            frame = crossed(mechanism=["a", "b"], active_params=[1e4, 4e4, 1.6e5, 6.4e5], seed=[0, 1])
            frame = frame.assign(tokens=15 * frame["active_params"], flops=90 * frame["active_params"] ** 2)
            return noisy(frame, lambda each: 2 + (each["flops"] / 1e13) ** -0.15 + 0.05 * (each["mechanism"] == "b"))
        case "density":
            frame = crossed(memory_rows=[1e3, 4e3, 1.6e4], memory_rows_read=[4, 16, 64], seed=[0, 1])
            return noisy(frame, lambda each: 4 - 0.02 * np.log10(each["memory_rows"]))
        case "ladder":
            return noisy(crossed(rung=[0, 1, 2], seed=[0, 1]), lambda each: 4 - 0.1 * each["rung"])
    return noisy(crossed(memory=["a", "b"], rho=[0.5, 1.0], seed=[0, 1]), lambda each: 4 + 0.1 * each["rho"])


PAIRED: dict[str, Callable[[pd.DataFrame], Fit]] = {
    "allocation": functools.partial(analysis.fit_allocation, resamples=50),
    "simplex": functools.partial(analysis.fit_simplex, pools=["a", "b", "c"], resamples=50),
    "joint": functools.partial(analysis.fit_joint, resamples=20),
    "slots": functools.partial(analysis.fit_slots, resamples=20),
    "scaling": functools.partial(analysis.fit_scaling, reference="a", resamples=50),
    "density": analysis.fit_density,
    "ladder": analysis.fit_ladder,
    "comparison": fit_comparison,
}


@functools.cache
def made(name: str) -> Fit:
    if name in PAIRED:
        return PAIRED[name](paired_runs(name))
    rng = np.random.default_rng(1)
    match name:
        case "log_log":
            x = np.geomspace(1, 100, 6)
            return analysis.fit_log_log(
                pd.DataFrame({"x": x, "y": x**0.5 * np.exp(0.01 * rng.standard_normal(6))}), x="x", y="y"
            )
        case "isoflop":
            frame = crossed(flops=[1e18, 1e19, 1e20], step=np.linspace(-1, 1, 7), seed=[0, 1])
            frame = frame.assign(params=0.1 * frame["flops"] ** 0.5 * np.exp(frame["step"]))
            frame = noisy(frame, lambda each: 60 * each["flops"] ** -0.07 + 0.05 * each["step"] ** 2, 1e-4)
            return analysis.fit_isoflop(frame, flops="flops", params="params", loss="val_loss", resamples=50)
        case "power":
            frame = noisy(SIZES[SIZES["tokens"] == 1e9], power)
            return analysis.fit_power(frame.loc[frame.index.repeat(2)], x="params", loss="val_loss", resamples=50)
        case "surface":
            return analysis.fit_surface(
                noisy(SIZES, power), params="params", tokens="tokens", loss="val_loss", resamples=50
            )
        case "routing":
            frame = noisy(
                crossed(params=[1e7, 4e7, 1.6e8], experts=[1, 4, 16, 64]),
                lambda each: 10 ** (1 - 0.08 * np.log10(each["params"]) - 0.05 * np.log10(each["experts"] + 1)),
            )
            return analysis.fit_routing(frame, params="params", experts="experts", loss="val_loss", resamples=20)
        case "data_constrained":
            frame = SIZES.assign(unique=SIZES["tokens"] / 6)
            frame = pd.concat([frame, SIZES.assign(unique=SIZES["tokens"])])
            return analysis.fit_data_constrained(
                noisy(frame, power).reset_index(),
                params="params",
                tokens="tokens",
                unique="unique",
                loss="val_loss",
                resamples=10,
            )
        case "precision":
            frame = SIZES.merge(crossed(bits=[3, 6, 16]), how="cross")
            loss = lambda each: power(each) + 0.5 * np.exp(-each["bits"] / 2)  # noqa: E731
            return analysis.fit_precision(
                noisy(frame, loss), params="params", tokens="tokens", bits="bits", loss="val_loss", resamples=10
            )
    frame = SIZES.merge(crossed(experts=[1, 4, 16, 64]), how="cross")
    loss = lambda each: power(each) - 0.05 * np.log(each["experts"])  # noqa: E731
    return analysis.fit_moe_joint(
        noisy(frame, loss), params="params", tokens="tokens", experts="experts", loss="val_loss", resamples=5
    )


NAMES = (
    *(*PAIRED, "log_log", "isoflop"),
    *("power", "surface", "routing", "data_constrained", "precision", "moe_joint"),
)


def test_every_fit_is_named_here() -> None:
    public = {name.removeprefix("fit_") for name in dir(analysis) if name.startswith("fit_")}
    assert public <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_is_used_like_every_other(name: str) -> None:
    fit = made(name)
    assert fit.parameters, fit.message
    params = fit.params
    assert list(params.columns) == ["value", "low", "high", "se"]
    assert list(params.index) == list(fit.parameters)
    assert (params["low"] <= params["value"]).all()
    assert fit.conf_int().equals(params[["low", "high"]])
    assert json.loads(fit.to_json())["status"] == fit.status.value
    shown = fit._repr_html_()
    assert "<table" in shown
    assert fit.summary().splitlines()[0][:40].replace("'", "&#x27;") in shown
    axes = fit.plot()
    assert isinstance(axes, Axes)
    assert axes.has_data()
    assert fit.plot(axes) is axes
    plt.close(axes.figure)


@pytest.mark.parametrize("name", NAMES)
def test_predictions_take_a_table_a_mapping_or_an_array(name: str) -> None:
    fit = made(name)
    if not fit.predictors:
        with pytest.raises(AnalysisError, match="compares runs"):
            fit.predict([1.0])
        return
    places = {
        "simplex": [[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]],
        "slots": [["a", 2e3], ["b", 5e4]],
        "scaling": [["a", 2e11], ["b", 5e12]],
        "density": [[2e3, 8], [1e4, 32]],
        "joint": [[0.3, 8], [0.7, 30]],
        "allocation": [[0.3], [0.7]],
    }.get(name, [[2e8, 2e10, 8][: len(fit.predictors)], [3e8, 3e10, 12][: len(fit.predictors)]])
    if name == "routing":
        places = [[2e7, 8], [3e7, 12]]
    table = pd.DataFrame(places, columns=list(fit.predictors))
    found = fit.predict(table.assign(other="not asked for"))
    assert list(found.columns)[: len(fit.predictors)] == list(fit.predictors)
    value = found.iloc[:, len(fit.predictors)]
    assert (found["low"] <= value).all()
    assert (value <= found["high"]).all()
    assert found.equals(fit.predict(table.to_dict("list")))
    if name not in ("slots", "scaling"):  # text and numbers are no array
        assert np.allclose(found.to_numpy(float), fit.predict(np.array(places)).to_numpy(float))
    with pytest.raises(AnalysisError, match=f"`{fit.predictors[-1]}` is missing"):
        fit.predict(dict.fromkeys(fit.predictors[:-1], 1.0))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("loss", [math.nan, -1.0, 1e200])
def test_what_is_no_loss_refuses_every_paired_fit(name: str, loss: float) -> None:
    frame = paired_runs(name)
    fit = PAIRED[name](frame.assign(val_loss=frame["val_loss"].where(frame.index != 3, loss)))
    assert fit.status == "not_finite"
    assert not fit.parameters
    assert "loss" in fit.message


@pytest.mark.parametrize("name", PAIRED)
def test_equal_losses_and_copied_seeds_converge_nowhere(name: str) -> None:
    frame = paired_runs(name)
    flat = PAIRED[name](frame.assign(val_loss=4.0))
    assert flat.status != "converged"
    assert "all losses are equal" in flat.message
    points = [column for column in frame if column not in ("seed", "val_loss")]
    copies = PAIRED[name](frame.assign(val_loss=frame.groupby(points)["val_loss"].transform("first")))
    assert copies.status == "too_few_points"
    assert "different seeds have the same losses" in copies.message


@pytest.mark.parametrize("name", PAIRED)
def test_without_repeats_every_paired_fit_asks_for_a_second_seed(name: str) -> None:
    fit = PAIRED[name](paired_runs(name)[lambda frame: frame["seed"] == 0])
    assert fit.status == "too_few_points"
    assert "no repeats, so seed noise is not measured" in fit.message
    assert fit.message.endswith("train a second seed.")


@pytest.mark.parametrize("name", PAIRED)
def test_every_paired_fit_refuses_two_vocabularies(name: str) -> None:
    frame = paired_runs(name)
    frame["embedding_params"] = np.where(frame["seed"] == 0, 1000, 2000)
    with pytest.raises(AnalysisError, match="`embedding_params` runs from 1,000 to 2,000"):
        PAIRED[name](frame)
