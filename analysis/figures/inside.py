"""What probes found inside kept models: predictions by layer, likeness of layers, depth, gates, suppression and use.

Seeds stay visible: as a band from least to most, or as points. Shares keep their look in all figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import GREY, LIGHT, MAP, TWO_COLUMNS, look, new_figure, panels, style
from analysis.table import RHO

DENSE = "dense"
DENSE_LOOK: dict[str, Any] = {"color": GREY, "marker": "x", "linestyle": ":"}


def looks(shares: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each share; the dense control is grey."""
    return {share: DENSE_LOOK if share == DENSE else look(place) for place, share in enumerate(shares)}


def named(share: str) -> str:
    return share if share == DENSE else f"{RHO} = {share}"


def lens_figure(data: pd.DataFrame) -> Figure:
    """Left: KL against depth. Right: area under the curve less that of the reference, share by share.

    Args:
        data: part (`curve`, `area`), share, layer, seeds, mean, low, high, least, most.
    """
    with style():
        figure = new_figure(TWO_COLUMNS, 2.7)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        curves, areas = (data[data["part"] == part] for part in ("curve", "area"))
        own = looks(list(dict.fromkeys(curves["share"])))
        for share, line in curves.groupby("share", sort=False):
            left.fill_between(
                line["layer"], line["least"], line["most"], alpha=0.18, linewidth=0, color=own[share]["color"]
            )
            left.plot(line["layer"], line["mean"], label=named(str(share)), **own[share])
        left.set(xlabel="Layer (0: before the first block)", ylabel="KL(final || layer), nats/token")
        left.set_ylim(bottom=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.legend()
        if len(areas):
            _whiskers(right, areas, own, "Area less that of the reference\n(nats/token)")
        else:
            right.set_visible(False)
        return figure


def _whiskers(axes: Axes, data: pd.DataFrame, own: dict[str, dict[str, Any]], label: str) -> None:
    """A point a share with the interval over seeds, and its seeds as small marks."""
    axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
    for place, (_, row) in enumerate(data.iterrows()):
        mark = own.get(row["share"], {"color": "black", "marker": "o"}) | {"linestyle": ""}
        if np.isfinite(row["low"]):
            reach = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            axes.errorbar([place], [row["mean"]], reach, elinewidth=0.8, **mark)
        else:
            axes.plot([place], [row["mean"]], **mark)
        axes.plot(
            [place + 0.18] * 2, [row["least"], row["most"]], color="black", marker="_", linestyle="", markersize=5
        )
    axes.set_xticks(
        range(len(data)),
        [named(str(share)) if share != "seeds" else "other seed\nof the reference" for share in data["share"]],
    )
    axes.set_xlim(-0.6, len(data) - 0.4)
    axes.set_ylabel(label)


def cka_figure(data: pd.DataFrame) -> Figure:
    """A heat map a pair and set of positions, with contours.

    Args:
        data: row, column (titles of the panels), first_layer, second_layer, cka.
    """
    rows, columns = (list(dict.fromkeys(data[name])) for name in ("row", "column"))
    with style():
        figure = new_figure(TWO_COLUMNS, 0.6 + ((TWO_COLUMNS - 1.3) / len(columns) + 0.15) * len(rows))
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        scale = Normalize(min(0.0, data["cka"].min()), max(1.0, data["cka"].max()))
        for (row, column), part in data.groupby(["row", "column"], sort=False):
            axes = grid[rows.index(row)][columns.index(column)]
            square = part.pivot(index="first_layer", columns="second_layer", values="cka")
            image = axes.imshow(square, origin="lower", cmap=MAP, norm=scale, aspect="equal")
            lines: dict[str, Any] = {"colors": "white", "linewidths": 0.8, "linestyles": [":", "--", "-"]}
            axes.contour(square.columns, square.index, square, levels=[0.5, 0.7, 0.9], **lines)
            if len(square) <= 8:
                for y, values in zip(square.index, square.to_numpy(), strict=True):
                    for x, value in zip(square.columns, values, strict=True):
                        ink = "black" if scale(value) > 0.6 else "white"
                        axes.text(x, y, f"{value:.2f}", fontsize=5, ha="center", va="center", color=ink)
            axes.spines[["top", "right"]].set_visible(True)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True))
            if row == rows[0]:
                axes.set_title(column)
            if row == rows[-1]:
                axes.set_xlabel("Layer of the other")
            if column == columns[0]:
                axes.set_ylabel(f"{row}\nlayer of the reference")
        figure.colorbar(image, ax=grid, label="CKA, unbiased", shrink=0.8, aspect=24, pad=0.02)
        return figure


