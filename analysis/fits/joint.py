"""Whether the best share moves with compute or with sparsity: one law for the share curves of several budgets.

From a table of runs to a frozen `JointFit`. Every budget keeps a level of its own, so this is a law of the curves' shape, not of the loss
surface. With z the decimal logarithms of compute and sparsity less their means over the budgets,

    loss = level(budget) + exp(s + s' z) H(x; m + m' z)

    cubic      H = (x - m)^2 + g (x - m)^3          m is the best share itself
    two-power  H = w f_q(x) - (1 - x)^p             f_q and the bounds as in `laws.TwoPower`; w puts the best share at
                                                    (1 + o) / (1 + e^-m) - o, o = 0.1

The depth and the shape (g, or p and q) may always change with every factor; the models differ in which of them move the optimum (m').
Were the shape common to all budgets, curves that only grow more lopsided would pass for a movement. Cubic or two-power, whichever has the
lesser AICc where everything may move the optimum; the model is chosen by AICc, anew in every resample.

Letters: B resamples, C budgets, F factors, I means over all budgets, K parameters, X any shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import fdtrc

from analysis.errors import AnalysisError, require_columns
from analysis.fits.allocation import require_apart
from analysis.fits.counting import unit_of_flops
from analysis.fits.joint_law import (
    BOUNDS,
    POSITION,
    PRIOR_SD,
    SHAPES,
    SOFT,
    VALLEYS,
    Curve,
    Law,
    Means,
    aiccs,
    deviations,
    fit_curve,
    nested,
)
from analysis.fits.joint_result import FACTORS, UNITS, VARIES, JointFit, LeftOut, Model
from analysis.fits.newton import SETTLED
from analysis.fits.noise import SeedModel, resample, seed_model, tied_with_best
from analysis.fits.runs import MIXED, NO_LOSS, listed, places, read_shares, require_one_budget, require_resamples, same_losses, same_seeds
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import ends, percent, takes_level
from analysis.status import Status

Array = np.ndarray
BUDGET = ("tokens", "budget.total_params", "budget.active_params")
"""Columns that set budgets apart, as a study's `trials.csv` has them where they vary."""
LEAST_SHARES = 4
AT_BOUND = 0.01
"""So near to an end of its admissible range, as a part of it, a parameter stopped there."""


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
    flops: str | None = None,
    resamples: int = 1000,
    random_seed: int = 0,
) -> JointFit:
    """Fit loss against share at several budgets at once.

    Args:
        frame: one run a row. A budget is what agrees in `BUDGET`; without its columns of sizes, sizes within a factor of `MIXED` of the
            next are of one budget. Its sparsity is the median over its runs of `total` / `active`. Rows without a share (the dense
            baseline) are left out, of a column `status` only `finished` is used.
        x: column of the share of the sparse parameters in routed experts, in [0, 1].
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across the shares of one budget.
        tokens: column of the training tokens.
        total: column of the total parameters.
        active: column of the activated parameters.
        flops: column of the FLOPs of a whole run, whose median is a budget's compute; by default that of `flops_per_token` x `tokens`, or
            without that column of 6 x `active` x `tokens`.
        resamples: size of the bootstrap.
        random_seed: of the bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a share is outside [0, 1], a trial id is repeated, or one seed stands twice at one
            share of one budget.
    """
    require_columns(frame.columns, (x, loss, seed, tokens, total, active, *([flops] if flops else [])), "fit_joint")
    require_resamples(resamples, "fit_joint")
    frame = frame[frame[x].notna()]
    for name in (tokens, total, active, *([flops] if flops else [])):
        number = pd.to_numeric(frame[name], errors="coerce")
        wrong = np.flatnonzero(~((number > 0) & np.isfinite(number)))
        if len(wrong):
            value = frame[name].iloc[wrong[0]]
            said = repr(value) if isinstance(value, str) else str(value)
            raise AnalysisError(f"fit_joint: column `{name}` holds {said} in {places(frame)[wrong[0]]}; a positive number belongs there")
        frame = frame.assign(**{name: number})
    frame = frame.assign(tokens=frame[tokens], total_params=frame[total], active_params=frame[active])
    if flops:
        unit = unit_of_flops(flops, *(frame[name].to_numpy(float) for name in (flops, active, tokens)))[0] or 1.0
        frame = frame.assign(flops_per_token=unit * frame[flops] / frame["tokens"])
    frame = _with_budgets(frame)
    names = [name for name in BUDGET if name in frame]
    if {"rho", "sparse_params"} <= set(frame):
        frame = frame[frame["rho"].notna() | (frame["sparse_params"] > 0)]
    frame = frame[frame[x].notna() & frame[names].notna().all(axis=1)]
    if "trial_id" in frame and frame["trial_id"].duplicated().any():
        repeated = listed(sorted(map(str, frame["trial_id"][frame["trial_id"].duplicated()].unique())))
        raise AnalysisError(f"fit_joint: trial id {repeated} stands in several rows; keep one of each")
    groups = [(dict(zip(names, key, strict=True)), group) for key, group in frame.groupby(names, sort=True)]
    for key, group in groups:
        require_one_budget(group, x, f"fit_joint, {_named(key)}")
    read = [read_shares(group, (x,), loss, seed, f"fit_joint, {_named(key)}") for key, group in groups]
    for (key, _), runs in zip(groups, read, strict=True):
        require_apart(np.unique(runs.x_NK), f"fit_joint, {_named(key)}")
    few = [_named(key) for (key, _), runs in zip(groups, read, strict=True) if len(np.unique(runs.x_NK)) < LEAST_SHARES]
    kept = [place for place, runs in enumerate(read) if len(np.unique(runs.x_NK)) >= LEAST_SHARES]
    groups, read = [groups[place] for place in kept], [read[place] for place in kept]
    budgets = tuple({name: float(value) for name, value in key.items()} | factors_of(group) for key, group in groups)
    factors, dropped = _tell_apart(budgets)
    conventions: dict[str, Any] = {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "factors": {name: UNITS[name] for name in factors},
        "dropped": dropped,
        "budgets_left_out": few,
        "z": "decimal logarithm less its mean over the budgets",
        "objective": "sum of squared deviations of the share means from the law, in units of their noise",
        "settled": f"a further full Newton step would lower half of that by less than {SETTLED:g} of it; unsettled resamples are counted",
        "starts": f"the {VALLEYS} lowest minima of the data, the best point known, and any lower minimum of another resample",
        "prior": f"normal, sd {PRIOR_SD:g} in each parameter's own unit: one answer where the data give none",
        "bounds": f"parameters of the shape near {BOUNDS} smoothly, within about {SOFT:.0%} of the range",
        "noise": "residuals of runs after share and seed effects, a level for each budget",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed effects taken off again",
        "choice_of_model": "least AICc, chosen anew in every resample; cubic or two-power by AICc of the fullest model, once",
        "moves": f"{percent()} interval of the shift without 0 and F test p < 0.05, in the fullest model; the budgets' own curves agree",
        "interval": f"{percent()} percentile",
        "resamples": resamples,
        "random_seed": random_seed,
    }
    common: dict[str, Any] = {
        "rows": tuple(row for runs in read for row in runs.rows),
        "conventions": conventions,
        "budgets": budgets,
        "factors": factors,
    }
    bad = ", ".join(filter(None, (runs.unusable() for runs in read)))
    if bad:
        return JointFit(status=Status.NOT_FINITE, message=NO_LOSS.format(bad), law="none", **common)
    seed_models = [seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N) for runs in read]
    refusal = _refusal(budgets, factors, seed_models)
    if refusal:
        return JointFit(status=Status.TOO_FEW_POINTS, message=refusal, law="none", **common)
    copied = [same_losses(runs.y_N) or same_seeds(model.sd, runs.y_N) for runs, model in zip(read, seed_models, strict=True)]
    if any(copied):
        return JointFit(status=Status.TOO_FEW_POINTS, message=next(filter(None, copied)), law="none", **common)

    rng = np.random.default_rng(random_seed)
    seeds_C = np.array([len(np.unique(runs.seeds_N)) for runs in read])
    means = _means(seed_models, np.log10([[budget[name] for name in factors] for budget in budgets]), seeds_C, resamples, rng)
    fullest = _determined(means, factors)
    fits = {curve: fit_curve(curve, means) for curve in fullest}
    full = min(fullest, key=lambda curve: (aiccs(curve, fits[curve].theta_BK, means)[0], curve.shape))
    shape = full.shape
    curves = tuple(replace(full, moves_with=moves) for moves in nested(factors))
    found = tuple(fits[full] if curve == full else fit_curve(curve, means) for curve in curves)
    theta = tuple(each.theta_BK for each in found)
    low, high = float(means.x_I.min()), float(means.x_I.max())
    score_MB = np.stack([aiccs(*each, means) for each in zip(curves, theta, strict=True)])
    law = Law(curves, theta, score_MB.argmin(0), means.z_CF.mean(0), low, high)
    chosen = int(law.chosen_B[0])
    settled_B = np.logical_and.reduce([each.settled_B for each in found])
    optima_CB = np.stack([law.optimum(z_F) for z_F in means.z_CF])
    alone_CB = _alone(shape, means)
    left_out, errors = _left_out(shape, budgets, means, alone_CB)
    models = _models(curves, theta, score_MB[:, 0], means, errors)
    shifts = _shifts(curves[-1], theta[-1], means, low, high)
    tied_C = np.array(
        [tied_with_best(model, sd, int(df), rng).all() for model, sd, df in zip(seed_models, means.sd_C, means.df_C, strict=True)]
    )
    status, message = _verdict(curves[chosen], theta[chosen][0], optima_CB, (low, high), models[chosen], means, tied_C, settled_B)
    own_BK = curves[chosen].stated(theta[chosen])
    return JointFit(
        status=status,
        message=message,
        law=shape,
        parameters={name: Estimate.of(own_BK[0, k], own_BK[1:, k]) for k, name in enumerate(curves[chosen].names)},
        covariance=tuple(map(tuple, np.cov(own_BK[1:].T).tolist())),
        objective=models[chosen].squares,
        moves_with=curves[chosen].moves_with,
        optima=tuple(Estimate.of(each[0], each[1:]) for each in optima_CB),
        p_interior=tuple(map(float, _inside(optima_CB, (low, high)))),
        own_optima=tuple(Estimate.of(each[0], each[1:]) for each in alone_CB),
        shifts=shifts,
        moved=_moved(full, models, shifts, alone_CB[:, 0], means),
        models=models,
        left_out=left_out,
        unsettled=int((~settled_B[1:]).sum()),
        _law=law,
        **common,
    )


