"""Which quantity a heading names. It must not know tables or laws."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from analysis.errors import AnalysisError

QUANTITIES = {
    "parameters": ("n", "total"),
    "tokens": ("d", "unique"),
    "compute": ("flops",),
    "steps": ("d",),
    "loss": ("loss", "loss-se"),
    "perplexity": (),
}
"""Quantity -> the options whose column it may be. `--x` takes any size, so it is not looked at."""
HEADINGS = {
    "parameters": r"params?|parameters?",
    "tokens": r"tokens?",
    "compute": r"[a-z]*flops?|compute",
    "steps": r"steps?|iterations?|iters?",
    "loss": r"loss(es)?|nll|bpb",
    "perplexity": r"ppl|perplexity",
}
"""Quantity -> the words of a heading that name it."""


def check_headings(columns: Mapping[str, str], holds: Mapping[str, str], path: Path) -> None:
    """Refuse a column whose heading names another quantity than its option's.

    Args:
        columns: option -> column.
        holds: option -> what its column holds, in words.

    Raises:
        AnalysisError: it does; a heading that also names its option's quantity, or several others, passes.
    """
    checked = {option for options in QUANTITIES.values() for option in options}
    for option in columns.keys() & checked:
        named = quantities_named(columns[option])
        if not named or len(named) > 1 or option in QUANTITIES[named[0]]:
            continue
        remedy = (
            "add a column of its natural logarithm and name that"
            if named == ["perplexity"]
            else "name the column that does"
        )
        raise AnalysisError(
            f"{path}: --{option} {columns[option]}: the heading says {named[0]}, but --{option} is {holds[option]}; "
            f"{remedy}, or rename the heading if it is wrong"
        )


def quantities_named(heading: str) -> list[str]:
    """Quantities that a heading names."""
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", heading).lower())
    return [quantity for quantity, word in HEADINGS.items() if any(re.fullmatch(word, each) for each in words)]
