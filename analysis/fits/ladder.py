"""What each rung of a ladder of changes does to the loss: its difference to the rung before, and to the first.

Rungs share their seeds, so the effect of a seed comes off and what is left is the noise of a paired difference, pooled
over all rungs. Differences are linear in the losses: their intervals are Student's. A ladder asks many questions at
once, so each step also has a p value after Holm's correction (Scand. J. Stat. 6, 1979), and only that decides which
steps are told from noise.

Letters: I rungs that have runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.fits.linear import LEVEL, chance, combine, covariance, holm
from analysis.fits.noise import Noise, seed_model, unrepeated
from analysis.fits.runs import (
    LENGTH,
    Runs,
    read_runs,
    refused_losses,
    require_one_budget,
    require_one_size,
    same_losses,
    same_seeds,
)
from analysis.fits.types import Estimate, Fit, noise_of_a_run, with_doubt
from analysis.fits.words import signed
from analysis.status import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray


@dataclass(frozen=True)
class Rung:
    """One rung. Losses are in nats per token."""

    rung: int
    """Place in the ladder, from 0."""
    runs: int
    loss: float
    """For the average seed."""
    step: Estimate | None
    """Loss less that of the rung before; None for the first, where the one before has no run, or where nothing is
    repeated.
    """
    step_p: float | None
    """Chance of so large a step if there were none, after Holm's correction over all steps."""
    total: Estimate | None
    """Loss less that of the first rung."""

    @property
    def told(self) -> bool:
        """Whether the step is told from noise."""
        return self.step_p is not None and self.step_p < LEVEL


@dataclass(frozen=True, kw_only=True)
class LadderFit(Fit):
    """The rungs that have runs, in order. The parameters are the steps, named by the rung that they lead to."""

    rungs: tuple[Rung, ...] = ()
    seeds: int
    paired_sd: float | None = None
    """Standard deviation of one run once the effect common to its seed is off, nats per token."""
    noise_df: int = 0
    """Degrees of freedom of `paired_sd`."""

    def summary(self, labels: Sequence[str] = ()) -> str:
        """What the fit says in sentences, with words of doubt wherever the status or the intervals ask for them.

        Args:
            labels: what every rung of the ladder changes, from the first; without them rungs go by their number.
        """
        names = labels or [f"rung {place}" for place in range(self.rungs[-1].rung + 1 if self.rungs else 0)]
        steps = [(rung, rung.step) for rung in self.rungs if rung.step]
        lines = []
        if steps and (last := self.rungs[-1]).total:
            verb, size = signed(last.total, "rises", "falls", "it may be no change")
            there = f"rung {last.rung}" + (f" ({names[last.rung]})" if labels else "")
            lines.append(f"From {names[0]} to {there} the loss {verb} by {size}.")
        if steps:
            told = [
                f"{step.value:.4f} ({step.low:.4f} to {step.high:.4f}) by {names[rung.rung]}"
                for rung, step in steps
                if rung.told
            ]
            each = f": {'; '.join(told)}" if told else ""
            lines.append(
                f"Of {len(steps)} steps {len(told) or 'none'} can be told from noise after Holm's correction{each}."
            )
        missing = sorted(set(range(len(names))) - {rung.rung for rung in self.rungs})
        if missing and self.rungs:
            lines.append(
                f"No finished run of rung {', '.join(map(str, missing))}: the steps to and from there are left out."
            )
        return with_doubt(self.status, self.message, [*lines, *noise_of_a_run(self.paired_sd)])

    def table(self, labels: Sequence[str], published: Sequence[float | None]) -> pd.DataFrame:
        """What a figure draws -> rung, label, quantity (`step`, `total`), value, low, high, verdict, published.

        Args:
            labels: of every rung of the ladder, from the first.
            published: change of the loss that the same step made elsewhere; None where there is none. A published
                `total` is the sum of the steps up to there, as far as all of them are published.

        Values are nats per token; a rung without a run has no value.
        """
        found = {rung.rung: rung for rung in self.rungs}
        rows: list[dict[str, Any]] = []
        total: float | None = 0.0
        for place, (label, step) in enumerate(zip(labels, published, strict=True)):
            rung = found.get(place)
            estimates = {"step": rung.step if rung else None, "total": rung.total if rung else None}
            if place:
                total = None if total is None or step is None else total + step
            printed = {"step": step, "total": total if place else None}
            for quantity, estimate in estimates.items():
                row = {
                    "rung": place,
                    "label": label,
                    "quantity": quantity,
                    "published": printed[quantity],
                    "verdict": "",
                }
                if estimate:
                    row |= {"value": estimate.value, "low": estimate.low, "high": estimate.high}
                if estimate and rung and quantity == "step":
                    row["verdict"] = (
                        ("lowers" if estimate.value < 0 else "raises") + " the loss"
                        if rung.told
                        else "not told from noise"
                    )
                rows.append(row)
        return pd.DataFrame(rows).reindex(
            columns=["rung", "label", "quantity", "value", "low", "high", "verdict", "published"]
        )

    def drawn(self) -> pd.DataFrame:
        """What `plot` draws: the steps of `table`."""
        names = [f"rung {place}" for place in range(self.rungs[-1].rung + 1 if self.rungs else 0)]
        return self.table(names, [None] * len(names))[lambda data: data["quantity"] == "step"]

    def _draw(self, ax: Axes, data: pd.DataFrame) -> None:
        """Each step with its interval, rungs from top to bottom."""
        from analysis.figures.ladder import draw_fit

        draw_fit(ax, data)