def alignment_figure(data: pd.DataFrame) -> Figure:
    """How much deeper each layer stands in the reference than the reference's own other seeds do.

    Args:
        data: share, layer, seeds, mean, low, high, least, most.
    """
    with style():
        figure = new_figure(TWO_COLUMNS * 0.62, 2.7)
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        shares = list(dict.fromkeys(data["share"]))
        own = looks(["", *shares])  # the reference has the first look
        spread = np.linspace(-0.12, 0.12, len(shares)) if len(shares) > 1 else [0.0]
        for off, (share, line) in zip(spread, data.groupby("share", sort=False), strict=True):
            at = line["layer"] + off
            axes.plot(at, line["mean"], label=named(str(share)), **own[share])
            for end in ("least", "most"):
                axes.plot(at, line[end], color=own[share]["color"], marker="_", linestyle="", markersize=6)
        axes.set(
            xlabel="Layer of the other model", ylabel="Soft alignment index less its null\n(layers of the reference)"
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure


def frequency_figure(data: pd.DataFrame) -> Figure:
    """Gates, or what suppression costs, against how often the n-gram occurs in training: a row of panels an order, a
    column a kind.

    Args:
        data: order, column (title), series, share, bin, mean, low, high, least, most, label (of y).
    """
    orders, columns = sorted(set(data["order"])), list(dict.fromkeys(data["column"]))
    bins = list(dict.fromkeys(data.sort_values("place")["bin"]))
    with style():
        figure, drawn = panels(len(orders) * len(columns), len(columns), 0.75, 1.75, sharex=True, sharey="row")
        names = list(dict.fromkeys(data["series"]))
        own = {name: look(place) for place, name in enumerate(names)}
        used: dict[str, Any] = {}
        for place, axes in enumerate(drawn):
            order, column = orders[place // len(columns)], columns[place % len(columns)]
            panel = data[(data["order"] == order) & (data["column"] == column)]
            axes.axhline(0, color=LIGHT, linewidth=0.6, zorder=0)
            for name, line in panel.groupby("series", sort=False):
                x = [bins.index(each) for each in line["bin"]]
                axes.fill_between(x, line["least"], line["most"], color=own[name]["color"], alpha=0.18, linewidth=0)
                (used[str(name)],) = axes.plot(x, line["mean"], **own[name])
            axes.set_xticks(range(len(bins)), bins, rotation=30)
            if place < len(columns):
                axes.set_title(column)
            if place % len(columns) == 0:
                axes.set_ylabel(f"{order}-grams\n{data['label'].iloc[0]}")
            if place // len(columns) == len(orders) - 1:
                axes.set_xlabel("Occurrences in the training text")
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=min(4, len(used)))
        return figure


def usage_figure(data: pd.DataFrame) -> Figure:
    """Left: how even the load is. Right: n-grams that share a row, against chance.

    Args:
        data: part (`even`, `shared`), series, layer, value, random.
    """
    with style():
        figure = new_figure(TWO_COLUMNS, 2.6)
        left, right = figure.subplots(1, 2)
        names = list(dict.fromkeys(data["series"]))
        for place, name in enumerate(names):
            own = look(place) | {"linestyle": "", "label": name}
            even, shared = (data[(data["series"] == name) & (data["part"] == part)] for part in ("even", "shared"))
            off = 0.5 * (place / max(1, len(names) - 1) - 0.5)
            left.plot(even["layer"] + off, even["value"], **own)
            right.plot(shared["random"], shared["value"], **own)
        left.set(xlabel="Layer (0: before the first block)", ylabel="Evenness of the load")
        left.set_ylim(top=1.02)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        if (data["part"] == "shared").any():
            low = float(data[data["part"] == "shared"][["value", "random"]].min().min())
            right.plot([low, 1], [low, 1], color=GREY, linewidth=0.6, zorder=0)
            right.set(xlabel="Share of n-grams that share a row, at random", ylabel="The same, as hashed")
        else:
            right.set_visible(False)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(names)))
        return figure
