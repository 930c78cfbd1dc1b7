"""IsoFLOP profiles: at each budget the size with the least loss, and how that size grows with the budget (arXiv
2203.15556, approach 2).

Each budget gets a parabola in log size. That is valid only near the optimum: wide, uncentred or lopsided grids bias it
even without noise (arXiv 2603.22339), so the fit says where the runs contradict it. The line through the optima is
`fit_log_log`.

Letters: B resamples, I runs of one budget, N rows, X points to predict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import chdtrc, fdtrc  # scipy.stats would take a second to import

from analysis.fits.counting import unit_of_flops
from analysis.fits.isoflop_result import Budget, IsoflopFit, Profile
from analysis.fits.log_log import LogLogFit, fit_log_log
from analysis.fits.points import Points, read_points
from analysis.fits.runs import distinct, finished, require_resamples, same_seeds
from analysis.fits.scatter import judge_scatter, with_scatter
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import percent, takes_level
from analysis.status import Status
from sparsemem.values import listed

Array = np.ndarray
SAME_BUDGET = (
    1.1  # runs whose FLOPs differ by less than this factor from the next are of one budget: sizes are integers
)
LEAST_SIZES, LEAST_BUDGETS = 4, 3
EDGE = 0.01  # an optimum within this part of the sampled range from an end counts as that end


@takes_level
def fit_isoflop(
    frame: pd.DataFrame,
    *,
    flops: str,
    params: str,
    loss: str,
    loss_se: str | None = None,
    resamples: int = 4000,
    random_seed: int = 0,
) -> IsoflopFit:
    """Fit a parabola in log size at each budget, then the power with which the optimal size grows.

    Args:
        frame: one run a row. A column `trial_id` names the rows used; of a column `status` only `finished` is.
        flops: column of the training budget, in FLOPs or what its heading says (`gflops`).
            Runs within a tenth of each other are of one budget.
        params: column of the size.
        loss: column of the loss.
        loss_se: column of the standard error of the loss; runs then count with 1 / variance. Without it, the noise is
            that of repeats (runs of one budget and size), and where nothing is repeated what the parabolas leave over.
        resamples: how often the optima are found anew with noise of that size on every run.
        random_seed: of the resampling; the same input gives the same fit.

    Returns:
        A fit. Budgets whose optimum lies at an end of the sizes in more than half of the resamples are left out and
        named; the others count in the regression with 1 / variance of the log of their optimum.

    Raises:
        AnalysisError: a column is missing, holds text or what is not positive, or a trial id is repeated.

    >>> c, n = np.meshgrid([1e18, 1e19, 1e20], np.linspace(-1, 1, 7))
    >>> best = 0.1 * c**0.5
    >>> loss = 60 * c**-0.07 + 0.05 * n**2
    >>> runs = pd.DataFrame({"c": c.ravel(), "n": (best * np.exp(n)).ravel(), "loss": loss.ravel()})
    >>> round(fit_isoflop(runs, flops="c", params="n", loss="loss", resamples=50).parameters["exponent"].value, 6)
    0.5
    """
    require_resamples(resamples, "fit_isoflop")
    points = read_points(frame, (flops, params, *([loss_se] if loss_se else [])), loss, None, "fit_isoflop")
    conventions = _conventions(flops, params, loss, loss_se, resamples, random_seed)
    common: dict[str, Any] = {
        "law": "isoflop",
        "columns": (flops, params),
        "rows": points.rows,
        "conventions": conventions,
    }
    refusal = points.refusal()
    if refusal:
        return IsoflopFit(status=refusal[0], message=points.with_left_out(refusal[1]), budgets=(), **common)
    unit, units = unit_of_flops(flops, points.x_TN[0], points.x_TN[1], _tokens(frame, points))
    conventions["unit_of_C"] = unit
    budget_N = _budgets(points.x_TN[0])
    owns = [np.flatnonzero(budget_N == budget) for budget in range(budget_N.max(initial=-1) + 1)]
    used = [own for own in owns if _fittable(points, own)]
    if not used:
        message = f"no budget has {LEAST_SIZES} distinct sizes: train more of them."
        return IsoflopFit(status=Status.TOO_FEW_POINTS, message=points.with_left_out(message), budgets=(), **common)
    rng = np.random.default_rng(random_seed)
    return _estimate(points, owns, used, loss_se is not None, (unit, units), common, resamples, rng)


# --- the steps --------------------------------------------------------------------------------------------------------


def _conventions(
    flops: str, params: str, loss: str, loss_se: str | None, resamples: int, random_seed: int
) -> dict[str, Any]:
    return {
        "columns": {"C": flops, "N": params},
        "loss": loss,
        "form": "at each budget loss = c + s log N + k (log N)^2; log N_opt = log_coefficient + exponent log C, "
        "natural logarithms",
        "objective": "weighted sum of squares of log N_opt around the line",
        "noise": f"column {loss_se}" if loss_se else "repeats: runs of one budget and size",
        "unit_of_C": None,
        "interval": f"{percent()}; optima: percentile; exponent: Student's t, errors widened where the optima scatter "
        "more (Birge ratio)",
        "resampling": "Gaussian noise of the measured size on every run",
        "resamples": resamples,
        "random_seed": random_seed,
    }


def _estimate(
    points: Points,
    owns: list[Array],
    used: list[Array],
    given: bool,
    units: tuple[float | None, str],
    common: dict[str, Any],
    resamples: int,
    rng: np.random.Generator,
) -> IsoflopFit:
    """
    Args:
        owns: runs of each budget.
        used: of those that determine a parabola.
        given: every run has its own standard error.
        units: of the budget's column, in FLOPs, None where it is not known; and what there is to say of it.
    """
    (flops, params), (unit, said) = common["columns"], units
    y_N = points.y_N / points.level
    sd_N, df, measured = _noise(points, y_N, used, common["conventions"])
    copied = same_seeds(float(sd_N[0]), y_N) if measured and not given else ""
    sd_N = np.maximum(sd_N, 1e-12)  # where parabolas leave nothing over
    level_B = np.sqrt(df / rng.chisquare(df, resamples)) if df else np.ones(resamples)
    found, profiles, squares, free, rest_N = _profiles(points, y_N, sd_N, owns, level_B, unit or 1.0, rng)
    lack = None
    if measured and free and not copied:
        lack = float(fdtrc(free, df, squares / free)) if df else float(chdtrc(free, squares))
    kept = [each for each in found if each.optimum]
    optima = pd.DataFrame(
        [(each.flops / (unit or 1.0), each.optimum.value, each.log_se) for each in kept if each.optimum],
        columns=[flops, params, "log_se"],
        dtype=float,
    )
    line = fit_log_log(optima.assign(log_se=np.maximum(optima["log_se"], 1e-9)), x=flops, y=params, log_se="log_se")
    status, message = with_scatter(
        *_verdict(found, line, lack, measured, copied, "FLOPs" if unit else f"of `{flops}`"),
        *judge_scatter(points, rest_N),
    )
    message = f"{message} {said}".strip()
    return IsoflopFit(
        status=status,
        message=points.with_left_out(message),
        budgets=tuple(found),
        parameters=line.parameters,
        covariance=line.covariance,
        objective=line.objective,
        noise_sd=None if given else points.level * float(sd_N[0]),
        lack_of_fit_p=lack,
        line=line,
        _profiles=tuple(profiles),
        **common,
    )


def _fittable(points: Points, own: Array) -> bool:
    """Whether the runs of a budget determine a parabola and leave something over."""
    return distinct(points.x_TN[1, own]) >= LEAST_SIZES


def _profiles(
    points: Points,
    y_N: Array,
    sd_N: Array,
    owns: Sequence[Array],
    level_B: Array,
    unit: float,
    rng: np.random.Generator,
) -> tuple[list[Budget], list[Profile | None], float, int, Array]:
    """Optimum and parabolas of each budget; the squares that the parabolas leave over in units of the noise, their
    degrees of freedom, and log loss less theirs -> [N].

    Args:
        owns: runs of each budget.
        level_B: noise of each resample in units of `sd_N`.
        unit: of the budgets, in FLOPs.
    """
    found: list[Budget] = []
    profiles: list[Profile | None] = []
    squares, free, rest_N = 0.0, 0, np.zeros(len(y_N))
    for own in owns:
        center = float(np.exp(np.log(points.x_TN[0, own]).mean())) * unit
        if not _fittable(points, own):
            found.append(Budget(center, len(own), None, None, None, None, f"fewer than {LEAST_SIZES} sizes"))
            profiles.append(None)
            continue
        noise_BI = rng.standard_normal((len(level_B), len(own))) * level_B[:, None] * sd_N[own]
        profile = _profile(np.log(points.x_TN[1, own]), y_N[own], sd_N[own], noise_BI, points.level)
        rest_I = profile.y_I - np.vander(profile.log_n_I - profile.center, 3, increasing=True) @ profile.theta_B3[0]
        squares, free = squares + float(np.sum((rest_I / sd_N[own]) ** 2)), free + len(own) - 3
        rest_N[own] = np.log(profile.y_I / np.maximum(profile.y_I - rest_I, 1e-9))
        found.append(_optimum(center, profile))
        profiles.append(profile)
    return found, profiles, squares, free, rest_N


def _tokens(frame: pd.DataFrame, points: Points) -> Array | None:
    """Training tokens, where the table has a column `tokens` of them; the points are its finished rows, in another
    order.
    """
    tokens = pd.to_numeric(finished(frame).get("tokens", pd.Series(dtype=float)), errors="coerce").to_numpy(float)
    if not len(tokens) or not (tokens > 0).all():
        return None
    by_row = dict(zip(map(str, finished(frame).get("trial_id", finished(frame).index)), tokens, strict=True))
    return np.array([by_row[row] for row in points.rows])


def _budgets(flops_N: Array) -> Array:
    """Number of the budget of each row, from the smallest."""
    order = np.argsort(flops_N, kind="stable")
    number_N = np.empty(len(order), int)
    number_N[order] = np.cumsum(
        np.diff(np.log(flops_N[order]), prepend=np.log(flops_N[order[:1]])) > math.log(SAME_BUDGET)
    )
    return number_N


def _noise(points: Points, y_N: Array, owns: list[Array], conventions: dict[str, Any]) -> tuple[Array, int, bool]:
    """Standard deviation of every row (of losses over their level), its degrees of freedom (0: given) and whether it
    was measured.
    """
    if len(points.x_TN) == 3:
        return points.x_TN[2] / points.level, 0, True
    repeats, rests = [], []
    for own in owns:
        log_n_I, y_I = np.log(points.x_TN[1, own]), y_N[own]
        sizes, place_I = np.unique(log_n_I, return_inverse=True)
        repeats.append((y_I - (np.bincount(place_I, y_I) / np.bincount(place_I))[place_I], len(own) - len(sizes)))
        design_I3 = np.vander(log_n_I - log_n_I.mean(), 3, increasing=True)
        rests.append((y_I - design_I3 @ (np.linalg.pinv(design_I3) @ y_I), len(own) - 3))
    measured = sum(df for _, df in repeats) > 0
    if not measured:
        conventions["noise"] = (
            "nothing is repeated: what the parabolas leave over, pooled over budgets, stands in for it"
        )
    pooled = repeats if measured else rests
    df = sum(each for _, each in pooled)
    sd = math.sqrt(sum(float(rest @ rest) for rest, _ in pooled) / df)
    return np.full(len(y_N), sd), df, measured


def _profile(log_n_I: Array, y_I: Array, sd_I: Array, noise_BI: Array, level: float) -> Profile:
    """The parabola through the runs, and through the runs with noise."""
    center = float(log_n_I.mean())
    map_3I = np.linalg.pinv(np.vander(log_n_I - center, 3, increasing=True) / sd_I[:, None]) / sd_I
    return Profile(log_n_I, y_I, center, np.vstack([y_I, y_I + noise_BI]) @ map_3I.T, level)


def _optimum(flops: float, profile: Profile) -> Budget:
    c_B, s_B, k_B = profile.theta_B3.T
    low, high = profile.log_n_I.min() - profile.center, profile.log_n_I.max() - profile.center
    air = EDGE * (high - low)
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex_B = -s_B / (2 * k_B)
    inside_B = (k_B > 0) & (vertex_B > low + air) & (vertex_B < high - air)
    falls_B = s_B + k_B * (low + high) < 0  # from the low end to the high one
    best_B = np.where(inside_B, vertex_B, np.where(falls_B, high, low))
    p_interior, runs = float(inside_B[1:].mean()), len(profile.y_I)
    if not inside_B[0] or p_interior < 0.5:
        end = "largest" if falls_B[0] else "smallest"
        note = (
            f"the least loss lies at the {end} size"
            if not inside_B[0]
            else f"only {p_interior:.0%} of the resamples have it inside"
        )
        return Budget(flops, runs, None, None, None, p_interior, note)
    loss_B = profile.level * (c_B + s_B * best_B + k_B * best_B**2)
    optimum = Estimate.of(np.exp(best_B + profile.center))
    return Budget(flops, runs, optimum, float(best_B[1:].std(ddof=1)), Estimate.of(loss_B), p_interior)


def _verdict(
    budgets: list[Budget], line: LogLogFit, lack: float | None, measured: bool, copied: str, name: str
) -> tuple[Status, str]:
    """The first reason not to quote the numbers, then the others and what there is to doubt.

    Args:
        name: of the unit of budgets.
    """
    kept, reasons, doubts = [each for each in budgets if not each.note], [], []
    profiles, single = ([each for each in budgets if each.is_profile is wanted] for wanted in (True, False))
    if copied:
        reasons.append((Status.TOO_FEW_POINTS, copied))
    if not kept:
        reasons.append(
            (Status.NO_INTERIOR_MINIMUM, "no budget has its optimum inside its sizes: train smaller or larger ones.")
        )
    elif line.status is not Status.CONVERGED:
        reasons.append(
            (Status.TOO_FEW_POINTS, f"{len(kept)} budget(s) with an optimum; the power needs at least {LEAST_BUDGETS}.")
        )
    elif len(profiles) - len(kept) > len(profiles) / 3:
        reasons.append(
            (
                Status.NO_INTERIOR_MINIMUM,
                f"only {len(kept)} of {len(profiles)} profiles have their optimum inside their sizes.",
            )
        )
    if lack is not None and lack < REFUTED:
        words = (
            f"the profiles miss the runs by more than noise explains (p = {lack:.1g}): keep to sizes nearer the "
            "optimum."
        )
        reasons.append((Status.POOR_FIT, words))
    if len(kept) < len(profiles):
        doubts.append(
            f"left out: {listed([f'{each.flops:.3g} {name} ({each.note})' for each in profiles if each.note])}."
        )
    if single:
        runs, at = sum(each.runs for each in single), listed([f"{each.flops:.3g} {name}" for each in single])
        doubts.append(
            f"{len(single)} budget(s) of fewer than {LEAST_SIZES} sizes ({runs} run(s)) are no profiles and are not "
            f"used: {at}."
        )
    if line.parameters and line.parameters["exponent"].low <= 0:
        doubts.append(
            "the interval of the exponent holds 0 or less: these runs do not show that the best size grows with the "
            "budget."
        )
    if not measured:
        doubts.append("no repeats, so what the parabolas leave over stands in for the noise: train a second seed.")
    return reasons[0][0] if reasons else Status.CONVERGED, " ".join([*(words for _, words in reasons), *doubts])