def fit_ladder(frame: pd.DataFrame, rung: str = "rung", loss: str = "val_loss", seed: str = "seed") -> LadderFit:
    """Differences between the rungs of a ladder.

    Args:
        frame: one run a row. A column `trial_id` names the rows used; of a column `status` only `finished` is.
        rung: column of the place in the ladder: 0, 1, 2, ...; a number without runs is a gap, and no step is taken over
            it.
        loss: column of the loss, nats per token.
        seed: column of the seed; runs of one seed are paired across rungs.

    Returns:
        A fit whose status says whether its numbers may be quoted. Poor data give a status, not an exception.

    Raises:
        AnalysisError: a column is missing or holds text, a trial id is repeated, one seed stands twice at one rung, or
            the runs are of several lengths or vocabularies.
    """
    runs = read_runs(frame, (rung,), loss, seed, "fit_ladder")
    require_one_budget(frame, rung, "fit_ladder", LENGTH)
    require_one_size(frame, [rung], rung, "fit_ladder")
    common: dict[str, Any] = {
        "law": "paired steps",
        "seeds": runs.seeds,
        "rows": runs.rows,
        "conventions": {
            "loss": loss,
            "loss_unit": "nats per token",
            "step": "loss less that of the rung before, for the average seed",
            "interval": "95%, Student's t, each on its own",
            "step_p": "two-sided t test, Holm's correction over all steps",
            "noise": "residuals of runs after rung and seed effects, pooled over rungs",
            "objective": "sum of the squares of those residuals",
            "held_out_set": "the same sequences for every run; intervals hold for that set",
        },
    }
    if refused := refused_losses(runs):
        return LadderFit(status=refused[0], message=refused[1], **common)
    places = [int(place) for place in np.unique(runs.x_NK[:, 0])]
    few = f"rungs with a finished run: {len(places)}; a step needs two." if len(places) < 2 else ""
    if few := few or same_losses(runs.y_N):
        return LadderFit(status=Status.TOO_FEW_POINTS, message=few, **common)

    return _estimate(runs, places, common)


def _estimate(runs: Runs, places: list[int], common: dict[str, Any]) -> LadderFit:
    """
    Args:
        places: of the rungs that have runs, rising.
    """
    model = seed_model(runs.x_NK[:, 0], runs.y_N, runs.seeds_N)
    noise = Noise(model.sd, model.df)

    def weights(place: int, other: int) -> Array:
        return np.equal(places, place).astype(float) - np.equal(places, other)

    def difference(place: int, other: int) -> Estimate | None:
        return combine(model, weights(place, other), noise) if model.df and place != other and other in places else None

    steps = {place: difference(place, place - 1) for place in places}
    parameters = {f"step {place}": step for place, step in steps.items() if step}
    weights_KI = np.array([weights(place, place - 1) for place, step in steps.items() if step])
    chances = holm({place: chance(step, noise) for place, step in steps.items() if step})
    rungs = tuple(
        Rung(
            place,
            int(model.counts_I[i]),
            float(model.mean_I[i]),
            steps[place],
            chances.get(place),
            difference(place, 0),
        )
        for i, place in enumerate(places)
    )
    status, message = Status.CONVERGED, ""
    if model.df == 0:
        status = Status.TOO_FEW_POINTS
        message = unrepeated("no step can be told from it")
    copied = same_seeds(model.sd, runs.y_N)
    if copied:
        status, message = Status.TOO_FEW_POINTS, copied
    return LadderFit(
        status=status,
        message=message,
        parameters=parameters,
        covariance=covariance(model, weights_KI, noise) if parameters else (),
        objective=model.squares,
        rungs=rungs,
        paired_sd=model.paired_sd,
        noise_df=model.df,
        **common,
    )
