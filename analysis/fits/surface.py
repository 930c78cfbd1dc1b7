"""A loss surface over parameters and tokens, with what a compute-optimal model would be.

Letters: B resamples, X points to predict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.counting import ways_of_counting
from analysis.fits.power_law import PowerFit, fit_powers, with_interval
from analysis.fits.types import Estimate
from analysis.interval import ends, takes_level

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
STEPS = 61  # of the drawn surface along each axis


@dataclass(frozen=True, kw_only=True)
class SurfaceFit(PowerFit):
    """A loss surface over parameters and tokens. The compute-optimal exponents hold for C = 6 N D, whatever the 6, at
    fixed `total`.
    """

    n_exponent: Estimate | None = None
    """N_opt ~ C^(beta / (alpha + beta)) with alpha of the parameters and beta of the tokens."""
    d_exponent: Estimate | None = None
    """D_opt ~ C^(alpha / (alpha + beta))."""

    def optimal(self, flops: Any, flops_per_parameter: float = 6.0) -> pd.DataFrame:
        """The compute-optimal model with 95% intervals -> flops, params, params_low, params_high, tokens, tokens_low,
        tokens_high.

        Args:
            flops: training budgets C = flops_per_parameter x params x tokens.
            flops_per_parameter: for every token.

        Raises:
            AnalysisError: no surface was fitted, the loss does not fall with one of both, or a budget is not positive.
        """
        law, c_X = self._fitted(), np.atleast_1d(np.asarray(flops, float))
        if self.n_exponent is None:
            raise AnalysisError(f"this fit has no compute-optimal model: {self.status}. {self.message}")
        if not ((c_X > 0) & np.isfinite(c_X)).all():
            raise AnalysisError("optimal: budgets must be positive numbers")
        alpha_B, beta_B = law.exponents()[:, :2].T
        a_B, b_B = law.log_coefficients()[:, :2].T
        level_B = (np.log(alpha_B / beta_B) + a_B - b_B) / (alpha_B + beta_B)
        log_nd_X = np.log(c_X / flops_per_parameter)
        log_n_BX = level_B[:, None] + (beta_B / (alpha_B + beta_B))[:, None] * log_nd_X
        table = {"flops": c_X}
        for name, log_BX in (("params", log_n_BX), ("tokens", log_nd_X - log_n_BX)):
            low_X, high_X = np.quantile(log_BX[1:], ends(), axis=0)
            table |= {name: np.exp(log_BX[0]), f"{name}_low": np.exp(low_X), f"{name}_high": np.exp(high_X)}
        return pd.DataFrame(table)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> series, params, tokens, loss, low, high.

        Series: `run` (measured loss), `surface` (a grid of the law, at the median total parameters where those have a
        term), `optimal` (the compute-optimal model of rising budgets, where there is one; its tokens have the 95%
        interval in low and high).
        """
        runs = self.residuals()
        params, tokens, *total = (runs[column] for column in self.columns)
        ends = [(x.min() / 1.5, x.max() * 1.5) for x in (params, tokens)]
        n, d = (axis.ravel() for axis in np.meshgrid(*(np.geomspace(*end, STEPS) for end in ends)))
        grid = self.predict(dict(zip(self.columns, (n, d, *(x.median() for x in total)), strict=True)))["loss"]
        tables = [
            pd.DataFrame({"series": "run", "params": params, "tokens": tokens, "loss": runs["measured"]}),
            pd.DataFrame({"series": "surface", "params": n, "tokens": d, "loss": grid}),
        ]
        if self.n_exponent:
            path = self.optimal(6 * np.geomspace(ends[0][0] * ends[1][0], ends[0][1] * ends[1][1], 121))
            path = path[path["params"].between(*ends[0]) & path["tokens"].between(*ends[1])].assign(series="optimal")
            tables.append(path.rename(columns={"tokens_low": "low", "tokens_high": "high"}))
        return pd.concat(tables, ignore_index=True).reindex(
            columns=["series", "params", "tokens", "loss", "low", "high"]
        )

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.surface import draw_surface

        draw_surface(ax, data, (self.columns[0], self.columns[1]), self.conventions["loss"])

    def _found(self) -> str:
        optimum = f" At best {self.columns[0]} grow as C^{with_interval(self.n_exponent)}." if self.n_exponent else ""
        return super()._found() + optimum


@takes_level
def fit_surface(
    frame: pd.DataFrame,
    *,
    params: str,
    tokens: str,
    loss: str,
    total: str | None = None,
    run: str | None = None,
    resamples: int = 4000,
    random_seed: int = 0,
) -> SurfaceFit:
    """Fit `L = E + A params^-alpha + B tokens^-beta (+ C total^-gamma)` (Hoffmann et al., arXiv 2203.15556, approach
    3).

    The last term is for models whose total parameters vary apart from the activated ones: each count has a term of its
    own, so at fixed total parameters the surface is the usual one, and C = 0 is the usual one throughout.

    Args:
        frame: one run, or one checkpoint, a row. A column `trial_id` names the rows used; of a column `status` only
            `finished` is.
        params: column of the parameters; the activated ones if `total` is given.
        tokens: column of the training tokens.
        loss: column of the loss.
        total: column of the total parameters.
        run: column that says which rows are checkpoints of one run. Those are drawn together: treated as runs they
            would narrow every interval.
        resamples: size of the bootstrap over runs.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing, holds text or a size that is not positive, or a trial id is repeated.

    >>> n, d = np.meshgrid([1e7, 3e7, 1e8, 3e8], [1e9, 3e9, 1e10, 3e10])
    >>> runs = pd.DataFrame({"n": n.ravel(), "d": d.ravel(), "loss": (1.7 + 400 / n**0.34 + 410 / d**0.28).ravel()})
    >>> fit = fit_surface(runs, params="n", tokens="d", loss="loss", resamples=50)
    >>> fit.status.value, round(fit.parameters["alpha"].value, 6), round(fit.n_exponent.value, 6)
    ('converged', 0.34, 0.451613)
    >>> round(float(fit.predict({"n": 1e9, "d": 1e11})["loss"].iloc[0]), 6)
    2.389409
    """
    columns = (params, tokens, *([total] if total else []))
    ways = ways_of_counting(frame, params, tokens)
    law = "chinchilla" if total is None else "chinchilla-total"
    common, law_of = fit_powers(frame, columns, loss, run, True, law, "fit_surface", resamples, random_seed)
    common["message"] = f"{common['message']} {ways}".strip()
    if (
        law_of is None or law_of.flat()[0, :2].any()
    ):  # where the loss does not fall with one of them, nothing is to be balanced
        return SurfaceFit(**common, _law=law_of)
    alpha_B, beta_B = law_of.exponents()[:, :2].T
    share_B = beta_B / (alpha_B + beta_B)
    n_exponent, d_exponent = (Estimate.of(each_B) for each_B in (share_B, 1 - share_B))
    return SurfaceFit(**common, n_exponent=n_exponent, d_exponent=d_exponent, _law=law_of)
