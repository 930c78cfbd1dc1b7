"""What every fit returns beside its own numbers: a status, the rows it rests on, and estimates that carry their
interval.
"""

from __future__ import annotations

import html
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import AnalysisError
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
    def of(cls, value_B: np.ndarray) -> Estimate:
        """From the point estimate, in row 0, and its resamples, shape [1 + resamples]."""
        draws = value_B[1:]
        with np.errstate(invalid="ignore"):  # `Fit` gives a status to what is not finite
            low, high = np.quantile(draws, ends())
            size = float(np.abs(draws).max()) or 1.0  # squares of very large or small values would leave the range
            return cls(float(value_B[0]), float(low), float(high), size * float(np.std(draws / size, ddof=1)))

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


def banded(value_BX: np.ndarray, name: str = "loss") -> dict[str, np.ndarray]:
    """What a law predicts, in row 0, with the pointwise band of its resamples -> `name`, low, high, each [X]."""
    low_X, high_X = np.quantile(value_BX[1:], ends(), axis=0)
    return {name: value_BX[0], "low": low_X, "high": high_X}


def noise_of_a_run(sd: float | None) -> list[str]:
    """The noise of a run in a sentence; none where it is not measured."""
    said = f"Noise of one run once its seed's common effect is off: {sd:.4f} nats/token (sd)." if sd is not None else ""
    return [said] if said else []


def with_doubt(status: Status, message: str, sentences: Iterable[str]) -> str:
    """The sentences, and before them what there is to doubt."""
    doubt = f"Caution: {message}" if message else ""
    if status is not Status.CONVERGED:
        doubt = f"Status {status}: {message}"
    return " ".join([doubt, *sentences]).strip()


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

    @property
    def params(self) -> pd.DataFrame:
        """`parameters` as a table -> index: their names; value, low, high, se."""
        import pandas as pd

        table = {name: asdict(each) for name, each in self.parameters.items()}
        return pd.DataFrame.from_dict(table, orient="index", columns=["value", "low", "high", "se"])

    def conf_int(self) -> pd.DataFrame:
        """The intervals of the parameters, at the level that the fit was made at -> index: their names; low, high."""
        return self.params[["low", "high"]]

    @property
    def predictors(self) -> tuple[str, ...]:
        """Columns that `predict` takes; none where differences between runs are all that a fit knows."""
        return ()

    @at_own_level
    def predict(self, at: Any) -> pd.DataFrame:
        """What the law says at other places -> `predictors`, the loss (or what else it is a law of), low, high.

        low and high are the ends of a pointwise band, without the scatter of single runs.

        Args:
            at: a table or a mapping with the columns `predictors`, whose values broadcast; or an array in their order,
                shape [X] of one of them, [X, predictors] of several.

        Raises:
            AnalysisError: no law was fitted, a column is missing, or the law says nothing of a place.
        """
        import pandas as pd

        names = self.predictors
        if not names:
            raise AnalysisError(f"{type(self).__name__} compares runs and predicts none; see its `params`")
        if not self.parameters:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        if not hasattr(at, "keys"):
            table = np.asarray(at)
            table = np.atleast_2d(table) if len(names) > 1 else table.reshape(-1, 1)
            if table.shape[-1] != len(names):
                raise AnalysisError(
                    f"predict takes {len(names)} columns: {', '.join(names)}; {table.shape[-1]} are given"
                )
            at = dict(zip(names, table.T, strict=True))
        missing = [name for name in names if name not in at]
        if missing:
            raise AnalysisError(f"predict takes the columns {', '.join(names)}; `{missing[0]}` is missing")
        values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(at[name])) for name in names))
        places = pd.DataFrame({name: value.ravel() for name, value in zip(names, values, strict=True)})
        return places.assign(**self._predict(places))

    def _predict(self, places: pd.DataFrame) -> dict[str, np.ndarray]:
        """The columns that `predict` adds to the places."""
        raise NotImplementedError

    @abstractmethod
    def summary(self) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them."""

    @abstractmethod
    def drawn(self) -> pd.DataFrame:
        """The table of exactly what `plot` draws; empty where there is nothing to draw."""

    @at_own_level
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw `drawn`: the runs, the law with its band and what was found.

        Args:
            ax: axes to draw into; None: those of a new figure of pyplot, as a notebook shows it.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(layout="constrained")[1]
        data = self.drawn()
        if len(data):
            self._draw(ax, data)
        return ax

    @abstractmethod
    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        """Draw the table; the drawing itself is in `analysis/figures`."""

    @at_own_level
    def _repr_html_(self) -> str:
        """What a notebook shows: the sentences and the parameters."""
        sentences = "".join(f"<p>{html.escape(line)}</p>" for line in self.summary().splitlines())
        return sentences + (self.params.to_html(float_format=lambda value: f"{value:.4g}") if self.parameters else "")
