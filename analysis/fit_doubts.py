"""What there is to doubt in a table itself, whichever law is fitted to it: the unit of its numbers, and sweeps of
settings.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_NATS = 12.0
"""Loss of a uniform guess among 160,000 tokens."""
FAR = 30.0
"""Factor by which the compute may differ from 6 N D: sparse models, other counts and attention lie within."""
SWEPT = 3
"""Rows of one cell (median) from which on they may be a sweep of settings."""
SPREAD = 0.005
"""Standard deviation of repeats, as part of the loss, which seeds seldom have."""


def with_doubts(fit: Any, doubts: list[str]) -> Any:
    """The fit with the sentences behind its message."""
    return replace(fit, message=" ".join(filter(None, (fit.message, *doubts)))) if any(doubts) else fit


def of_units(frame: pd.DataFrame, columns: dict[str, str], tokens: str | None) -> list[str]:
    """A sentence for losses too large for nats, and for compute far from 6 N D.

    Args:
        columns: option -> column.
        tokens: column of the training tokens, if there is one.
    """
    doubts = []
    loss = columns["loss"]
    median = float(frame[loss].median())
    if median > MOST_NATS:
        doubts.append(
            f"`{loss}` is {median:.3g} in the median run, more than the {MOST_NATS:g} nats of a guess: it may be "
            "perplexity (add a column of its natural logarithm) or a sum (divide by the number of tokens), then name "
            "the new column with --loss."
        )
    if tokens and {"flops", "n"} <= columns.keys():
        with np.errstate(all="ignore"):
            tokens_N = pd.to_numeric(frame[tokens], errors="coerce")
            ratio_N = frame[columns["flops"]] / (6 * frame[columns["n"]] * tokens_N)
        ratio = float(ratio_N.median())
        if ratio > 0 and abs(np.log(ratio)) > np.log(FAR):
            doubts.append(
                f"`{columns['flops']}` is {ratio:.3g} times 6 `{columns['n']}` `{tokens}` in the median run, where "
                "about 1 is usual: write all three in plain units (FLOPs, parameters, tokens), or name the columns "
                "that are."
            )
    return doubts


def best_of_cell(frame: pd.DataFrame, sizes: list[str], loss: str) -> tuple[pd.DataFrame, list[str]]:
    """Of rows with equal sizes the one with the least loss, in the order of the table, and how many were left out."""
    from analysis.fits.scatter import cells_of

    if not (frame[sizes] > 0).all(axis=None):
        return frame, []  # the fit refuses it, by its row
    cells = pd.Series(cells_of(frame[sizes].to_numpy(float).T), frame.index)
    kept = frame.loc[sorted(frame[loss].groupby(cells).idxmin(), key=frame.index.get_loc)]
    lost = len(frame) - len(kept)
    said = f"Left out: {lost} of {len(frame)} rows, which are not the best of their cell (equal {', '.join(sizes)})."
    return kept, [said] if lost else []


def of_sweep(frame: pd.DataFrame, sizes: list[str], loss: str, fit: Any, best: Callable[[], Any]) -> list[str]:
    """A sentence where the best of each cell gives another answer than all rows, and so many rows of a cell are no
    seeds.

    Args:
        sizes: columns by which rows are of one cell.
        best: fits the best of each cell.
    """
    from analysis.fits.scatter import cells_of

    if not ((frame[sizes] > 0).all(axis=None) and (frame[loss] > 0).all()):
        return []
    log_N = np.log(frame[loss])
    cells = log_N.groupby(cells_of(frame[sizes].to_numpy(float).T))
    squares, free = float(((log_N - cells.transform("mean")) ** 2).sum()), len(frame) - cells.ngroups
    if cells.size().median() < SWEPT or squares < free * SPREAD**2:
        return []
    other = best()
    moved = [
        f"{name} {each.value:.4g} instead of {fit.parameters[name].value:.4g}"
        for name, each in other.parameters.items()
        if name in fit.parameters and not fit.parameters[name].low <= each.value <= fit.parameters[name].high
    ]
    if other.status is Status.CONVERGED and fit.status is not Status.CONVERGED:
        moved.insert(0, f"status {other.status}")
    if fit.parameters and other.parameters and hasattr(fit, "residuals"):
        table = fit.residuals().merge(other.residuals(), on=sizes, suffixes=("", "_best"))
        lower = float((1 - table["predicted_best"] / table["predicted"]).median())
        if (table["predicted_best"] < table["low"]).mean() > 0.5:
            moved.append(f"losses {lower:.1%} lower, beyond the band of this fit")
    if not moved:
        return []
    return [
        f"the best of each cell (equal {', '.join(sizes)}) gives {', '.join(moved)}: where the rows of a cell are a "
        "sweep of settings, add --best-of-cell; where they are of several kinds, add --group COLUMN; where they are "
        "seeds, keep this fit."
    ]