# --- the table --------------------------------------------------------------------------------------------------------------


def _named(key: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in key.items())


def _with_budgets(frame: pd.DataFrame) -> pd.DataFrame:
    """With the sizes of the budgets where they differ and the table does not name them: medians of the runs' own, which are integers."""
    for size in ("total_params", "active_params"):
        sizes = np.sort(frame[size].unique())
        firsts = sizes[1:][sizes[1:] > MIXED * sizes[:-1]]
        if f"budget.{size}" not in frame and len(firsts):
            budget = np.searchsorted(firsts, frame[size], side="right")
            frame = frame.assign(**{f"budget.{size}": frame.groupby(budget)[size].transform("median")})
    return frame


def factors_of(group: pd.DataFrame) -> dict[str, float]:
    """Compute and sparsity of the runs of one budget."""
    each = group["flops_per_token"] if "flops_per_token" in group else 6 * group["active_params"]
    return {
        "compute": float((each * group["tokens"]).median()),
        "sparsity": float((group["total_params"] / group["active_params"]).median()),
    }


def _tell_apart(budgets: Sequence[Mapping[str, float]]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Factors whose effects the budgets can tell apart; and why the others are left out."""
    kept: list[str] = []
    dropped = {}
    for name in FACTORS:
        values = [budget[name] for budget in budgets]
        design = np.log10([[10.0, *(budget[each] for each in [*kept, name])] for budget in budgets]) if budgets else np.zeros((0, 1))
        if not values or max(values) <= VARIES * min(values):
            dropped[name] = "does not vary between the budgets"
        elif np.linalg.matrix_rank(design - design.mean(0) * (np.arange(design.shape[1]) > 0), tol=1e-2) < len(kept) + 2:
            dropped[name] = f"varies only together with {' and '.join(kept)}, so their effects cannot be told apart"
        else:
            kept.append(name)
    return tuple(kept), dropped


def _refusal(budgets: Sequence[Mapping[str, float]], factors: tuple[str, ...], models: Sequence[SeedModel]) -> str:
    """Why no law can be fitted, or ''."""
    if len(budgets) < 2:
        return f"{len(budgets)} of the budgets with {LEAST_SHARES} shares or more; a law over budgets needs two: train more shares."
    if not factors:
        return "neither compute nor sparsity varies: train another `budget.tokens`, `budget.active_params` or `budget.total_params`."
    if not any(model.df for model in models):
        return "no seed is repeated, so the noise is not measured and nothing can be compared: train a second seed."
    return ""


def _means(models: Sequence[SeedModel], z_CF: Array, seeds_C: Array, resamples: int, rng: np.random.Generator) -> Means:
    """A budget without repeats has the pooled noise of the others."""
    df = sum(model.df for model in models)
    pooled = math.sqrt(sum(model.squares for model in models) / df)
    sd_C = np.array([model.sd if model.df else pooled for model in models])
    df_C = np.array([model.df or df for model in models])
    budget_I = np.repeat(np.arange(len(models)), [len(model.x_I) for model in models])
    weigh_II = np.zeros((len(budget_I), len(budget_I)))
    for c, model in enumerate(models):
        whiten = np.linalg.inv(np.linalg.cholesky(model.covariance_II)) / sd_C[c]
        level = whiten.sum(1) / np.linalg.norm(whiten.sum(1))
        weigh_II[np.ix_(budget_I == c, budget_I == c)] = whiten - np.outer(level, level @ whiten)
    draws = [resample(model, sd, int(df), resamples, rng) for model, sd, df in zip(models, sd_C, df_C, strict=True)]
    y_BI = np.hstack([np.vstack([model.mean_I, drawn]) for model, drawn in zip(models, draws, strict=True)])
    x_I = np.concatenate([model.x_I for model in models])
    return Means(x_I, y_BI, budget_I, z_CF, tuple(models), sd_C, df_C, weigh_II, seeds_C)


def _determined(means: Means, factors: tuple[str, ...]) -> list[Curve]:
    """The fullest models that leave something over: with a shape of each budget's own, or, where none does, with a common one."""
    for bends in (factors, ()):
        curves = [Curve(shape, factors, factors, bends) for shape in SHAPES]
        found = [curve for curve in curves if len(means.x_I) > len(curve.names) + len(means.models)]
        if found:
            return found
    return []


# --- what the fitted models say ---------------------------------------------------------------------------------------------


def _models(
    curves: Sequence[Curve], theta: Sequence[Array], scores: Array, means: Means, errors: Mapping[tuple[str, ...], float]
) -> tuple[Model, ...]:
    found: list[Model] = []
    for curve, theta_BK, score in zip(curves, theta, scores, strict=True):
        squares = float((deviations(curve, theta_BK, means)[0] ** 2).sum())
        count = len(curve.names) + len(means.models)
        df, same = len(means.x_I) - count, found[0] if found else None
        better = None
        if same:
            more = count - same.parameters
            better = float(fdtrc(more, means.df, max(same.squares - squares, 0) / more))
        found.append(
            Model(
                moves_with=curve.moves_with,
                parameters=count,
                df=df,
                squares=squares,
                aicc=float(score) if math.isfinite(score) else None,
                lack_of_fit_p=float(fdtrc(df, means.df, squares / df)),
                same_optimum_p=better,
                left_out_error=errors.get(curve.moves_with),
            )
        )
    return tuple(found)


def _alone(shape: str, means: Means) -> Array:
    """Best share of each budget by a curve of its own -> [C, B]; a cubic where the shares do not determine the shape."""
    optima = []
    for c in range(len(means.models)):
        own = means.part(np.arange(len(means.models)) == c, np.zeros((1, 0)))
        curve = Curve(shape, (), (), ())
        if len(own.x_I) <= len(curve.names) + 1:
            curve = replace(curve, shape="cubic")
        optima.append(curve.optimum(fit_curve(curve, own).theta_BK, np.zeros(0), float(means.x_I.min()), float(means.x_I.max())))
    return np.stack(optima)


def _moved(full: Curve, models: Sequence[Model], shifts: Mapping[str, Estimate], alone_C: Array, means: Means) -> tuple[str, ...]:
    """Factors along which the best share is shown to move: the interval of its shift excludes 0, the law without that movement fits worse
    by more than noise explains (F test), and the best shares of the budgets' own curves go the same way.

    Without a shape of each budget's own nothing is shown: a change of shape would look the same.
    """
    squares = {model.moves_with: model.squares for model in models}
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(alone_C)), means.z_CF]), alone_C, rcond=None)[0][1:]
    found = []
    for name, slope in zip(full.factors, slopes, strict=True):
        without = squares[tuple(other for other in full.factors if other != name)]
        p, shift = float(fdtrc(1, means.df, max(without - squares[full.factors], 0))), shifts[name]
        if full.bends_with and p < 0.05 and not shift.low <= 0 <= shift.high and slope * shift.value > 0:
            found.append(name)
    return tuple(found)


