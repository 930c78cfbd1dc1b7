"""Where along the share of routed experts the loss is least, how sure that is, and which shares cannot be told from the best.

From a table of runs to a frozen `AllocationFit`. The order of the work: take the seed effects off (`noise`), fit every law to the share
means (`laws`), keep the law that predicts left-out shares best, and repeat all of that on resamples for the intervals.

Knows no file and no study: any DataFrame with a share, a loss and a seed a row will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.laws import Law, Quadratic, TwoPower
from analysis.fits.noise import SeedModel, aicc, lack_of_fit, resample, seed_model, tied_with_best
from analysis.fits.runs import Runs, read_shares
from analysis.fits.types import Estimate, Status, plain

Array = np.ndarray
LawName = Literal["auto", "quadratic", "two-power"]
LEAST_SHARES = 4


@dataclass(frozen=True)
class Candidate:
    """One law as fitted to the same runs, reported whether or not it was chosen."""

    law: str
    left_out_error: float | None
    """Root mean square error of the loss predicted for each inner share when it is left out, nats per token."""
    aicc: float | None
    """Akaike's criterion with the small-sample correction over runs, seed effects counted; None where too few runs allow it."""
    argmin: float | None
    note: str = ""


@dataclass(frozen=True)
class _Curves:
    """The fitted curves: row 0 is that of the data, the others those of the resamples. Every row chose a law of its own."""

    laws: tuple[Law, ...]
    theta: tuple[Array, ...]
    """Parameters under each law -> [B, K]."""
    chosen_B: Array
    """Index of the law of each row."""

    def at(self, x_X: Array) -> Array:
        """Loss of each row's curve -> [B, X]."""
        return self._own([law.value(x_X, theta) for law, theta in zip(self.laws, self.theta, strict=True)])

    def best(self, low: float, high: float) -> tuple[Array, Array]:
        """Share of the least loss of each row, an end of the range where none is inside -> [B]; and whether it is inside -> bool [B]."""
        vertex_B = self._own([law.vertex(theta, low, high) for law, theta in zip(self.laws, self.theta, strict=True)])
        ends_B2 = self.at(np.array([low, high]))
        return np.where(np.isnan(vertex_B), np.where(ends_B2[:, 0] <= ends_B2[:, 1], low, high), vertex_B), ~np.isnan(vertex_B)

    def _own(self, values: list[Array]) -> Array:
        return np.stack(values)[self.chosen_B, np.arange(len(self.chosen_B))]


