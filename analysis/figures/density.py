"""Loss over a memory's rows and the rows that a token reads: the fitted surface as contours, and cuts through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import MAP, TWO_COLUMNS, look, new_figure, shades, style, ticks_at
from analysis.table import si

ASIDE = 1.06
"""Points of one row count stand beside each other in the cuts, by this factor a cut, so that their errors
can be read.
"""


def density_figure(data: pd.DataFrame) -> Figure:
    """A row of two panels a cell: contours, and cuts."""
    cells = list(dict.fromkeys(data["cell"]))
    with style():
        figure = new_figure(TWO_COLUMNS, 0.2 + 2.7 * len(cells))
        figure.set_layout_engine("constrained", w_pad=0.08)  # the left panel's bar from the right panel's label
        for pair, cell in zip(figure.subplots(len(cells), 2, squeeze=False), cells, strict=True):
            panel = {str(name): group for name, group in data[data["cell"] == cell].groupby("series")}
            _contours(pair[0], panel["surface"], panel["mean"])
            _cuts(pair[1], panel["cut"], panel["mean"])
            pair[0].set_title(cell, loc="left")
        return figure


def draw_fit(axes: Axes, data: pd.DataFrame) -> None:
    """`DensityFit.drawn`: the contours."""
    with style():
        _contours(axes, data[data["series"] == "surface"], data[data["series"] == "mean"])


def _contours(axes: Axes, surface: pd.DataFrame, points: pd.DataFrame) -> None:
    """The surface, dark where it is low. Each mean has the colour of its own loss: one that stands out is one that the
    surface misses.
    """
    x, y = np.sort(surface["rows"].unique()), np.sort(surface["read"].unique())
    loss = surface.pivot(index="read", columns="rows", values="loss").to_numpy()
    low, high = min(loss.min(), points["loss"].min()), max(loss.max(), points["loss"].max())
    levels = MaxNLocator(12).tick_values(low, high)
    colours: dict[str, Any] = {"cmap": MAP, "vmin": levels[0], "vmax": levels[-1]}
    filled = axes.contourf(x, y, loss, levels=levels, **colours)
    axes.contour(x, y, loss, levels=levels, colors="white", linewidths=0.4)
    circles: dict[str, Any] = {"s": 34, "edgecolors": "black", "linewidths": 0.7, "clip_on": False, "zorder": 3}
    axes.scatter(points["rows"], points["read"], c=points["loss"], **circles, **colours)
    bar = axes.figure.colorbar(filled, ax=axes, pad=0.06)
    bar.ax.set_title("Validation loss\n(nats/token)", fontsize=6.5)
    axes.set(xscale="log", yscale="log", xlabel="Memory rows", ylabel="Rows that a token reads")
    ticks_at(axes.xaxis, points["rows"], si)
    ticks_at(axes.yaxis, points["read"], si)


def _cuts(axes: Axes, cuts: pd.DataFrame, points: pd.DataFrame) -> None:
    """From light to dark as more rows are read."""
    counts = sorted(points["read"].unique())
    colours = shades(len(counts))
    for place, count in enumerate(counts):
        cut, own = cuts[np.isclose(cuts["read"], count)], points[points["read"] == count]
        line = look(place) | {"color": colours[place]}
        axes.fill_between(cut["rows"], cut["low"], cut["high"], alpha=0.12, linewidth=0, color=line["color"])
        axes.plot(cut["rows"], cut["loss"], linewidth=1, **line | {"marker": ""})
        beside = own["rows"] * ASIDE ** (place - (len(counts) - 1) / 2)
        error = own["high"] - own["loss"]
        axes.errorbar(beside, own["loss"], error, elinewidth=0.8, label=si(count), **line | {"linestyle": ""})
    axes.set(xscale="log", xlabel="Memory rows", ylabel="Validation loss (nats/token)")
    ticks_at(axes.xaxis, points["rows"], si)
    axes.legend(title="rows read", loc="center left", bbox_to_anchor=(1.0, 0.5), title_fontsize=6.5)