def _left_out(
    shape: str, budgets: tuple[dict[str, float], ...], means: Means, alone_CB: Array
) -> tuple[LeftOut, dict[tuple[str, ...], float]]:
    """The largest budget predicted from all others; and the error of each model that they determine."""
    largest = max(range(len(budgets)), key=lambda c: (budgets[c]["compute"], budgets[c]["sparsity"]))
    others_C = np.arange(len(budgets)) != largest
    factors, _ = _tell_apart([budgets[c] for c in np.flatnonzero(others_C)])
    others = means.part(others_C, np.log10([[budgets[c][name] for name in factors] for c in np.flatnonzero(others_C)]))
    own = means.part(~others_C, np.zeros((1, 0)))
    low, high = float(means.x_I.min()), float(means.x_I.max())
    z_F = np.log10([budgets[largest][name] for name in factors]) - others.z_CF.mean(0)
    bends = next((curve.bends_with for curve in _determined(others, factors) if curve.shape == shape), ())
    curves = [Curve(shape, factors, moves, bends) for moves in nested(factors)]
    theta = [fit_curve(curve, others).theta_BK for curve in curves]
    chosen_B = np.stack([aiccs(*each, others) for each in zip(curves, theta, strict=True)]).argmin(0)
    wide_IF = np.repeat(z_F[None], len(own.x_I), axis=0)
    off_MBI = np.stack([curve.value(each, own.x_I, wide_IF) for curve, each in zip(curves, theta, strict=True)]) - own.y_BI
    off_MBI -= off_MBI.mean(2, keepdims=True)
    rows = np.arange(len(chosen_B))
    off_BI = off_MBI[chosen_B, rows]
    predicted_B = np.stack([curve.optimum(each, z_F, low, high) for curve, each in zip(curves, theta, strict=True)])[chosen_B, rows]
    measured_B = alone_CB[largest]
    bounds = np.quantile(off_BI[1:], ends(), axis=0)
    lost = [
        name
        for name in FACTORS
        if name not in factors and budgets[largest][name] > VARIES * max(budgets[c][name] for c in np.flatnonzero(others_C))
    ]
    left = LeftOut(
        budget=budgets[largest],
        moves_with=curves[chosen_B[0]].moves_with,
        predicted=Estimate.of(predicted_B[0], predicted_B[1:]),
        measured=Estimate.of(measured_B[0], measured_B[1:]),
        error=Estimate.of(predicted_B[0] - measured_B[0], predicted_B[1:] - measured_B[1:]),
        rms=float(np.sqrt(np.mean(off_BI[0] ** 2))),
        inside=float(np.mean((bounds[0] <= 0) & (bounds[1] >= 0))),
        note=f"taken to be without effect of {' and '.join(lost)}, which the others do not vary" if lost else "",
    )
    return left, {curve.moves_with: float(np.sqrt(np.mean(off[0] ** 2))) for curve, off in zip(curves, off_MBI, strict=True)}


