"""Where along the share of routed experts the loss is least, how sure that is, and which shares cannot be told from the
best.

From a table of runs to a frozen `AllocationFit`. The order of the work: take the seed effects off (`noise`), fit every
law to the share means (`laws`), choose one (`_scores`), and repeat all of that on resamples for the intervals.

Knows no file and no study: any DataFrame with a share, a loss and a seed a row will do.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fits.allocation_result import AllocationFit, Candidate, Curves
from analysis.fits.laws import Akima, Cubic, Law, Quadratic, TwoPower
from analysis.fits.noise import (
    Noise,
    SeedModel,
    aicc,
    aiccs,
    cps,
    lack_of_fit,
    lack_of_fits,
    noisier,
    resample,
    seed_model,
    tied_with_best,
    unrepeated,
)
from analysis.fits.runs import (
    Runs,
    read_shares,
    refused_losses,
    require_apart,
    require_one_budget,
    require_resamples,
    same_losses,
    same_seeds,
)
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status

Array = np.ndarray
LawName = Literal["auto", "quadratic", "cubic", "two-power", "akima"]
LAWS: tuple[Law, ...] = (Quadratic(), Cubic(), TwoPower(), Akima())
LEAST_SHARES = 4
DIGITS = 1e-7  # part of a loss that single precision resolves: smaller deviations refute no law


@takes_level
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
        frame: one run a row, all with the same budget. A column `trial_id` names the rows used; of a column `status`
            only `finished` is. Rows without a share (the dense baseline) are left out.
        x: column of the share of the sparse parameters in routed experts, in [0, 1].
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across shares.
        law: `auto` chooses among all laws (`_scores`), and every resample chooses again.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a share is outside [0, 1], a trial id is repeated, one seed
            stands twice at one share, the runs are of several budgets, or the law is unknown.
    """
    laws = _laws(law)
    runs = read_shares(frame, (x,), loss, seed, "fit_allocation")
    require_one_budget(frame, x, "fit_allocation")
    shares = np.unique(runs.x_NK)
    common: dict[str, Any] = {
        "shares": tuple(map(float, shares)),
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": _conventions(x, loss, law, resamples, random_seed),
        "_runs": runs,
    }
    require_resamples(resamples, "fit_allocation")
    require_apart(shares, "fit_allocation")
    refusal = _refusal(shares, runs)
    laws = tuple(each.on(shares) for each in laws if len(shares) >= each.least_shares)
    if refusal is None and not laws:
        refusal = (
            Status.TOO_FEW_POINTS,
            f"{len(shares)} distinct shares are too few for the {law} law: train more shares or ask for 'quadratic'.",
        )
    if refusal is not None:
        return AllocationFit(status=refusal[0], message=refusal[1], law=law, **common)

    return _estimate(runs, shares, laws, common, resamples, np.random.default_rng(random_seed))


# --- the steps --------------------------------------------------------------------------------------------------------


_CHOICE = (
    "least Cp (Mallows, with the paired noise; AICc where nothing is repeated) among the laws that the noise does not "
    f"refute (p > {REFUTED}); where it refutes all, least left-out error"
)


def _conventions(x: str, loss: str, law: str, resamples: int, random_seed: int) -> dict[str, Any]:
    return {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "interval": f"{percent()} percentile",
        "noise": "residuals of runs after share and seed effects, pooled; a share that scatters more (Cochran's test, "
        "5%) is named",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed "
        "effects taken off again",
        "resamples": resamples,
        "random_seed": random_seed,
        "objective": "weighted sum of squares of the share means around the curve; a weight is the number of runs that "
        "a mean is worth",
        "choice_of_law": f"{_CHOICE}, chosen anew in every resample" if law == "auto" else f"{law}, as asked",
        "band": "pointwise, without what moves all shares of a seed alike",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }


