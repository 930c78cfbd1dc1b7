"""Loss against compute with the laws and what they leave over, and the compute multiplier of each mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from analysis.figures.style import GREY, TWO_COLUMNS, look, new_figure, reach, style

ASIDE = 1.06
"""Residuals of one rung stand beside each other, by this factor a mechanism, so that their errors can be read."""


def scaling_figure(data: pd.DataFrame) -> Figure:
    """One fit: on the left the losses and below them the residuals, on the right the multipliers."""
    names = list(dict.fromkeys(data["mechanism"]))
    series = {str(key): group for key, group in data.groupby("series")}
    with style():
        figure = new_figure(TWO_COLUMNS, 3.7)
        grid = figure.add_gridspec(2, 2, height_ratios=(2.6, 1))
        losses, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[:, 1])
        rests = figure.add_subplot(grid[1, 0], sharex=losses)
        used = _losses(losses, series, names)
        losses.tick_params(labelbottom=False)
        losses.set_title("Loss and laws")
        _residuals(rests, series, names)
        rests.set_xlabel("Training compute (FLOPs)")
        _multipliers(right, series, names)
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=min(3, len(used)))
        return figure


def draw_fit(axes: Axes, data: pd.DataFrame) -> None:
    """`ScalingFit.drawn` with its legend."""
    with style():
        used = _losses(
            axes, {str(key): group for key, group in data.groupby("series")}, list(dict.fromkeys(data["mechanism"]))
        )
        axes.set_xlabel("Training compute (FLOPs)")
        axes.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _losses(axes: Axes, series: dict[str, pd.DataFrame], names: Sequence[str]) -> dict[str, Line2D]:
    axes.set_xscale("log")
    axes.set_yscale("log")
    used = {}
    for place, name in enumerate(names):
        curve, run, mean = (_own(series, key, name) for key in ("curve", "run", "mean"))
        points = look(place)
        axes.fill_between(curve["flops"], curve["low"], curve["high"], color=points["color"], alpha=0.12, linewidth=0)
        axes.plot(curve["flops"], curve["value"], **points | {"marker": ""})
        axes.plot(run["flops"], run["value"], **_single(place))
        axes.plot(mean["flops"], mean["value"], **points | {"linestyle": ""})
        used[name] = Line2D([], [], **points)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("Validation loss (nats/token)")
    return used


def _residuals(axes: Axes, series: dict[str, pd.DataFrame], names: Sequence[str]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    for place, name in enumerate(names):
        run, mean, aside = _own(series, "run_residual", name), _own(series, "residual", name), _aside(place, len(names))
        axes.plot(aside * run["flops"], run["value"], **_single(place))
        points = look(place) | {"linestyle": ""}
        axes.errorbar(aside * mean["flops"], mean["value"], reach(mean), elinewidth=0.8, **points)
    axes.set_ylabel("Less the law")


def _multipliers(axes: Axes, series: dict[str, pd.DataFrame], names: Sequence[str]) -> None:
    """Bands end where the reference was not measured; a multiplier told at one place only is a marker."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color=GREY, linewidth=0.6, zorder=0)
    told = series.get("multiplier", pd.DataFrame(columns=["mechanism", "flops", "value", "low", "high"]))
    for place, name in enumerate(names):
        own, points = told[told["mechanism"] == name], look(place)
        if own.empty:
            continue
        axes.fill_between(own["flops"], own["low"], own["high"], color=points["color"], alpha=0.15, linewidth=0)
        axes.plot(own["flops"], own["value"], **points, markevery=[0, len(own) - 1])
    if len(told):
        ends = [told["low"].min(), told["high"].max(), 1.0]
        steps = np.array(
            [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.7, 2, 3, 5, 10, 20, 50, 100]
        )
        inside = steps[(steps >= min(ends) / 1.05) & (steps <= max(ends) * 1.05)]
        axes.set_yticks(inside, [f"{step:g}" for step in inside])
    else:
        axes.text(0.5, 0.5, "none to show", color=GREY, ha="center", transform=axes.transAxes)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_title("Compute that the reference needs for the same loss")
    axes.set_ylabel("Compute multiplier")
    axes.set_xlabel("Training compute of the mechanism (FLOPs)")


def _own(series: dict[str, pd.DataFrame], key: str, name: str) -> pd.DataFrame:
    return series[key][series[key]["mechanism"] == name]


def _aside(place: int, count: int) -> float:
    return float(ASIDE ** (place - (count - 1) / 2))


def _single(place: int) -> dict[str, Any]:
    points: dict[str, Any] = look(place) | {"linestyle": "", "markersize": 2.4, "markerfacecolor": "white"}
    return points | {"markeredgewidth": 0.5, "alpha": 0.8}
