"""Loss against compute in several mechanisms: known laws come back, intervals hold the truth, floors are told only
where rungs allow it, and no multiplier is told where the reference was not measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import curve_fit
from scipy.stats import f as f_distribution

from analysis import AnalysisError, ScalingFit, Status, fit_scaling

LAWS = {"experts": (1.6, 0.18), "engram": (1.5, 0.19), "dense": (1.8, 0.16)}
"""Mechanism -> A at 1e13 FLOPs, and alpha."""
UNIT, FLOOR = 1e13, 1.8


def ladder(
    rungs: int = 4,
    *,
    seeds: int = 2,
    noise: float = 0.004,
    level: float = 0.006,
    floors: dict[str, float] | None = None,
    laws: dict[str, tuple[float, float]] = LAWS,
    step: float = 4,
    seed: int = 0,
    loss: Callable[[str, float], float] | None = None,
) -> pd.DataFrame:
    """Runs at 15 tokens for each activated parameter.

    Args:
        noise: of a run; `level`: of what its seed gives to all mechanisms of a rung.
        floors: of each mechanism, in place of `FLOOR`.
        loss: from mechanism and FLOPs, in place of the laws.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for rung in range(rungs):
        active = 3.4e4 * step**rung
        levels = level * rng.standard_normal(seeds)
        for place, (name, (a, alpha)) in enumerate(laws.items()):
            flops = 6 * active * 15 * active * (1 + 0.05 * place)
            true = loss(name, flops) if loss else (floors or {}).get(name, FLOOR) + a * (flops / UNIT) ** -alpha
            rows += [
                {
                    **{"trial_id": f"{name}-{rung}-{each}", "mechanism": name, "seed": each, "flops": flops},
                    **{"tokens": 15 * active, "active_params": active, "total_params": 10 * active},
                    **{"val_loss": true + levels[each] + noise * rng.standard_normal(), "status": "finished"},
                }
                for each in range(seeds)
            ]
    return pd.DataFrame(rows)


def fitted(frame: pd.DataFrame, **options: Any) -> ScalingFit:
    return fit_scaling(frame, **{"reference": "experts", "resamples": 60, **options})


@functools.cache
def example(rungs: int = 4) -> ScalingFit:
    return fitted(ladder(rungs))


def own(fit: ScalingFit, name: str) -> Any:
    return next(each for each in fit.mechanisms if each.name == name)


# --- known laws come back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floors", [None, {"experts": 1.8, "engram": 1.7, "dense": 1.95}])
def test_exponents_floors_and_multipliers_come_back(floors: dict[str, float] | None) -> None:
    fit = fitted(ladder(5, noise=1e-5, level=1e-5, floors=floors, seed=5), resamples=20)
    assert fit.status is Status.CONVERGED, fit.message
    assert fit.floors == ("own" if floors else "shared")
    assert fit.compute_unit
    for name, (a, alpha) in LAWS.items():
        assert fit.parameters[f"alpha of {name}"].value == pytest.approx(alpha, abs=1e-4)
        assert fit.parameters[f"A of {name}"].value == pytest.approx(a * (fit.compute_unit / UNIT) ** -alpha, rel=1e-3)
        floor = fit.parameters[f"E of {name}" if floors else "E"].value
        assert floor == pytest.approx((floors or {}).get(name, FLOOR), abs=2e-3)
    told = fit.multipliers("engram")
    floor, known = ((floors or {}).get(name, FLOOR) for name in ("engram", "experts"))
    loss = floor + 1.5 * (told["flops"] / UNIT) ** -0.19
    assert np.allclose(told["multiplier"], UNIT * ((loss - known) / 1.6) ** (-1 / 0.18) / told["flops"], rtol=1e-3)


def test_with_one_floor_the_multiplier_is_a_power_of_the_compute() -> None:
    fit = example()
    a, alpha, a_known, alpha_known = (
        fit.parameters[f"{letter} of {name}"].value for name in ("engram", "experts") for letter in ("A", "alpha")
    )
    told = fit.multipliers("engram")
    c = told["flops"] / fit.compute_unit
    assert np.allclose(told["multiplier"], (a_known / a) ** (1 / alpha_known) * c ** (alpha / alpha_known - 1))