@dataclass(frozen=True)
class AllocationFit:
    """An allocation curve with its status. Intervals are 95% percentile intervals over resamples; losses are in nats per token."""

    status: Status
    message: str
    """What the status means here and what to do about it; '' when there is nothing to doubt."""
    law: str
    shares: tuple[float, ...]
    seeds: int
    rows: tuple[str, ...]
    """Trial ids (or index labels) used."""
    conventions: dict[str, Any]
    parameters: dict[str, Estimate] = field(default_factory=dict)
    argmin: Estimate | None = None
    """Share at the least loss of the curve; None unless an interior minimum was found."""
    best_end: float | None = None
    """The sampled end that wins, when there is no interior minimum."""
    loss_at_best: Estimate | None = None
    depth: Estimate | None = None
    """Loss of the curve at share 1 less that at the argmin (or at the end that wins); None when share 1 was not sampled."""
    p_interior: float | None = None
    """Part of the resamples whose minimum is inside the sampled range, more than 1% of it away from the ends."""
    tied: tuple[float, ...] = ()
    """Sampled shares that may be the best: Gupta's subset at 95% joint confidence, on paired differences with pooled noise."""
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    seed_sd: float | None = None
    """Standard deviation between the seeds of one share, pooled over shares, nats per token."""
    depth_over_noise: float | None = None
    """depth / paired_sd."""
    lack_of_fit_p: float | None = None
    """Chance of so poor a fit of the share means if the law were true (F test against the paired noise)."""
    objective: float | None = None
    """Weighted sum of squares of the share means around the curve; a weight is the number of runs that a mean is worth."""
    candidates: tuple[Candidate, ...] = ()
    means: tuple[float, ...] = ()
    """Loss of each share for the average seed; empty without a curve."""
    _curves: _Curves | None = field(default=None, repr=False, compare=False)

    def predict(self, x: Any) -> pd.DataFrame:
        """The curve with its pointwise 95% band -> columns x, loss, low, high. What moves all shares of a seed alike is not in the band.

        Raises:
            AnalysisError: no curve was fitted, or an x lies outside the sampled range.
        """
        x_X = np.atleast_1d(np.asarray(x, float))
        if self._curves is None:
            raise AnalysisError(f"this fit has no curve: {self.status}. {self.message}")
        low, high = self.shares[0], self.shares[-1]
        if not ((x_X >= low) & (x_X <= high)).all():
            raise AnalysisError(
                f"a share in {x_X.tolist()} lies outside the sampled range {low:g} to {high:g}; train trials there to say more"
            )
        curves_BX = self._curves.at(x_X)
        bounds = np.quantile(curves_BX[1:], (0.025, 0.975), axis=0)
        return pd.DataFrame({"x": x_X, "loss": curves_BX[0], "low": bounds[0], "high": bounds[1]})

    def argmin_draws(self) -> Array:
        """Share at the least loss in every resample, the winning end where none is inside -> [resamples]. Empty without a fit."""
        return self._curves.best(self.shares[0], self.shares[-1])[0][1:] if self._curves else np.zeros(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: law, status, parameters, objective, rows and conventions first, then everything else."""
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        head = ("law", "status", "message", "parameters", "objective", "rows", "conventions", "argmin")
        return {name: plain(kept[name]) for name in (*head, *(name for name in kept if name not in head))}

    def summary(self, noun: str = "share") -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them.

        Args:
            noun: what the shares are called.
        """
        lines = []
        if self.argmin:
            value, low, high = (f"{share:.2f}" for share in (self.argmin.value, self.argmin.low, self.argmin.high))
            lines.append(f"The loss is least at a {noun} of {value} (95% interval {low} to {high}; {self.law} curve).")
        elif self.best_end is not None and (self.p_interior or 0) < 0.5:
            lines.append(f"No minimum inside the sampled {noun}s: the loss is least at the end {self.best_end:.2f}.")
        elif self.best_end is not None:
            lines.append(f"A minimum inside the sampled {noun}s is not established; of their ends, {self.best_end:.2f} has the lower loss.")
        if self.depth and self.best_end != self.shares[-1]:
            there = "That is" if self.argmin else "That end is"
            size = f"{abs(self.depth.value):.4f} nats/token {'lower' if self.depth.value >= 0 else 'higher'} than at {noun} 1"
            unsure = " and may be no difference" if self.depth.low <= 0 <= self.depth.high else ""
            lines.append(f"{there} {size} (95% interval of the gain {self.depth.low:.4f} to {self.depth.high:.4f}{unsure}).")
        if self.tied and len(self.tied) == len(self.shares):
            lines.append(f"All sampled {noun}s are statistically tied.")
        elif len(self.tied) > 1:
            gaps = any(min(self.tied) < share < max(self.tied) and share not in self.tied for share in self.shares)
            which = ", ".join(f"{share:.2f}" for share in self.tied) if gaps else f"{min(self.tied):.2f} to {max(self.tied):.2f}"
            lines.append(f"Statistically tied with the best: {which}.")
        if self.paired_sd is not None:
            lines.append(f"Noise of one run once its seed's common effect is off: {self.paired_sd:.4f} nats/token (sd).")
        if self.message:
            lines.append(f"{'Caution' if self.status is Status.CONVERGED else f'Status {self.status}'}: {self.message}")
        return " ".join(lines)


def fit_allocation(
    frame: pd.DataFrame,
    x: str = "share_moe",
    loss: str = "val_loss",
    seed: str = "seed",
    law: LawName = "auto",
    *,
    resamples: int = 2000,
    random_seed: int = 0,
) -> AllocationFit:
    """Fit loss against share.

    Args:
        frame: one run a row, all with the same budget. A column `trial_id` names the rows used; of a column `status` only `finished` is.
            Rows without a share (the dense baseline) are left out.
        x: column of the share of the sparse parameters in routed experts, in [0, 1].
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across shares.
        law: `auto` keeps the law with the least left-out error, and every resample chooses again.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a share is outside [0, 1], a trial id is repeated, one seed stands twice at one
            share, or the law is unknown.
    """
    laws = _laws(law)
    runs = read_shares(frame, (x,), loss, seed, "fit_allocation")
    x_N = runs.x_NK[:, 0]
    conventions = {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "interval": "95% percentile",
        "noise": "residuals of runs after share and seed effects",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed effects taken off again",
        "resamples": resamples,
        "random_seed": random_seed,
        "choice_of_law": "least left-out error over inner shares, chosen anew in every resample" if law == "auto" else f"{law}, as asked",
        "band": "pointwise, without what moves all shares of a seed alike",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }
    shares = np.unique(x_N)
    common: dict[str, Any] = {
        "shares": tuple(map(float, shares)),
        "seeds": len(np.unique(runs.seeds_N)),
        "rows": runs.rows,
        "conventions": conventions,
    }
    refusal = _refusal(shares, runs)
    laws = tuple(each for each in laws if len(shares) >= each.least_shares)
    if refusal is None and not laws:
        refusal = (
            Status.TOO_FEW_POINTS,
            f"{len(shares)} distinct shares are too few for the {law} law: train more shares or ask for 'quadratic'.",
        )
    if refusal is not None:
        return AllocationFit(status=refusal[0], message=refusal[1], law=law, **common)

    rng = np.random.default_rng(random_seed)
    model = seed_model(x_N, runs.y_N, runs.seeds_N)
    weights_I = 1 / np.diag(model.covariance_II)
    sd, df = model.sd, model.df
    if df == 0:  # nothing repeated: take the residuals around the most flexible law as noise, and say so
        residual_I = model.mean_I - laws[-1].value(model.x_I, laws[-1].fit(model.x_I, weights_I, model.mean_I[None]))[0]
        df = max(1, len(model.x_I) - len(laws[-1].parameters))
        sd = float(np.sqrt(np.sum(weights_I * residual_I**2) / df))
        conventions["noise"] = f"nothing is repeated: residuals around the {laws[-1].name} curve stand in for it"
    y_BI = np.vstack([model.mean_I, resample(model, sd, df, resamples, rng)])
    theta = tuple(each.fit(model.x_I, weights_I, y_BI) for each in laws)
    errors_LB = np.stack([_left_out_error(each, model.x_I, weights_I, y_BI) for each in laws])
    curves = _Curves(laws, theta, errors_LB.argmin(0))
    winner, theta_BK = laws[curves.chosen_B[0]], theta[curves.chosen_B[0]]
    low, high = float(shares[0]), float(shares[-1])
    best_B, inside_B = curves.best(low, high)
    p_interior = float(inside_B[1:].mean())
    tied_I = tied_with_best(model, sd, df, rng)
    interior = bool(inside_B[0]) and p_interior >= (0.95 if tied_I.all() else 0.5)
    end = float(best_B[0]) if not inside_B[0] else low if model.mean_I[0] <= model.mean_I[-1] else high
    at_best_B, at_high_B = curves.at(np.array([best_B[0] if interior else end, high])).T
    depth = Estimate.of(at_high_B[0] - at_best_B[0], at_high_B[1:] - at_best_B[1:]) if high > 0.995 else None
    objective = float(np.sum(weights_I * (model.mean_I - winner.value(model.x_I, theta_BK[:1])[0]) ** 2))
    lack = lack_of_fit(model, objective, len(winner.parameters))
    status, message = _verdict(
        winner, theta_BK[0], best_B[0] if inside_B[0] else None, interior, end, p_interior, tied_I, lack, model, common["seeds"]
    )
    candidates = zip(laws, theta, errors_LB[:, 0], strict=True)
    return AllocationFit(
        status=status,
        message=message,
        law=winner.name,
        parameters={name: Estimate.of(theta_BK[0, k], theta_BK[1:, k]) for k, name in enumerate(winner.parameters)},
        argmin=Estimate.of(best_B[0], best_B[1:]) if interior else None,
        best_end=None if interior else end,
        loss_at_best=Estimate.of(at_best_B[0], at_best_B[1:]),
        depth=depth,
        p_interior=p_interior,
        tied=tuple(map(float, shares[tied_I])),
        paired_sd=model.sd if model.df else None,
        seed_sd=model.spread if math.isfinite(model.spread) else None,
        depth_over_noise=depth.value / model.sd if depth and model.df and model.sd > 0 else None,
        lack_of_fit_p=lack,
        objective=objective,
        candidates=tuple(_candidate(each, own[0], float(error), model, weights_I, common["seeds"]) for each, own, error in candidates),
        means=tuple(map(float, model.mean_I)),
        _curves=curves,
        **common,
    )


# --- the steps --------------------------------------------------------------------------------------------------------------


def _laws(name: str) -> tuple[Law, ...]:
    laws: tuple[Law, ...] = (Quadratic(), TwoPower())
    if name not in ("auto", *(each.name for each in laws)):
        raise AnalysisError(f"unknown law {name!r}; known: auto, {', '.join(each.name for each in laws)}")
    return laws if name == "auto" else tuple(each for each in laws if each.name == name)


def _left_out_error(law: Law, x_I: Array, w_I: Array, y_BI: Array) -> Array:
    """Root mean square error over the inner shares, each predicted from all others -> [B]; an end left out would ask for extrapolation."""
    squares_B = np.zeros(len(y_BI))
    for i in range(1, len(x_I) - 1):
        kept = np.arange(len(x_I)) != i
        theta_BK = law.fit(x_I[kept], w_I[kept], y_BI[:, kept], polish=False)  # only to choose a law
        squares_B += (law.value(x_I[i : i + 1], theta_BK)[:, 0] - y_BI[:, i]) ** 2
    return np.sqrt(squares_B / (len(x_I) - 2))


def _refusal(shares: Array, runs: Runs) -> tuple[Status, str] | None:
    """Why no curve can be fitted, or None."""
    bad = runs.unusable()
    if bad:
        return Status.NOT_FINITE, f"the loss of {bad} is not a number or is negative: leave such runs out and say so, or repeat them."
    if len(shares) < LEAST_SHARES:
        return Status.TOO_FEW_POINTS, f"{len(shares)} distinct shares; a curve needs at least {LEAST_SHARES}: train more shares."
    if np.ptp(runs.y_N) == 0:
        return Status.NO_INTERIOR_MINIMUM, "all losses are equal, so no share is better than another: check that the runs differ."
    return None


def _verdict(
    law: Law,
    theta_K: Array,
    vertex: float | None,
    interior: bool,
    end: float,
    p_interior: float,
    tied_I: Array,
    lack: float | None,
    model: SeedModel,
    seeds: int,
) -> tuple[Status, str]:
    """The status of a fitted curve and what there is to doubt about it; the last status set is the gravest."""
    status, doubts = Status.CONVERGED, []
    bound = law.at_bound(theta_K)
    if bound:
        status = Status.BOUND_HIT
        doubts.append(f"the {law.name} curve stopped at the end of its admissible range ({bound}); compare the other law.")
    if not interior:
        status = Status.NO_INTERIOR_MINIMUM
        if vertex is None:
            doubts.append(f"the loss falls all the way to {end:.2f}; " + ("nothing lies beyond." if end in (0, 1) else "sample beyond it."))
        else:
            doubts.append(f"the curve turns at {vertex:.2f}, but only {p_interior:.0%} of the resamples have their minimum inside.")
    elif p_interior < 0.95:
        doubts.append(f"only {p_interior:.0%} of the resamples have their minimum inside the sampled range.")
    if tied_I.all():
        doubts.append("no sampled share can be told from the best: train more seeds.")
    if lack is not None and lack < 0.01:
        doubts.append(
            f"the curve misses the share means by more than noise explains (p = {lack:.1g}): trust the tied shares before the argmin."
        )
    if seeds < 2 or model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append("no repeats, so seed noise is not measured and the residuals around the curve stand in for it: train a second seed.")
    return status, " ".join(doubts)


def _candidate(law: Law, theta_K: Array, error: float, model: SeedModel, weights_I: Array, seeds: int) -> Candidate:
    vertex = float(law.vertex(theta_K[None], model.x_I[0], model.x_I[-1])[0])
    squares = float(np.sum(weights_I * (model.mean_I - law.value(model.x_I, theta_K[None])[0]) ** 2))
    score = aicc(model, squares, len(law.parameters), seeds)
    return Candidate(law.name, error, score, None if math.isnan(vertex) else vertex, law.at_bound(theta_K))
