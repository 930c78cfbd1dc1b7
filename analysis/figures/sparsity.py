"""The best share, and what it gains over pure experts, against the sparsity P_tot/P_act."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from analysis.figures.allocation import PUBLISHED as ENGRAM
from analysis.figures.style import COLOURS, GREY, LINES, MARKERS, ONE_COLUMN, new_figure, style
from analysis.status import Status
from analysis.table import RHO

ENGRAM_SPARSITY = 10  # about, arXiv 2601.07372
LONGCAT = 20  # memory beats experts only past about this sparsity, arXiv 2601.21204


def sparsity_figure(data: pd.DataFrame) -> Figure:
    """Top: the best share. Bottom: its gain. Open markers: a curve whose optimum may not be quoted."""
    with style():
        figure = new_figure(ONE_COLUMN, 4.4)
        top, bottom = figure.subplots(2, 1, sharex=True)
        used: dict[str, Line2D] = {}
        for place, (name, group) in enumerate(data.groupby("series", sort=False)):
            look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            for axes, quantity in ((top, "optimum"), (bottom, "gain")):
                _series(axes, group.dropna(subset=quantity), quantity, look | {"linestyle": LINES[place % len(LINES)]})
            used[name or "fitted curve, 95% interval"] = Line2D([], [], **look)
        if (data["status"] != Status.CONVERGED).any():
            used["in doubt or at an end"] = Line2D(
                [], [], color=GREY, marker=MARKERS[0], linestyle="", markerfacecolor="white"
            )
        used |= _published(top, bottom, data["sparsity"])
        top.set_ylim(-0.05, 1.05)
        top.set_ylabel(f"Best share of routed experts, {RHO}")
        bottom.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        bottom.set_ylabel(f"Gain over {RHO} = 1 (nats/token)")
        bottom.set_xlabel("Sparsity, P_tot / P_act")
        bottom.set_xscale("log")
        sampled = sorted(data["sparsity"].unique())
        bottom.xaxis.set_major_locator(FixedLocator(sampled))
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xticks(sampled, [f"{value:.2g}" for value in sampled])
        bottom.set_xlim(sampled[0] / 1.15, sampled[-1] * 1.15)
        figure.legend(
            used.values(), used.keys(), loc="outside lower center", ncols=1 if len(used) < 5 else 2, handlelength=1.8
        )
        return figure


def _series(axes: Axes, data: pd.DataFrame, quantity: str, look: dict[str, Any]) -> None:
    x, y = data["sparsity"], data[quantity]
    errors = np.abs(
        np.stack([y - data[f"{quantity}_low"], data[f"{quantity}_high"] - y])
    )  # an end that wins may lie outside its interval
    axes.errorbar(x, y, errors, elinewidth=0.8, **look)
    doubt = data["status"] != Status.CONVERGED
    axes.plot(x[doubt], y[doubt], **look | {"linestyle": "", "markerfacecolor": "white", "zorder": 3})


def _published(top: Axes, bottom: Axes, sparsity: pd.Series) -> dict[str, Line2D]:
    used = {}
    if sparsity.min() <= ENGRAM_SPARSITY <= sparsity.max():
        bar: dict[str, Any] = {"color": "0.7", "linewidth": 5, "solid_capstyle": "butt"}
        top.plot([ENGRAM_SPARSITY] * 2, ENGRAM, zorder=0, **bar)
        used["published optimum (Engram)"] = Line2D([], [], **bar)
    if sparsity.min() <= LONGCAT <= sparsity.max():
        dotted: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 0.9}
        bottom.axvline(LONGCAT, zorder=0, **dotted)
        used["published threshold (LongCat)"] = Line2D([], [], **dotted)
    return used
