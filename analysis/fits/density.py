"""Does density beat size? Loss over a grid of a memory's rows by the rows that one token reads.

The answer is two slopes and their difference: what a doubling of the table gains, and what a doubling of the rows read
gains, in nats per token. They are the slopes of the plane

    L = c - alpha log10(rows) - beta log10(rows read)

averaged over the grid, whether or not the surface is a plane; each is linear in the losses, so its interval is
Student's. Surfaces that bend are fitted beside it, and the simplest whose AICc is within 2 of the least is drawn:

    plane      1, r, k             r, k: log2 of rows and of rows read, from the middle of the grid
    twisted    1, r, k, rk         what a row is worth depends on how many are read
    quadratic  1, r, k, rk, r2, k2

A law with a floor, L = E + A rows^-a read^-b, is left out on purpose. Where a grid moves the loss by a tenth, E and the
exponents of what is above it cannot be separated: E may be anything from far below to just under the least loss. The
exponents reported are those of the whole loss, -d log L / d log rows and -d log L / d log rows read, from the same
plane fitted to log L. They are comparable with each other, not with the exponents of a reducible loss.

Letters: I points, K terms, N runs, X any points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.linear import TIE, LinearFit, fit_linear, left_out_errors, leftover, nested
from analysis.fits.noise import Noise, SeedModel, aicc, lack_of_fit, seed_model, unrepeated
from analysis.fits.runs import (
    LENGTH,
    Runs,
    distinct,
    read_runs,
    refused_losses,
    require_one_budget,
    require_one_size,
    same_losses,
    same_seeds,
)
from analysis.fits.types import REFUTED, Estimate, Fit, noise_of_a_run, with_doubt
from analysis.fits.words import signed
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray
TERMS = {"plane": 3, "twisted": 4, "quadratic": 6}
NAMES = ("c", "r", "k", "r k", "r^2", "k^2")
FINE = 41
"""Steps of the drawn surface along each axis."""
SIZE, READ = np.array([0.0, -1.0, 0.0]), np.array([0.0, 0.0, -1.0])
"""What a doubling gains, as combinations of the plane's parameters."""
EXCHANGE = (0.5, 3.0)
"""Half the table, three times the rows read: 60B parameters with top-768 against 120B with top-256 (UltraMemV2, arXiv
2508.18756).
"""


