"""IsoFLOP profiles with their optima, and how the optimal size grows with the budget."""

from __future__ import annotations

from matplotlib.figure import Figure

from analysis.figures.style import TWO_COLUMNS, new_figure, style
from analysis.fits.isoflop import IsoflopFit


def isoflop_figure(fit: IsoflopFit) -> Figure:
    """Two panels: what `IsoflopFit.plot` and `LogLogFit.plot` draw."""
    with style():
        figure = new_figure(TWO_COLUMNS, 2.7)
        left, right = figure.subplots(1, 2)
        fit.plot(left)
        if fit.line and fit.line.parameters:
            fit.line.plot(right)
        else:
            right.set_visible(False)
        return figure
