"""The fit of a loss against positive sizes, whichever its law: predictions with a band, residuals, sentences.

Letters: T sizes, B resamples, X points.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.points import Points
from analysis.fits.scatter import around
from analysis.fits.types import Fit, banded, with_doubt

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class SizesFit(Fit):
    """Intervals are percentile intervals over resampled runs; losses are in the unit of their column."""

    EXPERTS: ClassVar[int | None] = None
    """Place among `columns` of the number of routed experts, of which a dense model has one."""

    columns: tuple[str, ...]
    """Of the sizes, in the order of the law."""
    scatter: float | None = None
    """Root mean square of log loss (natural) around the law."""
    _points: Points | None = field(default=None, repr=False, compare=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        """`columns`, all positive."""
        return self.columns

    @abstractmethod
    def _losses(self, x_TX: Array) -> Array:
        """Loss of the law in row 0 and of the resamples' laws -> [B, X]."""

    @abstractmethod
    def _found(self) -> str:
        """What the parameters say, in a sentence."""

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        x_TX = places.to_numpy(float).T
        if self.EXPERTS is not None and not (x_TX[self.EXPERTS] >= 1).all():
            raise AnalysisError("predict: sizes must be positive and experts at least 1")
        if not (x_TX > 0).all():
            raise AnalysisError("predict: sizes must be positive")
        return banded(self._losses(x_TX))

    def residuals(self) -> pd.DataFrame:
        """Every run against the law -> row, the columns of the sizes, measured, predicted, low, high (the band of the
        law there).

        Raises:
            AnalysisError: no law was fitted.
        """
        points = self._points or Points(np.zeros((len(self.columns), 0)), np.zeros(0), np.zeros(0), ())
        table = self.predict(points.x_TN.T).rename(columns={"loss": "predicted"})
        table.insert(0, "row", points.rows)
        table.insert(len(self.columns) + 1, "measured", points.y_N)
        return table

    def summary(self) -> str:
        lines = []
        if self._points:  # fitted
            lines = [self._found(), around(self._points, self.residuals()["predicted"].to_numpy())]
        return with_doubt(self.status, self.message, lines)