@dataclass(frozen=True)
class Surface:
    """One surface as fitted to the same runs, reported whether or not it is the one drawn."""

    surface: str
    terms: int
    aicc: float | None
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where too few runs
    allow it.
    """
    left_out_error: float | None
    """Root mean square error of the loss predicted for each point when it is left out, nats per token."""
    lack_of_fit_p: float | None
    """Chance of so poor a fit of the means if the surface were true (F test against the noise)."""
    objective: float
    """Weighted sum of squares of the means around the surface; a weight is the number of runs that a mean is worth."""


@dataclass(frozen=True, kw_only=True)
class DensityFit(Fit):
    """Loss over rows and rows read. Losses and gains are in nats per token; a gain above zero lowers the loss.

    The law is the surface drawn, the simplest whose AICc is within `TIE` of the least; its parameters are the
    coefficients of the terms.
    """

    points: tuple[tuple[float, float], ...]
    """Distinct (rows, rows read)."""
    seeds: int
    means: tuple[float, ...] = ()
    """Loss at each point for the average seed."""
    errors: tuple[float, ...] = ()
    """Standard error of each mean, what moves all points of a seed alike left out; empty where nothing is repeated."""
    size_gain: Estimate | None = None
    """For a doubling of the table, mean over the grid."""
    density_gain: Estimate | None = None
    """For a doubling of the rows read, mean over the grid."""
    advantage: Estimate | None = None
    """density_gain less size_gain: above zero, density beats size, doubling for doubling."""
    exponents: dict[str, Estimate] = field(default_factory=dict)
    """Of the whole loss: `alpha` of the rows, `beta` of the rows read, and `beta - alpha`."""
    exchange: Estimate | None = None
    """Change of the loss by the plane when `EXCHANGE` is made."""
    surfaces: tuple[Surface, ...] = ()
    gain_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest `size_gain` and `density_gain` over the points, by the surface drawn."""
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    noise_df: int = 0
    """Degrees of freedom of `paired_sd`."""
    _drawn: LinearFit | None = field(default=None, repr=False, compare=False)

    @property
    def predictors(self) -> tuple[str, ...]:
        """The columns of the rows and of the rows read, inside the sampled rectangle."""
        return self.conventions["rows"], self.conventions["read"]

    def _predict(self, places: pd.DataFrame) -> dict[str, Array]:
        assert self._drawn
        x_X2, points_I2 = places.to_numpy(float), np.array(self.points)
        low_2, high_2 = points_I2.min(0), points_I2.max(0)
        if not ((x_X2 >= low_2 * (1 - 1e-9)) & (x_X2 <= high_2 * (1 + 1e-9))).all():
            raise AnalysisError(
                f"a point lies outside the sampled rows {low_2[0]:g} to {high_2[0]:g} and rows read {low_2[1]:g} to "
                f"{high_2[1]:g}; train trials there to say more"
            )
        return self._drawn.predict(_design(_logs(x_X2, points_I2), self.law))

    def summary(self) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them."""
        lines = []
        if self.size_gain and self.density_gain and self.advantage and self.exchange:
            (by_reading, reading), (by_size, size) = (
                signed(gain, "lowers", "raises", "it may change nothing")
                for gain in (self.density_gain, self.size_gain)
            )
            lines.append(
                f"A doubling of the rows that a token reads {by_reading} the loss by {reading}; a doubling of the "
                f"table {by_size} it by {size}."
            )
            winner, lead = signed(self.advantage, "density beats size", "size beats density", "")
            if self.advantage.low <= 0 <= self.advantage.high:
                winner = "neither is shown to beat the other"
            lines.append(f"Doubling for doubling, {winner}: they differ by {lead}.")
            alpha, beta = self.exponents["alpha"], self.exponents["beta"]
            lines.append(
                f"Exponents of the loss: {alpha.value:.4f} in the rows ({alpha.low:.4f} to {alpha.high:.4f}), "
                f"{beta.value:.4f} in the rows read ({beta.low:.4f} to {beta.high:.4f})."
            )
            lines.append(
                f"Half the table with three times the rows read changes the loss by {self.exchange.value:+.4f} "
                f"({self.exchange.low:+.4f} to {self.exchange.high:+.4f})."
            )
        if self.gain_ranges and self.law != "plane":
            ranges = {name: f"{low:+.4f} to {high:+.4f}" for name, (low, high) in self.gain_ranges.items()}
            lines.append(
                f"These are means over the grid: the surface bends ({self.law}), and across the grid a doubling gains "
                f"{ranges['density_gain']} by rows read and {ranges['size_gain']} by rows."
            )
        return with_doubt(self.status, self.message, [*lines, *noise_of_a_run(self.paired_sd)])

    def table(self) -> pd.DataFrame:
        """What a figure draws -> series, rows, read, loss, low, high (losses in nats per token).

        Series: `mean` (a point for the average seed, with its paired standard error), `surface` (on a fine grid), `cut`
        (the surface along the rows at each count of rows read, with its 95% band).
        """
        points = pd.DataFrame(self.points, columns=["rows", "read"]).assign(series="mean", loss=self.means)
        if self.errors:
            points = points.assign(low=np.subtract(self.means, self.errors), high=np.add(self.means, self.errors))
        x, y = (np.geomspace(points[name].min(), points[name].max(), FINE) for name in ("rows", "read"))
        named = dict(zip(self.predictors, ("rows", "read"), strict=True))

        def predicted(rows: Array, read: Array) -> pd.DataFrame:
            return self.predict(dict(zip(self.predictors, (rows, read), strict=True))).rename(columns=named)

        surface = predicted(*np.meshgrid(x, y))[["rows", "read", "loss"]].assign(series="surface")
        cuts = [predicted(x, value).assign(series="cut") for value in sorted(points["read"].unique())]
        table = pd.concat([points, surface, *cuts], ignore_index=True)
        return table.reindex(columns=["series", "rows", "read", "loss", "low", "high"])

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: the means and the surface of `table`; empty without a surface."""
        return self.table()[lambda data: data["series"] != "cut"] if self.surfaces else pd.DataFrame()

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        """The surface as contours over the measured means."""
        from analysis.figures.density import draw_fit

        draw_fit(ax, data)


