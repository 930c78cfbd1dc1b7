"""The best share, and what it gains over pure experts, against the sparsity P_tot/P_act."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.allocation import PUBLISHED as ENGRAM
from analysis.figures.style import GREY, MARKERS, ONE_COLUMN, look, new_figure, style, ticks_at, two_digits
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
            for axes, quantity in ((top, "optimum"), (bottom, "gain")):
                _series(axes, group.dropna(subset=quantity), quantity, look(place))
            used[name or "fitted curve, 95% interval"] = Line2D([], [], **look(place) | {"linestyle": "-"})
        if (data["status"] != Status.CONVERGED).any():
            white: dict[str, Any] = {"color": GREY, "marker": MARKERS[0], "linestyle": "", "markerfacecolor": "white"}
            used["in doubt or at an end"] = Line2D([], [], **white)
        used |= _published(top, bottom, data["sparsity"])
        top.set_ylim(-0.05, 1.05)
        top.set_ylabel(f"Best share of routed experts, {RHO}")
        bottom.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        bottom.set_ylabel(f"Gain over {RHO} = 1 (nats/token)")
        bottom.set(xlabel="Sparsity, P_tot / P_act", xscale="log")
        ticks_at(bottom.xaxis, data["sparsity"], two_digits)
        bottom.set_xlim(data["sparsity"].min() / 1.15, data["sparsity"].max() * 1.15)
        below: dict[str, Any] = {"loc": "outside lower center", "ncols": 1 if len(used) < 5 else 2}
        figure.legend(used.values(), used.keys(), handlelength=1.8, **below)
        return figure


def _series(axes: Axes, data: pd.DataFrame, quantity: str, look: dict[str, Any]) -> None:
    x, y = data["sparsity"], data[quantity]
    # An end that wins may lie outside its interval.
    errors = np.abs(np.stack([y - data[f"{quantity}_low"], data[f"{quantity}_high"] - y]))
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
