"""How well the curves follow the share means: residuals of the law used, and every law's prediction of the shares left
out of it.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import GREY, TWO_COLUMNS, look, new_figure, share_axis, style


def diagnostics_figure(data: pd.DataFrame, noun: str = "share") -> Figure:
    """One row of panels a cell: left the residuals of the law used, right the errors of every law on the shares left
    out of it.
    """
    cells = list(dict.fromkeys(data["cell"]))
    laws = list(dict.fromkeys(data["law"][data["series"] == "left out"]))
    with style():
        figure = new_figure(TWO_COLUMNS, 0.5 + 1.9 * len(cells))
        grid = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
        used: dict[str, Line2D] = {}
        for name, (left, right) in zip(cells, grid, strict=True):
            cell = data[data["cell"] == name]
            own, others = cell[cell["series"] == "residual"], cell[cell["series"] == "left out"]
            for axes in (left, right):
                axes.axhline(0, color=GREY, linewidth=0.6)
                share_axis(axes, own["share"].min(), own["share"].max(), noun[0].upper() + noun[1:])
            left.errorbar(own["share"], own["error"], own["se"], fmt="o", color="black", elinewidth=0.8)
            used["mean of a share, paired s.e."] = Line2D([], [], color="black", marker="o", linestyle="")
            for place, law in enumerate(laws):
                off = others[others["law"] == law]
                right.plot(off["share"], off["error"], linewidth=0.8, **look(place))
                used[law] = Line2D([], [], linewidth=0.8, **look(place))
            left.set_title(f"{name}: residuals, {own['law'].iloc[0]}" if name else f"Residuals, {own['law'].iloc[0]}")
            right.set_title(f"{name}: left-out shares" if name else "Left-out shares")
            left.set_ylabel("Mean less law (nats/token)")
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=len(used))
        return figure
