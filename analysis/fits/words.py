"""An estimate as words: which way it goes, how far, and whether that may be nothing."""

from __future__ import annotations

from analysis.fits.types import Estimate
from analysis.interval import percent


def signed(
    estimate: Estimate, positive: str, negative: str, unsure: str = "it may be no difference"
) -> tuple[str, str]:
    """The word for the sign, and the size with its interval; `unsure`, if any, is added where the interval holds zero.

    >>> signed(Estimate(-0.03, -0.04, -0.02, 0.005), "raises", "lowers")
    ('lowers', '0.0300 nats/token (95% interval 0.0200 to 0.0400)')
    """
    sign = 1 if estimate.value > 0 else -1
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    doubt = f"; {unsure}" if unsure and low <= 0 <= high else ""
    return (
        positive if sign > 0 else negative,
        f"{sign * estimate.value:z.4f} nats/token ({percent()} interval {low:z.4f} to {high:z.4f}{doubt})",
    )