def _shifts(curve: Curve, theta_BK: Array, means: Means, low: float, high: float) -> dict[str, Estimate]:
    z_CF = means.z_CF - means.z_CF.mean(0)
    shifts = {}
    for place, name in enumerate(curve.factors):
        first_F, last_F = np.zeros(z_CF.shape[1]), np.zeros(z_CF.shape[1])
        first_F[place], last_F[place] = z_CF[:, place].min(), z_CF[:, place].max()
        moved_B = curve.optimum(theta_BK, last_F, low, high) - curve.optimum(theta_BK, first_F, low, high)
        shifts[name] = Estimate.of(moved_B[0], moved_B[1:])
    return shifts


def _inside(optima_CB: Array, ends: tuple[float, float]) -> Array:
    """Part of the resamples whose best share is inside the sampled range -> [C]."""
    return np.asarray(1 - np.isin(optima_CB[:, 1:], ends).mean(1))


def _verdict(
    curve: Curve,
    theta_K: Array,
    optima_CB: Array,
    ends: tuple[float, float],
    model: Model,
    means: Means,
    tied_C: Array,
    settled_B: Array,
) -> tuple[Status, str]:
    """The status of a fitted law and what there is to doubt about it; the last status set is the gravest."""
    status, doubts = Status.CONVERGED, []
    if model.lack_of_fit_p < REFUTED:
        status = Status.POOR_FIT
        doubts.append(f"the law misses the share means by more than noise explains (p = {model.lack_of_fit_p:.1g}).")
    ordinary = {("p", 1), ("q", 0)}  # a steady gain and the logarithm are members of the family
    own = curve.at(theta_K[None], means.z_CF - means.z_CF.mean(0))
    limits = {**BOUNDS, "position": POSITION[curve.shape]}
    hits = [
        name
        for name, value_1C in own.items()
        if any(
            (abs(value_1C - limits[name][side]) < AT_BOUND * np.ptp(limits[name])).any() and (name, side) not in ordinary for side in (0, 1)
        )
    ]
    if hits:
        status = Status.BOUND_HIT
        doubts.append(f"the law stopped at the end of its admissible range ({', '.join(hits)}).")
    inside_C, at_end_C = _inside(optima_CB, ends), np.isin(optima_CB[:, 0], ends)
    open_C = at_end_C | (inside_C < np.where(tied_C, 0.95, 0.5))
    if open_C.any():
        status = Status.NO_INTERIOR_MINIMUM
    if at_end_C.any():
        doubts.append(f"at {at_end_C.sum()} of {len(at_end_C)} budgets the law is least at an end of the sampled shares.")
    if (inside_C < 0.95).any():
        parts = ", ".join(f"{part:.0%}" for part in inside_C)
        doubts.append(f"the best share lies inside the sampled ones in {parts} of the resamples, budget by budget.")
    if tied_C.any():
        which = "any budget" if tied_C.all() else f"{tied_C.sum()} of {len(tied_C)} budgets"
        doubts.insert(0, f"no sampled share can be told from the best at {which}: train more seeds.")
    if not settled_B[0]:
        status = Status.NO_INTERIOR_MINIMUM
        doubts.append("the descent found no point where the sum of squares is level: look at the runs for outliers.")
    elif not settled_B.all():
        doubts.append(f"{np.sum(~settled_B[1:])} of {len(settled_B) - 1} resamples did not settle; they are kept as they are.")
    if not curve.bends_with:
        doubts.append(
            "the shares are too few to let the curves change their shape, so no movement of the best one can be told from that: train more."
        )
    return status, " ".join(doubts)