def _estimate(
    runs: Runs, shares: Array, laws: tuple[Law, ...], common: dict[str, Any], resamples: int, rng: np.random.Generator
) -> AllocationFit:
    x_N, seeds = runs.x_NK[:, 0], common["seeds"]
    model = seed_model(x_N, runs.y_N, runs.seeds_N)
    weights_I = 1 / np.diag(model.covariance_II)
    noise = model.noise(lambda: _leftover(model, weights_I, common["conventions"]))
    y_BI = np.vstack([model.mean_I, resample(model, noise, resamples, rng)])
    theta = tuple(each.fit(model.x_I, weights_I, y_BI) for each in laws)
    settled_B = np.logical_and.reduce(
        [each.settled(model.x_I, weights_I, y_BI, own) for each, own in zip(laws, theta, strict=True)]
    )
    squares_LB = np.stack([_squares(each, own, model, weights_I, y_BI) for each, own in zip(laws, theta, strict=True)])
    chosen_B, left_out_LI = _choice(laws, model, weights_I, y_BI, squares_LB, seeds)
    curves = Curves(laws, theta, chosen_B)
    winner, theta_BK = laws[curves.chosen_B[0]], theta[curves.chosen_B[0]]
    low, high = float(shares[0]), float(shares[-1])
    best_B, inside_B = curves.best(low, high)
    p_interior = float(inside_B[1:].mean())
    tied_I = tied_with_best(model, noise, rng)
    louder = tuple(map(float, shares[noisier(x_N, runs.y_N, runs.seeds_N, rng)])) if model.df else ()
    interior = bool(inside_B[0]) and p_interior >= (0.95 if tied_I.all() else 0.5)
    end = float(best_B[0]) if not inside_B[0] else low if model.mean_I[0] <= model.mean_I[-1] else high
    along_X = np.diff(curves.at(np.linspace(low, high, 101))[0]) * (1 if end == high else -1)
    falls = bool(np.all(along_X <= 0))
    at_best_B, at_high_B = curves.at(np.array([best_B[0] if interior else end, high])).T
    depth = Estimate.of(at_high_B - at_best_B) if high > 0.995 else None
    objective = float(squares_LB[curves.chosen_B[0], 0])
    lack = lack_of_fit(model, objective, len(winner.parameters))
    vertex, refuted = best_B[0] if inside_B[0] else None, winner.name == Akima.name and len(laws) > 1
    status, message = _verdict(
        winner,
        theta_BK[0],
        vertex,
        interior,
        end,
        falls,
        p_interior,
        tied_I,
        lack,
        refuted,
        louder,
        model,
        seeds,
    )
    if not settled_B.all():
        unsettled = f"{np.sum(~settled_B)} of {len(settled_B)} resamples did not settle; they are kept as they are."
        message = f"{message} {unsettled}".strip()
    candidates = zip(laws, (each[0] for each in theta), squares_LB[:, 0], left_out_LI, strict=True)
    return AllocationFit(
        status=status,
        message=message,
        law=winner.name,
        parameters={name: Estimate.of(theta_BK[:, k]) for k, name in enumerate(winner.parameters)},
        covariance=tuple(map(tuple, np.cov(theta_BK[1:].T).tolist())),
        argmin=Estimate.of(best_B) if interior else None,
        best_end=None if interior else end,
        loss_at_best=Estimate.of(at_best_B),
        depth=depth,
        p_interior=p_interior,
        tied=tuple(map(float, shares[tied_I])),
        paired_sd=model.paired_sd,
        seed_sd=model.spread if math.isfinite(model.spread) else None,
        depth_over_noise=depth.value / model.sd if depth and model.df and model.sd > 0 else None,
        lack_of_fit_p=lack,
        objective=objective,
        candidates=tuple(_candidate(*each, model, seeds) for each in candidates),
        unsettled=int((~settled_B[1:]).sum()),
        means=tuple(map(float, model.mean_I)),
        _curves=curves,
        **common,
    )


def _leftover(model: SeedModel, weights_I: Array, conventions: dict[str, Any]) -> Noise:
    """The residuals around the most flexible law that leaves any, in place of noise; `conventions` then say so."""
    loosest = [each for each in LAWS[:3] if len(model.x_I) >= each.least_shares][-1]
    residual_I = model.mean_I - loosest.value(model.x_I, loosest.fit(model.x_I, weights_I, model.mean_I[None]))[0]
    df = len(model.x_I) - len(loosest.parameters)
    conventions["noise"] = f"nothing is repeated: residuals around the {loosest.name} curve stand in for it"
    return Noise(float(np.sqrt(np.sum(weights_I * residual_I**2) / df)), df)


