"""What every fit returns beside its own numbers: a status, the rows it rests on, and estimates that carry their
interval.
"""

from __future__ import annotations

import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.interval import at_own_level, ends, level
from analysis.status import Status

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


REFUTED = 0.01
"""Chance of so poor a fit of a true law, below which the status is `poor_fit`."""


LOOSE = 3.0
"""Standard error in widths of its interval, above which it says nothing; 0.26 is that of a normal
distribution at 95%.
"""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile interval and its standard error, in the unit of the value."""

    value: float
    low: float
    high: float
    se: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> Estimate:
        """From the point estimate and its resamples, shape [resamples]."""
        with np.errstate(invalid="ignore"):  # `Fit` gives a status to what is not finite
            low, high = np.quantile(draws, ends())
            size = (
                float(np.abs(draws).max()) or 1.0
            )  # squares of very large or small values would leave the range of numbers
            return cls(float(value), float(low), float(high), size * float(np.std(draws / size, ddof=1)))

    @property
    def identified(self) -> bool:
        """False where the standard error is far beyond both the value and the interval: a few resamples ran away."""
        return not (self.high > self.low and self.se > LOOSE * max(self.high - self.low, abs(self.value)))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


DIGITS = 7
"""Significant digits that are written, those of a loss in single precision. Fits converge to some five digits more, so
that what a processor rounds differently is not among them.
"""


def written(value: float) -> float:
    """A number to `DIGITS`; a count, and what is not finite, as it is.

    >>> written(1 / 3), written(123456789.0)
    (0.3333333, 123456789.0)
    """
    return value if not math.isfinite(value) or float(value).is_integer() else float(f"{value:.{DIGITS}g}")


def _written_matrix(matrix: tuple[tuple[float, ...], ...]) -> list[list[float]]:
    """A covariance to as many digits of the standard errors' product: what is smaller is rounding, also where it should
    be 0.
    """
    if not matrix:
        return []
    entries = np.array(matrix, float)
    size = np.sqrt(np.abs(np.diag(entries)))
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.outer(size, size))) - DIGITS)
        rounded = np.where((unit > 0) & np.isfinite(unit), np.round(entries / unit) * unit, entries)
    return (rounded + 0.0).tolist()  # -0 is 0


def plain(value: Any) -> Any:
    """Values that JSON knows: dataclasses become mappings of their public fields, tuples lists, a status its word; None
    is not finite.

    Numbers are those that are `written`.
    """
    if is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name)) for field in fields(value) if not field.name.startswith("_")
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return written(float(value)) if math.isfinite(value) else None
    return str(value) if isinstance(value, Status) else value


def with_doubt(status: Status, message: str, sentences: Iterable[str]) -> str:
    """The sentences, and what there is to doubt: last where the status is `converged`, before every number
    otherwise.
    """
    said = " ".join(sentences)
    if status is Status.CONVERGED:
        return f"{said} Caution: {message}".strip() if message else said
    return f"Status {status}: {message} {said}".strip()


@dataclass(frozen=True, kw_only=True)
class Fit(ABC):
    """What every fit has. Subclasses add their own numbers; poor data give a status, never an exception and never a
    bare number.
    """

    status: Status
    message: str
    """What the status means here and what to do about it; '' when there is nothing to doubt."""
    law: str
    rows: tuple[str, ...]
    """Trial ids (or index labels) used."""
    conventions: dict[str, Any]
    """Columns, units, the loss form, how intervals were made: what another reader needs to get the same numbers."""
    parameters: dict[str, Estimate] = field(default_factory=dict)
    """Of the law, by name; empty where none could be fitted."""
    covariance: tuple[tuple[float, ...], ...] = ()
    """Of the parameters, in their order."""
    objective: float | None = None
    """What was minimised, at the minimum; `conventions` says what it is."""
    _level: float = field(default_factory=level, repr=False, compare=False)
    """Of all intervals, those still to be made too; `conventions` says it."""

    def __init_subclass__(cls, **options: Any) -> None:
        """What a fit predicts, says and draws has intervals of the level that it was made at, not of the level in use
        by then.
        """
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(cls, name, at_own_level(method))
            elif isinstance(method, property) and method.fget:
                setattr(cls, name, property(at_own_level(method.fget), doc=method.__doc__))

    def __post_init__(self) -> None:
        """A number that is not finite is no answer, whatever led to it."""
        wrong = [name for name, each in self.parameters.items() if not all(map(math.isfinite, asdict(each).values()))]
        if wrong and self.status is not Status.NOT_FINITE:
            message = (
                f"{', '.join(wrong)} left the range of numbers: give sizes and losses in other units. {self.message}"
            )
            object.__setattr__(self, "status", Status.NOT_FINITE)
            object.__setattr__(self, "message", message.strip())
        loose = [name for name, each in self.parameters.items() if not each.identified]
        words = (
            f"not identified: {', '.join(loose)}, whose error a few resamples make: quote the interval, or train at "
            "more sizes."
        )
        if loose and not wrong and words not in self.message:
            object.__setattr__(self, "message", f"{self.message} {words}".strip())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: law, status, parameters, objective, rows and conventions first, then
        everything else.
        """
        head = ("law", "status", "message", "parameters", "covariance", "objective", "rows", "conventions")
        names = [each.name for each in fields(self) if not each.name.startswith("_")]
        record = {name: getattr(self, name) for name in (*head, *(name for name in names if name not in head))}
        return plain(record | {"covariance": _written_matrix(self.covariance)})

    def to_json(self) -> str:
        """`to_dict` as JSON, NaN-free."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @abstractmethod
    def summary(self) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them."""

    @abstractmethod
    def drawn(self) -> pd.DataFrame:
        """The table of exactly what `plot` draws. Without a law it holds the runs alone, is empty, or is refused by an
        `AnalysisError`.
        """

    @abstractmethod
    def plot(self, ax: Axes) -> None:
        """Draw `drawn` into the axes: the runs, the law with its band and what was found. The drawing itself is in
        `analysis/figures`.
        """