def generalised(frame: pd.DataFrame, fit: ScalingFit, floors: list[int]) -> tuple[np.ndarray, np.ndarray, float]:
    """SciPy's fit of the means, with their covariance -> parameters, their standard errors, the weighted squares."""
    assert fit.paired_sd
    assert fit.level_sd is not None
    means = frame.groupby(["mechanism", "flops"], as_index=False).agg(y=("val_loss", "mean"), rung=("tokens", "first"))
    names = sorted(LAWS)
    place = means["mechanism"].map(names.index).to_numpy()
    alike = np.equal.outer(means["rung"].to_numpy(), means["rung"].to_numpy())
    covariance = (fit.paired_sd**2 * np.eye(len(means)) + fit.level_sd**2 * alike) / 2
    u, count = np.log(means["flops"].to_numpy() / fit.compute_unit), max(floors) + 1

    def law(_: Any, *theta: float) -> np.ndarray:
        floor, a, alpha = np.array(theta[:count]), np.array(theta[count : count + 3]), np.array(theta[count + 3 :])
        return (floor[np.array(floors)[place]] if count else 0) + np.exp(a[place] - alpha[place] * u)

    start = [1.5] * count + [0.5] * 3 + [0.15] * 3
    found, spread = curve_fit(law, u, means["y"], start, covariance, absolute_sigma=True, xtol=1e-14, ftol=1e-14)
    rest = means["y"].to_numpy() - law(u, *found)
    return found, np.sqrt(np.diag(spread)), float(rest @ np.linalg.solve(covariance, rest))


def test_scipy_finds_the_same_law_and_nearly_the_same_intervals() -> None:
    frame = ladder()
    fit = fitted(frame, resamples=1000)
    found, errors, _ = generalised(frame, fit, [0, 0, 0])
    assert fit.parameters["E"].value == pytest.approx(found[0], abs=1e-5)
    for place, name in enumerate(sorted(LAWS)):
        assert fit.parameters[f"A of {name}"].value == pytest.approx(np.exp(found[1 + place]), rel=1e-4)
        alpha = fit.parameters[f"alpha of {name}"]
        assert alpha.value == pytest.approx(found[4 + place], abs=1e-6)
        # SciPy's errors know the noise; ours is known from 8 and 4 degrees of freedom only.
        assert 1.0 < (alpha.high - alpha.low) / (2 * 1.96 * errors[4 + place]) < 1.8


def test_the_nested_tests_are_those_of_scipys_squares() -> None:
    frame = ladder(floors={"experts": 1.8, "engram": 1.79, "dense": 1.8})
    fit = fitted(frame)
    none, one, each = (generalised(frame, fit, floors)[2] for floors in ([-1] * 3, [0, 0, 0], [0, 1, 2]))
    assert fit.own_floors_df == (2, 8)
    assert fit.own_floors_p == pytest.approx(f_distribution.sf((one - each) / 2, 2, 8), rel=1e-3)
    assert fit.floor_p == pytest.approx(f_distribution.sf(none - one, 1, 8) / 2, rel=1e-3)
    assert fit.lack_of_fit_p == pytest.approx(f_distribution.sf(one / 5, 5, 8), rel=1e-3)


def test_both_kinds_of_noise_are_measured() -> None:
    fit = fitted(ladder(5, seeds=40, noise=0.01, level=0.02), resamples=2)
    assert (fit.noise_df, fit.level_df) == (2 * 39 * 5, 39 * 5)
    assert fit.paired_sd == pytest.approx(0.01, rel=0.15)
    assert fit.level_sd == pytest.approx(0.02, rel=0.2)


def test_neither_the_order_of_rows_nor_the_unit_of_compute_matters() -> None:
    frame = ladder()
    fit = example()
    assert fitted(frame.sample(frac=1, random_state=1)).parameters == fit.parameters
    scaled = fitted(frame.assign(flops=frame["flops"] / 1e9))
    for name in fit.parameters:
        assert scaled.parameters[name].value == pytest.approx(fit.parameters[name].value, rel=1e-7)


# --- what rungs can tell ----------------------------------------------------------------------------------------------


def test_two_rungs_have_no_floor_and_nothing_outside() -> None:
    fit = example(2)
    assert fit.status is Status.CONVERGED
    assert fit.floors == "none"
    assert (fit.floor_p, fit.own_floors_p, fit.foretold) == (None, None, ())
    assert fit.summary().startswith("Caution: 2 rungs do not tell a floor from a power")
    with pytest.raises(AnalysisError, match=r"FLOPs lie outside the .* measured of experts.*train a third size"):
        fit.predict({"mechanism": "experts", "flops": 1e15})


def test_three_rungs_have_one_floor_for_all() -> None:
    fit = example(3)
    assert fit.floors == "shared"
    assert fit.own_floors_p is None
    assert "3 rungs cannot give each mechanism a floor of its own: one floor for all is assumed" in fit.message
    assert {each.floors for each in fit.foretold} == {"none"}
    alone = fitted(ladder(3, laws={"experts": LAWS["experts"]}))  # three means, three parameters
    assert alone.floors == "none"


