"""`expm1(z) / z` and its derivatives, without the cancellation near 0: power laws in their exponent, where they pass
into the logarithm.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
_SERIES = [(n + 1) * (n + 2) / math.factorial(n + 3) for n in range(18)]
"""Taylor coefficients of g'' at 0; where they are used, below 1, the last is below a rounding error."""


def growth(z: Array) -> tuple[Array, Array, Array]:
    """`g(z) = expm1(z) / z`, g' and g'' -> each as z.

    >>> [round(float(each), 6) for each in growth(np.array(0.0))]
    [1.0, 0.5, 0.333333]
    """
    near, power = np.abs(z) < 1, np.exp(z)
    small, large = np.where(near, z, 0.0), np.where(near, 1.0, z)
    series = np.full_like(small, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        series *= small
        series += coefficient
    slope = (power - small * series) / 2
    value, steep = power - small * slope, np.expm1(large) / large
    rise = (power - steep) / large
    return np.where(near, value, steep), np.where(near, slope, rise), np.where(near, series, (power - 2 * rise) / large)
