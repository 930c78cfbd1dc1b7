"""Loss when data are repeated: the law of Muennighoff et al. 2023, arXiv 2305.16264.

`L = E + A N'^-alpha + B D'^-beta`. Of D tokens U are unique, the others are worth ever less:
`D' = U + U R_D* (1 - exp(-(D/U - 1) / R_D*))`. Parameters beyond those that the unique tokens are best trained with,
`U_N = min(N, N_opt(U))`, fade alike with R_N*. N_opt is that of the same law without repeats: `N_opt(U) = G (G
U)^(beta/alpha)`, `G = (alpha A / (beta B))^(1 / (alpha + beta))`.

Letters: R rows of parameters, B resamples, G starts, N runs, X points, K parameters (E, log A and log B at the mean
sizes, alpha, beta, log R_D*, log R_N*).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.points import Points, read_points
from analysis.fits.refits import of_bootstrap
from analysis.fits.runs import require_resamples
from analysis.fits.sized_law import CountedLaw, SizedFit, fit_sized, ranged
from analysis.interval import percent, takes_level
from analysis.status import Status

Array = np.ndarray
LEAST_RUNS = 10
MOST_REPEATS = 1e4
"""Epochs of the median run beyond which the unique tokens are in another unit; the paper goes up to 1,500."""


def faded(base: Array, log_ratio: Array, fade: Array) -> Array:
    """What `base x ratio` is worth, ratio at least 1: base (1 + R* (1 - exp(-(ratio - 1) / R*)))."""
    return base * (1 - fade * np.expm1(-np.maximum(np.expm1(log_ratio), 0) / fade))


@dataclass(frozen=True)
class DataConstrainedLaw(CountedLaw):
    """The law of repeated data; its sizes are parameters, tokens and unique tokens."""

    NAMES = LIMITED = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
    FURTHER = (0.1, 1000.0)
    TRIED = ((3.0, 15.0, 60.0), (3.0, 15.0))

    def counted_at_start(self, further: tuple[float, ...]) -> tuple[Array, Array]:
        """Every parameter counts: how many do depends on the levels."""
        log_n_N, log_all_N, log_u_N = self.log_x_TN
        unique_N = np.minimum(log_u_N, log_all_N)
        return log_n_N, np.log(faded(np.exp(unique_N), log_all_N - unique_N, np.array(further[0])))

    def counted(
        self, log_x: Sequence[Array], further: Sequence[Array], powers: tuple[Array, ...]
    ) -> tuple[Array, Array]:
        (log_n_X, log_d_X, log_u_X), (log_fade_d, log_fade_n), (level_a, level_b, alpha, beta) = log_x, further, powers
        log_g = (np.log(alpha / beta) + level_a - level_b) / (alpha + beta)
        log_u_X = np.minimum(log_u_X, log_d_X)
        log_base_RX = np.minimum(log_n_X, log_g + beta / alpha * (log_g + log_u_X))
        log_n_RX = log_base_RX + np.log(faded(np.ones(1), log_n_X - log_base_RX, np.exp(log_fade_n)))
        return log_n_RX, log_u_X + np.log(faded(np.ones(1), log_d_X - log_u_X, np.exp(log_fade_d)))


@dataclass(frozen=True, kw_only=True)
class DataConstrainedFit(SizedFit):
    """The law of repeated data. The third of `columns` is that of the unique tokens."""

    def _found(self) -> str:
        fade, other = self.parameters["R_D"], self.parameters["R_N"]
        return (
            f"Repeats are worth new data up to about {fade.value:.3g} times ({percent()} interval {fade.low:.3g} to "
            f"{fade.high:.3g}), parameters beyond what the unique data ask for up to {other.value:.3g} "
            f"({other.low:.3g} to {other.high:.3g}) times."
        )


@takes_level
def fit_data_constrained(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    unique: str,
    loss: str,
    run: str | None = None,
    resamples: int = 400,
    random_seed: int = 0,
) -> DataConstrainedFit:
    """Fit the law of repeated data.

    Args:
        frame: one run, or one checkpoint, a row. A column `trial_id` names the rows used; of a column `status` only
            what says finished is.
        params: column of the parameters.
        tokens: column of the training tokens, repeats counted.
        unique: column of the unique tokens among them; where it is larger than `tokens` nothing was repeated.
        loss: column of the loss.
        run: column that says which rows are checkpoints of one run, drawn together.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, a trial id is repeated, or unique
            tokens are in another unit than tokens.
    """
    require_resamples(resamples, "fit_data_constrained")
    columns = (params, tokens, unique)
    points = read_points(frame, columns, loss, run, "fit_data_constrained")
    repeats = float(np.median(points.x_TN[1] / points.x_TN[2])) if len(points.y_N) else 1.0
    if repeats > MOST_REPEATS:
        raise AnalysisError(
            f"fit_data_constrained: `{tokens}` is {repeats:,.0f} times `{unique}` in the median run, more often than "
            f"data are repeated; write `{unique}` in the unit of `{tokens}`"
        )
    conventions = {
        "columns": {"N": params, "D": tokens, "U": unique},
        "loss": loss,
        "form": "loss = E + A N'^-alpha + B D'^-beta; D' = U (1 + R_D (1 - exp(-(D/U - 1) / R_D))), and N' alike with "
        "R_N and min(N, N_opt(U)) in place of U",
        "objective": "sum over rows of (log fitted loss - log loss)^2, natural logarithms",
        "admissible": ", ".join(
            (
                ranged("exponents", DataConstrainedLaw.POWERS),
                ranged("R_D and R_N", DataConstrainedLaw.FURTHER),
                "E not negative",
            )
        ),
        **of_bootstrap(run, resamples, random_seed),
    }
    common: dict[str, Any] = {
        "law": "data-constrained",
        "columns": columns,
        "rows": points.rows,
        "conventions": conventions,
    }
    refusal = _refusal(points, columns)
    if refusal:
        return DataConstrainedFit(status=refusal[0], message=points.with_left_out(refusal[1]), **common)
    return fit_sized(
        DataConstrainedFit, DataConstrainedLaw, points, common, "Train at more repeats, sizes or unique tokens."
    )


def _refusal(points: Points, columns: tuple[str, str, str]) -> tuple[Status, str] | None:
    """Why no law can be fitted, or None."""
    if refusal := points.too_few(columns, "seven", LEAST_RUNS, (3, 3), "its power"):
        return refusal
    _, d_N, u_N = points.x_TN
    if (d_N > 2 * u_N).sum() < 3:
        words = (
            f"fewer than 3 runs see `{columns[2]}` more than twice, so nothing says what repeats are worth: repeat "
            "more, or use chinchilla."
        )
        return Status.TOO_FEW_POINTS, words
    return None
