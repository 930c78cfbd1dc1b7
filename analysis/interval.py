"""The level of intervals, in one place: 95% unless `level=` of a fit, or `--interval` of the command, says otherwise.

A fit keeps the level that it was made at, and all that it predicts, says and draws is at that level.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from analysis.errors import AnalysisError

DEFAULT = 0.95
_LEVEL = ContextVar("level", default=DEFAULT)
T = TypeVar("T")


def level() -> float:
    """The level in use here."""
    return _LEVEL.get()


def ends() -> tuple[float, float]:
    """Quantiles at the ends of an interval: 0.025 and 0.975."""
    return (0.025, 0.975) if level() == DEFAULT else ((1 - level()) / 2, (1 + level()) / 2)


def percent() -> str:
    """The level in words.

    >>> with at_level(0.995):
    ...     percent()
    '99.5%'
    """
    return f"{100 * level():.6g}%"


@contextmanager
def at_level(level: float) -> Iterator[None]:
    """Intervals inside are at this level.

    Raises:
        AnalysisError: it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise AnalysisError(
            f"an interval of level {level:g} cannot be made; give a number between 0 and 1, such as 0.9"
        )
    token = _LEVEL.set(level)
    try:
        yield
    finally:
        _LEVEL.reset(token)


def takes_level(fit: Callable[..., T]) -> Callable[..., T]:
    """Gives a function `level`, the level of all intervals of what it returns."""

    @functools.wraps(fit)
    def at_its_level(*args: Any, level: float | None = None, **options: Any) -> T:
        with at_level(_LEVEL.get() if level is None else level):
            return fit(*args, **options)

    own = inspect.signature(fit)
    option = inspect.Parameter("level", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="float | None")
    at_its_level.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
    return at_its_level


def at_own_level(method: Callable[..., T]) -> Callable[..., T]:
    """A method of a fit, run at the level that the fit was made at."""

    @functools.wraps(method)
    def at_its_level(self: Any, *args: Any, **options: Any) -> T:
        with at_level(self._level):
            return method(self, *args, **options)

    return at_its_level