def fit_density(
    frame: pd.DataFrame,
    rows: str = "memory_rows",
    read: str = "memory_rows_read",
    loss: str = "val_loss",
    seed: str = "seed",
) -> DensityFit:
    """Fit loss over rows and rows read.

    Args:
        frame: one run a row, all on the same backbone and budget. A column `trial_id` names the rows used; of a column
            `status` only `finished` is.
        rows: column of the memory's rows.
        read: column of the rows that one token reads.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across points.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a count is not positive, a trial id is repeated, one seed
            stands twice at one point, or the runs are of several lengths or vocabularies.
    """
    runs = read_runs(frame, (rows, read), loss, seed, "fit_density")
    if not (runs.x_NK > 0).all():
        raise AnalysisError(
            f"fit_density: columns `{rows}` and `{read}` must hold positive counts; leave models without memory out"
        )
    require_one_budget(frame, rows, "fit_density", LENGTH)
    require_one_size(frame, [rows, read], rows, "fit_density")
    points_I2, point_N = (
        np.unique(runs.x_NK, axis=0, return_inverse=True) if len(runs.rows) else (np.zeros((0, 2)), np.zeros(0, int))
    )
    common: dict[str, Any] = {
        "points": tuple((float(size), float(reads)) for size, reads in points_I2),
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": _conventions(rows, read, loss),
    }
    refusal = _refusal(runs, points_I2)
    if refusal is not None:
        return DensityFit(status=refusal[0], message=refusal[1], law="plane", **common)

    return _estimate(runs, points_I2, point_N.ravel(), common)


# --- the steps --------------------------------------------------------------------------------------------------------


def _conventions(rows: str, read: str, loss: str) -> dict[str, Any]:
    return {
        "rows": rows,
        "read": read,
        "loss": loss,
        "loss_unit": "nats per token",
        "gains": "nats per token for a doubling, by the plane: mean slopes over the grid",
        "exponents": "of the whole loss, no floor taken off: the plane fitted to the logarithm of the loss",
        "interval": "95%, Student's t",
        "parameters": "nats per token; r, k: log2 of rows and of rows read, from the middle of the points",
        "objective": "weighted sum of squares of the means around the surface; a weight is the number of runs that a "
        "mean is worth",
        "noise": "residuals of runs after point and seed effects",
        "choice_of_surface": f"the simplest whose AICc is within {TIE:g} of the least",
        "band": "pointwise, without what moves all points of a seed alike",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }


def _estimate(runs: Runs, points_I2: Array, point_N: Array, common: dict[str, Any]) -> DensityFit:
    logs_I2 = _logs(points_I2, points_I2)
    model = seed_model(point_N, runs.y_N, runs.seeds_N)
    noise = _noise(model, logs_I2)
    plane = fit_linear(model, _design(logs_I2, "plane"), noise)
    log_model = seed_model(point_N, np.log(runs.y_N), runs.seeds_N)
    log_plane = fit_linear(log_model, _design(logs_I2, "plane"), _noise(log_model, logs_I2))
    fits = {name: fit_linear(model, _design(logs_I2, name), noise) for name in _allowed(logs_I2)}
    surfaces = tuple(_surface(name, fit, model, logs_I2, common["seeds"]) for name, fit in fits.items())
    least = min((each.aicc for each in surfaces if each.aicc is not None), default=0.0)
    drawn = next((each for each in surfaces if each.aicc is not None and each.aicc <= least + TIE), surfaces[0])
    status, message = _verdict(drawn, model, runs)
    kept = fits[drawn.surface]
    combinations = {"alpha": SIZE, "beta": READ, "beta - alpha": READ - SIZE}
    return DensityFit(
        status=status,
        message=message,
        law=drawn.surface,
        parameters={
            name: kept.estimate(unit_K) for name, unit_K in zip(NAMES, np.eye(len(kept.theta_K)), strict=False)
        },
        covariance=nested(kept.covariance_KK),
        objective=drawn.objective,
        means=tuple(map(float, model.mean_I)),
        errors=tuple(map(float, model.sd / np.sqrt(model.counts_I))) if model.df else (),
        size_gain=plane.estimate(SIZE),
        density_gain=plane.estimate(READ),
        advantage=plane.estimate(READ - SIZE),
        exponents={name: log_plane.estimate(along / math.log(2)) for name, along in combinations.items()},
        exchange=plane.estimate(-math.log2(EXCHANGE[0]) * SIZE - math.log2(EXCHANGE[1]) * READ),
        surfaces=surfaces,
        gain_ranges=_gain_ranges(logs_I2, drawn.surface, kept.theta_K),
        paired_sd=model.paired_sd,
        noise_df=model.df,
        _drawn=kept,
        **common,
    )


