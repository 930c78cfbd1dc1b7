"""Whether the numbers of a fit may be quoted."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Whether the numbers of a fit may be quoted. Only `converged` means yes without further words."""

    CONVERGED = "converged"
    POOR_FIT = "poor_fit"
    """The law is refuted: it misses the runs by more than their own noise allows (chance of so poor a fit below
    `fits.types.REFUTED`).
    """
    BOUND_HIT = "bound_hit"
    NO_INTERIOR_MINIMUM = "no_interior_minimum"
    TOO_FEW_POINTS = "too_few_points"
    NOT_FINITE = "not_finite"
