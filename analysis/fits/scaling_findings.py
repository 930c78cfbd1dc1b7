"""What a scaling fit says of each mechanism: its exponent, its compute multiplier and where that can be told, and its
largest rung as the others foretell it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.runs import Runs
from analysis.fits.scaling_law import RungMeans, choices, fit_curves
from analysis.fits.scaling_result import FLOORS, Foretold, Mechanism, ScalingLaw
from analysis.fits.types import Estimate
from analysis.interval import ends

Array = np.ndarray


def told(name: str, law: ScalingLaw, means: RungMeans, runs: Runs, own_N: Array, reference: str) -> Mechanism:
    place = law.names.index(name)
    own_I = means.mechanism_I == place
    errors_I = np.sqrt(np.diag(means.covariance_II) - _levels(means))[own_I]
    c_I = np.exp(means.log_c_I[own_I] + law.centre)
    common: dict[str, Any] = {
        "name": name,
        "rows": tuple(row for row, own in zip(runs.rows, own_N, strict=True) if own),
        "flops": tuple(map(float, c_I)),
        "means": tuple(map(float, means.mean_I[own_I])),
        "errors": tuple(map(float, errors_I)),
        "exponent": Estimate.of(law.exponents(name)),
    }
    if name == reference or reference not in law.names:
        return Mechanism(**common)
    known = means.log_c_I[means.mechanism_I == law.names.index(reference)] + law.centre
    span = law.comparable(name, reference, np.log(c_I), known)
    more: dict[str, Any] = {"exponent_less": Estimate.of(law.exponents(name) - law.exponents(reference)), "span": span}
    if span is None:
        best, worst = law.losses(reference, known.max())[0], law.losses(reference, known.min())[0]
        side = "less" if law.losses(name, np.log(c_I).min())[0] < best else "more"
        why = f"all its losses are {side} than the reference's, {best:.4f} to {worst:.4f} nats/token"
        return Mechanism(**common, **more, withheld=why)
    low_B, high_B = (law.multipliers(name, reference, np.log([c]))[:, 0] for c in span)
    return Mechanism(
        **common,
        **more,
        multipliers=(Estimate.of(low_B), Estimate.of(high_B)),
        growth=Estimate.of(high_B / low_B),
        withheld=""
        if np.isclose(span, (c_I.min(), c_I.max())).all()
        else "the reference was not measured at its other losses",
    )


def _levels(means: RungMeans) -> Array:
    """Variance that all means of a rung have in common -> [I]."""
    if not means.level_df:
        return np.zeros(len(means.mean_I))
    return means.level_sd**2 / np.array(means.seeds)[means.rung_I]


def foretell(
    law: ScalingLaw, means: RungMeans, order: list[str], resamples: int, random_seed: int
) -> tuple[Foretold, ...]:
    """The largest rung from the others: prediction intervals hold the noise of the runs to come too."""
    last = len(means.models) - 1
    part = means.part(last)
    counts = [int((part.mechanism_I == m).sum()) for m in range(len(law.names))]
    held = [m for m, count in enumerate(counts) if count >= 2]
    if not held:
        return ()
    own_I = np.isin(part.mechanism_I, held)
    if not own_I.all():
        return ()  # a mechanism that lacks a rung below has no prediction, and the covariance is of all
    laws = choices(counts)
    curves = laws[min(1, len(laws) - 1)] if law.curves.floors <= 1 else laws[-1]
    rng = np.random.default_rng(random_seed + 1)
    noise_BI = means.noise(resamples, rng)  # of this study; the rung to come has the same means with noise of its own
    theta_BK = fit_curves(curves, part, noise_BI[:, means.rung_I < last]).theta_BK
    found = []
    for name in order:
        place = law.names.index(name)
        at = np.flatnonzero((means.rung_I == last) & (means.mechanism_I == place))
        if not len(at):
            continue
        predicted_B = curves.value(theta_BK, np.array([place]), means.log_c_I[at])[:, 0]
        with_noise_B = np.r_[predicted_B[0], predicted_B[1:] + noise_BI[:, at[0]]]
        low, high = np.quantile(with_noise_B[1:], ends())
        expected = Estimate(float(predicted_B[0]), float(low), float(high), float(np.std(with_noise_B[1:], ddof=1)))
        flops = float(np.exp(means.log_c_I[at[0]] + law.centre))
        found.append(Foretold(name, flops, expected, float(means.mean_I[at[0]]), FLOORS[min(curves.floors, 2)]))
    return tuple(found)


def table_of(
    runs: Runs,
    log_c_N: Array,
    alphabet: list[str],
    means: RungMeans,
    place_N: Array,
    rung_N: Array,
    kept_N: Array,
) -> pd.DataFrame:
    """Runs used -> mechanism, flops, loss, seed, trial_id, paired (the effect of the seed at its rung taken off)."""
    at = {key: i for i, key in enumerate(zip(means.mechanism_I.tolist(), means.rung_I.tolist(), strict=True))}
    rest_N = runs.y_N[kept_N] - means.mean_I[[at[key] for key in zip(place_N.tolist(), rung_N.tolist(), strict=True)]]
    table = pd.DataFrame(
        {
            "mechanism": [alphabet[int(code)] for code in runs.x_NK[kept_N, 0]],
            "rung": rung_N,
            "flops": np.exp(log_c_N[kept_N]),
            "loss": runs.y_N[kept_N],
            "seed": runs.seeds_N[kept_N],
            "trial_id": np.array(runs.rows, dtype=object)[kept_N],
        }
    )
    effect_N = pd.Series(rest_N).groupby([table["rung"], table["seed"]]).transform("mean")
    alone_N = table.groupby("rung")["mechanism"].transform("nunique") < 2
    return table.assign(paired=table["loss"] - effect_N.where(~alone_N, 0.0))
