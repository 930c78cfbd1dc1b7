"""A ladder of changes: what each step does to the loss, beside what the same change did in print, and
where that leads.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import COLOURS, GREY, TWO_COLUMNS, new_figure, reach, style

LABEL_CHARACTERS = 40
NO_BREAK = "\N{NO-BREAK SPACE}"
_SPACE = re.compile(r"(?<!,) |(?<=,) (?=\d)")  # lines break between fields, not inside one
LOOKS: dict[str, dict[str, Any]] = {
    "lowers the loss": {"color": COLOURS[0], "marker": "o"},
    "raises the loss": {"color": COLOURS[1], "marker": "s"},
    "not told from noise": {"color": "0.55", "marker": "o", "markerfacecolor": "white"},
}
"""Verdict on a step -> how it is drawn."""
PUBLISHED: dict[str, Any] = {"marker": "D", "markersize": 3.6, "linestyle": "", "markerfacecolor": "none"}
PUBLISHED |= {"markeredgecolor": "black", "markeredgewidth": 0.7}


def ladder_figure(data: pd.DataFrame) -> Figure:
    """Rungs from top to bottom: the steps on the left, the way from the first rung on the right."""
    labels = data.drop_duplicates("rung").set_index("rung")["label"]
    wrapped = [textwrap.fill(_SPACE.sub(NO_BREAK, label), LABEL_CHARACTERS, break_long_words=False) for label in labels]
    lines = [1 + label.count("\n") for label in wrapped]
    # A rung is as high as its label: the middle of each, from the top.
    heights = np.maximum(1.0, 0.62 * np.array(lines))
    middles = pd.Series(np.cumsum(heights) - heights / 2, index=labels.index)
    with style():
        figure = new_figure(TWO_COLUMNS, 1.1 + 0.205 * float(heights.sum()))
        left, right = figure.subplots(1, 2, sharey=True)
        _steps(left, data[data["quantity"] == "step"], middles)
        _totals(right, data[data["quantity"] == "total"], middles)
        for axes in (left, right):
            axes.axvline(0, color=GREY, linewidth=0.6, zorder=0)
            for edge in np.cumsum(heights)[:-1]:
                axes.axhline(edge, color="0.92", linewidth=0.5, zorder=0)
            axes.tick_params(axis="y", length=0)
            axes.set_ylim(float(heights.sum()), 0)
        left.set_yticks(middles.to_numpy(), wrapped, fontsize=6.5)
        left.set_title("Each step")
        right.set_title("All steps so far")
        left.set_xlabel("Loss less that of the rung before (nats/token)")
        right.set_xlabel("Loss less that of the first rung (nats/token)")
        handles = [
            Line2D([], [], label=f"{verdict} (95% interval)", **look)
            for verdict, look in LOOKS.items()
            if (data["verdict"] == verdict).any()
        ]
        if data["published"].notna().any():
            handles.append(Line2D([], [], label="published (UltraMem, PKM-151M)", **PUBLISHED))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure


def draw_fit(axes: Axes, data: pd.DataFrame) -> None:
    """`LadderFit.drawn`: the steps, rungs from top to bottom."""
    middles = pd.Series(np.arange(len(data)) + 0.5)
    with style():
        _steps(axes, data, middles)
        axes.axvline(0, color=GREY, linewidth=0.6, zorder=0)
        axes.set_yticks(middles, data["label"])
        axes.set_ylim(max(len(data), 1), 0)
        axes.set_xlabel("Loss less that of the rung before (nats/token)")


def _steps(axes: Axes, data: pd.DataFrame, middles: pd.Series) -> None:
    for verdict, look in LOOKS.items():
        _intervals(axes, data[data["verdict"] == verdict], middles, linestyle="", **look)
    _published(axes, data, middles)


def _totals(axes: Axes, data: pd.DataFrame, middles: pd.Series) -> None:
    measured = data[data["value"].notna()]
    right: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 6.5}
    for rung in data["rung"][data["value"].isna() & (data["rung"] > 0)]:
        axes.text(0.98, middles[rung], "none to show", color=GREY, **right)
    axes.plot(measured["value"], middles[measured["rung"]], color="0.75", linewidth=0.8, zorder=1)
    _intervals(axes, measured, middles, color="black", fmt="o")
    _published(axes, data, middles)


def _intervals(axes: Axes, data: pd.DataFrame, middles: pd.Series, **look: Any) -> None:
    axes.errorbar(data["value"], middles[data["rung"]], xerr=reach(data), elinewidth=0.9, capsize=0, **look)


def _published(axes: Axes, data: pd.DataFrame, middles: pd.Series) -> None:
    known = data[data["published"].notna()]
    axes.plot(known["published"], middles[known["rung"]], **PUBLISHED, zorder=3)
