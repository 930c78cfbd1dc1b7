"""The straight line in logs, `log y = log_coefficient + exponent log x`, through points with or without errors of their
own.

Letters: N points, X points to predict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit  # scipy.stats would take a second to import

from analysis.errors import AnalysisError
from analysis.fits.points import read_points
from analysis.fits.runs import distinct
from analysis.fits.types import Estimate, Fit, with_doubt
from analysis.interval import ends, percent, takes_level
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, kw_only=True)
class LogLogFit(Fit):
    """`log y = log_coefficient + exponent log x`, natural logarithms. Intervals are Student's t at 95%."""

    columns: tuple[str, str]
    chi_square: float | None = None
    """Weighted sum of squares over its degrees of freedom: about 1 where the given errors explain the scatter; None
    without errors.
    """
    _center: float = field(default=0.0, repr=False, compare=False)
    """Weighted mean of log x, at which level and exponent are independent."""
    _table: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        """The column of x, positive; what is predicted is the column of y."""
        return self.columns[:1]

    def _predict(self, places: pd.DataFrame) -> dict[str, np.ndarray]:
        x_X = places.iloc[:, 0].to_numpy(float)
        if not (x_X > 0).all():
            raise AnalysisError(f"predict: `{self.columns[0]}` must be positive")
        design_X2 = np.stack([np.ones(len(x_X)), np.log(x_X)], axis=1)
        log_y_X = design_X2 @ [estimate.value for estimate in self.parameters.values()]
        off_X, (level, slope) = design_X2[:, 1] - self._center, self._variances()
        half_X = stdtrit(len(self.rows) - 2, ends()[1]) * np.sqrt(level + off_X**2 * slope)
        return {self.columns[1]: np.exp(log_y_X), "low": np.exp(log_y_X - half_X), "high": np.exp(log_y_X + half_X)}

    def _variances(self) -> tuple[float, float]:
        """Of the level at the centre and of the exponent."""
        slope = self.covariance[1][1]
        return max(0.0, self.covariance[0][0] - self._center**2 * slope), slope

    def summary(self) -> str:
        return with_doubt(self.status, self.message, [self.sentence()] if self.parameters else [])

    def sentence(self) -> str:
        """The exponent in words."""
        exponent = self.parameters["exponent"]
        interval = f"{percent()} interval {exponent.low:.4f} to {exponent.high:.4f}"
        return f"{self.columns[1]} grows as {self.columns[0]}^{exponent.value:.4f} ({interval})."

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> series (run, curve), group, x, loss (here y), low, high."""
        from analysis.figures.law import curves_of, runs_of

        x, y = self.columns
        x_X = np.geomspace(self._table[x].min(), self._table[x].max(), 31)
        runs = runs_of(self._table[x], self._table[y], low=self._table.get("low"), high=self._table.get("high"))
        return pd.concat([runs, curves_of(self.predict(x_X).rename(columns={y: "loss"}), x)], ignore_index=True)

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, data, *self.columns)
        ax.set_yscale("log")
        if np.ptp(np.log10(self._table[self.columns[1]])) > 2:
            ax.yaxis.set_minor_formatter("")


@takes_level
def fit_log_log(frame: pd.DataFrame, *, x: str, y: str, log_se: str | None = None) -> LogLogFit:
    """Weighted log-log regression of y on x.

    Args:
        frame: one point a row.
        x: column, positive.
        y: column, positive.
        log_se: column of the standard errors of log y (natural); weights are 1 / log_se^2. None: equal weights.

    Returns:
        A fit; where the points scatter by more than their errors explain, all errors are widened to explain it (Birge
        ratio).

    Raises:
        AnalysisError: a column is missing, holds text or what is not positive.

    >>> optima = pd.DataFrame({"flops": [1e18, 1e19, 1e20, 1e21], "params": [1e7, 3e7, 1e8, 3e8]})
    >>> fit_log_log(optima, x="flops", y="params").summary()
    'params grows as flops^0.4954 (95% interval 0.4676 to 0.5233).'
    """
    points = read_points(frame, (x, y, *([log_se] if log_se else [])), y, None, "fit_log_log")
    conventions = {
        "x": x,
        "y": y,
        "form": "log y = log_coefficient + exponent log x, natural logarithms",
        "objective": "weighted sum of squares of log y",
        "weights": f"1 / {log_se}^2" if log_se else "equal",
        "interval": f"{percent()}, Student's "
        f"t{'; errors widened where the points scatter more (Birge ratio)' if log_se else ''}",
    }
    common: dict[str, Any] = {"law": "log-log", "columns": (x, y), "rows": points.rows, "conventions": conventions}
    df = len(points.rows) - 2
    if df < 1 or distinct(points.x_TN[0]) < 2:
        message = points.with_left_out("a line with an interval needs at least 3 points at 2 places.")
        return LogLogFit(status=Status.TOO_FEW_POINTS, message=message, **common)
    log_x_N, log_y_N = np.log(points.x_TN[:2])
    w_N = 1 / points.x_TN[2] ** 2 if log_se else np.ones(df + 2)
    center = float(np.average(log_x_N, weights=w_N))
    off_N = log_x_N - center
    spread = w_N @ off_N**2
    level, exponent = np.average(log_y_N, weights=w_N), w_N @ (off_N * log_y_N) / spread
    squares = float(w_N @ (log_y_N - level - exponent * off_N) ** 2)
    scale = max(1.0, squares / df) if log_se else squares / df
    var_level, var_exponent = scale / w_N.sum(), scale / spread
    covariance = (
        (var_level + center**2 * var_exponent, -center * var_exponent),
        (-center * var_exponent, var_exponent),
    )
    table = pd.DataFrame({x: points.x_TN[0], y: points.x_TN[1]})
    if log_se:
        table["low"], table["high"] = (
            points.x_TN[1] * np.exp(sign * ndtri(ends()[1]) * points.x_TN[2]) for sign in (-1, 1)
        )
    return LogLogFit(
        status=Status.CONVERGED,
        message=points.left_out,
        parameters={
            "log_coefficient": _student(level - exponent * center, covariance[0][0], df),
            "exponent": _student(exponent, var_exponent, df),
        },
        covariance=tuple(tuple(map(float, row)) for row in covariance),
        objective=squares,
        chi_square=squares / df if log_se else None,
        _center=center,
        _table=table,
        **common,
    )


def _student(value: float, variance: float, df: int) -> Estimate:
    se = math.sqrt(max(variance, 0.0))
    half = float(stdtrit(df, ends()[1])) * se
    return Estimate(float(value), float(value - half), float(value + half), se)
