"""Numbers and tables for people. It must not know studies."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: float) -> str:
    """Four digits and a decimal unit.

    >>> count(1_240_000), count(499_968), count(62)
    ('1.24M', '500k', '62')
    """
    return _scaled(number, "", ("k", "M", "B", "T"))


def size(number: float) -> str:
    """Bytes, in decimal units.

    >>> size(32_090_000_000), size(1500), size(62)
    ('32.09 GB', '1.5 kB', '62 B')
    """
    return _scaled(number, " B", (" kB", " MB", " GB", " TB"))


def _scaled(number: float, plain: str, units: Sequence[str]) -> str:
    """With the unit, of ever a thousand times the one before it, that leaves at least 1."""
    for power in range(len(units), 0, -1):
        if abs(number) >= 1000.0**power:
            return f"{number / 1000.0**power:.4g}{units[power - 1]}"
    return f"{number:.4g}{plain}"


def duration(seconds: float) -> str:
    """The largest two units, no finer than that.

    >>> duration(42), duration(190), duration(7500), duration(200_000)
    ('42 s', '3 min 10 s', '2 h 5 min', '2 d 7 h')
    """
    whole = round(seconds)
    for whole_unit, unit, smaller_size, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= whole_unit:
            rest = whole % whole_unit // smaller_size
            return f"{whole // whole_unit} {unit} {rest} {smaller}" if rest else f"{whole // whole_unit} {unit}"
    return f"{whole} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right by spaces, the first to the left; lines are never wrapped or cut."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
