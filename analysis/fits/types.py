"""What every fit returns beside its own numbers: a status, and estimates that carry their interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

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
