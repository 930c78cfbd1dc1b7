"""A loss surface over parameters and tokens: isolines, the runs, and the path of compute-optimal models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.style import COLOURS
from analysis.interval import percent


def draw_surface(ax: Axes, data: pd.DataFrame, labels: tuple[str, str], loss: str) -> None:
    """Draw the table; the runs are filled with the colour of their own loss, so a run off the law stands out from its
    surroundings.

    Args:
        labels: of parameters and tokens.
        loss: what the loss is called.
    """
    series = {str(name): group for name, group in data.groupby("series")}
    grid, runs = series["surface"], series["run"]
    steps = grid["params"].nunique()
    x, y, z = (grid[name].to_numpy().reshape(steps, steps) for name in ("params", "tokens", "loss"))
    low, high = z.min(), z.max()
    levels = low + (high - low) * np.linspace(0, 1, 14)[1:-1] ** 1.7  # closer where the surface is flat
    look: dict[str, Any] = {"cmap": "viridis_r", "norm": Normalize(low, high)}
    ax.set(xscale="log", yscale="log", xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    isolines = ax.contour(x, y, z, levels=levels, linewidths=0.8, **look)
    for text in ax.clabel(isolines, levels[:-1:2], fmt="%.2f", fontsize=6):
        text.set(zorder=4, color="black", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})
    circles: dict[str, Any] = {"s": 9, "edgecolors": "black", "linewidths": 0.35, "zorder": 3}
    ax.scatter(runs["params"], runs["tokens"], c=runs["loss"], **circles, **look)
    run: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "0.7", "markeredgecolor": "black"}
    used: dict[str, Any] = {
        f"run, coloured by {loss}": Line2D([], [], markersize=3.5, **run),
        f"{loss} of the law": Line2D([], [], color="0.4", linewidth=0.8),
    }
    if "optimal" in series:
        path = series["optimal"]
        ax.fill_between(path["params"], path["low"], path["high"], color=COLOURS[1], alpha=0.18, linewidth=0)
        ax.plot(path["params"], path["tokens"], color=COLOURS[1], linewidth=1.6)
        used["compute-optimal"] = Line2D([], [], color=COLOURS[1], linewidth=1.6)
        used[f"its {percent()} band"] = Patch(color=COLOURS[1], alpha=0.18, linewidth=0)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
