"""Loss against the precision that weights are trained in: the law of Kumar et al. 2024, arXiv 2411.04330.

`L = E + A N'^-alpha + B D^-beta`, where of N parameters trained in P bits `N' = N (1 - exp(-P / gamma))` count. The
paper multiplies such a factor for each of weights, activations and the KV cache; here it is one, for whichever
precision was varied.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (E, log A and log B at the mean
sizes, alpha, beta, log gamma).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.points import read_points
from analysis.fits.refits import of_bootstrap
from analysis.fits.runs import require_resamples
from analysis.fits.sized_law import CountedLaw, SizedFit, fit_sized, ranged
from analysis.interval import percent, takes_level

Array = np.ndarray
LEAST_RUNS = 9


def counted(bits: Array, gamma: Array) -> Array:
    """Share of the parameters that counts: 1 - exp(-bits / gamma)."""
    return -np.expm1(-bits / gamma)


@dataclass(frozen=True)
class PrecisionLaw(CountedLaw):
    """The law of precision; its sizes are parameters, tokens and bits."""

    NAMES = LIMITED = ("E", "A", "B", "alpha", "beta", "gamma")
    FURTHER = (0.05, 100.0)
    TRIED = ((0.5, 2.0, 6.0),)

    def counted_at_start(self, further: tuple[float, ...]) -> tuple[Array, Array]:
        log_n_N, log_d_N, log_p_N = self.log_x_TN
        return log_n_N + np.log(counted(np.exp(log_p_N), np.array(further[0]))), log_d_N

    def counted(
        self, log_x: Sequence[Array], further: Sequence[Array], powers: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        log_n_X, log_d_X, log_p_X = log_x
        return log_n_X + np.log(counted(np.exp(log_p_X), np.exp(further[0]))), log_d_X


@dataclass(frozen=True, kw_only=True)
class PrecisionFit(SizedFit):
    """The law of precision. The third of `columns` is that of the bits."""

    def _found(self) -> str:
        gamma = self.parameters["gamma"]
        shares = ", ".join(f"{counted(np.array(bits), np.array(gamma.value)):.1%} in {bits}" for bits in (4, 8, 16))
        return (
            f"Of the parameters {shares} bits count as they would in full precision (gamma {gamma.value:.3g} bits, "
            f"{percent()} interval {gamma.low:.3g} to {gamma.high:.3g})."
        )


@takes_level
def fit_precision(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    bits: str,
    loss: str,
    run: str | None = None,
    resamples: int = 400,
    random_seed: int = 0,
) -> PrecisionFit:
    """Fit the law of precision.

    Args:
        frame: one run, or one checkpoint, a row. A column `trial_id` names the rows used; of a column `status` only
            what says finished is.
        params: column of the parameters.
        tokens: column of the training tokens.
        bits: column of the bits of precision in training, such as 4 or 16.
        loss: column of the loss.
        run: column that says which rows are checkpoints of one run, drawn together.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, or a trial id is repeated.
    """
    require_resamples(resamples, "fit_precision")
    columns = (params, tokens, bits)
    points = read_points(frame, columns, loss, run, "fit_precision")
    conventions = {
        "columns": {"N": params, "D": tokens, "P": bits},
        "loss": loss,
        "form": "loss = E + A (N (1 - exp(-P / gamma)))^-alpha + B D^-beta",
        "objective": "sum over rows of (log fitted loss - log loss)^2, natural logarithms",
        "admissible": f"{ranged('exponents', PrecisionLaw.POWERS)}, {ranged('gamma', PrecisionLaw.FURTHER)} bits, E "
        "not negative",
        **of_bootstrap(run, resamples, random_seed),
    }
    common: dict[str, Any] = {"law": "precision", "columns": columns, "rows": points.rows, "conventions": conventions}
    if refusal := points.too_few(columns, "six", LEAST_RUNS, (3, 3, 3), "its law"):
        return PrecisionFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    return fit_sized(PrecisionFit, PrecisionLaw, points, common, "Train at more sizes, or in fewer bits.")
