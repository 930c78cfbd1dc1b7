"""The fitted loss over the mixes of three pools, as a ternary plot: every point of the triangle is a mix, every corner
one pool alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

from analysis.figures.style import COLOURS, GREY, panels, style
from analysis.status import Status
from sparsemem.mechanisms import label

Array = np.ndarray
HEIGHT = np.sqrt(3) / 2
CORNERS = np.array([[0.5, HEIGHT], [0.0, 0.0], [1.0, 0.0]])  # of the first, second and third pool
FOUND = COLOURS[1]
TICKS = (0.2, 0.4, 0.6, 0.8)
SIGN: dict[str, Any] = {"linestyle": "", "markeredgecolor": "black"}


def draw_fit(axes: Axes, data: pd.DataFrame) -> None:
    """`SimplexFit.drawn`: the trained mixes, the surface, what is tied with its best and the best itself."""
    _triangle(axes, data, off=1)


def simplex_figure(data: pd.DataFrame) -> Figure:
    """One triangle a cell, each with its own colours: cells differ by far more than a surface is deep."""
    cells = data.groupby("cell", sort=False)
    with style():
        figure, drawn = panels(len(cells), min(len(cells), 2), 0.45, 3.3)
        used: dict[str, Line2D] = {}
        for axes, (name, cell) in zip(drawn, cells, strict=True):
            used |= _triangle(axes, cell, off=1.25)
            axes.set_title(str(name), pad=20)
        figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=2)
        return figure


def to_plane(mixes_X3: Array) -> Array:
    """Shares of the three pools -> where they are drawn, [X, 2]; sides have length 1."""
    return np.asarray(mixes_X3, float) @ CORNERS


def _triangle(axes: Axes, data: pd.DataFrame, off: float) -> dict[str, Line2D]:
    """Draw one cell; returns the legend's entries.

    Args:
        off: how far from the sides the text stands; more where the triangle is small.
    """
    names = [name for name in data.columns if name.startswith("share_")]
    series = {str(name): group for name, group in data.groupby("series")}
    at = {name: to_plane(group[names].to_numpy()) for name, group in series.items()}
    shown = pd.concat([series["mean"]["loss"], series.get("surface", series["mean"])["loss"]])
    levels = MaxNLocator(12).tick_values(shown.min(), shown.max())
    colours: dict[str, Any] = {"cmap": "viridis_r", "norm": Normalize(levels[0], levels[-1])}
    used: dict[str, Line2D] = {}
    if "surface" in series:
        lattice = Triangulation(*at["surface"].T)
        axes.tricontourf(lattice, series["surface"]["loss"], levels=levels, **colours)
        axes.tricontour(lattice, series["surface"]["loss"], levels=levels, colors="black", linewidths=0.3, alpha=0.5)
    _frame(axes, [label(name.removeprefix("share_")) for name in names], off)
    x, y = at["mean"].T
    axes.scatter(x, y, s=34, color="white", zorder=3, clip_on=False)
    circles: dict[str, Any] = {"s": 22, "edgecolors": "black", "linewidths": 0.6, "zorder": 3, "clip_on": False}
    points = axes.scatter(x, y, c=series["mean"]["loss"], **circles, **colours)
    ring: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markerfacecolor": "0.8", "markeredgewidth": 0.6}
    used["mean of a trained mix"] = Line2D([], [], **SIGN, **ring)
    if "surface" in series:
        tie = series["tie"]["tie"].clip(upper=3)
        if tie.min() < 1 < tie.max():
            # Cased in white, to be seen on any colour and on a side of the triangle.
            line: dict[str, Any] = {"colors": FOUND, "linewidths": 1.3, "zorder": 2.5}
            outline = axes.tricontour(Triangulation(*at["tie"].T), tie, levels=[1], **line)
            outline.set(path_effects=[Stroke(linewidth=2.6, foreground="white"), Normal()], clip_on=False)
            used["tied with the best mix"] = Line2D([], [], color=FOUND, linewidth=1.3)
        if "two" in series:
            two: dict[str, Any] = {"color": "white", "marker": "D", "markersize": 3.6, "markeredgewidth": 0.7}
            axes.plot(*at["two"].T, zorder=4, clip_on=False, **SIGN, **two)
            used["best mix of two pools"] = Line2D([], [], **SIGN, **two)
        status = data["status"].iloc[0]
        star: dict[str, Any] = {"marker": "*", "markersize": 11, "markeredgewidth": 0.8}
        star["color"] = FOUND if status == Status.CONVERGED else "white"
        axes.plot(*at["best"].T, zorder=5, clip_on=False, **SIGN, **star)
        doubt = "" if status == Status.CONVERGED else f" ({status.replace('_', ' ')})"
        used[f"best mix{doubt}"] = Line2D([], [], **SIGN, **star)
    below: dict[str, Any] = {"location": "bottom", "shrink": 0.8, "aspect": 26, "pad": 0.05}
    bar = axes.figure.colorbar(points, ax=axes, ticks=MaxNLocator(5), **below)
    bar.set_label("Validation loss (nats/token)")
    return used


def _frame(axes: Axes, names: Sequence[str], off: float) -> None:
    """Sides, grid lines, ticks and names. Each pool's share is read on the side that ends in its corner, along that
    pool's grid lines.
    """
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, HEIGHT)
    axes.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", linewidth=0.8, zorder=2, clip_on=False)
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    looks: tuple[tuple[dict[str, Any], str, float], ...] = (  # of each pool: its ticks, its title, the rotation of that
        ({"rotation": 0, "ha": "left", "va": "center"}, f"{left} {names[0]}", -60),
        ({"rotation": -60, "ha": "right", "va": "bottom"}, f"{left} {names[1]}", 60),
        ({"rotation": 60, "ha": "right", "va": "top"}, f"{names[2]} {right}", 0),
    )
    for k, (ticks, title, rotation) in enumerate(looks):
        # Read along the side that comes from `start`; the lines run to the side of `end`.
        start, end = CORNERS[k - 1], CORNERS[(k + 1) % 3]
        outward = (start - end) * 0.02 * off
        for share in TICKS:
            on_side, across = (share * CORNERS[k] + (1 - share) * corner for corner in (start, end))
            axes.plot(*np.stack([on_side, across]).T, color=GREY, linewidth=0.3, linestyle=":", zorder=1.5)
            axes.plot(*np.stack([on_side, on_side + outward]).T, color="black", linewidth=0.6, clip_on=False)
            x, y = on_side + 1.6 * outward
            axes.text(x, y, f"{share:g}", fontsize=6.5, rotation_mode="anchor", **ticks)
        along = CORNERS[k] - start
        x, y = start + along / 2 + 0.12 * off * np.array([along[1], -along[0]])
        centred: dict[str, Any] = {"fontsize": 7.5, "ha": "center"}
        axes.text(x, y, title, va="center", rotation=rotation, **centred)
        x, y = CORNERS[k] + [0, off * (-0.045 if k else 0.035)]
        axes.text(x, y, names[k], weight="bold", va="top" if k else "bottom", **centred)