def test_a_power_law_shows_no_floor() -> None:
    fit = fitted(ladder(4, floors=dict.fromkeys(LAWS, 0.0), noise=1e-4, level=1e-4, seed=2))
    assert fit.parameters["E"].low == 0
    assert fit.floor_p
    assert fit.floor_p > 0.05
    assert "floor" in fit.message


def test_floors_far_apart_are_told() -> None:
    floors = {"experts": 1.8, "engram": 1.5, "dense": 2.0}
    fit = fitted(ladder(4, floors=floors, seed=2))
    assert fit.floors == "own"
    assert "One floor for all is refuted against a floor of each (F test, 2 and 8 degrees of freedom" in fit.summary()
    for name, floor in floors.items():
        assert fit.parameters[f"E of {name}"].low < floor < fit.parameters[f"E of {name}"].high


def test_the_largest_rung_is_hit_or_missed() -> None:
    assert all(each.hit for each in example().foretold)
    frame = ladder()
    off = (frame["mechanism"] == "engram") & (frame["tokens"] == frame["tokens"].max())
    fit = fitted(frame.assign(val_loss=frame["val_loss"] + 0.3 * off))
    assert [each.mechanism for each in fit.foretold if not each.hit] == ["engram"]
    assert "2 of 3 inside their 95% interval; missed: engram measured" in fit.summary()
    assert fit.status is Status.POOR_FIT


# --- multipliers ------------------------------------------------------------------------------------------------------


def test_multipliers_end_where_the_reference_was_measured() -> None:
    fit = example()
    reference, best, worst = (own(fit, name) for name in ("experts", "engram", "dense"))
    assert (reference.span, reference.multipliers, reference.growth) == (None, None, None)
    at = lambda name, c: fit.predict({"mechanism": name, "flops": c})["loss"].iloc[0]  # noqa: E731
    assert at("engram", best.span[1]) == pytest.approx(at("experts", reference.flops[-1]))
    assert at("dense", worst.span[0]) == pytest.approx(at("experts", reference.flops[0]))
    assert best.span[1] < best.flops[-1]
    for name, c in (("engram", best.flops[-1]), ("dense", worst.flops[0])):
        with pytest.raises(AnalysisError, match=f"the multiplier of {name} is told from"):
            fit.multipliers(name, [c])
    with pytest.raises(AnalysisError, match="experts has no compute multiplier: it is the reference"):
        fit.multipliers("experts")
    assert best.multipliers[1].low > 1 > worst.multipliers[1].high
    assert best.growth.value > 1 > worst.growth.value
    assert "Elsewhere it is withheld: the reference was not measured at its other losses" in fit.summary()


def test_a_mechanism_out_of_reach_has_none() -> None:
    fit = fitted(ladder(3, laws={"experts": (1.6, 0.18), "far": (0.4, 0.18)}, step=2))
    far = own(fit, "far")
    assert (far.span, far.multipliers) == (None, None)
    assert "No compute multiplier: all its losses are less than the reference's" in fit.summary()
    assert "multiplier" not in set(fit.table()["series"])


def test_residuals_and_what_is_drawn_are_those_of_the_runs() -> None:
    fit, frame = example(), ladder()
    rest = fit.residuals()
    assert set(rest["trial_id"]) == set(frame["trial_id"])
    assert np.allclose(rest.groupby(["mechanism", "rung"])["paired"].mean(), [
        mean for name in sorted(LAWS) for mean in own(fit, name).means
    ])  # fmt: skip
    assert rest["paired"].sub(rest["predicted"]).std() < rest["loss"].sub(rest["predicted"]).std()
    assert set(fit.table()["series"]) == {"run", "mean", "curve", "residual", "run_residual", "multiplier"}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(tokens=t["tokens"].where(t["seed"] == 0, 4 * t["tokens"])), "runs from 15 to 60"),
        (lambda t: t.assign(**{"data.corpus": t["seed"].map({0: "a", 1: "b"})}), "column `data.corpus` holds a and b"),
        (lambda t: t.assign(embedding_params=t["seed"] + 4096), "column `embedding_params` runs from 4,096 to 4,097"),
        (lambda t: t.assign(total_params=t["total_params"] * (1 + t["seed"])), "`dense` has P_tot/P_act from 10 to 20"),
        (lambda t: t.assign(flops=t["flops"] * (1 + t["seed"])), "so it is several mechanisms"),
        (lambda t: t.assign(seed=0), "agree in"),
        (lambda t: t.assign(flops=-1.0), "column `flops` holds -1 in trial experts-0-0"),
        (lambda t: t.assign(flops="many"), "trial experts-0-0"),
        (lambda t: t.assign(mechanism="dense"), "no run is of the reference `experts`"),
        (lambda t: t.drop(columns="active_params"), "active_params"),
        (lambda t: t.assign(trial_id="same"), "stands in several rows"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        fitted(change(ladder(3)))


def copied(t: pd.DataFrame) -> pd.DataFrame:
    first = t[t["mechanism"] == "experts"].set_index(["tokens", "seed"])["val_loss"]
    twin = t["mechanism"] == "engram"
    same = [first[key] for key in zip(t["tokens"], t["seed"], strict=True)]
    return t.assign(val_loss=t["val_loss"].where(~twin, same))


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda t: t[t["tokens"] == t["tokens"].min()], Status.TOO_FEW_POINTS, "rungs with a finished run: 1"),
        (lambda t: t.assign(val_loss=4.0), Status.TOO_FEW_POINTS, "all losses are equal"),
        (lambda t: t.assign(val_loss=t["val_loss"].where(t["tokens"] > 1e6)), Status.NOT_FINITE, "is not a number"),
        (lambda t: t[t["seed"] == 0], Status.TOO_FEW_POINTS, "no repeats, so seed noise is not measured"),
        (copied, Status.TOO_FEW_POINTS, "the losses of engram and experts are the same numbers"),
        (
            lambda t: t.assign(val_loss=t.groupby("flops")["val_loss"].transform("first")),
            Status.TOO_FEW_POINTS,
            "different seeds have the same losses",
        ),
        (
            lambda t: t.assign(val_loss=9 - t["val_loss"]),
            Status.BOUND_HIT,
            "the loss of experts does not fall with compute",
        ),
    ],
)
def test_poor_tables_give_a_status(
    change: Callable[[pd.DataFrame], pd.DataFrame], status: Status, message: str
) -> None:
    fit = fitted(change(ladder()))
    assert fit.status is status
    assert message in fit.message
    assert message in fit.summary().splitlines()[0]
    json.loads(fit.to_json())


