"""A search in place of a list of shares: `vary: {rho: {search: optimum, tolerance: 0.1}}`. It is never part of a
trial's identity.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from sparsemem.values import Share, Size, Strict

FIRST_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
"""The first batch. Fewer decide nothing: the only law that four shares can judge is the parabola."""
GRID_SHARES = 11
"""The grid that a search stands in for."""


class Optimum(Strict):
    """Shares are trained where they are expected to shorten the 95% interval of the best share most, until it is short
    enough.
    """

    search: Literal["optimum"]
    tolerance: Annotated[Share, Field(gt=0, lt=1)]
    """The search ends when the 95% interval of the best share is no longer than this, in units of the share, from end
    to end.
    """
    seeds: Annotated[StrictInt, Field(ge=2, le=1000)] = 2
    """Of each share, the first of 0, 1, ...: what they differ by measures the noise."""
    batch: Size = 1
    """Shares trained at once. What a batch holds follows from the batches before it alone, so it is no matter of the
    machine's slots.
    """
    max_trials: Size | None = None
    """The search ends before it would train more than this; None: as many as a grid of 11 shares."""

    @property
    def most(self) -> int:
        """Trials that it may come to."""
        return self.max_trials or GRID_SHARES * self.seeds

    @model_validator(mode="after")
    def _can_end(self) -> Optimum:
        if self.most < len(FIRST_SHARES) * self.seeds:
            raise ValueError(
                f"`max_trials` {self.max_trials} is less than {len(FIRST_SHARES)} shares of {self.seeds} seeds, "
                f"the fewest that a curve is judged by; allow {len(FIRST_SHARES) * self.seeds} or more"
            )
        return self
