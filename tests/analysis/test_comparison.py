"""Alternatives at one share of one budget: true differences inside their intervals, no verdict without repeats, no
memory unnamed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import AnalysisError, summarize, write_report
from analysis.detect import detect
from analysis.fits.comparison import fit_comparison
from analysis.results import Results
from analysis.status import Status
from analysis.studies import comparing
from analysis.studies.allocation import Allocation
from analysis.studies.memories import Memories

New = Callable[..., Path]
RESULTS = Path(__file__).resolve().parents[2] / "results"
TRUE = {"engram": 0.0, "ngram_embedding": 0.0, "ultramem_v2": 0.05}


def simulate(random: int, noise: float = 0.01, seeds: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(random)
    together = 0.05 * rng.standard_normal(seeds)
    return pd.DataFrame(
        [
            {
                "memory": pool,
                "rho": rho,
                "seed": seed,
                "val_loss": 4 + extra + rho + together[seed] + noise * rng.standard_normal(),
            }
            for pool, extra in (*TRUE.items(), ("experts", 0.02))
            for rho in ((1.0,) if pool == "experts" else (0.75, 0.5))
            for seed in range(seeds)
        ]
    )


def points(shares: tuple[float, ...] = (0.5,), **columns: Any) -> list[dict[str, Any]]:
    """Three memories at each share, of which the last takes nine tenths of the shared experts, and the pure experts."""
    alone = {"rho": 1.0, "share_moe": 1.0, "loss": 4.03, "shared_width": 89, **{f"share_{pool}": 0.0 for pool in TRUE}}
    mixed = [
        {"rho": rho, "share_moe": rho, "loss": 4.0 + extra, "shared_width": 9 if pool == "ultramem_v2" else 89}
        | {f"share_{other}": (1 - rho) * (other == pool) for other in TRUE}
        for rho in shares
        for pool, extra in TRUE.items()
    ]
    return [point | columns for point in (alone, *mixed)]


def test_intervals_cover_and_few_true_ties_are_told() -> None:
    covered, ties = [], []
    for random in range(60):
        fit = fit_comparison(simulate(random), reference="experts")
        for each in (*fit.differences, *fit.means):
            true = TRUE[each.first] - TRUE[each.second]
            covered.append(each.difference.low <= true <= each.difference.high)
            ties += [each.told] if true == 0 else []
        covered += [
            each.difference.low <= TRUE[each.first] + (each.share or 0) - 1.02 <= each.difference.high
            for each in fit.gains
        ]
    assert 0.92 <= np.mean(covered) <= 0.98
    assert np.mean(ties) <= 0.05


def test_an_interval_without_zero_that_is_not_told_says_why() -> None:
    """The interval is for one difference, the verdict for all of them together."""
    torn = 0
    for random in range(20):
        fit = fit_comparison(simulate(random), reference="experts")
        for each in fit.differences:
            best = min((level for level in fit.levels if level.share == each.share), key=lambda level: level.loss).name
            if (
                best in (each.first, each.second)
                and not each.told
                and (each.difference.low > 0 or each.difference.high < 0)
            ):
                assert f"; p {each.p:.2g} after Holm's correction)" in fit.summary()
                torn += 1
    assert torn


def test_one_seed_has_a_status_and_no_difference() -> None:
    fit = fit_comparison(simulate(0, seeds=1))
    assert (fit.status, fit.differences) == (Status.TOO_FEW_POINTS, ())
    assert fit.summary().startswith("Status too_few_points: no repeats, so seed noise is not measured")
    assert len(fit.levels) == 7


def test_alternatives_with_the_same_losses_are_doubted_first() -> None:
    runs = simulate(0)
    losses = runs["val_loss"].where(runs["memory"] != "ngram_embedding", runs["val_loss"].shift(4))
    assert losses[4:8].tolist() == losses[:4].tolist()
    fit = fit_comparison(runs.assign(val_loss=losses), reference="experts")
    assert fit.status is Status.TOO_FEW_POINTS
    assert fit.summary().startswith(
        "Status too_few_points: the losses of engram and ngram_embedding are the same numbers in every run: copies"
    )


def test_a_point_that_scatters_less_than_all_others_is_named() -> None:
    """Trials that did not train end alike whatever the seed: noise pooled with theirs is too small for the others."""
    calm = [fit_comparison(simulate(random, seeds=3)).message for random in range(60)]
    assert sum("scatters less" in message for message in calm) <= 6
    runs = simulate(1, noise=0.1, seeds=3)
    still = (runs["memory"] == "engram") & (runs["rho"] == 0.5)
    runs.loc[still, "val_loss"] = 5.82 + 1e-4 * runs["seed"]
    assert "engram at 0.5 scatters less" in fit_comparison(runs).message


def test_copied_seeds_have_a_status() -> None:
    once = simulate(0, seeds=1)
    fit = fit_comparison(pd.concat([once, once.assign(seed=1)], ignore_index=True))
    assert (fit.status, fit.differences) == (Status.TOO_FEW_POINTS, ())


@pytest.mark.parametrize("kind", ["memories", "allocation"])
def test_memories_at_one_share_are_compared_by_name_and_what_they_displace_is_said(new_points: New, kind: str) -> None:
    folder = new_points(
        kind,
        points(),
        described={"model": {"ultramem": {"key_dim": 4}, "ultramem_v2": {"key_dim": 16, "layers": [1, 2]}}},
    )
    html = write_report(folder).read_text()
    text = summarize(folder)
    assert "`model.ultramem.key_dim" not in text  # another memory, whose name begins alike
    assert "try `model.ultramem_v2.key_dim=8` or `model.ultramem_v2.layers=[1]`" in text
    assert "At share 0.5 " in text
    for name in ("Engram", "n-gram embedding", "UltraMemV2"):
        assert name in text
    assert "Warning: UltraMemV2 leaves the shared experts a width of 9 of 89 at share 0.5." in text
    assert "of the widest" in html
    fit = json.loads((folder / "fits.json").read_text())["fits"][-1]
    assert len(fit["rows"]) == 8  # every run: nothing was averaged or left out
    assert [(each["first"], each["second"]) for each in fit["differences"]] == [
        ("Engram", "n-gram embedding"),
        ("Engram", "UltraMemV2"),
        ("n-gram embedding", "UltraMemV2"),
    ]
    assert {each["first"] for each in fit["gains"]} == {"Engram", "n-gram embedding", "UltraMemV2"}


def test_memories_of_mechanisms_that_are_not_installed_here_are_compared_by_their_names(new_points: New) -> None:
    told = [
        {name.replace("ngram_embedding", "elsewhere"): value for name, value in point.items()} for point in points()
    ]
    settings = [point | {"model.elsewhere.rate": 2.0 if point["share_elsewhere"] else None} for point in told]
    for each in (told, settings):
        folder = new_points(f"memories{len(each[0])}", each, described={"analysis": "memories"})
        html = write_report(folder).read_text()
        (fit,) = json.loads((folder / "fits.json").read_text())["fits"]
        names = {part for pair in fit["differences"] for part in (pair["first"], pair["second"])}
        assert {name.split(",")[0] for name in names} == {"Engram", "UltraMemV2", "elsewhere"}
        assert "share of elsewhere" in html


def test_the_figure_draws_its_table(new_points: New) -> None:
    (drawing,) = Memories(Results(new_points("memories", points((0.75, 0.5))))).drawings()
    left, right = drawing.figure.axes
    differences = drawing.data[drawing.data["series"].isin(("difference", "mean"))]
    drawn = np.concatenate([np.asarray(line.get_xdata(), float) for line in right.lines])
    assert set(differences["value"].round(9)) <= set(np.round(drawn, 9))
    levels = drawing.data[drawing.data["series"].isin(("level", "reference"))]
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in left.lines])
    assert set(levels["value"].round(9)) <= set(np.round(heights, 9))
    assert drawing.figure.get_figwidth() == pytest.approx(6.9)


def test_budgets_are_compared_apart(new_points: New) -> None:
    both = [
        point
        for tokens in (500_000, 2_000_000)
        for point in points((0.5,), **{"budget.tokens": tokens, "tokens": tokens})
    ]
    analysis = Memories(Results(new_points("memories", both)))
    assert [reading.label for reading in analysis.readings()] == [
        "Compared, 500k training tokens",
        "Compared, 2M training tokens",
    ]
    assert [drawing.name for drawing in analysis.drawings()] == ["memories-1", "memories-2"]


def test_a_study_without_two_memories_at_one_share_is_refused(new_points: New) -> None:
    folder = new_points(
        "memories",
        [point for point in points() if not point["share_ultramem_v2"] and not point["share_ngram_embedding"]],
    )
    with pytest.raises(AnalysisError, match="from 2 to 12 alternatives to compare, and two of them at one share"):
        write_report(folder)


def test_the_values_of_a_varied_field_are_compared_on_one_axis_with_an_interval(new_points: New) -> None:
    shares = (0.8, 0.6, 0.4, 0.2)
    runs = [{"rho": 1.0, "share_moe": 1.0, "share_engram": 0.0, "loss": 4.1}]
    runs += [
        {
            "rho": rho,
            "share_moe": rho,
            "share_engram": 1 - rho,
            "model.engram.row_dim": width,
            "loss": 4 + 0.2 * (rho - 0.4) ** 2 + extra,
        }
        for width, extra in ((8, 0.0), (16, 0.03))
        for rho in shares
    ]
    folder = new_points("allocation", runs)
    write_report(folder)
    (fit,) = (
        each for each in json.loads((folder / "fits.json").read_text())["fits"] if each["law"] == "paired differences"
    )
    (mean,) = fit["means"]
    assert (mean["first"], mean["second"]) == ("model.engram.row_dim 8", "model.engram.row_dim 16")
    assert mean["difference"]["low"] < -0.03 < mean["difference"]["high"]
    assert len(fit["differences"]) == 4
    assert (folder / "figures" / "comparison.svg").is_file()
    assert "Mean difference over the shares that both have" in summarize(folder)


def test_too_many_alternatives_are_not_compared_and_it_is_said(new_points: New) -> None:
    """200 values of a field would be 19,900 pairs."""
    runs = [
        {
            "rho": rho,
            "share_moe": rho,
            "share_engram": 1 - rho,
            "train.weight_decay": decay / 100,
            "loss": 4 + 0.1 * rho,
        }
        for decay in range(13)
        for rho in (0.8, 0.4)
    ]
    analysis = Allocation(Results(new_points("allocation", runs, seeds=1)))
    assert analysis.compared == []
    assert "More than 12 curves: the differences between them are not tested." in analysis.caveats()
    with pytest.raises(AnalysisError, match="from 2 to 12 alternatives"):
        Memories(analysis.results).check()


@pytest.mark.parametrize("shares", [(0.5,), (0.75, 0.5)])
def test_its_noise_tells_what_a_plan_can_detect(new_points: New, shares: tuple[float, ...]) -> None:
    """Memories at one share are points beside each other: each of them alone repeats no seed."""
    folder = new_points("memories", points(shares))
    found = detect(0.01, Results(folder).trials, folder)
    (comparison,) = Memories(Results(folder)).compared
    assert (found["noise"]["paired_sd"], found["noise"]["df"]) == (comparison.fit.paired_sd, comparison.fit.noise_df)
    (design,) = found["designs"]
    assert (design["points"], design["seeds"]) == (1 + 3 * len(shares), 2)


def test_what_streams_displace_is_lessened_by_their_number() -> None:
    assert "try `model.streams=2`" in comparing._smaller("model.residual manifold, model.engram.fusion per_branch", {})
    assert "streams" not in comparing._smaller("Engram", {})


def test_experts_alone_are_named_alike_whether_one_design_of_a_memory_is_beside_them_or_two() -> None:
    """Else residuals with a memory of two designs were no pair with those of one."""
    (fit,) = (each.fit for each in Memories(Results(RESULTS / "residual-streams")).compared)
    pairs = [(each.first, each.second) for each in fit.differences if each.share == 1]
    kinds = ("pre_norm", "static", "hyper_connections", "manifold", "gated")
    assert pairs == list(combinations([f"routed experts alone, model.residual {kind}" for kind in kinds], 2))
