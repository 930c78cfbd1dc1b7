"""Length of the interval of the best share against trials: a search beside grids, one panel a recorded curve."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, GREY, TWO_COLUMNS, new_figure, style

LOOKS = {"grid": (COLOURS[1], "s", "--"), "search": (COLOURS[0], "o", "-")}


def adaptive_figure(data: pd.DataFrame) -> Figure:
    """
    Args:
        data: `analysis.adaptive.summary`.
    """
    panels = [(str(curve), int(seeds)) for curve, seeds in data[["curve", "seeds"]].drop_duplicates().to_numpy()]
    columns = min(len(panels), 4)
    with style():
        figure = new_figure(TWO_COLUMNS, 0.5 + 1.75 * -(-len(panels) // columns))
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True)
        for place, axes in enumerate(grid.flat):
            if place >= len(panels):
                axes.set_visible(False)
                continue
            curve, seeds = panels[place]
            own = data[(data["curve"] == curve) & (data["seeds"] == seeds)]
            for design, (colour, marker, line) in LOOKS.items():
                part = own[own["design"] == design].sort_values("trials")
                axes.fill_between(part["trials"], part["low"], part["high"], color=colour, alpha=0.15, linewidth=0)
                axes.plot(
                    part["trials"],
                    part["length"],
                    color=colour,
                    marker=marker,
                    linestyle=line,
                    markersize=2.8,
                    label=design,
                )
            full = own[own["design"] == "grid"].sort_values("trials").iloc[-1]
            axes.axhline(full["length"], color=GREY, linewidth=0.6, linestyle=":", label="grid of 11 shares")
            axes.set_title(f"{curve}\n{seeds} seeds".replace(", ", "\n", 1), fontsize=6.5)
            axes.set_ylim(0, 1)
            axes.set_xlabel("Trials")
            if place % columns == 0:
                axes.set_ylabel("95% interval of the\nbest share, length")
        handles, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3)
        return figure
