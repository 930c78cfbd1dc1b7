"""What the fitted models of a law over several budgets (`joint`) say: which is better, what moves the optimum, and what
there is to doubt.

Letters as in `joint`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import fdtrc

from analysis.fits.joint_budgets import FACTORS, VARIES, WORDS, tell_apart
from analysis.fits.joint_curve import BOUNDS, POSITION, SHAPES, Curve
from analysis.fits.joint_law import Means, aiccs, deviations, fit_curve, nested
from analysis.fits.joint_result import LeftOut, Model
from analysis.fits.linear import LEVEL, holm
from analysis.fits.types import REFUTED, Estimate
from analysis.interval import ends
from analysis.status import Status

Array = np.ndarray
AT_BOUND = 0.01
"""So near to an end of its admissible range, as a part of it, a parameter stopped there."""


def determined(means: Means, factors: tuple[str, ...]) -> list[Curve]:
    """The fullest models that leave something over: with a shape of each budget's own, or, where none does, with a
    common one.
    """
    for bends in (factors, ()):
        curves = [Curve(shape, factors, factors, bends) for shape in SHAPES]
        found = [curve for curve in curves if len(means.x_I) > len(curve.names) + len(means.models)]
        if found:
            return found
    return []


def compared(
    curves: Sequence[Curve],
    theta: Sequence[Array],
    scores: Array,
    means: Means,
    errors: Mapping[tuple[str, ...], float],
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


def alone(shape: str, means: Means) -> Array:
    """Best share of each budget by a curve of its own -> [C, B]; a cubic where the shares do not determine
    the shape.
    """
    optima = []
    for c in range(len(means.models)):
        own = means.part(np.arange(len(means.models)) == c, np.zeros((1, 0)))
        curve = Curve(shape, (), (), ())
        if len(own.x_I) <= len(curve.names) + 1:
            curve = replace(curve, shape="cubic")
        optima.append(
            curve.optimum(fit_curve(curve, own).theta_BK, np.zeros(0), float(means.x_I.min()), float(means.x_I.max()))
        )
    return np.stack(optima)


def chances(full: Curve, models: Sequence[Model], means: Means) -> dict[str, float]:
    """Factor -> chance of so much worse a fit without its movement of the best share if there were none: F test in the
    fullest model, after Holm's correction for the number of factors.

    Every budget is weighed by the noise that its own repeats measure, so the test has the degrees of freedom of one
    budget, the least: with those of all, 10 of 100 simulated ladders (three factors, 8 budgets of 7 shares and 2 seeds)
    had a factor move where none did; now 2.
    """
    squares, df = {model.moves_with: model.squares for model in models}, min(noise.df for noise in means.noises)

    def alone(name: str) -> float:
        without = squares[tuple(other for other in full.factors if other != name)]
        return float(fdtrc(1, df, max(without - squares[full.factors], 0)))

    return holm({name: alone(name) for name in full.factors})


def moved(
    full: Curve, movement_p: Mapping[str, float], shifts: Mapping[str, Estimate], alone_C: Array, means: Means
) -> tuple[str, ...]:
    """Factors along which the best share is shown to move: the interval of its shift excludes 0, the law without that
    movement fits worse by more than noise explains (`chances`), and the best shares of the budgets' own curves go the
    same way.

    Without a shape of each budget's own nothing is shown: a change of shape would look the same.
    """
    slopes = np.linalg.lstsq(np.column_stack([np.ones(len(alone_C)), means.z_CF]), alone_C, rcond=None)[0][1:]
    found = []
    for name, slope in zip(full.factors, slopes, strict=True):
        shift = shifts[name]
        if (
            full.bends_with
            and movement_p[name] < LEVEL
            and not shift.low <= 0 <= shift.high
            and slope * shift.value > 0
        ):
            found.append(name)
    return tuple(found)


def left_out_of(
    shape: str, budgets: tuple[dict[str, float], ...], means: Means, alone_CB: Array
) -> tuple[LeftOut, dict[tuple[str, ...], float]]:
    """The largest budget predicted from all others; and the error of each model that they determine."""
    largest = max(range(len(budgets)), key=lambda c: _rank(budgets[c]))
    others_C = np.arange(len(budgets)) != largest
    factors, _ = tell_apart([budgets[c] for c in np.flatnonzero(others_C)])
    others = means.part(others_C, np.log10([[budgets[c][name] for name in factors] for c in np.flatnonzero(others_C)]))
    own = means.part(~others_C, np.zeros((1, 0)))
    low, high = float(means.x_I.min()), float(means.x_I.max())
    z_F = np.log10([budgets[largest][name] for name in factors]) - others.z_CF.mean(0)
    bends = next((curve.bends_with for curve in determined(others, factors) if curve.shape == shape), ())
    curves = [Curve(shape, factors, moves, bends) for moves in nested(factors)]
    theta = [fit_curve(curve, others).theta_BK for curve in curves]
    chosen_B = np.stack([aiccs(*each, others) for each in zip(curves, theta, strict=True)]).argmin(0)
    wide_IF = np.repeat(z_F[None], len(own.x_I), axis=0)
    off_MBI = (
        np.stack([curve.value(each, own.x_I, wide_IF) for curve, each in zip(curves, theta, strict=True)]) - own.y_BI
    )
    off_MBI -= off_MBI.mean(2, keepdims=True)
    rows = np.arange(len(chosen_B))
    off_BI = off_MBI[chosen_B, rows]
    predicted_B = np.stack([curve.optimum(each, z_F, low, high) for curve, each in zip(curves, theta, strict=True)])[
        chosen_B, rows
    ]
    measured_B = alone_CB[largest]
    bounds = np.quantile(off_BI[1:], ends(), axis=0)
    lost = [
        name
        for name in FACTORS
        if name not in factors
        and budgets[largest][name] > VARIES * max(budgets[c][name] for c in np.flatnonzero(others_C))
    ]
    left = LeftOut(
        budget=budgets[largest],
        moves_with=curves[chosen_B[0]].moves_with,
        predicted=Estimate.of(predicted_B),
        measured=Estimate.of(measured_B),
        error=Estimate.of(predicted_B - measured_B),
        rms=float(np.sqrt(np.mean(off_BI[0] ** 2))),
        inside=float(np.mean((bounds[0] <= 0) & (bounds[1] >= 0))),
        note=f"taken to be without effect of {' and '.join(WORDS[name] for name in lost)}, which the others do not vary"
        if lost
        else "",
    )
    return left, {
        curve.moves_with: float(np.sqrt(np.mean(off[0] ** 2))) for curve, off in zip(curves, off_MBI, strict=True)
    }


def _rank(budget: Mapping[str, float]) -> tuple[float, float]:
    """By compute, which goes with P_act times tokens, then by sparsity."""
    return budget["active_params"] ** 2 * budget["tokens_per_active_param"], budget["sparsity"]


def shifts_of(curve: Curve, theta_BK: Array, means: Means, low: float, high: float) -> dict[str, Estimate]:
    z_CF = means.z_CF - means.z_CF.mean(0)
    shifts = {}
    for place, name in enumerate(curve.factors):
        first_F, last_F = np.zeros(z_CF.shape[1]), np.zeros(z_CF.shape[1])
        first_F[place], last_F[place] = z_CF[:, place].min(), z_CF[:, place].max()
        moved_B = curve.optimum(theta_BK, last_F, low, high) - curve.optimum(theta_BK, first_F, low, high)
        shifts[name] = Estimate.of(moved_B)
    return shifts


def inside_of(optima_CB: Array, ends: tuple[float, float]) -> Array:
    """Part of the resamples whose best share is inside the sampled range -> [C]."""
    return np.asarray(1 - np.isin(optima_CB[:, 1:], ends).mean(1))


def verdict(
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
            (abs(value_1C - limits[name][side]) < AT_BOUND * np.ptp(limits[name])).any()
            and (name, side) not in ordinary
            for side in (0, 1)
        )
    ]
    if hits:
        status = Status.BOUND_HIT
        doubts.append(f"the law stopped at the end of its admissible range ({', '.join(hits)}).")
    inside_C, at_end_C = inside_of(optima_CB, ends), np.isin(optima_CB[:, 0], ends)
    open_C = at_end_C | (inside_C < np.where(tied_C, 0.95, 0.5))
    if open_C.any():
        status = Status.NO_INTERIOR_MINIMUM
    if at_end_C.any():
        doubts.append(
            f"at {at_end_C.sum()} of {len(at_end_C)} budgets the law is least at an end of the sampled shares."
        )
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
        doubts.append(
            f"{np.sum(~settled_B[1:])} of {len(settled_B) - 1} resamples did not settle; they are kept as they are."
        )
    if not curve.bends_with:
        doubts.append(
            "the shares are too few to let the curves change their shape, so no movement of the best one can be told "
            "from that: train more."
        )
    return status, " ".join(doubts)