def test_runs_without_a_result_are_counted_and_used_nowhere() -> None:
    frame = ladder()
    frame.loc[[0, 5], "status"] = ["diverged", "learned_nothing"]
    frame.loc[[0, 5], "val_loss"] = [np.nan, 99.0]
    fit = fitted(frame)
    assert "Left out: 2 of 24 rows, whose `status` says diverged (1), learned_nothing (1)" in fit.message
    assert len(fit.rows) == 22
    assert fit.status is Status.CONVERGED


def test_a_mechanism_of_one_rung_is_left_out_by_name() -> None:
    frame = ladder()
    fit = fitted(frame[(frame["mechanism"] != "dense") | (frame["tokens"] == frame["tokens"].max())])
    assert "left out, with one rung each: dense" in fit.message
    assert [each.name for each in fit.mechanisms] == ["experts", "engram"]


# --- what intervals hold ----------------------------------------------------------------------------------------------


def held(studies: int, rungs: int, resamples: int) -> dict[str, float]:
    """Part of simulated studies whose intervals hold the truth, and that say wrongly that floors differ."""
    found: dict[str, list[bool]] = {}

    def keep(name: str, interval: Any, truth: float) -> None:
        found.setdefault(name, []).append(bool(interval.low <= truth <= interval.high))

    for study in range(studies):
        fit = fitted(ladder(rungs, noise=0.01, level=0.01, seed=study), resamples=resamples, random_seed=study)
        if "E" in fit.parameters:
            keep("floor", fit.parameters["E"], FLOOR)
        for name, (a, alpha) in LAWS.items():
            keep("exponent", fit.parameters[f"alpha of {name}"], alpha)
            if span := own(fit, name).span:
                c = np.exp(np.mean(np.log(span)))
                truth = UNIT * (a / 1.6 * (c / UNIT) ** -alpha) ** (-1 / 0.18) / c
                keep("multiplier", fit.multipliers(name, [c]).iloc[0], truth)
        for each in fit.foretold:
            if each.floors != "none":
                found.setdefault("largest", []).append(each.hit)
        if fit.own_floors_p is not None:
            found.setdefault("own floors", []).append(fit.own_floors_p < 0.05)
    return {name: float(np.mean(each)) for name, each in found.items()}


def test_intervals_hold_the_truth_in_a_few_studies() -> None:
    found = held(12, 4, 60)
    assert found["own floors"] <= 0.25
    assert all(found[name] > 0.75 for name in ("floor", "exponent", "multiplier", "largest"))


@pytest.mark.slow
@pytest.mark.xfail(reason="of 30 studies of 4 sizes 86% of floors and 82% of exponents were held", strict=False)
@pytest.mark.parametrize("rungs", [3, 4])
def test_intervals_hold_the_truth(rungs: int) -> None:
    found = held(150, rungs, 200)
    assert found.pop("own floors", 0.0) <= 0.09  # 5%, and what 150 studies scatter by
    assert all(0.9 <= part <= 0.985 for part in found.values()), found
