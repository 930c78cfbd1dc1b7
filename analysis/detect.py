"""How many seeds a planned study needs to see a difference, from the noise of a study that has run. Knows no plan, only
its table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import chdtri, nctdtr, stdtrit

from analysis.cells import RATE, cell_fields
from analysis.errors import AnalysisError
from analysis.results import Results
from analysis.studies import analyse
from analysis.table import si

LEVEL, POWER, MOST_SEEDS = 0.05, 0.8, 1000
UNEVEN = 2.0
"""Factor between the noises of two cells from which on they are named."""


def detect(depth: float, planned: pd.DataFrame, noise_from: Path | str) -> dict[str, Any]:
    """What a planned study can detect, and the seeds that a difference of `depth` would take.

    Args:
        depth: difference between two points, such as the best share and rho = 1, nats per token.
        planned: the columns of `trials.csv` that are known before training, one trial a row.
        noise_from: results folder of a similar study.

    Raises:
        AnalysisError: the depth is not positive, or the folder holds no study with a repeated seed.
    """
    if not depth > 0:
        raise AnalysisError(f"--detect {depth:g}: give a positive number of nats per token, such as 0.01")
    cells = paired_noise(noise_from)
    lengths = set(planned["tokens"]) if "tokens" in planned else set()
    alike = [cell for cell in cells if cell["tokens"] in lengths] or cells
    df = sum(cell["df"] for cell in alike)
    sd = math.sqrt(sum(cell["paired_sd"] ** 2 * cell["df"] for cell in alike) / df)
    low, high = (sd * math.sqrt(df / chdtri(df, chance)) for chance in (0.025, 0.975))
    designs = [
        {
            **{"points": points, "seeds": seeds, "seeds_needed": seeds_needed(depth, sd, points)},
            "seeds_needed_range": [seeds_needed(depth, low, points), seeds_needed(depth, high, points)],
            **{"detectable": detectable(sd, seeds, points), "power": power(depth, sd, seeds, points)},
        }
        for points, seeds in planned_designs(planned)
    ]
    noise = {"folder": str(noise_from), "paired_sd": sd, "df": df, "low": low, "high": high}
    noise |= {"cells": cells, "used": alike}
    return {"depth": depth, "level": LEVEL, "wanted_power": POWER, "noise": noise, "designs": designs}


def paired_noise(folder: Path | str) -> list[dict[str, Any]]:
    """`Analysis.noise` of a study.

    Raises:
        AnalysisError: no seed is repeated.
    """
    found = analyse(Results(Path(folder))).noise()
    if not found:
        raise AnalysisError(
            f"{folder}: no seed is repeated over the same points, so its noise is unknown; give a study with two seeds"
        )
    return found


def planned_designs(planned: pd.DataFrame) -> list[tuple[int, int]]:
    """Distinct pairs of points in a cell and seeds that each of them has at least; a point's learning
    rates count once.
    """
    trials = planned[planned["rho"].notna() | (planned["sparse_params"] > 0)]
    shares = [name for name in trials if name.startswith("share_")]
    cells = [name for name in cell_fields(planned) if name != "rho"]
    found = []
    for _, cell in trials.groupby(cells, dropna=False) if cells else [((), trials)]:
        rates = [RATE] if RATE in cell else []
        seeds = cell.round(dict.fromkeys(shares, 9)).groupby([*shares, *rates], dropna=False)["seed"].nunique()
        most = seeds.groupby(level=list(range(len(shares)))).max()
        found.append((len(most), int(most.min())))
    return list(dict.fromkeys(found))


def describe_detect(found: dict[str, Any]) -> str:
    """`detect` in words."""
    noise, depth = found["noise"], found["depth"]
    of = f"95% interval {noise['low']:.4f} to {noise['high']:.4f}, {noise['df']} degrees of freedom, {noise['folder']}"
    lines = [
        f"noise of one run once its seed's common effect is off: {noise['paired_sd']:.4f} nats/token (sd, {of})",
        f"one paired difference of two points, two-sided test at {found['level']:.0%} (reports of several correct for "
        "their number):",
    ]
    sizes = [cell["paired_sd"] for cell in noise["cells"]]
    if max(sizes) > UNEVEN * min(sizes):
        each = ", ".join(
            f"{cell['paired_sd']:.4f} ({cell['label'] or 'tokens ' + si(cell['tokens'])})" for cell in noise["cells"]
        )
        used = "those with as many tokens as planned" if len(noise["used"]) < len(sizes) else "all"
        lines.insert(1, f"the noise differs between the cells of that study: {each}; used: {used}")
    for design in found["designs"]:
        needed, least = design["seeds_needed"], design["detectable"]
        seeds, can = f"{design['seeds']} seed{'s' * (design['seeds'] != 1)}", "cannot be tested"
        if least is not None:
            can = f"{depth:g} is seen with a chance of {design['power']:.0%}, {least:.4f} with {POWER:.0%}"
        least_needed, most_needed = (number or "more than 1,000" for number in design["seeds_needed_range"])
        span = f" ({least_needed} to {most_needed} over the interval of the noise)"
        takes = f"{needed or 'more than 1,000'} seeds see {depth:g} with {POWER:.0%}{span}"
        lines.append(f"  {design['points']} points, {seeds} each: {can}; {takes}")
    return "\n".join(lines)


# --- the power of the test --------------------------------------------------------------------------------------------


def power(depth: float, paired_sd: float, seeds: int, points: int) -> float:
    """Chance that a paired difference of two points of this size is told from 0: two-sided t test at 5%, noise pooled
    over all points.

    Both are named beforehand; the best of many points, picked afterwards, needs more.

    Args:
        depth: true difference, nats per token.
        paired_sd: of one run once the effect of its seed is off, nats per token.
        seeds: of each point.
        points: whose runs the noise is pooled over, each with all seeds: (points - 1) (seeds - 1) degrees of freedom.
    """
    df = (points - 1) * (seeds - 1)
    if df < 1:
        return 0.0
    shift, critical = depth / (paired_sd * math.sqrt(2 / seeds)), float(stdtrit(df, 1 - LEVEL / 2))
    # Far from 0 the noncentral t's distribution function is not evaluated; there the test cannot miss.
    return 1.0 if shift > critical + 20 else float(1 - nctdtr(df, shift, critical) + nctdtr(df, shift, -critical))


def seeds_needed(depth: float, paired_sd: float, points: int) -> int | None:
    """Fewest seeds at each point with a `power` of 80%; None beyond 1,000."""
    low, high = 1, 2
    while power(depth, paired_sd, high, points) < POWER:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(depth, paired_sd, middle, points) >= POWER else (middle, high)
    return high


def detectable(paired_sd: float, seeds: int, points: int) -> float | None:
    """Least difference with a `power` of 80%, nats per token; None with one seed."""
    if (points - 1) * (seeds - 1) < 1:
        return None
    low, high = 0.0, paired_sd
    while power(high, paired_sd, seeds, points) < POWER:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, paired_sd, seeds, points) >= POWER else (middle, high)
    return high
