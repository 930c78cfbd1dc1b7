"""Predicted against measured loss, and below it what is left over: for every fit that has `residuals()`."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, GREY, ONE_COLUMN, new_figure, style


def agreement_data(residuals: pd.DataFrame) -> pd.DataFrame:
    """What `agreement_figure` draws -> row, measured, predicted, low, high (the law's 95% band), residual (percent of
    the prediction).
    """
    table = residuals[["row", "measured", "predicted", "low", "high"]]
    return table.assign(residual=100 * (table["measured"] / table["predicted"] - 1))


def agreement_figure(data: pd.DataFrame, loss: str) -> Figure:
    """Both panels on one axis of predicted loss.

    Args:
        data: `agreement_data`.
        loss: what the loss is called, with its unit.
    """
    with style():
        figure = new_figure(ONE_COLUMN, 3.9)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        draw_agreement(top, data, loss)
        bottom.plot(
            data["predicted"], data["residual"], "o", markersize=2.4, color=COLOURS[0], alpha=0.7, markeredgewidth=0
        )
        bottom.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        bottom.set_ylabel("Left over (%)")
        bottom.set_xlabel(f"Predicted {loss}")
        return figure


def draw_agreement(ax: Axes, data: pd.DataFrame, loss: str) -> None:
    """The upper panel alone."""
    ends = [data[["predicted", "measured"]].min().min(), data[["predicted", "measured"]].max().max()]
    ax.plot(ends, ends, color=GREY, linewidth=0.6, zorder=0)
    errors = [data["predicted"] - data["low"], data["high"] - data["predicted"]]
    ax.errorbar(
        *(data["predicted"], data["measured"]),
        xerr=errors,
        fmt="o",
        markersize=2.4,
        color=COLOURS[0],
        alpha=0.7,
        elinewidth=0.6,
        capsize=0,
    )
    ax.set_ylabel(f"Measured {loss}")
