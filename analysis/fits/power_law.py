"""Loss as powers of sizes: what a fit of one size and a surface over several share. The arithmetic is in `power_sum`.

Letters: B resamples, N runs, T terms, K parameters, X points to predict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.newton import Minimum
from analysis.fits.points import Points, read_points
from analysis.fits.power_sum import ALPHA, DELTA, PowerSum
from analysis.fits.refits import covariance_of, fit_all, of_bootstrap, resampled_weights, verdict
from analysis.fits.runs import distinct, require_resamples
from analysis.fits.scatter import judge_scatter, slopes_of, with_scatter
from analysis.fits.sizes_fit import SizesFit
from analysis.fits.types import Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
SYMBOLS = (("A", "alpha"), ("B", "beta"), ("C", "gamma"))
"""Coefficient and exponent of each term."""
LEAST_RUNS = 5  # fewer than this to draw from say nothing of the spread
LEAST_SPAN = 1.1  # sizes nearer to each other show no power
# curvature, relative to the diagonal of the Hessian, below which other parameters fit as well; surfaces have about 1e-3
LEVEL = 1e-7


@dataclass(frozen=True)
class PowerLaw:
    """What was fitted, in the terms of `PowerSum`."""

    model: PowerSum
    mean_T: Array
    """Of log x."""
    theta_BK: Array
    """Row 0 is the fit of the data, the others are those of the resamples."""
    points: Points
    """`model` has their losses over `points.level`."""

    def losses(self, x_TX: Array) -> Array:
        """Every row's loss -> [B, X]."""
        return self.points.level * np.exp(self.model.log_value(self.theta_BK, np.log(x_TX) - self.mean_T[:, None]))

    def log_coefficients(self) -> Array:
        """log A of each term at x = 1 -> [B, T]; what is 0 is as small as numbers go."""
        s_BT = np.maximum(self.theta_BK[:, : self.model.terms], 1e-300)
        return np.log(s_BT / self.exponents()) + self.exponents() * self.mean_T + np.log(self.points.level)

    def flat(self) -> Array:
        """Whether the loss does not fall with a size: its term is 0, or, without a floor, as near to constant as it may
        be -> [B, T].
        """
        t = self.model.terms
        return (self.theta_BK[:, :t] <= 0) | ((self.theta_BK[:, -t:] >= 1 / ALPHA[0]) & (not self.model.floor))

    def exponents(self) -> Array:
        """-> [B, T]."""
        return 1 / self.theta_BK[:, -self.model.terms :]

    def table(self) -> dict[str, Array]:
        """The parameters as published, by name -> [B]."""
        t = self.model.terms
        floor = {"E": self.points.level * self.theta_BK[:, t]} if self.model.floor else {}
        with np.errstate(over="ignore"):  # `Fit` gives a status to what leaves the range of numbers
            coefficients = {
                name: values for (name, _), values in zip(SYMBOLS, np.exp(self.log_coefficients()).T, strict=False)
            }
        return (
            floor
            | coefficients
            | {name: values for (_, name), values in zip(SYMBOLS, self.exponents().T, strict=False)}
        )