def _verdict(drawn: Surface, model: SeedModel, runs: Runs) -> tuple[Status, str]:
    """The status of a fitted surface and what there is to doubt about it; the last status set is the gravest."""
    status, doubts = Status.CONVERGED, []
    copied = same_seeds(model.sd, runs.y_N)
    if copied:
        status = Status.TOO_FEW_POINTS
        doubts.append(copied)
    elif drawn.lack_of_fit_p is not None and drawn.lack_of_fit_p < REFUTED:
        status = Status.POOR_FIT
        doubts.append(
            f"the means miss the surface by more than noise explains (p = {drawn.lack_of_fit_p:.1g}): trust the points "
            "first."
        )
    if model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append(unrepeated("the residuals around the plane stand in for it"))
    return status, " ".join(doubts)


def _refusal(runs: Runs, points_I2: Array) -> tuple[Status, str] | None:
    """Why nothing can be fitted, or None."""
    if refused := refused_losses(runs):
        return refused
    equal = same_losses(runs.y_N)
    if equal:
        return Status.TOO_FEW_POINTS, equal
    sizes, reads = (distinct(values) for values in points_I2.T)
    if min(sizes, reads) < 2 or len(points_I2) <= TERMS["plane"] or not _allowed(_logs(points_I2, points_I2)):
        return (
            Status.TOO_FEW_POINTS,
            f"too small a grid (points: {len(points_I2)}, row counts: {sizes}, counts of rows read: {reads}): cross at "
            "least two of each.",
        )
    return None


def _noise(model: SeedModel, logs_I2: Array) -> Noise:
    return model.noise(lambda: leftover(model, _design(logs_I2, "plane")))


def _logs(x_X2: Array, points_I2: Array) -> Array:
    """r and k: log2 of both counts from the middle of the sampled points."""
    return np.log2(x_X2) - np.log2(points_I2).mean(0)


def _design(logs_X2: Array, surface: str) -> Array:
    r, k = logs_X2.T
    return np.stack([np.ones(len(r)), r, k, r * k, r**2, k**2][: TERMS[surface]], axis=1)


def _allowed(logs_I2: Array) -> list[str]:
    """Surfaces that the points determine with at least one to spare."""
    designs = {name: _design(logs_I2, name) for name in TERMS}
    return [
        name for name, terms in TERMS.items() if len(logs_I2) > terms and np.linalg.matrix_rank(designs[name]) == terms
    ]


def _surface(name: str, fit: LinearFit, model: SeedModel, logs_I2: Array, seeds: int) -> Surface:
    errors_I = left_out_errors(model, _design(logs_I2, name))
    return Surface(
        surface=name,
        terms=TERMS[name],
        aicc=aicc(model, fit.squares, TERMS[name], seeds),
        left_out_error=None if np.isnan(errors_I).all() else float(np.sqrt(np.nanmean(errors_I**2))),
        lack_of_fit_p=lack_of_fit(model, fit.squares, TERMS[name]),
        objective=fit.squares,
    )


def _gain_ranges(logs_I2: Array, surface: str, theta_K: Array) -> dict[str, tuple[float, float]]:
    """Least and greatest gain of a doubling over the points, from the slopes of the surface there."""
    r, k = logs_I2.T
    zero, one = np.zeros(len(r)), np.ones(len(r))
    slopes = {"size_gain": [zero, one, zero, k, 2 * r, zero], "density_gain": [zero, zero, one, r, zero, 2 * k]}
    gains = {name: -np.stack(terms[: TERMS[surface]], axis=1) @ theta_K for name, terms in slopes.items()}
    return {name: (float(values.min()), float(values.max())) for name, values in gains.items()}
