"""A loss surface over parameters and tokens: isolines, the runs, and the path of compute-optimal models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.style import COLOURS
from analysis.fits.interval import percent

if TYPE_CHECKING:
    from analysis.fits.surface import SurfaceFit

STEPS = 61


def surface_data(fit: SurfaceFit) -> pd.DataFrame:
    """What `draw_surface` draws -> series, params, tokens, loss, low, high.

    Series: `run` (measured loss), `surface` (a grid of the law, at the median total parameters where those have a term), `optimal` (the
    compute-optimal model of rising budgets, where there is one; its tokens have the 95% interval in low and high).
    """
    runs = fit.residuals()
    params, tokens, *total = (runs[column] for column in fit.columns)
    ends = [(x.min() / 1.5, x.max() * 1.5) for x in (params, tokens)]
    n, d = (axis.ravel() for axis in np.meshgrid(*(np.geomspace(*end, STEPS) for end in ends)))
    grid = fit.predict(n, d, *(x.median() for x in total))["loss"]
    tables = [
        pd.DataFrame({"series": "run", "params": params, "tokens": tokens, "loss": runs["measured"]}),
        pd.DataFrame({"series": "surface", "params": n, "tokens": d, "loss": grid}),
    ]
    if fit.n_exponent:
        path = fit.optimal(6 * np.geomspace(ends[0][0] * ends[1][0], ends[0][1] * ends[1][1], 121))
        path = path[path["params"].between(*ends[0]) & path["tokens"].between(*ends[1])].assign(series="optimal")
        tables.append(path.rename(columns={"tokens_low": "low", "tokens_high": "high"}))
    return pd.concat(tables, ignore_index=True).reindex(columns=["series", "params", "tokens", "loss", "low", "high"])


def draw_surface(ax: Axes, data: pd.DataFrame, labels: tuple[str, str], loss: str) -> None:
    """Draw the table; the runs are filled with the colour of their own loss, so a run off the law stands out from its surroundings.

    Args:
        labels: of parameters and tokens.
        loss: what the loss is called.
    """
    series = {str(name): group for name, group in data.groupby("series")}
    grid, runs = series["surface"], series["run"]
    x, y, z = (grid[name].to_numpy().reshape(STEPS, STEPS) for name in ("params", "tokens", "loss"))
    scale = Normalize(z.min(), z.max())
    low, high = z.min(), z.max()
    levels = low + (high - low) * np.linspace(0, 1, 14)[1:-1] ** 1.7  # closer where the surface is flat
    look: dict[str, Any] = {"cmap": "viridis_r", "norm": scale}
    ax.set(xscale="log", yscale="log", xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
    written = ax.clabel(ax.contour(x, y, z, levels=levels, linewidths=0.8, **look), levels[:-1:2], fmt="%.2f", fontsize=6)
    for text in written:
        text.set(zorder=4, color="black", bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4})
    ax.scatter(runs["params"], runs["tokens"], c=runs["loss"], s=9, edgecolors="black", linewidths=0.35, zorder=3, **look)
    used: dict[str, Any] = {
        f"run, coloured by {loss}": Line2D(
            [], [], marker="o", linestyle="", markerfacecolor="0.7", markeredgecolor="black", markersize=3.5
        ),
        f"{loss} of the law": Line2D([], [], color="0.4", linewidth=0.8),
    }
    if "optimal" in series:
        path = series["optimal"]
        ax.fill_between(path["params"], path["low"], path["high"], color=COLOURS[1], alpha=0.18, linewidth=0)
        ax.plot(path["params"], path["tokens"], color=COLOURS[1], linewidth=1.6)
        used["compute-optimal"] = Line2D([], [], color=COLOURS[1], linewidth=1.6)
        used[f"its {percent()} band"] = Patch(color=COLOURS[1], alpha=0.18, linewidth=0)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.legend(used.values(), used.keys(), loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
