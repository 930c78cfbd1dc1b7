"""Length of the interval of the best share against trials: a search beside grids, one panel a recorded curve."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, GREY, panels, style

LOOKS = {"grid": (COLOURS[1], "s", "--"), "search": (COLOURS[0], "o", "-")}


def adaptive_figure(data: pd.DataFrame) -> Figure:
    """
    Args:
        data: `analysis.adaptive.summary`.
    """
    curves = data.groupby(["curve", "seeds"], sort=False)
    columns = min(len(curves), 4)
    with style():
        figure, drawn = panels(len(curves), columns, 0.5, 1.75, sharey=True)
        for axes, ((curve, seeds), own) in zip(drawn, curves, strict=True):
            for design, (colour, marker, line) in LOOKS.items():
                part = own[own["design"] == design].sort_values("trials")
                axes.fill_between(part["trials"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
                look: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markersize": 2.8}
                axes.plot(part["trials"], part["length"], label=design, **look)
            full = own[own["design"] == "grid"].sort_values("trials").iloc[-1]
            axes.axhline(full["length"], color=GREY, linewidth=0.6, linestyle=":", label="grid of 11 shares")
            axes.set_title(f"{curve}\n{seeds} seeds".replace(", ", "\n", 1), fontsize=6.5)
            axes.set_ylim(0, 1)
            axes.set_xlabel("Trials")
        for axes in drawn[::columns]:
            axes.set_ylabel("95% interval of the\nbest share, length")
        figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure
