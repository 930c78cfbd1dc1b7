"""How far the loss falls with every tenfold of a memory's rows, in each kind of memory, and whether the kinds differ.

    log-linear        L = a + b log10(rows)       the published form (Engram, arXiv 2601.07372; OverEncoding,
                                                  arXiv 2501.16975)
    power with floor  L = E + A rows^-alpha       becomes the line as alpha goes to 0, so the line is nested in it

The slope b is the answer; the power law is fitted beside it, to say whether the fall slows within the rows that were
tried. A line is linear in its parameters, so its intervals are Student's; those of the power law are percentiles over
resamples.

Letters: B resamples, I row counts of one mechanism, P points of all of them and the backbone, X any row counts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError, require_columns
from analysis.fits.linear import TIE, combine, covariance, fit_linear, left_out_errors, leftover, part
from analysis.fits.noise import Noise, SeedModel, aicc, lack_of_fit, resample, seed_model, unrepeated
from analysis.fits.power import ALPHA, box_cox, fit_means
from analysis.fits.runs import (
    LENGTH,
    Runs,
    distinct,
    read_runs,
    refused_losses,
    require_one_budget,
    require_one_size,
    require_resamples,
    same_losses,
    same_runs,
    same_seeds,
)
from analysis.fits.slots_result import LINE, POWER, Law, MechanismFit, SlopeDifference, SlotsFit, line_design
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status

Array = np.ndarray
LEAST_SIZES = 3
LEAST_SIZES_POWER = 5


@takes_level
def fit_slots(
    frame: pd.DataFrame,
    mechanism: str = "mechanism",
    x: str = "memory_rows",
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    resamples: int = 1000,
    random_seed: int = 0,
) -> SlotsFit:
    """Fit loss against rows in each kind of memory.

    Args:
        frame: one run a row, all on the same backbone and budget. A column `trial_id` names the rows used; of a column
            `status` only `finished` is.
        mechanism: column that names the kind of memory; empty: the backbone alone.
        x: column of the rows.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across all rows and mechanisms.
        resamples: size of the power law's bootstrap.
        random_seed: of that bootstrap; the same input gives the same fit.

    Returns:
        Fits whose status says whether their numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, rows are not positive, a trial id is repeated, one seed stands
            twice at one point, or the runs are of several lengths or vocabularies.
    """
    require_columns(frame.columns, (mechanism, x, loss, seed), "fit_slots")
    require_resamples(resamples, "fit_slots")
    names = list(
        dict.fromkeys(frame[mechanism].dropna())
    )  # told in the order of the table, computed in that of the alphabet
    alphabet = sorted(names, key=str)
    codes = frame[mechanism].map({name: code for code, name in enumerate(alphabet)}).fillna(-1).astype(int)
    runs = read_runs(
        frame.assign(**{mechanism: codes, x: frame[x].where(codes >= 0, 0)}), (mechanism, x), loss, seed, "fit_slots"
    )
    require_one_budget(frame, seed, "fit_slots", LENGTH)
    require_one_size(frame, [mechanism, x], seed, "fit_slots")
    refused, runs = refused_losses(runs), _linked(runs)
    code_N, x_N = runs.x_NK.T
    if not ((x_N > 0) & np.isfinite(x_N))[code_N >= 0].all():
        raise AnalysisError(
            f"fit_slots: column `{x}` must hold positive row counts wherever `{mechanism}` names a memory"
        )
    common: dict[str, Any] = {
        "law": LINE,
        "_mechanism": mechanism,
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": _conventions(x, loss, resamples, random_seed),
    }
    if refused:
        return SlotsFit(status=refused[0], message=refused[1], **common)
    if not (code_N >= 0).any():
        return SlotsFit(status=Status.TOO_FEW_POINTS, message="no run with a memory has finished.", **common)
    equal = same_losses(runs.y_N)
    if equal:
        return SlotsFit(status=Status.TOO_FEW_POINTS, message=equal, **common)

    return _estimate(runs, names, common, resamples, random_seed)


def _conventions(x: str, loss: str, resamples: int, random_seed: int) -> dict[str, Any]:
    return {
        "x": x,
        "loss": loss,
        "loss_unit": "nats per token",
        "slope": f"nats per token for every tenfold of {x}",
        "objective": "weighted sum of squares of the means around the lines; a weight is the number of runs that a "
        "mean is worth",
        "interval": f"{percent()}: Student's t for all that is linear in the losses, percentiles over resamples for "
        "the power law",
        "noise": "residuals of runs after point and seed effects, pooled over mechanisms and the backbone",
        "runs_left_out": "those of a seed that stands at one point only, where that point has others: they say nothing "
        "of differences",
        "resampling": "Gaussian noise of that size on every run, its level from a scaled inverse chi-square, seed "
        "effects taken off again",
        "resamples": resamples,
        "random_seed": random_seed,
        "band": "pointwise, without what moves all points of a seed alike",
        "differences": f"each interval at {percent()} on its own",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }


def _estimate(runs: Runs, names: list[Any], common: dict[str, Any], resamples: int, random_seed: int) -> SlotsFit:
    """All mechanisms together, with one measure of the noise."""
    points_PK, point_N = np.unique(runs.x_NK, axis=0, return_inverse=True)
    point_N = point_N.ravel()
    model = seed_model(point_N, runs.y_N, runs.seeds_N)
    code_N, x_N = runs.x_NK.T
    backbone_P = points_PK[:, 0] == -1
    alphabet = sorted(names, key=str)
    own_codes = [alphabet.index(name) for name in names]
    owns = [points_PK[:, 0] == code for code in own_codes]
    names_N = [str(alphabet[int(code)]) if code >= 0 else "" for code in code_N]
    copied = same_seeds(model.sd, runs.y_N) or same_runs(names_N, x_N, runs.seeds_N, runs.y_N)
    noise = model.noise(lambda: _leftover(model, points_PK[:, 1], owns))
    fits = []
    for code, name, own_P in zip(own_codes, names, owns, strict=True):
        own_N = code_N == code
        rows = tuple(row for row, own in zip(runs.rows, own_N, strict=True) if own)
        fit = _fit_one(name, rows, points_PK[own_P, 1], part(model, own_P), noise, copied)
        if fit.slope:
            alone = seed_model(x_N[own_N], runs.y_N[own_N], runs.seeds_N[own_N])
            rng = np.random.default_rng(random_seed)
            fit = _with_laws(fit, part(model, own_P), alone, len(np.unique(runs.seeds_N[own_N])), noise, resamples, rng)
        if model.df and fit.sizes and backbone_P.any():
            most_P = (points_PK == (code, fit.sizes[-1])).all(1)
            fit = replace(fit, gain=combine(model, backbone_P.astype(float) - most_P, noise))
        fits.append(fit)
    lines = [(fit, own_P) for fit, own_P in zip(fits, owns, strict=True) if fit.slope]
    weights_KP = _weights(lines)
    slopes = [(fit, weights_P) for (fit, _), weights_P in zip(lines, weights_KP[1::2], strict=True)]
    memory_N = code_N >= 0
    return SlotsFit(
        status=next((fit.status for fit in fits if fit.status is not Status.CONVERGED), Status.CONVERGED),
        message=" ".join(f"{fit.mechanism}: {fit.message}" for fit in fits if fit.status is not Status.CONVERGED),
        parameters={
            f"{name} of {fit.mechanism}": combine(model, weights_P, noise)
            for (fit, name), weights_P in zip(product([fit for fit, _ in lines], "ab"), weights_KP, strict=True)
        },
        covariance=covariance(model, weights_KP, noise) if lines else (),
        objective=sum(fit.laws[0].objective for fit, _ in lines) if lines else None,
        mechanisms=tuple(fits),
        differences=tuple(
            SlopeDifference(first.mechanism, second.mechanism, combine(model, one_P - other_P, noise))
            for (first, one_P), (second, other_P) in combinations(slopes if model.df else (), 2)
        ),
        backbone=float(model.mean_I[backbone_P][0]) if backbone_P.any() else None,
        paired_sd=model.paired_sd,
        noise_df=model.df,
        seed_effects={
            seed: float(np.mean((runs.y_N - model.mean_I[point_N])[runs.seeds_N == seed]))
            for seed in np.unique(runs.seeds_N)
        },
        _runs=pd.DataFrame(
            {
                "mechanism": [alphabet[int(code)] for code in code_N[memory_N]],
                "memory_rows": x_N[memory_N],
                "val_loss": runs.y_N[memory_N],
                "seed": runs.seeds_N[memory_N],
                "trial_id": np.array(runs.rows, dtype=object)[memory_N],
            }
        ),
        **common,
    )


def _linked(runs: Runs) -> Runs:
    """Without the runs of seeds that stand at one point only, such as more seeds of the backbone than of the memories.

    They would make every mean that of an average seed of which only this point knows anything. A point's last runs are
    kept.
    """
    points_N = np.unique(runs.x_NK, axis=0, return_inverse=True)[1].ravel()
    at_N = [set(points_N[runs.seeds_N == seed]) for seed in runs.seeds_N]
    lone_N = np.array([len(points) == 1 for points in at_N], bool)
    kept_N = ~(lone_N & np.isin(points_N, points_N[~lone_N]))
    rows = tuple(row for row, kept in zip(runs.rows, kept_N, strict=True) if kept)
    return Runs(runs.x_NK[kept_N], runs.y_N[kept_N], runs.seeds_N[kept_N], rows)


# --- the line ---------------------------------------------------------------------------------------------------------


def _leftover(model: SeedModel, x_P: Array, owns: list[Array]) -> Noise:
    """What the lines leave over, pooled over the mechanisms that have one: stands in for noise where nothing is
    repeated.
    """
    found = [leftover(part(model, own_P), line_design(x_P[own_P])) for own_P in owns if own_P.sum() >= LEAST_SIZES]
    df = sum(each.df for each in found)
    return Noise(math.sqrt(sum(each.df * each.sd**2 for each in found) / df), df) if found else Noise(math.nan, 1)


def _fit_one(
    name: str, rows: tuple[str, ...], sizes_I: Array, model: SeedModel, noise: Noise, copied: str
) -> MechanismFit:
    """The line of one mechanism. `copied`: what `same_seeds` or `same_runs` says of all."""
    errors_I = model.sd / np.sqrt(model.counts_I) if model.df else np.zeros(0)
    common: dict[str, Any] = {"mechanism": name, "rows": rows} | {
        key: tuple(map(float, values))
        for key, values in (("sizes", sizes_I), ("means", model.mean_I), ("errors", errors_I))
    }
    if distinct(sizes_I) < LEAST_SIZES:
        words = (
            f"row counts with a finished run: {distinct(sizes_I)}; a line that can be checked needs {LEAST_SIZES}: "
            "train more."
        )
        return MechanismFit(status=Status.TOO_FEW_POINTS, message=words, **common)
    status, doubts = Status.CONVERGED, []
    if sizes_I[-1] < 100 * sizes_I[0]:
        doubts.append("less than two decades of rows, so whether the fall slows cannot be told.")
    if model.df == 0:
        status = Status.TOO_FEW_POINTS
        doubts.append(unrepeated("the residuals around the lines stand in for it"))
    elif copied:
        status = Status.TOO_FEW_POINTS
        doubts.append(copied)
    line = fit_linear(model, line_design(sizes_I), noise)
    others = fit_linear(part(model, np.arange(len(sizes_I)) < len(sizes_I) - 1), line_design(sizes_I[:-1]), noise)
    weights_I = np.append(-line_design(sizes_I[-1:])[0] @ others.map_KI, 1.0)
    return MechanismFit(
        status=status,
        message=" ".join(doubts),
        slope=line.estimate(np.array([0.0, 1.0])),
        beyond=combine(model, weights_I, noise),
        _line=line,
        **common,
    )


def _weights(lines: list[tuple[MechanismFit, Array]]) -> Array:
    """a and b of every line as combinations of the means of all points -> [2 lines, P]."""
    rows: list[Array] = []
    for fit, own_P in lines:
        assert fit._line
        both_2P = np.zeros((2, len(own_P)))
        both_2P[:, own_P] = fit._line.map_KI
        rows.extend(both_2P)
    return np.array(rows)


# --- the laws compared ------------------------------------------------------------------------------------------------


def _with_laws(
    fit: MechanismFit,
    model: SeedModel,
    alone: SeedModel,
    seeds: int,
    noise: Noise,
    resamples: int,
    rng: np.random.Generator,
) -> MechanismFit:
    """Add both laws and which is preferred. `alone`, the model of the mechanism's own runs, is what AICc compares them
    on.
    """
    assert fit._line
    assert fit.beyond
    design_IK, line = line_design(np.array(fit.sizes)), fit._line
    laws = [
        Law(
            law=LINE,
            parameters={"a": line.estimate(np.array([1.0, 0.0])), "b": line.estimate(np.array([0.0, 1.0]))},
            aicc=aicc(alone, line.squares, 2, seeds),
            left_out_error=_rms(left_out_errors(model, design_IK)[1:-1]),
            beyond=fit.beyond.value,
            lack_of_fit_p=lack_of_fit(model, line.squares, 2),
            objective=line.squares,
        )
    ]
    power = None
    if distinct(np.array(fit.sizes)) >= LEAST_SIZES_POWER:
        y_BI = np.vstack([model.mean_I, resample(model, noise, resamples, rng)])
        law, power = _power_law(model, alone, seeds, np.array(fit.sizes), y_BI)
        laws.append(law)
    preferred, doubts = "", []
    scores = [law.aicc for law in laws if law.aicc is not None]
    if len(scores) == 2 and abs(scores[0] - scores[1]) > TIE:
        preferred = LINE if scores[0] < scores[1] else POWER
    chance, status = laws[0].lack_of_fit_p, fit.status
    if status is Status.CONVERGED and all(
        law.lack_of_fit_p is not None and law.lack_of_fit_p < REFUTED for law in laws
    ):
        status = Status.POOR_FIT
    if preferred == POWER:
        doubts.append("the slope is a mean over the rows tried: the next tenfold will bring less.")
    elif chance is not None and chance < REFUTED:
        doubts.append(
            f"the means miss the line by more than noise explains (p = {chance:.1g}): the slope is a mean over the "
            "rows tried."
        )
    return replace(
        fit,
        status=status,
        message=" ".join([*doubts, fit.message]).strip(),
        laws=tuple(laws),
        preferred=preferred,
        _power=power,
    )


def _power_law(model: SeedModel, alone: SeedModel, seeds: int, sizes_I: Array, y_BI: Array) -> tuple[Law, Array]:
    """The power law and its c, s and alpha."""
    middle = math.sqrt(sizes_I[0] * sizes_I[-1])
    log_I = np.log(sizes_I / middle)
    theta_BK, squares_B = fit_means(model, log_I, y_BI)
    alpha_B = theta_BK[:, 2]
    parameters, note = {"alpha": Estimate.of(alpha_B)}, ""
    if alpha_B[0] in ALPHA:
        note = "alpha at 0, where it is the line" if alpha_B[0] == 0 else f"alpha at its bound, {ALPHA[1]:g}"
    elif np.mean(alpha_B[1:] == 0) > 0.025:
        note = "no floor can be given: noise allows the line"
    else:
        c_D, s_D, alpha_D = theta_BK[alpha_B > 0].T
        floor_D, scale_D = c_D - s_D / alpha_D, s_D / alpha_D * middle**alpha_D
        parameters |= {"E": Estimate.of(floor_D), "A": Estimate.of(scale_D)}
    errors = []
    for i in range(1, len(log_I)):
        kept_I = np.arange(len(log_I)) != i
        theta_1K, _ = fit_means(part(model, kept_I), log_I[kept_I], model.mean_I[None, kept_I])
        errors.append(model.mean_I[i] - (theta_1K[0, 0] + theta_1K[0, 1] * box_cox(log_I[[i]], theta_1K[:, 2])[0, 0]))
    law = Law(
        law=POWER,
        parameters=parameters,
        aicc=aicc(alone, float(squares_B[0]), 3, seeds),
        left_out_error=_rms(np.array(errors[:-1])),
        beyond=float(errors[-1]),
        lack_of_fit_p=lack_of_fit(model, float(squares_B[0]), 3),
        objective=float(squares_B[0]),
        note=note,
    )
    return law, theta_BK[0]


def _rms(errors: Array) -> float:
    return float(np.sqrt(np.mean(errors**2)))
