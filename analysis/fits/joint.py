"""Whether the best share moves with size, with tokens per activated parameter or with sparsity: one law for the curves
of several budgets.

From a table of runs to a frozen `JointFit`. Every budget keeps a level of its own, so this is a law of the curves'
shape, not of the loss surface. With z the decimal logarithms of those factors that vary (`joint_budgets.FACTORS`), less
their means over the budgets,

    loss = level(budget) + exp(s + s' z) H(x; m + m' z)

    cubic      H = (x - m)^2 + g (x - m)^3          m is the best share itself
    two-power  H = w f_q(x) - (1 - x)^p             f_q and the bounds as in `laws.TwoPower`; w puts the best share at
                                                    (1 + o) / (1 + e^-m) - o, o = 0.1

The depth and the shape (g, or p and q) may always change with every factor; the models differ in which of them move the
optimum (m'). Were the shape common to all budgets, curves that only grow more lopsided would pass for a movement. Cubic
or two-power, whichever has the lesser AICc where everything may move the optimum; the model is chosen by AICc, anew in
every resample.

Letters: B resamples, C budgets, F factors, I means over all budgets, K parameters, X any shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError, require_columns
from analysis.fits.joint_budgets import BUDGET, UNITS, factors_of, named, tell_apart, with_budgets
from analysis.fits.joint_curve import BOUNDS, SOFT
from analysis.fits.joint_findings import (
    alone,
    chances,
    compared,
    determined,
    inside_of,
    left_out_of,
    moved,
    shifts_of,
    verdict,
)
from analysis.fits.joint_law import PRIOR_SD, VALLEYS, Law, Means, aiccs, fit_curve, nested
from analysis.fits.joint_result import JointFit
from analysis.fits.linear import LEVEL
from analysis.fits.newton import SETTLED
from analysis.fits.noise import Noise, SeedModel, resample, seed_model, tie_width, tied_with_best, unrepeated
from analysis.fits.runs import (
    Runs,
    places,
    read_shares,
    refused_losses,
    require_apart,
    require_one_budget,
    require_resamples,
    same_losses,
    same_runs,
    same_seeds,
)
from analysis.fits.types import Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status
from sparsemem.values import listed

Array = np.ndarray
LEAST_SHARES = 4


@takes_level
def fit_joint(
    frame: pd.DataFrame,
    x: str = "share_moe",
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    tokens: str = "tokens",
    total: str = "total_params",
    active: str = "active_params",
    resamples: int = 1000,
    random_seed: int = 0,
) -> JointFit:
    """Fit loss against share at several budgets at once.

    Args:
        frame: one run a row. A budget is what agrees in `BUDGET`; without its columns of sizes, sizes within a factor
            of `MIXED` of the next are of one budget. Its size, tokens per activated parameter and sparsity are medians
            over its runs of `active`, `tokens` / `active` and `total` / `active`; a factor that is the same at all
            budgets stays out and is named. Rows without a share (the dense baseline) are left out, of a column `status`
            only `finished` is used.
        x: column of the share of the sparse parameters in routed experts, in [0, 1].
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across the shares of one budget.
        tokens: column of the training tokens.
        total: column of the total parameters.
        active: column of the activated parameters.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a share is outside [0, 1], a trial id is repeated, or one seed
            stands twice at one share of one budget.
    """
    require_columns(frame.columns, (x, loss, seed, tokens, total, active), "fit_joint")
    require_resamples(resamples, "fit_joint")
    groups, read = _read(frame, x, loss, seed, {"tokens": tokens, "total_params": total, "active_params": active})
    few = [named(key) for (key, _), runs in zip(groups, read, strict=True) if len(np.unique(runs.x_NK)) < LEAST_SHARES]
    kept = [place for place, runs in enumerate(read) if len(np.unique(runs.x_NK)) >= LEAST_SHARES]
    groups, read = [groups[place] for place in kept], [read[place] for place in kept]
    budgets = tuple({name: float(value) for name, value in key.items()} | factors_of(group) for key, group in groups)
    factors, dropped = tell_apart(budgets)
    conventions = _conventions(x, loss, factors, dropped, few, resamples, random_seed)
    common: dict[str, Any] = {
        "rows": tuple(row for runs in read for row in runs.rows),
        "conventions": conventions,
        "budgets": budgets,
        "factors": factors,
    }
    if refused := refused_losses(*read):
        return JointFit(status=refused[0], message=refused[1], law="none", **common)
    seed_models = [seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N) for runs in read]
    refusal = _refusal(budgets, factors, seed_models)
    if refusal:
        return JointFit(status=Status.TOO_FEW_POINTS, message=refusal, law="none", **common)
    copied = [
        same_losses(runs.y_N) or same_seeds(model.sd, runs.y_N) for runs, model in zip(read, seed_models, strict=True)
    ]
    names_N = [named(key) for (key, _), runs in zip(groups, read, strict=True) for _ in runs.rows]
    x_N, seeds_N, y_N = (
        np.concatenate(each) for each in zip(*((runs.x_NK[:, 0], runs.seeds_N, runs.y_N) for runs in read), strict=True)
    )
    copied.append(same_runs(names_N, x_N, seeds_N, y_N))
    if any(copied):
        return JointFit(status=Status.TOO_FEW_POINTS, message=next(filter(None, copied)), law="none", **common)

    return _estimate(read, seed_models, common, resamples, np.random.default_rng(random_seed))


def _read(
    frame: pd.DataFrame, x: str, loss: str, seed: str, sizes: Mapping[str, str]
) -> tuple[list[tuple[dict[str, Any], pd.DataFrame]], list[Runs]]:
    """The budgets by the columns that set them apart, each with its rows; and their runs.

    Args:
        sizes: tokens, total_params, active_params -> their columns.
    """
    frame = frame[frame[x].notna()]
    for name in sizes.values():
        number = pd.to_numeric(frame[name], errors="coerce")
        wrong = np.flatnonzero(~((number > 0) & np.isfinite(number)))
        if len(wrong):
            value = frame[name].iloc[wrong[0]]
            said = repr(value) if isinstance(value, str) else str(value)
            raise AnalysisError(
                f"fit_joint: column `{name}` holds {said} in {places(frame)[wrong[0]]}; a positive number belongs there"
            )
        frame = frame.assign(**{name: number})
    frame = frame.assign(**{name: frame[column] for name, column in sizes.items()})
    frame = with_budgets(frame)
    names = [name for name in BUDGET if name in frame]
    if {"rho", "sparse_params"} <= set(frame):
        frame = frame[frame["rho"].notna() | (frame["sparse_params"] > 0)]
    frame = frame[frame[x].notna() & frame[names].notna().all(axis=1)]
    if "trial_id" in frame and frame["trial_id"].duplicated().any():
        repeated = listed(sorted(map(str, frame["trial_id"][frame["trial_id"].duplicated()].unique())))
        raise AnalysisError(f"fit_joint: trial id {repeated} stands in several rows; keep one of each")
    groups = [(dict(zip(names, key, strict=True)), group) for key, group in frame.groupby(names, sort=True)]
    for key, group in groups:
        require_one_budget(group, x, f"fit_joint, {named(key)}")
    read = [read_shares(group, (x,), loss, seed, f"fit_joint, {named(key)}") for key, group in groups]
    for (key, _), runs in zip(groups, read, strict=True):
        require_apart(np.unique(runs.x_NK), f"fit_joint, {named(key)}")
    return groups, read


def _conventions(
    x: str,
    loss: str,
    factors: tuple[str, ...],
    dropped: dict[str, str],
    few: list[str],
    resamples: int,
    random_seed: int,
) -> dict[str, Any]:
    return {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "factors": {name: UNITS[name] for name in factors},
        "dropped": dropped,
        "budgets_left_out": few,
        "z": "decimal logarithm less its mean over the budgets",
        "objective": "sum of squared deviations of the share means from the law, in units of their noise",
        "settled": f"a further full Newton step would lower half of that by less than {SETTLED:g} of it; unsettled "
        "resamples are counted",
        "starts": f"the {VALLEYS} lowest minima of the data, the best point known, and any lower minimum of another "
        "resample",
        "prior": f"normal, sd {PRIOR_SD:g} in each parameter's own unit: one answer where the data give none",
        "bounds": f"parameters of the shape near {BOUNDS} smoothly, within about {SOFT:.0%} of the range",
        "noise": "residuals of runs after share and seed effects, a level for each budget",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed "
        "effects taken off again",
        "choice_of_model": "least AICc, chosen anew in every resample; cubic or two-power by AICc of the fullest "
        "model, once",
        "moves": f"{percent()} interval of the shift without 0 and F test p < {LEVEL:g} after Holm's correction for "
        "the number of factors, in the fullest model; the budgets' own curves agree",
        "interval": f"{percent()} percentile",
        "resamples": resamples,
        "random_seed": random_seed,
    }


def _estimate(
    read: Sequence[Runs],
    seed_models: Sequence[SeedModel],
    common: dict[str, Any],
    resamples: int,
    rng: np.random.Generator,
) -> JointFit:
    budgets, factors = common["budgets"], common["factors"]
    seeds_C = np.array([len(np.unique(runs.seeds_N)) for runs in read])
    means = _means(
        seed_models, np.log10([[budget[name] for name in factors] for budget in budgets]), seeds_C, resamples, rng
    )
    fullest = determined(means, factors)
    fits = {curve: fit_curve(curve, means) for curve in fullest}
    full = min(fullest, key=lambda curve: (aiccs(curve, fits[curve].theta_BK, means)[0], curve.shape))
    shape = full.shape
    curves = tuple(replace(full, moves_with=moves) for moves in nested(factors))
    found = tuple(fits[full] if curve == full else fit_curve(curve, means) for curve in curves)
    theta = tuple(each.theta_BK for each in found)
    low, high = float(means.x_I.min()), float(means.x_I.max())
    score_MB = np.stack([aiccs(*each, means) for each in zip(curves, theta, strict=True)])
    law = Law(curves, theta, score_MB.argmin(0), means.z_CF, np.unique(means.x_I))
    chosen = int(law.chosen_B[0])
    settled_B = np.logical_and.reduce([each.settled_B for each in found])
    optima_CB = np.stack([law.optimum(z_F) for z_F in means.z_CF])
    alone_CB = alone(shape, means)
    left, errors = left_out_of(shape, budgets, means, alone_CB)
    models = compared(curves, theta, score_MB[:, 0], means, errors)
    movement_p = chances(full, models, means)
    shifts = shifts_of(curves[-1], theta[-1], means, low, high)
    noisy = list(zip(seed_models, means.noises, strict=True))
    tied_C = np.array([tied_with_best(*each, rng).all() for each in noisy])
    widths = [tie_width(*each, rng) for each in noisy]
    status, message = verdict(
        curves[chosen], theta[chosen][0], optima_CB, (low, high), models[chosen], means, tied_C, settled_B
    )
    own_BK = curves[chosen].stated(theta[chosen])
    return JointFit(
        status=status,
        message=message,
        law=shape,
        parameters={name: Estimate.of(own_BK[:, k]) for k, name in enumerate(curves[chosen].names)},
        covariance=tuple(map(tuple, np.cov(own_BK[1:].T).tolist())),
        objective=models[chosen].squares,
        moves_with=curves[chosen].moves_with,
        optima=tuple(Estimate.of(each) for each in optima_CB),
        p_interior=tuple(map(float, inside_of(optima_CB, (low, high)))),
        own_optima=tuple(Estimate.of(each) for each in alone_CB),
        shifts=shifts,
        moved=moved(full, movement_p, shifts, alone_CB[:, 0], means),
        movement_p=movement_p,
        models=models,
        left_out=left,
        tie_widths=tuple(widths),
        unsettled=int((~settled_B[1:]).sum()),
        _law=law,
        **common,
    )


def _refusal(budgets: Sequence[Mapping[str, float]], factors: tuple[str, ...], models: Sequence[SeedModel]) -> str:
    """Why no law can be fitted, or ''."""
    if len(budgets) < 2:
        return (
            f"{len(budgets)} of the budgets with {LEAST_SHARES} shares or more; a law over budgets needs two: train "
            "more shares."
        )
    if not factors:
        return (
            "no factor varies: train another `budget.tokens_per_active_param`, `budget.active_params` or "
            "`budget.total_params`."
        )
    if not any(model.df for model in models):
        return unrepeated("nothing can be compared")
    return ""


def _means(models: Sequence[SeedModel], z_CF: Array, seeds_C: Array, resamples: int, rng: np.random.Generator) -> Means:
    """A budget without repeats has the pooled noise of the others."""
    df = sum(model.df for model in models)
    pooled = Noise(math.sqrt(sum(model.squares for model in models) / df), df)
    noises = tuple(model.noise(lambda: pooled) for model in models)
    budget_I = np.repeat(np.arange(len(models)), [len(model.x_I) for model in models])
    weigh_II = np.zeros((len(budget_I), len(budget_I)))
    for c, model in enumerate(models):
        whiten = np.linalg.inv(np.linalg.cholesky(model.covariance_II)) / noises[c].sd
        level = whiten.sum(1) / np.linalg.norm(whiten.sum(1))
        weigh_II[np.ix_(budget_I == c, budget_I == c)] = whiten - np.outer(level, level @ whiten)
    draws = [resample(model, noise, resamples, rng) for model, noise in zip(models, noises, strict=True)]
    y_BI = np.hstack([np.vstack([model.mean_I, drawn]) for model, drawn in zip(models, draws, strict=True)])
    x_I = np.concatenate([model.x_I for model in models])
    return Means(x_I, y_BI, budget_I, z_CF, tuple(models), noises, weigh_II, seeds_C)
