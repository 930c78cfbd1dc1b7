"""The search at one point of a study: an Optuna study with numbered places. It must not know processes.

A place is done once its trial has finished, diverged or been pruned; what is not done is asked for again by the next
run, with the values that it had. What a place asks for follows from the place and from what is done, not from the
process, so that an interrupted search goes on as it would have: the first place has the study's own values, the first
half a space-filling sequence, the same at every point; the rest is TPE's.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from sparsemem.config import ConfigError, Trial, Tune, Winner, changed, named, point, settings
from sparsemem.files import write_atomically
from sparsemem.results import FREQUENCY_NATS, LEARNED_NATS, TrialStatus
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger
from sparsemem.study.ledger.provenance import data_id
from sparsemem.study.tune.tuned import Outcome, edges

DIGITS = 4  # of a proposed number: what is trained is what winners.yaml says
SPREAD_SHARE = (
    2  # one in so many places, and no fewer than SPREAD_LEAST, is spread over the ranges before results decide
)
SPREAD_LEAST = 4
REDUCTION = 2  # a pruner keeps one in so many
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass
class Attempt:
    """One trial of a search, being trained."""

    search: PointSearch
    asked: optuna.Trial
    place: int
    trial: Trial
    job: Job
    reported: int = 0
    """Evaluations that the pruner has seen."""


class PointSearch:
    """The search at one point."""

    def __init__(
        self,
        trial: Trial,
        settings: Tune,
        storage: JournalStorage,
        folders: Mapping[str, Path],
        manifests: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.trial, self.settings = trial, settings
        self.at = point(trial, settings.per)
        self.label = named(self.at) or "all trials"
        self.fields = _distributions(trial, settings)
        self.tokens_folder = folders[data_id(trial.data)]
        self.in_flight: set[int] = set()
        self.failed: set[int] = set()
        """Places whose trial failed in this run: the next one tries them again."""
        self._study = optuna.create_study(
            storage=storage,
            study_name=f"{self.label} [{_digest(trial, settings)}]",
            load_if_exists=True,
            pruner=_pruner(settings.pruner, trial.train.evaluations),
        )
        manifest = manifests[data_id(trial.data)]
        self.frequencies = manifest.get("token_frequency_loss", math.inf)
        self._study.set_user_attr("data", [data_id(trial.data), manifest["digest"]])
        for left in self._study.get_trials(
            deepcopy=False, states=(TrialState.RUNNING,)
        ):  # their driver is gone: its lock is ours
            self._study.tell(left.number, state=TrialState.FAIL)

    @property
    def done(self) -> int:
        return len(self._done_places())

    @property
    def open(self) -> list[int]:
        """Places to ask for, the first one first."""
        closed = self._done_places() | self.in_flight | self.failed
        return [place for place in range(self.settings.trials) if place not in closed]

    def _done_places(self) -> set[int]:
        return {trial.user_attrs["place"] for trial in self._study.get_trials(deepcopy=False, states=DONE)}

    def ask(self, ledger: Ledger) -> Attempt:
        """The trial of the first open place."""
        place = self.open[0]
        seed = int(hashlib.sha256(f"{self.settings.seed} {place}".encode()).hexdigest()[:8], 16)
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1)
        known = self._known(place)
        if known and not self._study.get_trials(
            deepcopy=False, states=(TrialState.WAITING,)
        ):  # one may be left of a killed driver
            self._study.enqueue_trial(known, user_attrs={"place": place})
        asked = self._study.ask(self.fields)
        place = asked.user_attrs.get("place", place)
        asked.set_user_attr("place", place)
        self.in_flight.add(place)
        trial = changed(
            self.trial, {path: _rounded(value, self.settings, path) for path, value in asked.params.items()}
        )
        asked.set_user_attr("trial_id", trial.id)
        return Attempt(self, asked, place, trial, Job(ledger.trial_folder(trial.id).resolve(), self.tokens_folder))

    def _known(self, place: int) -> dict[str, Any]:
        """Values that do not depend on results: what the place had when it was interrupted or failed, or those of the
        first half.
        """
        for trial in reversed(self._study.get_trials(deepcopy=False, states=(TrialState.FAIL,))):
            if trial.user_attrs.get("place") == place and trial.params.keys() == self.fields.keys():
                return trial.params
        if place >= max(SPREAD_LEAST, self.settings.trials // SPREAD_SHARE):
            return {}
        own = self.trial.at(self.fields) if place == 0 else {}
        return _spread(self.fields, place, self.settings.seed) | {
            path: v for path, v in own.items() if _contains(self.fields[path], v)
        }

    def tell(self, attempt: Attempt, status: TrialStatus, loss: float | None, se: float | None) -> None:
        """A diverged trial is infinitely bad: Optuna takes that for a value, where it would fail a trial at
        not-a-number.
        """
        attempt.asked.set_user_attr("status", status)
        attempt.asked.set_user_attr("val_loss_se", se)
        self.in_flight.discard(attempt.place)
        if status == TrialStatus.FINISHED:
            self._study.tell(attempt.asked, loss)
        elif status == TrialStatus.DIVERGED:
            self._study.tell(attempt.asked, math.inf)
        elif status == TrialStatus.PRUNED:
            self._study.tell(attempt.asked, state=TrialState.PRUNED)
        else:
            self.failed.add(attempt.place)
            self._study.tell(attempt.asked, state=TrialState.FAIL)

    def best(self) -> FrozenTrial | None:
        finished = [
            trial
            for trial in self._study.get_trials(deepcopy=False, states=DONE[:1])
            if math.isfinite(trial.value or 0.0)
        ]
        return min(finished, key=lambda trial: (trial.value, trial.user_attrs["place"]), default=None)

    def outcome(self) -> Outcome:
        trials, best = self._study.get_trials(deepcopy=False, states=DONE), self.best()
        statuses = Counter(str(trial.user_attrs["status"]) for trial in trials)
        statuses[TrialStatus.FAILED] = len(self.failed)
        if best is None or best.value is None:
            return Outcome(self.at, dict(statuses), None, False, {})
        se = best.user_attrs["val_loss_se"]
        tied = [
            trial
            for trial in trials
            if trial.state == TrialState.COMPLETE and (trial.value or 0.0) <= best.value + (se or 0.0)
        ]
        ranges = [path for path in self.fields if isinstance(self.fields[path], FloatDistribution)]
        values = self.values(best)
        tried = {path: sorted({self.values(trial)[path] for trial in trials}) for path in ranges}
        winner = Winner(
            at=self.at,
            values=values,
            val_loss=best.value,
            val_loss_se=se,
            trial_id=best.user_attrs["trial_id"],
            edges=edges(self.fields, values),
            tried={path: len(found) for path, found in tried.items()},
            unbracketed=tuple(path for path, found in tried.items() if values[path] in (found[0], found[-1])),
            next_tried={path: _neighbours(found, values[path]) for path, found in tried.items()},
            seed=self.trial.seed,
            searched=settings(self.trial, (*self.at, *values)),
        )
        learned = best.value <= math.log(self.trial.data.vocab_size) - LEARNED_NATS
        near = {path: [self.values(trial)[path] for trial in tied] for path in ranges}
        ends = {path: (min(found), max(found)) for path, found in near.items()}
        frequencies = self.frequencies if best.value > self.frequencies - FREQUENCY_NATS else None
        return Outcome(self.at, dict(statuses), winner, learned, ends, frequencies)

    def values(self, trial: FrozenTrial) -> dict[str, Any]:
        return {path: _rounded(trial.params[path], self.settings, path) for path in self.fields}


# --- small parts ------------------------------------------------------------------------------------------------------


def _distributions(trial: Trial, settings: Tune) -> dict[str, BaseDistribution]:
    found: dict[str, BaseDistribution] = {}
    for path, search in settings.search.items():
        if search.low is not None and search.high is not None:
            found[path] = FloatDistribution(search.low, search.high, log=search.log)
        else:  # units resolved by the field itself
            found[path] = CategoricalDistribution(
                list(dict.fromkeys(changed(trial, {path: choice}).at([path])[path] for choice in search.choices))
            )
    return found


def _contains(field: BaseDistribution, value: Any) -> bool:
    if isinstance(field, FloatDistribution):
        return field.low <= value <= field.high
    return isinstance(field, CategoricalDistribution) and value in field.choices


def _spread(fields: Mapping[str, BaseDistribution], place: int, seed: int) -> dict[str, Any]:
    """The place's point of a scrambled Halton sequence."""
    sequence = qmc.Halton(len(fields), seed=seed)
    sequence.fast_forward(place)
    found: dict[str, Any] = {}
    for (path, field), share in zip(fields.items(), sequence.random()[0], strict=True):
        if isinstance(field, FloatDistribution):
            found[path] = float(
                field.low * (field.high / field.low) ** share
                if field.log
                else field.low + (field.high - field.low) * share
            )
        elif isinstance(field, CategoricalDistribution):
            found[path] = field.choices[int(share * len(field.choices))]
    return found


