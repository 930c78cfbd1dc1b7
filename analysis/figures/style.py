"""The one look of all figures, and how they are saved. It must not know what a figure shows.

Fonts are the DejaVu that comes with matplotlib, text is drawn as outlines, ids are hashed from a fixed salt and no date
is written: the same table gives the same bytes. Colours are Okabe and Ito's, safe for colour-blind readers; marker and
line style repeat what colour says, for print in grey.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from analysis.table import si
from sparsemem.files import write_atomically, write_text

ONE_COLUMN, TWO_COLUMNS = 3.35, 6.9  # inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
GREY, LIGHT = "0.45", "0.88"
MAP = "viridis"
"""Of surfaces, and of lines in an order (`shades`); it darkens evenly, so it holds in grey too."""

HATCHED: dict[str, Any] = {"facecolor": "none", "edgecolor": "0.6", "hatch": "/////", "linewidth": 0}
"""A range from the literature."""

_SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "errorbar.capsize": 1.5,
    "mathtext.fontset": "dejavusans",
    "svg.fonttype": "path",
    "svg.hashsalt": "sparsemem",
    "savefig.dpi": 300,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults plus ours, whatever the user's settings are; those are back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # type: ignore[arg-type]
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, on the file-only canvas."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, data: pd.DataFrame, folder: Path, name: str) -> None:
    """Write NAME.svg, NAME.png and NAME.csv, the last with exactly what is drawn."""
    with style():
        if engine := figure.get_layout_engine():  # once, so that both show the same
            engine.execute(figure)
            figure.set_layout_engine("none")
        for suffix in (".svg", ".png"):
            write_figure(figure, folder / f"{name}{suffix}")
    write_text(folder / f"{name}.csv", data.to_csv(index=False, lineterminator="\n"))


def write_figure(figure: Figure, path: Path) -> None:
    """Write .svg or .png, without a date."""
    kind = path.suffix[1:].lower()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    write_atomically(path, lambda file: figure.savefig(file, format=kind, metadata=metadata))


def share_axis(axes: Axes, low: float, high: float, label: str) -> None:
    """Name the share axis and leave the ends some air."""
    axes.set_xlabel(label)
    air = 0.03 * (high - low) or 0.05
    axes.set_xlim(low - air, high + air)


def shades(count: int) -> Any:
    """Colours of lines in an order, from light to dark; the lightest still stands out from white -> [count, 4]."""
    return matplotlib.colormaps[MAP](np.linspace(0.78, 0, count))


def look(place: int) -> dict[str, Any]:
    """Colour, marker and line of one of several series that are drawn together."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": LINES[place % len(LINES)],
    }


def panels(count: int, columns: int, head: float, each: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels in rows of `columns`, without those that the last row does not need.

    Args:
        head: height of the figure without its rows, inches.
        each: height of a row.
    """
    rows = -(-count // columns)
    figure = new_figure(ONE_COLUMN if columns == 1 else TWO_COLUMNS, head + each * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flat
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, list(axes[:count])


def reach(data: pd.DataFrame, quantity: str = "value") -> list[pd.Series]:
    """How far `low` and `high` are from a quantity: what `errorbar` takes."""
    return [data[quantity] - data["low"], data["high"] - data[quantity]]


def two_digits(value: float) -> str:
    """A tick's number, such as 4, 240 or 34k.

    >>> two_digits(3.992), two_digits(239.6), two_digits(34_064)
    ('4', '240', '34k')
    """
    return si(float(f"{value:.2g}"))


def ticks_at(axis: Axis, values: Iterable[float], form: Callable[[float], str]) -> None:
    """Ticks at what was sampled, and nowhere else."""
    values = sorted(set(values))
    axis.set_ticks(values, [form(value) for value in values])
    axis.set_minor_locator(NullLocator())


def count_axis(axes: Axes) -> None:
    """Ticks such as 500k and 2M along x."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value) if value else "0"))
