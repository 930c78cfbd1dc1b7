"""Loss against the memory layers' share of the compute, with the published optimum marked."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.allocation import share_figure

PUBLISHED = 0.17  # best share of UltraMemV2-500M/6B, arXiv 2508.18756


def compute_ratio_figure(data: pd.DataFrame) -> Figure:
    """One panel a cell, from `allocation_data` over the memory layers' share."""
    return share_figure(data, "Memory layers' share of the blocks' forward FLOPs", _published)


def _published(axes: Axes, low: float, high: float) -> dict[str, Line2D | Patch]:
    if not low <= PUBLISHED <= high:
        return {}
    dashed: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 0.8}
    axes.axvline(PUBLISHED, zorder=0.6, **dashed)
    return {"published optimum (UltraMemV2)": Line2D([], [], **dashed)}
