"""From a table to the runs of a scaling fit: mechanisms at rungs. Refuses what no curve may mix."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.columns import floats
from analysis.errors import AnalysisError
from analysis.fits.runs import MIXED, NEAR, Runs, places, read_runs, require_one_budget

Array = np.ndarray
RUNG = "rung"
"""Column that is made here: the number of the size and length, rising."""


def read_rungs(
    used: pd.DataFrame,
    names: list[str],
    mechanism: str,
    flops: str,
    loss: str,
    seed: str,
    tokens: str,
    active: str,
) -> tuple[Runs, Array]:
    """Runs at (number of the mechanism, number of the rung), and the logarithm of each one's compute."""
    caller, at = "fit_scaling", places(used)
    numbers = {name: floats(used[name], lambda row: f"{caller}: {at[row]}") for name in (flops, tokens, active)}
    for name, held_N in numbers.items():
        wrong = np.flatnonzero(~((held_N > 0) & np.isfinite(held_N)))
        if len(wrong):
            raise AnalysisError(
                f"{caller}: column `{name}` holds {held_N[wrong[0]]:g} in {at[wrong[0]]}; a positive number belongs "
                "there"
            )
    ratio_N = numbers[tokens] / numbers[active]
    if len(ratio_N) and ratio_N.max() > MIXED * ratio_N.min():
        raise AnalysisError(
            f"{caller}: `{tokens}` / `{active}` runs from {ratio_N.min():.3g} to {ratio_N.max():.3g} (trials "
            f"{at[int(ratio_N.argmin())]} and {at[int(ratio_N.argmax())]}), but a curve holds the tokens for each "
            "activated parameter; fit each of them alone"
        )
    sizes = np.sort(np.unique(numbers[tokens]))
    rung_N = np.searchsorted(sizes[1:][sizes[1:] > MIXED * sizes[:-1]], numbers[tokens], side="right")
    codes = [names.index(str(name)) for name in used[mechanism]]
    table = used.assign(**{mechanism: codes, RUNG: rung_N, flops: numbers[flops]})
    _require_alike(table, names, mechanism, flops)
    runs = read_runs(table, (mechanism, RUNG), loss, seed, caller)
    compute = dict(zip(map(str, table.get("trial_id", table.index)), np.log(numbers[flops]), strict=True))
    return runs, np.array([compute[row] for row in runs.rows])


def _require_alike(table: pd.DataFrame, names: list[str], mechanism: str, flops: str) -> None:
    """Refuse what no curve may mix: designs of a mechanism at one rung, sparsities, texts and vocabularies."""
    caller = "fit_scaling"
    for (code, _), own in table.groupby([mechanism, RUNG]):
        least, most = own[flops].min(), own[flops].max()
        if most > NEAR * least:
            raise AnalysisError(
                f"{caller}: `{names[code]}` takes from {least:.4g} to {most:.4g} FLOPs at one rung, so it is several "
                f"mechanisms, or rungs nearer than a factor of {MIXED:g} in tokens: give each design its own name"
            )
    for _, own in table.groupby(RUNG):
        require_one_budget(own, RUNG, caller, ("embedding_params",))
    for name in [name for name in table.columns if str(name).startswith("data.")]:
        held = table[name].dropna().astype(str).unique()
        if len(held) > 1:
            raise AnalysisError(
                f"{caller}: column `{name}` holds {held[0]} and {held[1]}, so the losses are not of one text and "
                "vocabulary; fit each alone"
            )
    if {"total_params", "active_params"} <= {*table.columns}:
        sparsity = table["total_params"] / table["active_params"]
        for code, own_N in sparsity.groupby(table[mechanism]):
            if own_N.max() > MIXED * own_N.min():
                raise AnalysisError(
                    f"{caller}: `{names[code]}` has P_tot/P_act from {own_N.min():.3g} to {own_N.max():.3g}, so its "
                    "curve mixes size with sparsity; fit each alone"
                )