def _choice(
    laws: tuple[Law, ...], model: SeedModel, weights_I: Array, y_BI: Array, squares_LB: Array, seeds: int
) -> tuple[Array, Array]:
    """Index of the law of each row -> [B]; and the losses that each law predicts for the data's inner shares from all
    others -> [L, I - 2].
    """
    score_LB = _scores(laws, model, squares_LB, seeds)
    chosen_B, refuted_B = score_LB.argmin(0), np.isinf(score_LB).all(0)
    # the data first; left-out losses decide nothing for the other rows unless all laws are refuted there
    asked_A = np.flatnonzero(refuted_B | (np.arange(len(y_BI)) == 0))
    left_out_LAI = np.stack([_left_out(each, model.x_I, weights_I, y_BI[asked_A]) for each in laws])
    errors_LA = np.sqrt(np.mean((left_out_LAI - y_BI[asked_A, 1:-1]) ** 2, axis=2))
    chosen_B[refuted_B] = errors_LA.argmin(0)[refuted_B[asked_A]]
    return chosen_B, left_out_LAI[:, 0]


def _laws(name: str) -> tuple[Law, ...]:
    if name not in ("auto", *(each.name for each in LAWS)):
        raise AnalysisError(f"unknown law {name!r}; known: auto, {', '.join(each.name for each in LAWS)}")
    return LAWS if name == "auto" else tuple(each for each in LAWS if each.name == name)


def _scores(laws: tuple[Law, ...], model: SeedModel, squares_LB: Array, seeds: int) -> Array:
    """Cp of each law in each row, infinite where the noise refutes it -> [L, B]. The least is used; where all are
    refuted, the law with the least left-out error.

    A resample has the noise of the study and its own, so half of its squares count. In 60 simulated studies each (two
    seeds) the 95% interval of the optimum held the truth in 93 to 97% at 8 shares (a parabola, a cubic, a two-power
    curve), in 90 to 93% at 6 and in 97 to 100% at 5. AICc takes a parabola for 4 + 0.15 (x - 0.6)^2 - 0.1 (x - 0.6)^3
    at 5 shares and noise 0.003, whatever the data say: its interval held the truth in 48%, that by Cp in 97% (at 6
    shares 85% and 92%). Left-out error alone took a parabola (noise a fifteenth of its depth) for another law in half
    of the studies, mostly for Akima's curve, and its interval was 3 times as wide. For a curve outside all laws, 4 +
    0.1 |x - 0.3|^1.3, the interval held the truth in 95% at noise 0.01, where its form cannot be seen, but in 75% at
    0.003 (by AICc without the test for lack of fit and the halving, in 66%): trust the tied shares there.
    """
    runs, floor = model.counts_I.sum(), (DIGITS * np.abs(model.mean_I).max()) ** 2
    squares_LB = squares_LB * np.where(np.arange(squares_LB.shape[1]), 0.5, 1.0) + runs * floor
    score_LB = []
    for law, squares_B in zip(laws, squares_LB, strict=True):
        count, interpolates = len(law.parameters), len(law.parameters) >= len(model.mean_I)
        sd = math.sqrt(model.sd**2 + runs * floor)
        holds_B = lack_of_fits(model, squares_B, count, sd) > REFUTED
        scores_B = cps(squares_B, count, sd) if model.df else aiccs(model, squares_B, count, seeds)
        score_LB.append(np.where(holds_B & (not interpolates), scores_B, np.inf))
    return np.stack(score_LB)


def _left_out(law: Law, x_I: Array, w_I: Array, y_BI: Array) -> Array:
    """Loss of each inner share predicted from all others -> [B, I - 2]; an end left out would ask for extrapolation."""
    predicted = []
    for i in range(1, len(x_I) - 1):
        kept = np.arange(len(x_I)) != i
        own = law.on(x_I[kept])
        theta_BK = own.fit(x_I[kept], w_I[kept], y_BI[:, kept], polish=False)  # only to compare laws
        predicted.append(own.value(x_I[i : i + 1], theta_BK)[:, 0])
    return np.stack(predicted, axis=1)


