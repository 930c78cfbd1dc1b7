"""What the columns of a table count: budgets in FLOPs, GFLOPs, petaFLOP-days, ... by their heading or by C = 6 N D;
parameters with their embeddings or without.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.runs import finished, places

Array = np.ndarray
PREFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21}
NAMES = {"kilo": "k", "mega": "m", "giga": "g", "tera": "t", "peta": "p", "exa": "e", "zetta": "z"}
DAYS = 8.64e19
"""FLOPs of a petaFLOP/s-day."""
_DAYS = re.compile(r"(?<![a-z])(pf|pflops?|peta[ _-]?flops?)[ _/-]*s?[ _-]*days?", re.I)
_PREFIX = re.compile(rf"(?<![a-z])({'|'.join(NAMES)}|[{''.join(PREFIXES)}])[ _-]?flop", re.I)
_POWER = re.compile(r"(?<![a-z0-9.])(?:1e|10\^)\+?(\d{1,2})(?!\d)", re.I)
NEAR = 4.0
"""C may be so far from 6 N D: attention, the head and other ways of counting."""
FEWEST = 1e-3
"""Tokens a parameter, below which nobody trains."""
USUAL = 0.1
"""Tokens a parameter, from which on a unit is likely."""


def by_heading(column: str) -> float | None:
    """FLOPs in one unit of the column, if its heading says so.

    >>> [by_heading(name) for name in ("train_gflops", "ExaFLOPs", "C (1e18 FLOPs)", "pf-days", "model_flops")]
    [1000000000.0, 1e+18, 1e+18, 8.64e+19, None]
    """
    if _DAYS.search(column):
        return DAYS
    found = _PREFIX.search(column)
    if found:
        prefix = found[1].lower()
        return PREFIXES[NAMES.get(prefix, prefix)]
    power = _POWER.search(column)
    return 10.0 ** int(power[1]) if power else None


def unit_of_flops(column: str, c_N: Array, n_N: Array, d_N: Array | None = None) -> tuple[float | None, str]:
    """FLOPs in one unit of the column, None where that cannot be told, and what there is to say of it, '' where these
    are plain FLOPs.

    Args:
        c_N: budgets, in the unit of the column.
        n_N: parameters.
        d_N: training tokens, where known.
    """
    headed, checked = by_heading(column), None
    if d_N is not None:
        ratio = float(np.median(np.log(c_N) - np.log(6.0) - np.log(n_N) - np.log(d_N)))
        units = [1.0, *PREFIXES.values(), DAYS]
        nearest = min(units, key=lambda unit: abs(ratio + np.log(unit)))
        checked = nearest if abs(ratio + np.log(nearest)) < np.log(NEAR) else None
        if headed and checked and checked != headed:
            return (
                None,
                f"`{column}` says units of {headed:g} FLOPs, but C = 6 N D asks for units of {checked:g}: rename or "
                "convert it.",
            )
    unit = headed or checked
    if unit:
        by = "by its heading" if headed else "as C = 6 N D asks"
        return unit, f"`{column}` is in units of {unit:g} FLOPs, {by}." if unit != 1 else ""
    each = float(np.median(np.log(c_N) - np.log(6.0) - 2 * np.log(n_N)))  # log tokens a parameter, if these were FLOPs
    if each < np.log(FEWEST):
        likely = next((prefix.upper() for prefix, unit in PREFIXES.items() if each + np.log(unit) > np.log(USUAL)), "Z")
        words = f"`{column}` cannot be FLOPs: C = 6 N D would leave {np.exp(each):.1g} tokens a parameter"
        return None, f"{words}. If it is {likely}FLOPs, name it so (`{likely.lower()}flops`)."
    return 1.0, ""


STEADY = 1.5
"""Where head and attention count, FLOPs over parameters x tokens drift with size; what scatters by more about the drift
is none.
"""


def ways_of_counting(frame: pd.DataFrame, params: str, tokens: str) -> str:
    """Where the table can tell: says that its rows seem to count parameters in several ways; '' otherwise.

    Raises:
        AnalysisError: some rows count the embeddings in `params` and others do not.
    """
    used = finished(frame)
    if used.empty or not {params, tokens} <= set(used.columns):
        return ""
    if {"total_params", "embedding_params"} <= set(used.columns) and params not in ("total_params", "embedding_params"):
        n_N, total_N, embedding_N = (
            pd.to_numeric(used[name], errors="coerce") for name in (params, "total_params", "embedding_params")
        )
        with_N, without_N = np.isclose(n_N, total_N, rtol=1e-6), np.isclose(n_N, total_N - embedding_N, rtol=1e-6)
        if (with_N & ~without_N).any() and (without_N & ~with_N).any():
            rows = [places(used)[int(np.argmax(each))] for each in (with_N, without_N)]
            raise AnalysisError(
                f"fit_surface: column `{params}` counts embeddings in {rows[0]} but not in {rows[1]}, by "
                "`total_params` and `embedding_params`; count them alike"
            )
    if "flops" in used:
        columns = np.array([pd.to_numeric(used[name], errors="coerce") for name in ("flops", params, tokens)], float)
        if len(used) > 3 and (np.isfinite(columns) & (columns > 0)).all():
            log_c_N, log_n_N, log_d_N = np.log(columns)
            design_N3 = np.stack([np.ones(len(used)), log_n_N, log_d_N], axis=1)
            rest_N = log_c_N - log_n_N - log_d_N
            rest_N -= design_N3 @ np.linalg.lstsq(design_N3, rest_N, rcond=None)[0]
            if np.ptp(rest_N) > np.log(STEADY):
                factor = f"{np.exp(np.ptp(rest_N)):.2g}"
                return (
                    f"`flops` over {params} x {tokens} scatters by a factor of {factor}: are parameters counted in "
                    "several ways?"
                )
    return ""
