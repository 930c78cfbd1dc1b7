"""Alternatives at one budget, point by point: what each pair differs by, and which differences are told from noise.

Runs are paired by seed: the effect of a seed comes off, and what is left is the noise of a paired difference, pooled
over all points. Differences are linear in the losses, so their intervals are Student's. Many questions are asked at
once: every difference also has a p value after Holm's correction (Scand. J. Stat. 6, 1979) for its family, and only
that decides what is told from noise.

Letters: I points (an alternative at a share) that have runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.errors import require_columns
from analysis.fits.linear import LEVEL, chance, combine, covariance, holm
from analysis.fits.noise import Noise, SeedModel, noisier, quieter, seed_model, unrepeated
from analysis.fits.runs import Runs, read_runs, refused_losses, require_one_budget, same_losses, same_runs, same_seeds
from analysis.fits.types import Estimate, Fit, with_doubt
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Level:
    """An alternative at one share."""

    name: str
    share: float | None
    """None: it has none, as the dense baseline."""
    runs: int
    loss: float
    """For the average seed, nats per token."""
    se: float | None
    """Paired standard error; None where nothing is repeated."""


@dataclass(frozen=True)
class Difference:
    """Loss of one alternative less that of another, nats per token."""

    first: str
    second: str
    share: float | None
    """Where; None: the mean over all shares that both have."""
    difference: Estimate
    p: float
    """Chance of so large a difference if there were none, after Holm's correction over its family."""

    @property
    def told(self) -> bool:
        """Whether it is told from noise."""
        return self.p < LEVEL

    def reversed(self) -> Difference:
        """The second less the first."""
        same = self.difference
        return replace(
            self, first=self.second, second=self.first, difference=Estimate(-same.value, -same.high, -same.low, same.se)
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonFit(Fit):
    """Alternatives compared. The parameters are the differences at each share, by name."""

    levels: tuple[Level, ...] = ()
    differences: tuple[Difference, ...] = ()
    """Of every pair at every share that both have."""
    means: tuple[Difference, ...] = ()
    """Of every pair over the shares that both have, where those are two or more."""
    gains: tuple[Difference, ...] = ()
    """Of every alternative at every share less the reference, if that has runs."""
    reference: str
    seeds: int
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    noise_df: int = 0
    """Degrees of freedom of `paired_sd`."""

    def summary(self) -> str:
        """What the fit says in sentences, with words of doubt before every number where the status asks for them."""
        lines = [self._at_share(share) for share in dict.fromkeys(each.share for each in self.differences)]
        if self.means:
            each = "; ".join(f"{mean.first} less {mean.second} {_size(mean)}" for mean in self.means)
            lines.append(f"Mean difference over the shares that both have, nats/token: {each}.")
        if self.gains:
            better, worse = (
                ", ".join(
                    f"{_at(gain.first, gain.share)} {_size(gain)}"
                    for gain in self.gains
                    if gain.told and (gain.difference.value < 0) is wanted
                )
                for wanted in (True, False)
            )
            lines.append(
                f"Against {self.reference}, told from noise after Holm's correction, of {len(self.gains)} differences, "
                f"nats/token: better {better or 'none'}; worse {worse or 'none'}."
            )
        if not self.differences and self.levels:
            lines += [f"Losses: {', '.join(f'{_at(each.name, each.share)} {each.loss:.4f}' for each in self.levels)}."]
        if self.paired_sd is not None:
            lines.append(
                f"Noise of one run once its seed's common effect is off: {self.paired_sd:.4f} nats/token (sd, "
                f"{self.noise_df} degree{'s' * (self.noise_df != 1)} of freedom)."
            )
        return with_doubt(self.status, self.message, lines)

    def _at_share(self, share: float | None) -> str:
        """Which alternative has the least loss, and which of the others are told from it."""
        here = [each for each in self.differences if each.share == share]
        names = {name for each in here for name in (each.first, each.second)}
        best = min(
            (level for level in self.levels if level.share == share and level.name in names),
            key=lambda level: level.loss,
        )
        behind = [
            each if each.second == best.name else each.reversed()
            for each in here
            if best.name in (each.first, each.second)
        ]
        told, rest = (
            ", ".join(f"{each.first} {_size(each)}" for each in behind if each.told is wanted)
            for wanted in (True, False)
        )
        parts = [f"told from it, nats/token: {told}"] if told else []
        parts += [f"not told from it: {rest}"] if rest else []
        return f"At share {share:.4g} {best.name} has the least loss, {best.loss:.4f}; {'; '.join(parts)}."

    def compared(self) -> pd.DataFrame:
        """Everything that a figure draws -> series, name, share, value, low, high, verdict (nats per token).

        Series: `level` (loss for the average seed, with its paired standard error), `reference` (likewise, of what all
        are held against), `difference` (of a pair at a share, with its 95% interval) and `mean` (over the shares that
        both have).
        """
        rows: list[dict[str, Any]] = []
        for level in self.levels:
            if level.share is not None:
                series = "reference" if level.name == self.reference else "level"
                row = {"series": series, "name": level.name, "share": level.share, "value": level.loss}
                rows.append(
                    row | ({} if level.se is None else {"low": level.loss - level.se, "high": level.loss + level.se})
                )
        for series, differences in (("difference", self.differences), ("mean", self.means)):
            for each in differences:
                row = {
                    "series": series,
                    "name": f"{each.first} less {each.second}",
                    "share": each.share,
                    "value": each.difference.value,
                }
                verdict = "told from noise" if each.told else "not told from noise"
                rows.append(row | {"low": each.difference.low, "high": each.difference.high, "verdict": verdict})
        return pd.DataFrame(rows).reindex(columns=["series", "name", "share", "value", "low", "high", "verdict"])

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: the pairs of `compared`."""
        return self.compared()[lambda data: data["series"] == "difference"]

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        """Each difference with its interval."""
        from analysis.figures.comparison import draw_differences

        draw_differences(ax, data)


def fit_comparison(
    frame: pd.DataFrame,
    name: str = "memory",
    share: str = "rho",
    loss: str = "val_loss",
    seed: str = "seed",
    *,
    reference: str = "",
    pairs: Sequence[tuple[str, str]] | None = None,
) -> ComparisonFit:
    """Compare alternatives at each share.

    Args:
        frame: one run a row, all of one budget. A column `trial_id` names the rows used; of a column `status` only
            `finished` is.
        name: column of the alternative's name.
        share: column of the share at which it stands; empty for what has none.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired.
        reference: an alternative that all others are held against, whatever their share.
        pairs: names to compare; default: all, but the reference and what has no share.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a trial id is repeated, one seed stands twice at one share of
            an alternative, or the runs are of several budgets.
    """
    require_columns(frame.columns, (name, share, loss, seed), "fit_comparison")
    shares = frame[share].astype(float).round(9)
    named = list(
        dict.fromkeys(zip(frame[name], (None if np.isnan(each) else float(each) for each in shares), strict=True))
    )
    places = {point: place for place, point in enumerate(named)}
    codes = [places[each, None if np.isnan(at) else float(at)] for each, at in zip(frame[name], shares, strict=True)]
    runs = read_runs(frame.assign(point=codes), ("point",), loss, seed, "fit_comparison")
    require_one_budget(frame.assign(point=codes), "point", "fit_comparison")
    common: dict[str, Any] = {
        "law": "paired differences",
        "reference": reference,
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": {
            **{"name": name, "share": share, "loss": loss, "loss_unit": "nats per token"},
            "difference": "loss of the first less that of the second, for the average seed",
            "interval": "95%, Student's t, each on its own",
            "p": "two-sided t test, Holm's correction over the differences at all shares, over the means, and over the "
            "gains",
            "noise": "residuals of runs after the effects of point and seed, pooled over points",
            "objective": "sum of the squares of those residuals",
            "held_out_set": "the same sequences for every run; intervals hold for that set",
        },
    }
    if refused := refused_losses(runs):
        return ComparisonFit(status=refused[0], message=refused[1], **common)
    return _estimate(runs, named, pairs, common)


def _estimate(
    runs: Runs,
    named: Sequence[tuple[str, float | None]],
    pairs: Sequence[tuple[str, str]] | None,
    common: dict[str, Any],
) -> ComparisonFit:
    """
    Args:
        named: the points, by the numbers that the runs have for them.
    """
    reference = common["reference"]
    points = [named[int(place)] for place in np.unique(runs.x_NK[:, 0])]
    if not points:
        return ComparisonFit(status=Status.TOO_FEW_POINTS, message="no run has finished.", **common)
    model = seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N)
    copied = same_losses(runs.y_N) or same_seeds(model.sd, runs.y_N)
    repeated = model.df > 0 and not copied
    errors = model.sd * np.sqrt(np.diag(model.covariance_II))
    levels = tuple(
        Level(*point, int(model.counts_I[i]), float(model.mean_I[i]), float(errors[i]) if repeated else None)
        for i, point in enumerate(points)
    )
    chosen = (
        pairs
        if pairs is not None
        else list(combinations(dict.fromkeys(each for each, at in points if at is not None), 2))
    )
    chosen = [pair for pair in chosen if reference not in pair]
    asked = _questions(points, chosen, reference)
    if not any(asked.values()) or not repeated:
        alone = "" if any(asked.values()) else "no two alternatives have a finished run at one share."
        message = alone or copied or unrepeated("no difference can be told from it")
        return ComparisonFit(status=Status.TOO_FEW_POINTS, message=message, levels=levels, **common)
    noise = Noise(model.sd, model.df)
    differences, means, gains = (_answers(asked[family], model, noise) for family in ("differences", "means", "gains"))
    labels = [f"{each.first} less {each.second} at {each.share:g}" for each in differences]
    weights_KI = np.array([weights for weights, *_ in asked["differences"]])
    doubt = _unlike(runs, levels)
    at_N = [named[int(place)] for place in runs.x_NK[:, 0]]
    twins = same_runs([each for each, _ in at_N], [share for _, share in at_N], runs.seeds_N, runs.y_N)
    return ComparisonFit(
        status=Status.TOO_FEW_POINTS if twins else Status.CONVERGED,
        message=" ".join(filter(None, (twins, doubt))),
        parameters={label: each.difference for label, each in zip(labels, differences, strict=True)},
        covariance=covariance(model, weights_KI, noise) if labels else (),
        objective=model.squares,
        levels=levels,
        paired_sd=model.sd,
        noise_df=model.df,
        differences=differences,
        means=means,
        gains=gains,
        **common,
    )


def _unlike(runs: Runs, levels: Sequence[Level]) -> str:
    """Names the points that scatter more or less than the others; '' where there is none."""
    loud = noisier(runs.x_NK[:, 0], runs.y_N, runs.seeds_N, np.random.default_rng(0))
    quiet = quieter(runs.x_NK[:, 0], runs.y_N, np.random.default_rng(0))
    unlike = [
        f"{', '.join(_at(level.name, level.share) for level, odd in zip(levels, found, strict=True) if odd)} {verb}"
        for found, verb in ((loud, "scatters more"), (quiet, "scatters less"))
        if found.any()
    ]
    return (
        f"the noise is not alike at all points: {'; '.join(unlike)}, so intervals, which pool it, may be too short."
        if unlike
        else ""
    )


Question = tuple[Array, str, str, float | None]
"""Weights over the points, first, second, share."""


def _questions(
    points: Sequence[tuple[str, float | None]], pairs: Sequence[tuple[str, str]], reference: str
) -> dict[str, list[Question]]:
    """The differences to be asked for, by family."""
    at = {point: np.eye(len(points))[i] for i, point in enumerate(points)}
    held = {name: [share for each, share in points if each == name and share is not None] for name, _ in points}
    differences: list[Question] = []
    means: list[Question] = []
    for first, second in pairs:
        shares = [share for share in held.get(first, ()) if share in held.get(second, ())]
        own: list[Question] = [(at[first, share] - at[second, share], first, second, share) for share in shares]
        differences += own
        if len(own) > 1:
            means.append((np.mean([weights for weights, *_ in own], axis=0), first, second, None))
    base = next((point for point in points if point[0] == reference), None)
    gains: list[Question] = (
        [(at[point] - at[base], point[0], reference, point[1]) for point in points if point[0] != reference]
        if base
        else []
    )
    return {"differences": sorted(differences, key=lambda each: -(each[3] or 0)), "means": means, "gains": gains}


def _answers(questions: Sequence[Question], model: SeedModel, noise: Noise) -> tuple[Difference, ...]:
    estimates = [combine(model, weights, noise) for weights, *_ in questions]
    chances = holm({place: chance(estimate, noise) for place, estimate in enumerate(estimates)})
    return tuple(
        Difference(first, second, share, estimates[place], chances[place])
        for place, (_, first, second, share) in enumerate(questions)
    )


# --- words ------------------------------------------------------------------------------------------------------------


def _size(each: Difference) -> str:
    """A difference with the interval that it has on its own, and p where the correction decides otherwise than that
    interval would.
    """
    value = each.difference
    corrected = (
        f"; p {each.p:.2g} after Holm's correction" if (value.low > 0 or value.high < 0) and not each.told else ""
    )
    return f"{value.value:+.4f} ({value.low:+.4f} to {value.high:+.4f}{corrected})"


def _at(name: str, share: float | None) -> str:
    return name if share is None else f"{name} at {share:.4g}"
