"""Loss against a memory's rows, and against its parameters: one line a kind of memory, the backbone alone
beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import GREY, TWO_COLUMNS, look, new_figure, style

ASIDE = 1.12
"""Markers of one row count stand beside each other, by this factor a mechanism, so that their errors can be read."""


def slots_figure(data: pd.DataFrame) -> Figure:
    """A row of two panels a cell, on one loss axis: against rows, and against the parameters in them."""
    cells, names = (list(dict.fromkeys(data[name].dropna())) for name in ("cell", "mechanism"))
    names = [name for name in names if ((data["mechanism"] == name) & (data["series"] == "run")).any()]
    with style():
        figure = new_figure(TWO_COLUMNS, 0.5 + 2.5 * len(cells))
        grid = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
        used: dict[str, Line2D] = {}
        for pair, cell in zip(grid, cells, strict=True):
            panel = data[data["cell"] == cell]
            for axes, column in zip(pair, ("rows", "params"), strict=True):
                used |= _panel(axes, panel, names, column, slopes=len(cells) == 1)
            used |= _published(pair[0], panel)
            pair[0].set_ylabel("Validation loss (nats/token)")
            pair[0].set_title(cell, loc="left")
        grid[-1, 0].set_xlabel("Memory rows")
        grid[-1, 1].set_xlabel("Memory parameters")
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=2)
        return figure


def draw_fit(axes: Axes, data: pd.DataFrame) -> None:
    """`SlotsFit.drawn` with its legend."""
    with style():
        used = _panel(axes, data, list(dict.fromkeys(data["mechanism"].dropna())), "rows", slopes=True)
        axes.set_xlabel("Memory rows")
        axes.set_ylabel("Validation loss (nats/token)")
        axes.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def signed(value: float) -> str:
    """Four digits with a typeset sign."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _panel(axes: Axes, data: pd.DataFrame, names: Sequence[str], column: str, slopes: bool) -> dict[str, Line2D]:
    """Draw one cell against one column; returns the legend's entries."""
    used: dict[str, Line2D] = {}
    dotted: dict[str, Any] = {"linestyle": (0, (1, 1)), "linewidth": 0.9}
    axes.set_xscale("log")
    for place, name in enumerate(names):
        own = data[data["mechanism"] == name]
        series = {str(key): group for key, group in own.groupby("series")}
        solid, label = look(place), name
        colour = solid["color"]
        points: dict[str, Any] = solid | {"linestyle": ""}
        single: dict[str, Any] = points | {"markersize": 2.6, "markerfacecolor": "white", "markeredgewidth": 0.5}
        aside = ASIDE ** (place - (len(names) - 1) / 2)
        axes.plot(aside * series["run"][column], series["run"]["loss"], alpha=0.7, **single)
        if "line" in series:
            line = series["line"]
            if "power" not in series:  # the band is that of a line that holds
                axes.fill_between(line[column], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            axes.plot(line[column], line["loss"], **solid | {"marker": ""})
        if "power" in series:
            axes.plot(series["power"][column], series["power"]["loss"], color=colour, **dotted)
            used["power law with a floor"] = Line2D([], [], color=GREY, **dotted)
        if "slope" in series and slopes:
            slope = series["slope"].iloc[0]
            label += f": {signed(slope['loss'])} a tenfold ({signed(slope['low'])} to {signed(slope['high'])})"
        means = series["mean"]
        axes.errorbar(aside * means[column], means["loss"], means["high"] - means["loss"], elinewidth=0.8, **points)
        used[label] = Line2D([], [], **solid)
    for loss in data["loss"][data["series"] == "backbone"]:
        black: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": ":"}
        axes.axhline(loss, **black)
        used["backbone alone"] = Line2D([], [], **black)
    return used


def _published(axes: Axes, data: pd.DataFrame) -> dict[str, Line2D]:
    """A piece of line one decade long with the published slope, low on the left, below all that is there."""
    published, runs = data[data["series"] == "published"], data[data["series"] == "run"]
    if published.empty:
        return {}
    slope, (bottom, top), left = published["loss"].iloc[0], axes.get_ylim(), runs["rows"].min()
    air = 0.06 * (top - bottom)
    lowest = data["loss"][(data["rows"] <= 10 * left) & (data["series"] != "slope")].min()
    head = min(bottom + air + abs(slope), lowest - air)
    axes.plot([left, 10 * left], [head, head + slope], color=GREY, linewidth=1)
    axes.set_ylim(min(bottom, head - abs(slope) - air), top)
    return {f"{published['mechanism'].iloc[0]}: {signed(slope)} a tenfold": Line2D([], [], color=GREY, linewidth=1)}
