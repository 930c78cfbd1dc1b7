"""Memories whose rows follow from the token ids: tables of distinct primes, and what their fields have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StrictInt

from sparsemem.mechanisms.mechanism import Mechanism, MemoryFields, Tables

if TYPE_CHECKING:
    from sparsemem.config import Model

MOST_TABLES = 1024  # of hashed rows: each has a prime of its own, which is searched for
Order = Annotated[StrictInt, Field(ge=2, le=64)]


class Hashed(Mechanism):
    """A memory of `orders` x `heads` tables a module. Tables of a size: distinct primes from there upward, module by
    module.
    """

    def modules(self, model: Model) -> int:
        """Modules, each with its own tables."""
        return 1

    def check(self, model: Model) -> None:
        tables = self._tables(model) * self.modules(model)
        if tables > MOST_TABLES:
            raise ValueError(
                f"`{self.name}` has {tables:,} tables; use fewer `orders`, `heads` or `layers`, at most "
                f"{MOST_TABLES:,} tables in all"
            )

    def least(self, model: Model) -> int:
        return 2

    def tables(self, model: Model, size: int) -> Tables:
        each = self._tables(model)
        primes = distinct_primes(size, each * self.modules(model))
        return tuple(primes[start : start + each] for start in range(0, len(primes), each))

    def row_width(self, model: Model) -> int:
        return int(self.of(model).row_dim)

    def _tables(self, model: Model) -> int:
        return len(self.of(model).orders) * int(self.of(model).heads)


def refuse_unless_rising(fields: MemoryFields, *names: str) -> None:
    """
    Raises:
        ValueError: one of these lists is empty, does not rise or repeats a number.
    """
    for name in names:
        values = getattr(fields, name)
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"`{name}` must be a rising list without repeats, such as [2, 3]; got {list(values)}")


def distinct_primes(at_least: int, count: int) -> tuple[int, ...]:
    """The first `count` primes from `at_least` upward: rows of all tables of a model, none used twice.

    >>> distinct_primes(8, 4)
    (11, 13, 17, 19)
    """
    return tuple(prime for _, prime in zip(range(count), _primes_from(at_least), strict=False))


def _primes_from(start: int) -> Iterator[int]:
    candidate = max(start, 2)
    while True:
        if _is_prime(candidate):
            yield candidate
        candidate += 1


def _is_prime(number: int) -> bool:
    """Miller and Rabin's test with the first twelve primes as bases, which is exact below 3.1e23 (Sorenson and Webster
    2015).

    >>> [number for number in range(2, 30) if _is_prime(number)], _is_prime(10**15 + 37), _is_prime(1_000_003**2)
    ([2, 3, 5, 7, 11, 13, 17, 19, 23, 29], True, False)
    """
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if any(number % base == 0 for base in bases):
        return number in bases
    halvings = ((number - 1) & (1 - number)).bit_length() - 1
    for base in bases:
        power = pow(base, (number - 1) >> halvings, number)
        if power != 1 and all(pow(power, 2**squared, number) != number - 1 for squared in range(halvings)):
            return False
    return True
