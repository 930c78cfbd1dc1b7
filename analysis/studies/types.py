"""What every kind of study gives to the report: records of its fits, readings, figures, tables and caveats.

One class a kind (`analysis/studies/<kind>.py`), named in the registry (`analysis/studies/__init__.py`). It gets a
`Results` and only computes; `report` is what reads and writes files. A study in progress has a report too: nothing here
may fail for want of finished trials.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.cells import Cell, split_cells
from analysis.errors import AnalysisError
from analysis.fits.noise import seed_model
from analysis.fits.types import Fit, written
from analysis.results import Results
from analysis.status import Status
from analysis.table import TPP

F = TypeVar("F", bound=Fit)


@dataclass(frozen=True)
class Reading:
    """What one fit says, in sentences."""

    label: str
    """Names the part of the study; '' where it is the only one."""
    sentences: str
    sure: bool
    """Whether the fit's numbers may be quoted (`Status.CONVERGED`); the page marks the others."""

    @classmethod
    def of(cls, label: str, fit: Any, *words: Any) -> Reading:
        """What a fit, or a part of one, says; `words` are for its `summary`."""
        return cls(label, fit.summary(*words), fit.status is Status.CONVERGED)


@dataclass(frozen=True)
class Drawing:
    """A figure with the table of exactly what it shows; saved as figures/NAME.svg, .png and .csv."""

    name: str
    caption: str
    draw: Callable[[pd.DataFrame], Figure]
    data: pd.DataFrame
    """To the digits that are written (`fits.types.written`), also for the figure: so both are the same on every
    processor.
    """
    figure: Figure = field(init=False)

    def __post_init__(self) -> None:
        numbers = {name: column.map(written) for name, column in self.data.items() if column.dtype == float}
        object.__setattr__(self, "data", self.data.assign(**numbers))
        object.__setattr__(self, "figure", self.draw(self.data))

    @classmethod
    def of_any(
        cls, name: str, caption: str, draw: Callable[[pd.DataFrame], Figure], data: pd.DataFrame
    ) -> list[Drawing]:
        """The figure, where there is anything to draw."""
        return [] if data.empty else [cls(name, caption, draw, data)]


@dataclass(frozen=True)
class Table:
    """A table of the page; every cell is text."""

    rows: pd.DataFrame
    title: str = ""
    header: bool = True
    """Without it the two columns are facts: name and value."""
    wide: bool = False
    """Takes the whole width of the page; others stand side by side where there is room."""


@dataclass(frozen=True)
class Section:
    """Tables under a heading, with a note above them."""

    heading: str
    tables: tuple[Table, ...]
    note: str = ""


@dataclass(frozen=True)
class Analysis(ABC):
    """One kind of study. Subclasses say what they compare and fill in the methods; `fits` refuses results that are not
    of the kind.
    """

    results: Results

    point: ClassVar[str] = "share"
    """What the study compares, as a noun of its caveats and tables."""
    terms: ClassVar[str] = ""
    """Explains under the readings the words that they use."""

    @property
    def axis(self) -> tuple[str, ...]:
        """Columns of `trials.csv` that tell one point from another."""
        return ("rho",)

    @cached_property
    def cells(self) -> list[Cell]:
        """What the study varies beside its points, each apart; refuses results that are not of this kind."""
        return split_cells(self.results.trials, self.axis)

    def check(self) -> None:
        """Refuse trials, planned or finished, that are not of this kind.

        Raises:
            AnalysisError: the trials do not hold what this kind of study needs.
        """
        _ = self.cells

    def foresee(self) -> list[str]:
        """What can be said of planned trials before they are trained: what the report will not be able to tell."""
        return []

    def noise(self) -> list[dict[str, Any]]:
        """Noise of one run, the effect of its seed off -> label, tokens, paired_sd (nats per token) and df of each cell
        that has any.
        """
        found, axis = [], list(self.axis)
        for cell in split_cells(self.results.trials, axis):
            runs = cell.trials.dropna(subset=axis)
            if len(runs):
                point_N = np.unique(runs[axis].to_numpy(float).round(9), axis=0, return_inverse=True)[1].ravel()
                model = seed_model(point_N, runs["val_loss"].to_numpy(), runs["seed"].to_numpy())
                if model.df and model.sd > 0:
                    tokens = float(runs["tokens"].median())
                    found.append({"label": cell.label, "tokens": tokens, "paired_sd": model.sd, "df": model.df})
        return found

    @abstractmethod
    def fits(self) -> list[dict[str, Any]]:
        """Records for fits.json: plain values, each with a `status`.

        Raises:
            AnalysisError: the results do not hold what this kind of study needs.
        """

    @abstractmethod
    def readings(self) -> list[Reading]:
        """What the fits say, one reading each."""

    @abstractmethod
    def drawings(self) -> list[Drawing]:
        """The figures that the finished trials allow."""

    @abstractmethod
    def sections(self) -> list[Section]:
        """Tables of the page's part "Fits"."""

    def remarks(self) -> list[str]:
        """Sentences that no single reading can say."""
        return []

    def caveats(self) -> list[str]:
        """What this kind of study cannot tell, beyond what `prose.caveats` says of all of them."""
        return []

    def require(self, holds: bool, problem: str, remedy: str) -> None:
        """Refuse results that are not of this kind.

        Raises:
            AnalysisError: naming the folder, the problem and the remedy.
        """
        if not holds:
            raise AnalysisError(f"{self.results.folder}: {problem}; {remedy}")


class CellAnalysis(Analysis, Generic[F]):
    """A kind of study that fits one law to each cell."""

    @abstractmethod
    def fit(self, cell: Cell) -> F:
        """The law of one cell."""

    @cached_property
    def fitted(self) -> list[tuple[Cell, F]]:
        """Every cell with its fit."""
        return [(cell, self.fit(cell)) for cell in self.cells]

    def fits(self) -> list[dict[str, Any]]:
        return [self.record(cell, fit.to_dict()) for cell, fit in self.fitted]

    def readings(self) -> list[Reading]:
        return [Reading.of(cell.label, fit) for cell, fit in self.fitted]

    def record(self, cell: Cell, fit: dict[str, Any]) -> dict[str, Any]:
        """What fits.json says beside the fit's own numbers: the cell, and how learning rates were chosen."""
        if len(cell.rates):
            chosen = f"chosen per {self.point}: least mean validation loss over the seeds that its rates share"
            fit = fit | {
                "conventions": fit["conventions"] | {"learning_rate": chosen},
                "learning_rates": json.loads(cell.rates.to_json(orient="records")),
            }
        planned = cell.planned if len(cell.planned) else cell.dense
        return {"cell": cell.fields, TPP: float(planned[TPP].median()) if TPP in planned else None, **fit}
