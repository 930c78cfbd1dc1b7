"""Runs and a law against one size, one line a group (a budget, a model's size): the drawing of every fit of loss that
has such an axis.

Table: series (`run`, `curve`, `optimum`), group, x, loss, low, high. Of a run low and high are its error, of a curve
its 95% band, of an optimum the interval of its x.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.figures.style import COLOURS, LINES, MARKERS, reach
from analysis.table import si

COLUMNS = ["series", "group", "x", "loss", "low", "high"]


def runs_of(x: Any, loss: Any, group: Any = np.nan, low: Any = None, high: Any = None) -> pd.DataFrame:
    """Rows `run`."""
    ends = {"low": np.nan if low is None else low, "high": np.nan if high is None else high}
    table = pd.DataFrame({"series": "run", "x": np.asarray(x), "loss": np.asarray(loss)})
    return table.assign(group=np.asarray(group), **ends)[COLUMNS]


def curves_of(predicted: pd.DataFrame, x: str, group: float = np.nan) -> pd.DataFrame:
    """Rows `curve`, from what a fit predicts (the column x, loss, low, high)."""
    return predicted.rename(columns={x: "x"}).assign(series="curve", group=group)[COLUMNS]


def draw_law(ax: Axes, data: pd.DataFrame, x_label: str, y_label: str, group_label: str = "") -> None:
    """Draw the table against a logarithmic x; many groups run from dark to light, few have the usual colours."""
    groups = sorted(data["group"].dropna().unique()) or [np.nan]
    colours: Any = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(groups))) if len(groups) > 4 else COLOURS
    named = set(np.linspace(0, len(groups) - 1, min(len(groups), 6)).astype(int))
    ax.set_xscale("log")
    for place, group in enumerate(groups):
        own = data if np.isnan(group) else data[data["group"] == group]
        runs, curve, best = (own[own["series"] == name] for name in ("run", "curve", "optimum"))
        colour, marker = colours[place % len(colours)], MARKERS[place % len(MARKERS)]
        open_marker: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": "", "markersize": 3}
        open_marker |= {"markerfacecolor": "white", "markeredgewidth": 0.6}
        label = (f"{group:.2g}" if group >= 1e15 else si(group)) if group_label else None
        if runs["low"].notna().any():
            ax.errorbar(runs["x"], runs["loss"], reach(runs, "loss"), elinewidth=0.8, **open_marker)
        else:
            ax.plot(runs["x"], runs["loss"], label=label if place in named else None, **open_marker)
        ax.fill_between(curve["x"], curve["low"], curve["high"], color=colour, alpha=0.18, linewidth=0)
        ax.plot(curve["x"], curve["loss"], color=colour, linestyle=LINES[place % len(LINES)])
        star: dict[str, Any] = {"fmt": "*", "markersize": 6, "color": "black", "markerfacecolor": colour, "zorder": 4}
        ax.errorbar(best["x"], best["loss"], xerr=reach(best, "x"), elinewidth=0.9, **star)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if group_label:
        ax.legend(title=group_label, loc="upper left", bbox_to_anchor=(1, 1))