def _squares(law: Law, theta_BK: Array, model: SeedModel, w_I: Array, y_BI: Array) -> Array:
    return np.asarray(((law.value(model.x_I, theta_BK) - y_BI) ** 2) @ w_I)


def _refusal(shares: Array, runs: Runs) -> tuple[Status, str] | None:
    """Why no curve can be fitted, or None."""
    if refused := refused_losses(runs):
        return refused
    if len(shares) < LEAST_SHARES:
        return (
            Status.TOO_FEW_POINTS,
            f"{len(shares)} distinct shares; a curve needs at least {LEAST_SHARES}: train more shares.",
        )
    if same_losses(runs.y_N):
        return (
            Status.NO_INTERIOR_MINIMUM,
            "all losses are equal, so no share is better than another: check that the runs differ.",
        )
    copied = same_seeds(seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N).sd, runs.y_N)
    return (Status.TOO_FEW_POINTS, copied) if copied else None


def _verdict(
    law: Law,
    theta_K: Array,
    vertex: float | None,
    interior: bool,
    end: float,
    falls: bool,
    p_interior: float,
    tied_I: Array,
    lack: float | None,
    refuted: bool,
    louder: tuple[float, ...],
    model: SeedModel,
    seeds: int,
) -> tuple[Status, str]:
    """The status of a fitted curve and what there is to doubt about it; the last status set is the gravest."""
    status, doubts = Status.CONVERGED, []
    if lack is not None and lack < REFUTED:
        status = Status.POOR_FIT
        doubts.append(
            f"the curve misses the share means by more than noise explains (p = {lack:.1g}): trust the tied shares "
            "before the argmin."
        )
    bound = law.at_bound(theta_K)
    if bound:
        status = Status.BOUND_HIT
        doubts.append(
            f"the {law.name} curve stopped at the end of its admissible range ({bound}); compare the other laws."
        )
    if not interior:
        status = Status.NO_INTERIOR_MINIMUM
        if vertex is None and tied_I.all():
            pass  # said first
        elif vertex is None and tied_I[0] and tied_I[-1]:
            doubts.append(
                "the noise does not tell which end of the sampled shares is better, let alone where the loss is least."
            )
        elif vertex is None and not falls:
            doubts.append("the curve has no minimum between the ends.")
        elif vertex is None:
            doubts.append(
                f"the loss falls all the way to {end:.2f}; "
                + ("nothing lies beyond." if end in (0, 1) else "sample beyond it.")
            )
        else:
            doubts.append(
                f"the curve turns at {vertex:.2f}, but only {p_interior:.0%} of the resamples have their minimum "
                "inside."
            )
    elif p_interior < 0.95:
        doubts.append(f"only {p_interior:.0%} of the resamples have their minimum inside the sampled range.")
    if tied_I.all():
        doubts.insert(0, "no sampled share can be told from the best: train more seeds.")
    if louder:
        which = ", ".join(f"{share:.2f}" for share in louder)
        doubts.append(
            f"the noise is not alike at all shares: {which} scatters more, so the intervals, which pool it, may be too "
            "short."
        )
    if refuted:
        doubts.append(
            "every other law misses the share means by more than noise explains: trust the tied shares before the "
            "argmin."
        )
    if seeds < 2 or model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append(unrepeated("the residuals around the curve stand in for it"))
    return status, " ".join(doubts)


def _candidate(law: Law, theta_K: Array, squares: float, left_out: Array, model: SeedModel, seeds: int) -> Candidate:
    vertex = float(law.vertex(theta_K[None], model.x_I[0], model.x_I[-1])[0])
    interpolates = len(law.parameters) >= len(model.mean_I)
    return Candidate(
        law.name,
        float(np.sqrt(np.mean((left_out - model.mean_I[1:-1]) ** 2))),
        None
        if interpolates or not model.df or model.sd == 0
        else float(cps(np.array([squares]), len(law.parameters), model.sd)[0]),
        None if interpolates else aicc(model, squares, len(law.parameters), seeds),
        lack_of_fit(model, squares, len(law.parameters)),
        None if math.isnan(vertex) else vertex,
        tuple(map(float, left_out)),
        "interpolates: as many parameters as shares, so no AICc" if interpolates else law.at_bound(theta_K),
    )