def _neighbours(tried: Sequence[float], value: float) -> tuple[float | None, float | None]:
    below, above = ([each for each in tried if each < value], [each for each in tried if each > value])
    return max(below, default=None), min(above, default=None)


def _rounded(value: Any, settings: Tune, path: str) -> Any:
    search = settings.search[path]
    if search.low is None or search.high is None:
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), search.low), search.high)


def _digest(trial: Trial, settings: Tune) -> str:
    """Of all that makes a search's results comparable: other values begin another search. More `trials` extend one, and
    so does a version with a new field at its default, as of `Trial.id`.
    """
    held = trial.model_dump(
        mode="json", exclude_defaults=True, exclude={"train": {path.removeprefix("train.") for path in settings.search}}
    )
    rest = settings.model_dump(mode="json", exclude_defaults=True, exclude={"trials", "per"})
    text = json.dumps([held, rest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _pruner(name: str, evaluations: int) -> optuna.pruners.BasePruner:
    first = max(1, evaluations // 4)
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=first, max_resource=max(evaluations, first), reduction_factor=REDUCTION
        )
    return optuna.pruners.NopPruner()


# --- the journal ------------------------------------------------------------------------------------------------------


def texts_searched(journal: Path) -> tuple[dict[str, str], Counter[str]]:
    """Digest of the corpus of the searches so far, and how many trials they have finished on it, by data id.

    Raises:
        ConfigError: the file is damaged.
    """
    digests, finished = dict[str, str](), Counter[str]()
    if not journal.exists():
        return digests, finished
    storage = open_journal(journal)
    for found in storage.get_all_studies():
        name, digest = found.user_attrs.get("data", [None, None])
        if name:
            digests[name] = digest
            finished[name] += len(storage.get_all_trials(found._study_id, deepcopy=False, states=DONE))
    return digests, finished


def open_journal(journal: Path) -> JournalStorage:
    """The searches so far.

    Raises:
        ConfigError: the file is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if journal.exists():  # a driver that was killed while writing leaves half a line, which nobody was told of
        content = journal.read_bytes()
        whole = b"".join(line for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True) if line.strip())
        if whole != content:  # half a line, or the blank one of an editor
            write_atomically(journal, lambda file: file.write(whole))
    try:
        if journal.exists() and (lines := journal.read_bytes().splitlines()):
            json.loads(lines[-1])  # Optuna itself takes this one for being written, and fails when another follows
        storage = JournalStorage(JournalFileBackend(str(journal)))
        storage.get_all_studies()
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(f"{journal}: not a journal of Optuna ({error}); move it away to search anew") from None
    return storage
