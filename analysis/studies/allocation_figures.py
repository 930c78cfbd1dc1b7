"""What the figures of curves over a share draw, and their captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.cells import Cell
from analysis.figures.allocation import PUBLISHED
from analysis.fits.allocation_result import AllocationFit
from analysis.table import RHO, average_differences, paired_differences

HATCHED = (
    f"Hatched: the published optimum, {PUBLISHED[0]:.0%} to {PUBLISHED[1]:.0%} (Engram, arXiv 2601.07372), at far "
    "larger scale."
)
DIFFERENCES_CAPTION = (
    f"Loss less that of the pure mixture of experts ({RHO} = 1) with the same seed, mean over seeds; bars are one "
    "standard error between seeds, where there are two. Below zero, memory helps."
)
DIAGNOSTICS_CAPTION = (
    "Left: mean of each share less the fitted curve, with its paired standard error. Right: mean of each inner share "
    "less what each law predicts for it when fitted to all others. Zero is a perfect fit."
)
OPTIMUM_CAPTION = (
    "The best share of each budget by a curve of its own (orange, 95% interval; white where in doubt or at an end of "
    "the sampled shares), and by the law over all budgets (blue, pointwise 95% band; the model is chosen anew in every "
    f"resample). {HATCHED}"
)
CURVES_CAPTION = (
    f"Top: validation loss while training, mean over seeds. Bottom: the same less that of {RHO} = 1 with the same seed "
    "at the same token; bands are one standard error between seeds."
)
_SERIES = {
    "run": "Open markers: single runs.",
    "curve": "Filled markers: means for the average seed, with paired standard error; line: the fit, with pointwise "
    "95% band.",
    "optimum": "The star marks the fitted optimum with its 95% interval.",
    "tied": "Shaded: shares statistically tied with the best sampled one.",
    "dense": "Dense: a model without sparse parameters and with as many activated ones (dotted, or its loss where that "
    "is far off).",
}


def curve_caption(what: str, data: pd.DataFrame, published: str) -> str:
    """Describes a figure of loss against a share.

    Args:
        what: the first sentence: which share, and what is fixed along it.
        data: `allocation_data`.
        published: the last: how the optimum in print is marked.
    """
    return " ".join((what, *(words for name, words in _SERIES.items() if (data["series"] == name).any()), published))


def allocation_data(fitted: Sequence[tuple[Cell, AllocationFit]]) -> pd.DataFrame:
    """Everything that `share_figure` draws -> cell, status, series, share, loss, low, high, seed, trial_id (losses in
    nats per token).

    Series: those of `AllocationFit.drawn`, and `dense` (mean of the baseline).
    """
    tables = []
    for cell, fit in fitted:
        dense = [pd.DataFrame([{"series": "dense", "loss": cell.dense["val_loss"].mean()}])] if len(cell.dense) else []
        tables.append(pd.concat([fit.drawn(), *dense]).assign(cell=cell.label, status=str(fit.status)))
    return pd.concat(tables, ignore_index=True).reindex(
        columns=["cell", "status", "series", "share", "loss", "low", "high", "seed", "trial_id"]
    )


def differences_data(
    fitted: Sequence[tuple[Cell, AllocationFit]], sequence_losses: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What `differences_figure` draws: `average_differences` of every cell, with its label; share 1 is 0
    by definition.
    """
    tables = []
    for cell, _ in fitted:
        averages = average_differences(paired_differences(cell.trials, sequence_losses))
        if len(averages):
            pure = pd.DataFrame([{"rho": 1.0, "share_moe": 1.0, "difference": 0.0}])
            tables.append(pd.concat([averages, pure]).sort_values("share_moe").assign(cell=cell.label))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def diagnostics_data(fitted: Sequence[tuple[Cell, AllocationFit]]) -> pd.DataFrame:
    """What `diagnostics_figure` draws -> cell, series, law, share, error, se (nats per token). Fits without a curve are
    left out.

    Series: `residual` (mean of a share less the law used, with the paired standard error of the mean), `left out` (mean
    of an inner share less what each law predicts for it from all others).
    """
    tables = []
    for cell, fit in fitted:
        if not fit.means:
            continue
        runs = fit.runs()["share"].value_counts()
        means = pd.DataFrame({"cell": cell.label, "share": fit.shares, "mean": fit.means})
        error = means["mean"] - fit.predict(fit.shares)["loss"]
        se = (fit.paired_sd or np.nan) / np.sqrt(means["share"].map(runs))
        tables.append(means.assign(series="residual", law=fit.law, error=error, se=se))
        inner = means.iloc[1:-1]
        tables += [
            inner.assign(series="left out", law=law.law, error=inner["mean"] - np.array(law.left_out))
            for law in fit.candidates
        ]
    columns = ["cell", "series", "law", "share", "error", "se"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
