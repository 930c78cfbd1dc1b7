"""Validation loss while training, for every share; below it the difference to pure experts, which the scale of the loss
hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cells import Cell
from analysis.figures.style import GREY, ONE_COLUMN, TWO_COLUMNS, count_axis, look, new_figure, shades, style
from analysis.table import RHO

POINTS = 5_000
"""In a panel with more, bands are pixels in the SVG too; lines stay lines, and the CSV holds every point."""


def curves_data(cells: Sequence[Cell], curves: pd.DataFrame) -> pd.DataFrame:
    """What `curves_figure` draws -> cell, quantity (`val_loss`, `difference`), rho, tokens, seeds, mean, low, high (the
    band: mean -+ one standard error between seeds; empty for one seed). Differences are to rho = 1 of the same seed at
    the same token.
    """
    tables = []
    for cell in cells:
        points = curves[curves["trial_id"].isin(cell.trials["trial_id"]) & curves["val_loss"].notna()][
            ["rho", "seed", "tokens", "val_loss"]
        ]
        pure = points[points["rho"] == 1][["seed", "tokens", "val_loss"]].rename(columns={"val_loss": "pure"})
        paired = points.merge(pure, on=["seed", "tokens"])
        quantities = {"val_loss": points, "difference": paired.assign(difference=paired["val_loss"] - paired["pure"])}
        for name, rows in quantities.items():
            table = rows.groupby(["rho", "tokens"])[name].agg(seeds="count", mean="mean", se="sem").reset_index()
            table["low"], table["high"] = table["mean"] - table["se"], table["mean"] + table["se"]
            tables.append(table.assign(cell=cell.label, quantity=name))
    names = ["cell", "quantity", "rho", "tokens", "seeds", "mean", "low", "high"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def curves_figure(data: pd.DataFrame) -> Figure:
    """One column of panels a cell; shares run from dark (0) to light (1), with their own markers."""
    names, shares = list(dict.fromkeys(data["cell"])), sorted(data["rho"].unique(), reverse=True)
    with style():
        figure = new_figure(ONE_COLUMN if len(names) == 1 else TWO_COLUMNS, 4.2)
        grid = figure.subplots(2, len(names), squeeze=False, sharex="col")
        for column, name in enumerate(names):
            panel = data[data["cell"] == name]
            for axes, quantity in zip(grid[:, column], ("val_loss", "difference"), strict=True):
                _lines(axes, panel[panel["quantity"] == quantity], shares)
                count_axis(axes)
            grid[0, column].set_title(name)
            grid[1, column].axhline(0, color=GREY, linewidth=0.6, zorder=0)
            grid[1, column].set_xlabel("Training tokens")
        grid[0, 0].set_ylabel("Validation loss (nats/token)")
        grid[1, 0].set_ylabel(f"Loss less that of {RHO} = 1\n(nats/token)")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        where: dict[str, Any] = {"loc": "outside right center"}
        if len(names) == 1:
            where = {"loc": "outside lower center", "ncols": 4}
        figure.legend(handles, labels, title=RHO, **where)
        return figure


def _lines(axes: Axes, data: pd.DataFrame, shares: list[float]) -> None:
    colours = shades(len(shares))
    many = len(data) > POINTS
    for place, share in enumerate(shares):
        line = data[data["rho"] == share].sort_values("tokens")
        own = look(place) | {"color": colours[place], "markersize": 2.6, "linewidth": 0.9}
        axes.plot(line["tokens"], line["mean"], label=f"{share:g}", markevery=max(1, len(line) // 16), **own)
        band: dict[str, Any] = {"color": colours[place], "alpha": 0.15, "linewidth": 0, "rasterized": many}
        axes.fill_between(line["tokens"], line["low"], line["high"], **band)
