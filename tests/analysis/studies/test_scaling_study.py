"""The scaling study: one fit for each number of tokens per activated parameter, mechanisms by name, and a report also
of a study in progress.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import AnalysisError, summarize, write_report
from analysis.results import Results
from analysis.studies.scaling import Scaling

New = Callable[..., Path]
LAWS = {"dense": (1.75, 0.165), "moe": (1.6, 0.18), "engram": (1.52, 0.185), "ultramem_v2": (1.66, 0.18)}
SHARES: dict[str, dict[str, float | None]] = {
    "dense": {"rho": None, "share_moe": 0.0, "share_engram": 0.0, "share_ultramem_v2": 0.0, "sparse_params": 0},
    "moe": {"rho": 1.0, "share_moe": 1.0, "share_engram": 0.0, "share_ultramem_v2": 0.0},
    "engram": {"rho": 0.4, "share_moe": 0.4, "share_engram": 0.6, "share_ultramem_v2": 0.0},
    "ultramem_v2": {"rho": 0.0, "share_moe": 0.0, "share_engram": 0.0, "share_ultramem_v2": 1.0},
}
NAMES = ["dense", "routed experts", "experts + Engram, share 0.4", "UltraMemV2"]


def points(ratios: dict[int, int] | None = None, laws: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """
    Args:
        ratios: tokens for each activated parameter -> sizes.
    """
    found = []
    for ratio, sizes in (ratios or {15: 4}).items():
        for size in range(sizes):
            active = 34_000 * 4**size
            for place, (name, (a, alpha)) in enumerate((laws or LAWS).items()):
                tokens, flops = ratio * active, 6 * active * (1 + 0.03 * place)
                shares = SHARES[name]
                found.append(
                    {
                        **{"total_params": (1 if name == "dense" else 10) * active, "active_params": active + place},
                        **{"budget.active_params": active, "budget.tokens": tokens, "tokens": tokens},
                        **{"model.width": 32 * 2**size, "flops_per_token": flops, "flops_per_token_head": 4 * flops},
                        **{"embedding_params": 4096 * 32 * 2**size, **shares},
                        "loss": 1.9 + a * (flops * tokens / 1e13) ** -alpha,
                    }
                )
    return found


def test_mechanisms_are_named_and_fitted(new_points: New) -> None:
    folder = new_points("scaling", points(), noise=0.004)
    html = write_report(folder).read_text()
    (fit,) = json.loads((folder / "fits.json").read_text())["fits"]
    assert fit["cell"] == {}  # width, size, length and share make up the rungs and the mechanisms
    assert fit["tokens_per_active_param"] == pytest.approx(15, rel=1e-3)
    assert [each["name"] for each in fit["mechanisms"]] == NAMES
    for each, (_, alpha) in zip(fit["mechanisms"], LAWS.values(), strict=True):
        assert each["exponent"]["low"] < alpha < each["exponent"]["high"]
    assert fit["floors"] == "shared"
    assert fit["parameters"]["E"]["low"] < 1.9 < fit["parameters"]["E"]["high"]
    lines = summarize(folder).splitlines()
    assert any("Loss falls towards one floor for all, E = " in line for line in lines)
    assert any(line.startswith("experts + Engram, share 0.4: exponent 0.18") for line in lines)
    for part in ("Laws and compute multipliers", "The largest size from the others", "FLOPs leave out the output head"):
        assert part in html


def test_each_number_of_tokens_per_parameter_has_its_own_fit_and_figure(new_points: New) -> None:
    found = Scaling(Results(new_points("scaling", points({15: 3, 60: 2}))))
    assert [cell.label for cell in found.cells] == ["tokens/P_act 15", "tokens/P_act 60"]
    assert [fit.floors for _, fit in found.fitted] == ["shared", "none"]
    drawings = found.drawings()
    assert [drawing.name for drawing in drawings] == ["scaling-1", "scaling-2"]
    assert drawings[1].caption.startswith("tokens/P_act 60. Left, top: validation loss")
    assert [line.partition(" size")[0] for line in found.foresee()] == ["tokens/P_act 15: 3", "tokens/P_act 60: 2"]
    assert all(each["df"] > 0 for each in found.noise())


def test_the_figure_draws_its_table(new_points: New) -> None:
    (drawing,) = Scaling(Results(new_points("scaling", points()))).drawings()
    losses, multipliers, residuals = drawing.figure.axes
    table = {str(name): own for name, own in drawing.data.groupby("series")}
    drawn = [tuple(line.get_ydata()) for axes in drawing.figure.axes for line in axes.lines]
    for series in ("run", "mean", "curve", "run_residual", "residual", "multiplier"):
        for _, own in table[series].groupby("mechanism"):
            assert tuple(own["value"]) in drawn
    assert [text.get_text() for text in drawing.figure.legends[0].get_texts()] == NAMES
    assert "nats/token" in losses.get_ylabel()
    assert "FLOPs" in multipliers.get_xlabel()
    assert residuals.get_ylabel() == "Less the law"


@pytest.mark.parametrize("unfinished", [range(3, 32), range(32)])
def test_a_study_in_progress_has_a_report(new_points: New, unfinished: range) -> None:
    folder = new_points("scaling", points(), statuses=dict.fromkeys(unfinished, "pending"))
    assert "too few points" in write_report(folder).read_text()


def test_a_size_that_diverged_is_left_out_and_counted(new_points: New) -> None:
    (_, fit), = Scaling(Results(new_points("scaling", points(), statuses={1: "diverged"}))).fitted  # fmt: skip
    assert "Left out: 1 of 32 rows, whose `status` says diverged (1)" in fit.message


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (points(laws={"moe": LAWS["moe"]}), "there are no mechanisms to hold against routed experts"),
        (points(laws={"dense": LAWS["dense"], "engram": LAWS["engram"]}), "there are no mechanisms to hold against"),
        (points({15: 1}), "no two trainings differ in size"),
        (points({15: 2}) + points({60: 2}, {"dense": LAWS["dense"], "engram": LAWS["engram"]}), "no trial has routed"),
    ],
)
def test_other_studies_are_refused(made: list[dict[str, Any]], message: str, new_points: New) -> None:
    with pytest.raises(AnalysisError, match=message):
        write_report(new_points("scaling", made))
