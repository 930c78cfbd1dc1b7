"""What was predicted of a budget before it was trained (`predictions.json`), beside what was measured there.

A prediction counts only where the files show that none of the budget's results was there when it was made; any other is
shown as made afterwards, and nothing is said of its hits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from analysis.cells import Cell
from analysis.fits.allocation_result import AllocationFit
from analysis.fits.joint_budgets import FACTORS, factors_of
from analysis.fits.linear import combine
from analysis.fits.noise import Noise, seed_model
from analysis.fits.types import Estimate
from analysis.results import Results
from analysis.studies.allocation_tables import budget_name
from analysis.studies.tables import interval
from analysis.studies.types import Section, Table

SAME = 1.05
"""A budget whose factors are within this ratio of those of a prediction is the one that was predicted."""
NEAR = 0.02
"""Shares so near to each other are one: integer sizes differ from model to model."""
NOTE = (
    "Predicted by `python -m analysis predict` from other budgets, with every factor free to move the optimum; 95% "
    "intervals. Hit: the interval of the predicted less the measured value has 0 in it (square-and-add, Zou and "
    "Donner, Stat. Med. 27, 2008)."
)


@dataclass(frozen=True)
class Compared:
    """One number, predicted and measured."""

    quantity: str
    predicted: Estimate
    measured: Estimate
    digits: int

    @property
    def hit(self) -> bool:
        low = math.hypot(self.predicted.value - self.predicted.low, self.measured.high - self.measured.value)
        high = math.hypot(self.predicted.high - self.predicted.value, self.measured.value - self.measured.low)
        return -high <= self.predicted.value - self.measured.value <= low


@dataclass(frozen=True)
class Foretold:
    """A prediction and the budget that it is of."""

    prediction: Mapping[str, Any]
    afterwards: str
    """Why it is none: what shows, or does not rule out, that results of the budget were there when it was made; '' for
    a prediction.
    """
    numbers: tuple[Compared, ...]
    tied: tuple[int, int] | None
    """Of how many sampled shares it says rightly whether they are tied with the best, and how many there are."""

    @property
    def name(self) -> str:
        return f"{budget_name(self.prediction['at'])}, {self.prediction['made'][:10]}"

    def summary(self) -> str:
        if self.afterwards:
            return f"{self.name}: made afterwards, so it is no prediction: {self.afterwards}."
        if not self.numbers:
            return f"{self.name}, made before any of its results: nothing can be measured there yet."
        best, *others = self.numbers
        beside = (
            f"best share {interval(best.predicted, 2)} predicted, {interval(best.measured, 2)} measured, "
            f"{'a hit' if best.hit else 'a miss'}"
        )
        parts = [f"{self.name}, made before any of its results: {beside}"]
        missed = [number.quantity for number in others if not number.hit]
        parts.append(
            f"of {len(others)} other numbers {len(others) - len(missed)} hits"
            + (f" (missed: {', '.join(missed)})" if missed else "")
        )
        parts += [f"tied or not rightly said of {self.tied[0]} of {self.tied[1]} shares"] if self.tied else []
        distance = self.prediction["distance"]
        far = f" It was an extrapolation, by {distance:.2f} of the range that had been sampled." if distance > 0 else ""
        return "; ".join(parts) + "." + far

    def table(self) -> Table:
        rows = [
            {
                "quantity": number.quantity,
                "predicted": interval(number.predicted, number.digits),
                "measured": interval(number.measured, number.digits),
                **({} if self.afterwards else {"": "hit" if number.hit else "miss"}),
            }
            for number in self.numbers
        ]
        when = f"made afterwards, no prediction ({self.afterwards})" if self.afterwards else "predicted beforehand"
        return Table(pd.DataFrame(rows), f"{self.name}: {when}", wide=True)


def foretold(results: Results, fitted: Sequence[tuple[Cell, AllocationFit]]) -> list[Foretold]:
    """The predictions of `predictions.json` whose budget the study has by now, in the order in which they were made."""
    found = []
    for prediction in results.predictions:
        for cell, fit in fitted:
            if fit.means and prediction["data"] == results.described.get("data") and _is_of(prediction, cell.trials):
                afterwards, numbers = why_afterwards(prediction, cell, results), tuple(_numbers(prediction, fit))
                found.append(Foretold(prediction, afterwards, numbers, _tied(prediction, fit)))
    return found


def foretold_sections(found: Sequence[Foretold]) -> list[Section]:
    return [Section("Predicted and measured", tuple(each.table() for each in found), NOTE)] if found else []


def _is_of(prediction: Mapping[str, Any], trials: pd.DataFrame) -> bool:
    own = factors_of(trials)
    return all(1 / SAME <= own[name] / prediction["at"][name] <= SAME for name in FACTORS)


def why_afterwards(prediction: Mapping[str, Any], cell: Cell, results: Results) -> str:
    """Why the prediction may have known results of the cell, at any learning rate; '' where the files show that it did
    not.
    """
    ids = {*cell.planned["trial_id"]} & {*results.trained["trial_id"]}
    if used := ids & set(prediction["rows"]):
        return f"{len(used)} of the budget's {len(ids)} runs were among those that it was made from"
    if there := ids & {id_ for study in prediction["studies"] for id_ in study["finished"]}:
        return f"{len(there)} of the budget's {len(ids)} runs had finished in the ledger that it was made from"
    if results.digest in {study["trials_csv_sha256"] for study in prediction["studies"]}:
        return "the ledger that it was made from holds the budget's results"
    made = datetime.fromisoformat(prediction["made"])
    ends = [_ended(results, id_) for id_ in sorted(ids)]
    if early := sum(end is not None and end <= made for end in ends):
        return f"{early} of the budget's {len(ids)} runs had finished by then"
    if None in ends and results.name not in {study["study"] for study in prediction["studies"]}:
        return "when the budget's runs finished is not recorded, and it was made from another ledger"
    return ""


def _ended(results: Results, trial_id: str) -> datetime | None:
    try:
        return datetime.fromisoformat(json.loads(results.files.read(trial_id, "result.json"))["ended"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _numbers(prediction: Mapping[str, Any], fit: AllocationFit) -> Iterator[Compared]:
    best = fit.argmin.value if fit.argmin else fit.best_end
    low, high = fit.interval_of_best
    if best is not None:
        yield Compared("best share", _estimate(prediction["optimum"]), Estimate(best, low, high, math.nan), 3)
    if prediction["depth"] and fit.depth:
        yield Compared("depth against share 1 (nats/token)", _estimate(prediction["depth"]), fit.depth, 4)
    runs = fit.runs()
    model = seed_model(runs["share"].to_numpy(), runs["loss"].to_numpy(), runs["seed"].to_numpy())
    if not model.df or not model.sd > 0:
        return
    noise = Noise(model.sd, model.df)
    for share, difference in ((float(share), each) for share, each in prediction["differences"].items()):
        place = int(np.abs(model.x_I - share).argmin())
        if abs(model.x_I[place] - share) <= NEAR and place < len(model.x_I) - 1:
            weights = np.eye(len(model.x_I))[place] - np.eye(len(model.x_I))[-1]
            name = f"loss at share {share:g} less that at {model.x_I[-1]:.2g} (nats/token)"
            yield Compared(name, _estimate(difference), combine(model, weights, noise), 4)


def _tied(prediction: Mapping[str, Any], fit: AllocationFit) -> tuple[int, int] | None:
    first, last = (each["value"] for each in prediction["tied"])
    right = [(first - NEAR / 2 <= share <= last + NEAR / 2) == (share in fit.tied) for share in fit.shares]
    return (sum(right), len(right)) if fit.tied else None


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(record["value"], record["low"], record["high"], math.nan)
