"""Loss against share: the allocation curve of every cell, and the differences to pure experts with all cells on one
axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.style import (
    COLOURS,
    GREY,
    HATCHED,
    LIGHT,
    ONE_COLUMN,
    look,
    new_figure,
    panels,
    share_axis,
    style,
)
from analysis.interval import percent
from analysis.status import Status
from analysis.table import RHO

PUBLISHED = (0.75, 0.80)  # best share of routed experts in Engram, arXiv 2601.07372
SHARE_LABEL = f"Routed experts' share of sparse parameters, {RHO}"
SEED_MARKERS = ("o", "^", "s", "D", "v", "P")


def draw_fit(axes: Axes, data: pd.DataFrame, share: str, loss: str) -> None:
    """The runs, the curve with its band and the optimum of one fit, with their legend.

    Args:
        data: `fit_data`.
        share, loss: names of the axes.
    """
    used = _panel(axes, data, COLOURS[0], COLOURS[0])
    axes.set_xlabel(share)
    axes.set_ylabel(loss)
    narrow: dict[str, Any] = {"ncols": 2, "columnspacing": 0.8, "handlelength": 1.6, "borderaxespad": 0.2}
    axes.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), **narrow)


def allocation_figure(data: pd.DataFrame) -> Figure:
    """One panel a cell, each with its own loss axis: cells differ by far more than a curve is deep."""
    return share_figure(data, SHARE_LABEL, _published)


def _published(axes: Axes, low: float, high: float) -> dict[str, Line2D | Patch]:
    if not (low < PUBLISHED[0] and high > PUBLISHED[1]):
        return {}
    axes.axvspan(*PUBLISHED, zorder=0.5, **HATCHED)  # above the tied range
    return {"published optimum (Engram)": Patch(**HATCHED)}


def share_figure(
    data: pd.DataFrame, label: str, published: Callable[[Axes, float, float], dict[str, Line2D | Patch]]
) -> Figure:
    """Loss against a share, one panel a cell.

    Args:
        data: `allocation_data`.
        label: of the share's axis.
        published: marks in a panel, whose shares run from low to high, where the literature puts the optimum; returns
            the legend's entries.
    """
    cells = data.groupby("cell", sort=False)
    columns = 2 if len(cells) == 4 else min(len(cells), 3)
    with style():
        figure, drawn = panels(len(cells), columns, 0.45, 2.45)
        used: dict[str, Line2D | Patch] = {}
        below = range(1, len(cells), 3)[-1:]  # of three columns the middle one names the axis: it is too long for each
        for place, (axes, (name, cell)) in enumerate(zip(drawn, cells, strict=True)):
            shares = cell["share"][cell["series"] == "run"]
            used |= published(axes, shares.min(), shares.max())
            used |= _panel(axes, cell, COLOURS[place % len(COLOURS)], COLOURS[0] if len(cells) == 1 else GREY)
            share_axis(axes, shares.min(), shares.max(), label if columns < 3 or place in below else "")
            axes.set_title(str(name))
        for axes in drawn[::columns]:
            axes.set_ylabel("Validation loss (nats/token)")
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=4 if columns > 1 else 2)
        return figure


def _panel(axes: Axes, data: pd.DataFrame, colour: str, key: str) -> dict[str, Line2D | Patch]:
    """Draw one cell in `colour`; returns the legend's entries, in the colour `key`."""
    series = {str(name): group for name, group in data.groupby("series")}
    runs, shares = series["run"], series["run"]["share"]
    used: dict[str, Line2D | Patch] = {}
    if "tied" in series:
        for low, high in series["tied"][["low", "high"]].itertuples(index=False):
            axes.axvspan(low, high, color=LIGHT, linewidth=4, zorder=0)  # its edge shows a share that is tied alone
        used["tied with the best share"] = Patch(color=LIGHT, linewidth=0)
    for marker, seed in zip(itertools.cycle(SEED_MARKERS), sorted(runs["seed"].unique()), strict=False):
        run: dict[str, Any] = {"marker": marker, "linestyle": "", "markersize": 2.8, "markerfacecolor": "white"}
        run |= {"markeredgecolor": GREY, "markeredgewidth": 0.6}
        axes.plot(shares[runs["seed"] == seed], runs["loss"][runs["seed"] == seed], **run)
        used[f"seed {seed}"] = Line2D([], [], **run)
    if "curve" in series:
        curve, means = series["curve"], series["mean"]
        axes.fill_between(curve["share"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
        axes.plot(curve["share"], curve["loss"], color=colour)
        error = means["high"] - means["loss"]
        axes.errorbar(means["share"], means["loss"], error, fmt="o", color=colour, elinewidth=0.8)
        used["mean, paired s.e."] = Line2D([], [], color=key, marker="o", linestyle="")
        used[f"fit, {percent()} band"] = Line2D([], [], color=key)
    if "dense" in series:
        loss = series["dense"]["loss"].iloc[0]
        bottom, top = axes.get_ylim()
        if bottom - 0.5 * (top - bottom) < loss < top + 0.5 * (top - bottom):
            dotted: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 0.9}
            axes.axhline(loss, **dotted)
            used["dense, same P_act"] = Line2D([], [], **dotted)
        else:  # a line so far off would flatten the curve
            place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 6.5}
            axes.text(0.5, 0.97, f"dense, same P_act: {loss:.3f}", **place)
    if "optimum" in series:
        best, status = series["optimum"].iloc[0], data["status"].iloc[0]
        star: dict[str, Any] = {"marker": "*", "markersize": 7, "markeredgecolor": "black", "markeredgewidth": 0.6}
        star["markerfacecolor"] = "black" if status == Status.CONVERGED else "white"
        bottom, top = axes.get_ylim()
        level = bottom - 0.03 * (top - bottom)
        axes.set_ylim(bottom - 0.10 * (top - bottom), top)
        axes.plot([best["low"], best["high"]], [level, level], color="black", linewidth=1, marker="|", markersize=4)
        axes.plot(best["share"], level, color="black", **star)
        doubt = f"{percent()} interval" if status == Status.CONVERGED else status.replace("_", " ")
        used[f"optimum, {doubt}"] = Line2D([], [], color="black", linewidth=1, **star)
    return used


def differences_figure(data: pd.DataFrame) -> Figure:
    """Paired differences to rho = 1 with all cells on one axis: whether the optimum or the depth moves."""
    with style():
        figure = new_figure(ONE_COLUMN, 2.7)
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6)
        for place, (name, group) in enumerate(data.groupby("cell", sort=False)):
            error = group["se_seeds"]
            axes.errorbar(
                group["share_moe"], group["difference"], error, elinewidth=0.8, label=name or None, **look(place)
            )
        axes.set_ylabel(f"Loss less that of {RHO} = 1 (nats/token)")
        share_axis(axes, data["share_moe"].min(), data["share_moe"].max(), SHARE_LABEL)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2)
        return figure