@dataclass(frozen=True, kw_only=True)
class PowerFit(SizesFit):
    """Loss as powers of sizes."""

    _law: PowerLaw | None = field(default=None, repr=False, compare=False)

    def _losses(self, x_TX: Array) -> Array:
        return self._fitted().losses(x_TX)

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws -> for one size: series (run, curve), group, x, loss, low, high."""
        from analysis.figures.law import curves_of, runs_of

        (x,), runs = self.columns, self.residuals()
        return pd.concat(
            [
                runs_of(runs[x], runs["measured"]),
                curves_of(self.predict(np.geomspace(runs[x].min(), runs[x].max(), 61)), x),
            ],
            ignore_index=True,
        )

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        from analysis.figures.law import draw_law

        draw_law(ax, data, self.columns[0], self.conventions["loss"])

    def _found(self) -> str:
        """With which sizes the loss falls, and with which it does not."""
        law, floor = self._fitted(), self.parameters.get("E")
        flat_T = law.flat()[0]
        falls = [
            f"{with_interval(self.parameters[name])} of {column}"
            for (_, name), column, flat in zip(SYMBOLS, self.columns, flat_T, strict=False)
            if not flat
        ]
        rests = [
            f"Loss does not fall with {column}." for column, flat in zip(self.columns, flat_T, strict=True) if flat
        ]
        to = f" towards {floor.value:.4g} ({floor.low:.4g} to {floor.high:.4g})" if floor else ""
        return " ".join([*rests, *([f"Loss falls with the power {', '.join(falls)}{to}."] if falls else [])])

    def _fitted(self) -> PowerLaw:
        if self._law is None:
            raise AnalysisError(f"this fit has no law: {self.status}. {self.message}")
        return self._law


@takes_level
def fit_power(
    frame: pd.DataFrame,
    *,
    x: str,
    loss: str,
    floor: bool = True,
    run: str | None = None,
    resamples: int = 4000,
    random_seed: int = 0,
) -> PowerFit:
    """Fit `L = E + A x^-alpha`, or without its floor `L = A x^-alpha`; arguments and errors as for `fit_surface`.

    >>> sizes = pd.DataFrame({"flops": 10.0 ** np.arange(17, 23)})
    >>> sizes["loss"] = 2 + 300 * sizes["flops"] ** -0.15
    >>> fit = fit_power(sizes, x="flops", loss="loss", resamples=50)
    >>> fit.status.value, round(fit.parameters["E"].value, 6), round(fit.parameters["alpha"].value, 6)
    ('converged', 2.0, 0.15)
    """
    law = "saturating-power" if floor else "power"
    common, law_of = fit_powers(frame, (x,), loss, run, floor, law, "fit_power", resamples, random_seed)
    return PowerFit(**common, _law=law_of)


# --- the steps --------------------------------------------------------------------------------------------------------


def fit_powers(
    frame: pd.DataFrame,
    columns: tuple[str, ...],
    loss: str,
    run: str | None,
    floor: bool,
    law: str,
    caller: str,
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], PowerLaw | None]:
    """What every fit here has, by name, and the law unless the data allow none."""
    require_resamples(resamples, caller)
    points = read_points(frame, columns, loss, run, caller)
    terms = " + ".join(f"{a} {column}^-{b}" for (a, b), column in zip(SYMBOLS, columns, strict=False))
    conventions = {
        "columns": dict(zip((b for _, b in SYMBOLS), columns, strict=False)),
        "loss": loss,
        "form": f"loss = {'E + ' if floor else ''}{terms}",
        "objective": f"sum over rows of Huber(log fitted loss - log loss), delta {DELTA:g}, natural logarithms",
        "admissible": f"exponents {ALPHA[0]:g} to {ALPHA[1]:g}, coefficients and floor not negative",
        "flops": "C = 6 N D with the columns' own way of counting parameters",
        "runs": int(points.clusters_N.max(initial=-1)) + 1,
        **of_bootstrap(run, resamples, seed),
    }
    common: dict[str, Any] = {"law": law, "columns": columns, "rows": points.rows, "conventions": conventions}
    refusal = _refusal(points, columns, floor)
    if refusal:
        return common | {"status": refusal[0], "message": points.with_left_out(refusal[1])}, None
    log_x_TN = np.log(points.x_TN)
    mean_T = log_x_TN.mean(1)
    model = PowerSum(log_x_TN - mean_T[:, None], np.log(points.y_N / points.level), floor)
    w_BN = resampled_weights(points.clusters_N, resamples, np.random.default_rng(seed))
    data, draws = fit_all(model, w_BN)
    fitted = PowerLaw(model, mean_T, np.vstack([data.theta_BK, draws.theta_BK]), points)
    rest_N = model.log_y_N - model.log_value(data.theta_BK, model.log_x_TN)[0]
    status, message = _verdict(fitted, data, draws, columns, rest_N)
    table = fitted.table()
    return common | {
        "_points": points,
        "status": status,
        "message": points.with_left_out(message),
        "parameters": {name: Estimate.of(values) for name, values in table.items()},
        "covariance": covariance_of(table),
        "objective": float(data.objective_B[0]),
        "scatter": float(np.sqrt(np.mean(rest_N**2))),
    }, fitted


def _refusal(points: Points, columns: Sequence[str], floor: bool) -> tuple[Status, str] | None:
    """Why no law can be fitted, or None."""
    refusal = points.refusal()
    if refusal:
        return refusal
    least = 2 * len(columns) + floor + 1
    if len(points.y_N) < least:
        return (
            Status.TOO_FEW_POINTS,
            f"{len(points.y_N)} rows; {least - 1} parameters need at least {least}: train more sizes.",
        )
    runs = int(points.clusters_N.max()) + 1
    if runs < LEAST_RUNS:
        return Status.TOO_FEW_POINTS, f"{runs} runs to draw from; an interval needs at least {LEAST_RUNS}: train more."
    for column, x_N in zip(columns, points.x_TN, strict=True):
        sizes, needed = distinct(x_N), 3 if floor else 2
        span = x_N.max() / x_N.min()
        if sizes < needed or span < LEAST_SPAN:
            few = f"`{column}` has {sizes} distinct value(s) and spans a factor of {span:.4g}"
            needs = (
                f"its power needs at least {needed}, of which those within 1% count once, and a factor of {LEAST_SPAN}"
            )
            return Status.TOO_FEW_POINTS, f"{few}; {needs}: train other sizes, or leave this column out."
    log_x_NT = np.log(points.x_TN.T)
    spread_T = np.linalg.svd((log_x_NT - log_x_NT.mean(0)) / log_x_NT.std(0), compute_uv=False)
    if spread_T[-1] < 1e-2 * spread_T[0]:
        return (
            Status.TOO_FEW_POINTS,
            f"{' and '.join(columns)} move together, so their terms cannot be told apart: train at other ratios.",
        )
    return None


def _verdict(law: PowerLaw, data: Minimum, draws: Minimum, columns: Sequence[str], rest_N: Array) -> tuple[Status, str]:
    """The status of a fit and what there is to doubt about it.

    Args:
        rest_N: log loss less that of the law.
    """
    low_K, high_K = law.model.bounds()
    at_low_BK, at_high_BK, flat_BT = law.theta_BK <= low_K, law.theta_BK >= high_K, law.flat()
    t, ends = law.model.terms, []
    for i, column in enumerate(columns):
        name = SYMBOLS[i][1]
        rises = t == 1 and float(law.model.log_x_TN[0] @ law.model.log_y_N) > 0
        ends.append((flat_BT[:, i], f"the loss {'rises' if rises else 'does not fall'} with {column}"))
        ends.append((at_low_BK[:, i - t] & ~flat_BT[:, i], f"{name} stopped at {ALPHA[1]:g}, the end of its range"))
        ends.append((at_high_BK[:, i - t] & ~flat_BT[:, i], f"{name} stopped at {ALPHA[0]:g}, the end of its range"))
    if law.model.floor:
        ends.append((at_low_BK[:, t], "no floor shows: E stopped at 0"))
    runs = int(law.points.clusters_N.max()) + 1
    status, message = verdict(data, draws, ends, "Train over a wider range or fit a law without that term.", runs)
    if status is Status.CONVERGED and _least_curvature(law) < LEVEL:
        words = "other parameters fit as well: train more sizes, or average the repeats of a size first."
        status, message = Status.NO_INTERIOR_MINIMUM, f"{words} {message}".strip()
    free_K = (law.theta_BK[0] > low_K) & (law.theta_BK[0] < high_K)
    slopes_NK = slopes_of(lambda theta_RK: law.model.log_value(theta_RK, law.model.log_x_TN), law.theta_BK[0], free_K)
    return with_scatter(status, message, *judge_scatter(law.points, rest_N, slopes_NK))


def _least_curvature(law: PowerLaw) -> float:
    """Of the objective at a minimum inside the bounds, relative to the diagonal of the Hessian."""
    h_KK = law.model.derivatives(law.theta_BK[:1], np.ones((1, len(law.model.log_y_N))))[2][0]
    scale_K = np.sqrt(np.abs(np.diag(h_KK)) + 1e-300)
    return float(np.linalg.eigvalsh(h_KK / np.outer(scale_K, scale_K))[0])


def with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({percent()} interval {estimate.low:.3f} to {estimate.high:.3f})"
