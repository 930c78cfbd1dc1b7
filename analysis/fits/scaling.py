"""Loss against training compute in several mechanisms at a fixed number of tokens for each activated parameter, and how
much compute each saves against a reference at equal loss.

    L = E + A (C / C0)^-alpha        C0: geometric mean of the least and the most compute

Three laws are nested: no floor, one floor E for all mechanisms, a floor for each. The fullest that the rungs allow is
tested against the one before (F test against the noise between seeds), and taken where that is refuted. The compute
multiplier of a mechanism at C is the compute that the reference needs for the same loss, over C. Only where the
reference was measured at that loss is it told.

Letters: as in `scaling_law`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import fdtrc  # scipy.stats would take a second to import

from analysis.errors import AnalysisError, require_columns
from analysis.fits.newton import Minimum
from analysis.fits.noise import unrepeated
from analysis.fits.refits import covariance_of, verdict
from analysis.fits.runs import (
    MIXED,
    Runs,
    finished,
    refused_losses,
    require_resamples,
    same_losses,
    same_runs,
    same_seeds,
    unfinished,
)
from analysis.fits.scaling_findings import foretell, table_of, told
from analysis.fits.scaling_law import ALPHA, RungMeans, choices, fit_curves
from analysis.fits.scaling_read import read_rungs
from analysis.fits.scaling_result import FLOORS, ScalingFit, ScalingLaw
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status
from sparsemem.config.nearest import nearest_name
from sparsemem.values import listed

Array = np.ndarray
LEVEL = 0.05
"""Chance of such means under the smaller of two nested laws, below which the larger is taken."""
FLAT = 1e-6
"""Loss above the floor, nats per token, that is none."""


@takes_level
def fit_scaling(
    frame: pd.DataFrame,
    mechanism: str = "mechanism",
    flops: str = "flops",
    loss: str = "val_loss",
    seed: str = "seed",
    tokens: str = "tokens",
    active: str = "active_params",
    *,
    reference: str,
    resamples: int = 1000,
    random_seed: int = 0,
) -> ScalingFit:
    """Fit loss against compute in each mechanism.

    Args:
        frame: one run a row, all at one number of tokens for each activated parameter. A column `trial_id` names the
            rows used; of a column `status` only `finished` is.
        mechanism: column that names the mechanism.
        flops: column of the FLOPs of the whole training, by whichever count, the same for all.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired within a rung.
        tokens: column of the training tokens; runs within 15% of each other are of one rung.
        active: column of the activated parameters.
        reference: the mechanism that the others are held against.
        resamples: size of the bootstrap.
        random_seed: of that bootstrap; the same input gives the same fit.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, sizes are not positive, a trial id is repeated, one seed
            stands twice at one rung of a mechanism, no run is of the reference, or the runs are of several tokens per
            activated parameter, sparsities, texts or vocabularies.
    """
    caller = "fit_scaling"
    require_columns(frame.columns, (mechanism, flops, loss, seed, tokens, active), caller)
    require_resamples(resamples, caller)
    known = list(dict.fromkeys(map(str, frame[mechanism].dropna())))
    if reference not in known:
        raise AnalysisError(f"{caller}: no run is of the reference `{reference}`; {nearest_name(reference, known)}")
    left_out, used = unfinished(frame), finished(frame[frame[mechanism].notna()])
    names = [name for name in known if name in set(used[mechanism].astype(str))]
    runs, log_c_N = read_rungs(used, sorted(names), mechanism, flops, loss, seed, tokens, active)
    common: dict[str, Any] = {
        "law": "power with floor",
        "reference": reference,
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": _conventions(flops, loss, tokens, active, resamples, random_seed),
        "_columns": (mechanism, flops),
    }

    def refused(status: Status, message: str) -> ScalingFit:
        return ScalingFit(status=status, message=f"{message} {left_out}".strip(), **common)

    if wrong := refused_losses(runs):
        return refused(*wrong)
    rungs = len(np.unique(runs.x_NK[:, 1]))
    if rungs < 2:
        return refused(
            Status.TOO_FEW_POINTS,
            f"rungs with a finished run: {rungs}; a power of the compute needs two, and a floor three: train other "
            "sizes.",
        )
    if equal := same_losses(runs.y_N):
        return refused(Status.TOO_FEW_POINTS, equal)
    fit = _estimate(runs, log_c_N, sorted(names), names, common, resamples, random_seed)
    return replace(fit, message=f"{fit.message} {left_out}".strip())


def _conventions(flops: str, loss: str, tokens: str, active: str, resamples: int, random_seed: int) -> dict[str, Any]:
    return {
        "x": flops,
        "loss": loss,
        "loss_unit": "nats per token",
        "form": f"loss = E + A ({flops} / C0)^-alpha, C0 the geometric mean of its ends",
        "held": f"{tokens} / {active}, within {MIXED - 1:.0%}",
        "rung": f"runs whose {tokens} are within {MIXED - 1:.0%} of each other",
        "objective": "half the sum of squares of the means around the law, weighed by their covariance",
        "admissible": f"alpha {ALPHA[0]:g} to {ALPHA[1]:g}, floors not negative",
        "noise": "residuals of runs after the effects of point and of seed at each rung, and, for levels of whole "
        "rungs, the effects of seeds beyond them; both pooled over rungs",
        "floors": f"F test of each nested law against the next at {LEVEL:g}; the noise has the degrees of freedom of "
        "the residuals of runs",
        "interval": f"{percent()} percentile, each on its own",
        "resampling": "Gaussian noise of those sizes on every run and rung, each size from a scaled inverse chi-square",
        "resamples": resamples,
        "random_seed": random_seed,
        "multiplier": "compute of the reference at the loss that the mechanism has at C, over C; only where both were "
        "measured on both sides of that loss",
        "held_out_set": "the same sequences for every run; intervals hold for that set",
    }


# --- the fit ----------------------------------------------------------------------------------------------------------


def _estimate(
    runs: Runs,
    log_c_N: Array,
    alphabet: list[str],
    names: list[str],
    common: dict[str, Any],
    resamples: int,
    random_seed: int,
) -> ScalingFit:
    """
    Args:
        alphabet: the mechanisms by number.
        names: the same in the order to be told in.
    """
    code_N, rung_N = runs.x_NK.T.astype(int)
    counts = np.array([len(np.unique(rung_N[code_N == code])) for code in range(len(alphabet))])
    kept_N = counts[code_N] >= 2
    lone = [name for name, count in zip(alphabet, counts, strict=True) if count < 2]
    centre = float(np.mean([log_c_N[kept_N].min(), log_c_N[kept_N].max()])) if kept_N.any() else 0.0
    if not kept_N.any():
        few = f"no mechanism has two rungs with a finished run ({', '.join(alphabet)}): train other sizes."
        return ScalingFit(status=Status.TOO_FEW_POINTS, message=few, **common)
    codes = np.flatnonzero(counts >= 2)
    place_N = np.searchsorted(codes, code_N[kept_N])
    rung_N = np.unique(rung_N[kept_N], return_inverse=True)[1]
    means = RungMeans.of(place_N, rung_N, log_c_N[kept_N] - centre, runs.y_N[kept_N], runs.seeds_N[kept_N])
    kept = [alphabet[code] for code in codes]
    copied = same_seeds(means.sd, runs.y_N) or same_runs(
        [alphabet[code] for code in code_N], runs.x_NK[:, 1], runs.seeds_N, runs.y_N
    )
    laws = choices(counts[codes].tolist())
    squares = [2 * float(fit_curves(law, means, np.zeros((0, len(means.mean_I)))).objective_B[0]) for law in laws]
    free = len(means.mean_I) - np.array([law.size for law in laws])
    means, repeated = _with_noise(means, squares[-1], int(free[-1]))
    if not means.sd > 0:
        few = "no repeats, and no mean more than parameters, so there is no noise to make an interval of: train seeds."
        return ScalingFit(status=Status.TOO_FEW_POINTS, message=copied or few, **common)
    scale = 1.0 if repeated else means.sd**2
    tests = tuple(
        _f_test(less - more, few.size, full.size, means.df, scale)
        for less, more, few, full in zip(squares, squares[1:], laws, laws[1:], strict=False)
    )
    # Own floors only where one for all is refuted; one floor, which may be 0, wherever it can be told.
    chosen = min(1, len(laws) - 1) if len(laws) < 3 or tests[1][2] >= LEVEL else 2
    lack = _f_test(squares[chosen], 0, int(free[chosen]), means.df, scale)[2] if repeated and free[chosen] else None
    noise_BI = means.noise(resamples, np.random.default_rng(random_seed))
    found = fit_curves(laws[chosen], means, noise_BI)
    law = ScalingLaw(laws[chosen], found.theta_BK, centre, tuple(kept))
    data, draws = (Minimum(*(each[rows] for each in found)) for rows in (slice(0, 1), slice(1, None)))
    status, message = verdict(data, draws, _ends(law), "Train over a wider range.", runs=10**6)
    status, message = _judged(status, message, law, means, tests, lack, copied, repeated, lone)
    order = [name for name in names if name in kept]
    table = law.table(order)
    mechanisms = tuple(
        told(name, law, means, runs, code_N == alphabet.index(name), common["reference"]) for name in order
    )
    return ScalingFit(
        status=status,
        message=message,
        parameters={name: Estimate.of(values) for name, values in table.items()},
        covariance=covariance_of(table),
        objective=float(data.objective_B[0]),
        floors=FLOORS[chosen],
        compute_unit=float(np.exp(centre)),
        floor_p=tests[0][2] / 2 if tests else None,
        own_floors_p=tests[1][2] if len(tests) > 1 else None,
        own_floors_df=tests[1][:2] if len(tests) > 1 else None,
        lack_of_fit_p=lack,
        mechanisms=mechanisms,
        foretold=foretell(law, means, order, resamples, random_seed) if repeated else (),
        paired_sd=means.sd if repeated else None,
        noise_df=means.df if repeated else 0,
        level_sd=means.level_sd if repeated and means.level_df else None,
        level_df=means.level_df,
        _law=law,
        _runs=table_of(runs, log_c_N, alphabet, means, place_N, rung_N, kept_N),
        **common,
    )


def _with_noise(means: RungMeans, squares: float, free: int) -> tuple[RungMeans, bool]:
    """The means with the noise of their repeats; without repeats that which the fullest law leaves over, which then is
    all of it.
    """
    if means.df and means.sd > 0:
        return means, True
    sd = float(np.sqrt(squares / free)) if free > 0 else 0.0
    return replace(means, sd=sd, df=max(free, 1), level_squares=0.0, level_df=0), False


def _f_test(squares: float, few: int, full: int, df: int, scale: float) -> tuple[int, int, float]:
    """Degrees of freedom and p of the squares, in units of the noise, that so many parameters more take."""
    return full - few, df, float(fdtrc(full - few, df, max(squares, 0.0) / (full - few) / scale))


def _ends(law: ScalingLaw) -> list[tuple[Array, str]]:
    """Which rows stopped at an end of a range other than that of a floor, and what that says."""
    _, log_a_BM, alpha_BM = law.curves.split(law.theta_BK)
    found = []
    for name, log_a_B, alpha_B in zip(law.names, log_a_BM.T, alpha_BM.T, strict=True):
        flat_B = (alpha_B <= ALPHA[0]) | (np.exp(log_a_B) < FLAT)
        found.append((flat_B, f"the loss of {name} does not fall with compute"))
        found.append((alpha_B >= ALPHA[1], f"alpha of {name} stopped at {ALPHA[1]:g}, the end of its range"))
    return found


def _judged(
    status: Status,
    message: str,
    law: ScalingLaw,
    means: RungMeans,
    tests: Sequence[tuple[int, int, float]],
    lack: float | None,
    copied: str,
    repeated: bool,
    lone: list[str],
) -> tuple[Status, str]:
    """The status, and all there is to doubt, the gravest first."""
    doubts = [] if status is Status.CONVERGED else [message]
    message = message if status is Status.CONVERGED else ""
    if copied or not repeated:
        status = Status.TOO_FEW_POINTS
    if copied:
        doubts.append(copied)
    if lack is not None and lack < REFUTED:
        status = Status.POOR_FIT if status is Status.CONVERGED else status
        doubts.append(
            f"the means miss the law by more than seeds differ (p = {lack:.1g}): fit fewer rungs, or tune each of them."
        )
    rungs = len(means.models)
    if not law.curves.floors:
        doubts.append(
            f"{rungs} rungs do not tell a floor from a power, so the laws are pure powers: they hold in the "
            "measured range alone, and with a floor their exponents would be larger."
        )
    elif law.theta_BK[0, : law.curves.floors].min() <= 0:
        doubts.append("no floor shows: E stopped at 0, so beyond the measured range the laws fall too fast.")
    elif tests[0][2] / 2 >= LEVEL:
        doubts.append(
            f"a floor is not told from none (p = {tests[0][2] / 2:.2g}): exponents and E move together, as their "
            "intervals say."
        )
    if law.curves.floors and len(tests) < 2:
        doubts.append(
            f"{rungs} rungs cannot give each mechanism a floor of its own: one floor for all is assumed, which the "
            f"text sets and not the model{'' if lack is None else f' (lack of fit p = {lack:.2g})'}."
        )
    if law.curves.floors:
        doubts.append("intervals of exponents and floors are too short: take them for a lower bound of the doubt.")
    if (odd := _uneven(means)) and repeated:
        doubts.append(odd)
    if lone:
        doubts.append(f"left out, with one rung each: {listed(lone)}.")
    doubts.append(message)
    if not (copied or repeated):
        doubts.append(unrepeated("the residuals around the law stand in for it"))
    return status, " ".join(filter(None, doubts))


def _uneven(means: RungMeans) -> str:
    """Names the rung whose runs scatter most, where that is not the noise of the others (F test, 1% over all)."""
    free_R = np.array([model.df for model in means.models])
    squares_R = np.array([model.squares for model in means.models])
    tested = [r for r in range(len(free_R)) if free_R[r] and free_R.sum() > free_R[r]]
    p = {
        r: float(
            fdtrc(
                free_R[r],
                free_R.sum() - free_R[r],
                squares_R[r] / free_R[r] / max((squares_R.sum() - squares_R[r]) / (free_R.sum() - free_R[r]), 1e-300),
            )
        )
        for r in tested
    }
    worst = min(p, key=lambda r: p[r], default=None)
    if worst is None or p[worst] * len(tested) >= REFUTED:
        return ""
    compute = np.exp(means.log_c_I[means.rung_I == worst].mean())
    return (
        f"the runs of rung {worst + 1} (about {compute:.2g} C0) scatter more than those of the others, but their noise "
        "is pooled: intervals there are too short, elsewhere too long."
    )
