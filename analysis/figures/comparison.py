"""Alternatives at one budget on one axis: the loss of each over the share, and every paired difference with its
interval.
"""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import GREY, TWO_COLUMNS, look, new_figure, reach, style
from analysis.table import RHO

LABEL_CHARACTERS = 44
ASIDE = 0.012  # of the range of shares: alternatives at one share are set side by side
LOOKS: dict[str, dict[str, Any]] = {
    "told from noise": {"color": "black", "marker": "o"},
    "not told from noise": {"color": "0.55", "marker": "o", "markerfacecolor": "white"},
}
"""Verdict on a difference -> how it is drawn."""


def comparison_figure(data: pd.DataFrame) -> Figure:
    """Losses over the share on the left, differences on the right."""
    differences = data[data["series"].isin(("difference", "mean"))]
    with style():
        names = list(dict.fromkeys(data["name"][data["series"] == "level"]))
        columns = 3 if max(map(len, names), default=0) <= LABEL_CHARACTERS else 1
        lines = [len(textwrap.wrap(name + ", mean", LABEL_CHARACTERS)) for name in differences["name"]]
        height = 0.9 + sum(max(0.26, 0.13 * count) for count in lines) + (0.16 * len(names) if columns == 1 else 0)
        figure = new_figure(TWO_COLUMNS, max(2.6, height))
        left, right = figure.subplots(1, 2, width_ratios=(1, 0.9))
        _levels(left, data)
        draw_differences(right, differences)
        handles, labels = left.get_legend_handles_labels()
        for verdict in (each for each in LOOKS if (differences["verdict"] == each).any()):
            handles.append(Line2D([], [], linestyle="", **LOOKS[verdict]))
            labels.append(f"{verdict} (95% interval)")
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        return figure


def draw_differences(axes: Axes, data: pd.DataFrame) -> None:
    """Each difference with its 95% interval, from top to bottom."""
    with style():
        places = np.arange(len(data)) + 0.5
        axes.axvline(0, color=GREY, linewidth=0.6, zorder=0)
        for verdict, own_look in LOOKS.items():
            own = (data["verdict"] == verdict).to_numpy()
            error: dict[str, Any] = {"xerr": reach(data[own]), "linestyle": "", "elinewidth": 0.9, "capsize": 0}
            axes.errorbar(data["value"][own], places[own], **error, **own_look)
        several = data["share"].nunique(dropna=False) > 1
        at = data["share"].map(lambda share: ", mean" if pd.isna(share) else f", at {share:.4g}") if several else ""
        labels = [textwrap.fill(label, LABEL_CHARACTERS) for label in data["name"] + at]
        axes.set_yticks(places, labels, fontsize=6.5)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(max(len(data), 1), 0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("Difference of loss (nats/token)")


def _levels(axes: Axes, data: pd.DataFrame) -> None:
    levels, reference = (data[data["series"] == series] for series in ("level", "reference"))
    shares = pd.concat([levels, reference])["share"]
    span = float(shares.max() - shares.min()) or 1.0
    names = list(dict.fromkeys(levels["name"]))
    for place, name in enumerate(names):
        own = levels[levels["name"] == name].sort_values("share")
        aside = ASIDE * span * (place - (len(names) - 1) / 2)
        error = (own["high"] - own["value"]).to_numpy()
        axes.errorbar(own["share"] + aside, own["value"], error, elinewidth=0.8, label=name, **look(place))
    if len(reference):
        black: dict[str, Any] = {"color": "black", "marker": "*", "markersize": 6, "linestyle": "", "elinewidth": 0.8}
        error = (reference["high"] - reference["value"]).to_numpy()
        axes.errorbar(reference["share"], reference["value"], error, label=str(reference["name"].iloc[0]), **black)
    ticks = sorted(shares.unique())
    if len(ticks) <= 6:
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xlim(shares.min() - 0.12 * span, shares.max() + 0.12 * span)
    axes.set_xlabel(f"Routed experts' share of sparse parameters, {RHO}")
    axes.set_ylabel("Validation loss (nats/token)")
