"""The best share against what varies between budgets (`LABELS`): each budget's own curve, and the law over
all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.allocation import PUBLISHED
from analysis.figures.style import COLOURS, HATCHED, MARKERS, ONE_COLUMN, new_figure, reach, style, ticks_at, two_digits
from analysis.interval import percent
from analysis.status import Status

LABELS = {
    "active_params": "Activated parameters, P_act",
    "tokens_per_active_param": "Training tokens per activated parameter",
    "sparsity": "Sparsity, P_tot / P_act",
}


def optimum_figure(data: pd.DataFrame, factor: str) -> Figure:
    """Points: each budget's own curve. Line: the law over all of them, with its 95% band."""
    with style():
        figure = new_figure(ONE_COLUMN, 2.7)
        axes = figure.subplots()
        used = _draw(axes, data, factor)
        axes.axhspan(*PUBLISHED, zorder=0.5, **HATCHED)
        used["published optimum (Engram)"] = Patch(**HATCHED)
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=2)
        return figure


def draw_fit(axes: Axes, data: pd.DataFrame, factor: str) -> None:
    """`JointFit.table` with its legend."""
    used = _draw(axes, data, factor)
    axes.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)


def _draw(axes: Axes, data: pd.DataFrame, factor: str) -> dict[str, Line2D | Patch]:
    law, points = data[data["series"] == "law"], data[data["series"] == "curve"]
    used: dict[str, Line2D | Patch] = {}
    if len(law):
        axes.fill_between(law["value"], law["low"], law["high"], color=COLOURS[0], alpha=0.18, linewidth=0)
        axes.plot(law["value"], law["optimum"], color=COLOURS[0])
        used[f"all budgets, {percent()} band"] = Line2D([], [], color=COLOURS[0])
    look: dict[str, Any] = {"color": COLOURS[1], "marker": MARKERS[0], "linestyle": ""}
    axes.errorbar(points["value"], points["optimum"], np.abs(reach(points, "optimum")), elinewidth=0.8, **look)
    used[f"one budget, {percent()} interval"] = Line2D([], [], **look)
    doubt = points["status"] != Status.CONVERGED
    if doubt.any():
        axes.plot(points["value"][doubt], points["optimum"][doubt], **look | {"markerfacecolor": "white", "zorder": 3})
        used["in doubt or at an end"] = Line2D([], [], **look | {"markerfacecolor": "white"})
    sampled = points["value"] if len(points) else law["value"].iloc[[0, -1]]
    axes.set_xscale("log")
    ticks_at(axes.xaxis, sampled, two_digits)
    axes.set(xlim=(sampled.min() / 1.25, sampled.max() * 1.25), ylim=(-0.05, 1.05))
    axes.set(xlabel=LABELS[factor], ylabel="Best share")
    return used
