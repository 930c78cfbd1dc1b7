"""What every fit returns beside its own numbers: a status, and estimates that carry their interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

import numpy as np


class Status(StrEnum):
    """Whether the numbers of a fit may be quoted. Only `converged` means yes without further words."""

    CONVERGED = "converged"
    BOUND_HIT = "bound_hit"
    NO_INTERIOR_MINIMUM = "no_interior_minimum"
    TOO_FEW_POINTS = "too_few_points"
    NOT_FINITE = "not_finite"


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
        low, high = np.quantile(draws, (0.025, 0.975))
        return cls(float(value), float(low), float(high), float(np.std(draws, ddof=1)))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def plain(value: Any) -> Any:
    """Values that JSON knows: dataclasses become mappings of their public fields, tuples lists, a status its word."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if not field.name.startswith("_")}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Status) else value
