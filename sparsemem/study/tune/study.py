"""Searches training fields at each point of a study, apart from it: Optuna proposes, the study's own worker processes
train.

Everything is under `<results>/<study>/tune/`: `journal.log` (one Optuna study a point), `trials/<id>/` as in a study,
and `winners.yaml`.
"""

from __future__ import annotations

import csv
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import yaml

from sparsemem.config import ConfigError, Study, Trial, Tune, Tuned, changed, load_tuned, point
from sparsemem.failure import record_failure
from sparsemem.files import remove_temporaries, write_text
from sparsemem.results import FINAL, TrialStatus
from sparsemem.study.console import terminated_like_interrupted, to_stderr
from sparsemem.study.engines.local import Workers
from sparsemem.study.jobs import Job
from sparsemem.study.ledger import Ledger, study_lock
from sparsemem.study.plan import plan
from sparsemem.study.plan.corpora import begun_with, prepare_corpora
from sparsemem.study.text import duration
from sparsemem.study.tune.search import Attempt, PointSearch, open_journal, texts_searched
from sparsemem.study.tune.tuned import Outcome, values_text

POLL_SECONDS = 0.1


def tune_study(study: Study, base: Path, results: Path, say: Callable[[str], None] = to_stderr) -> list[Outcome]:
    """Search every point of `study.tune` to its end and write the winners. Running it again is always safe.

    Args:
        study: without `tuned`: each search starts from the study's own values.
        base: the folder that relative paths in `study.data` start from.
        results: receives the folder `<study>/tune/`.
        say: takes remarks, one line each.

    Returns:
        What came out at each point, in the order of the plan.

    Raises:
        ConfigError: refused; nothing was trained.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the next run goes on.
    """
    if study.tune is None:
        raise ConfigError(
            "field `tune` is missing; add one, such as tune: {search: {train.lr: {low: 1e-3, high: 3e-2, log: true}}}"
        )
    planned = plan(study)
    Ledger(results / study.study, [p.row() for p in planned]).check_owner()
    trials: dict[str, Trial] = {}
    for p in planned:  # the first trial of a point has the first value of every other axis
        trials.setdefault(json.dumps(point(p.trial, study.tune.per), sort_keys=True), p.trial)
    corners = [corner for trial in trials.values() for corner in _corners(trial, study.tune)]
    workers = Workers(study.run.model_copy(update={"keep_models": False}))
    ledger = Ledger(results / study.study / "tune", [])
    journal, begun_before = ledger.folder / "journal.log", ledger.folder.exists()
    with ExitStack() as held:
        if begun_before:
            held.enter_context(study_lock(ledger.folder))
        begun = begun_with([corner.data for corner in corners], *texts_searched(journal), ledger.folder)
        folders, manifests = prepare_corpora(corners, base, begun, say)
        if not begun_before:
            ledger.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(study_lock(ledger.folder))
        remove_temporaries(ledger.folder)
        storage = open_journal(journal)
        searches = [PointSearch(trial, study.tune, storage, folders, manifests) for trial in trials.values()]
        places = len(searches) * study.tune.trials
        say(
            f"{study.study}: {len(searches)} points, {places} trials, {sum(s.done for s in searches)} done before; "
            f"kept in {ledger.folder}"
        )
        held.enter_context(terminated_like_interrupted())
        held.enter_context(workers)
        _Driver(searches, ledger, workers, say).run()
        outcomes = [search.outcome() for search in searches]
        _write_winners(ledger.folder / "winners.yaml", study.study, outcomes, say)
    return outcomes


class _Driver:
    """Keeps the slots busy until no place is open."""

    def __init__(
        self, searches: Sequence[PointSearch], ledger: Ledger, workers: Workers, say: Callable[[str], None]
    ) -> None:
        self.searches, self.ledger, self.workers, self.say = searches, ledger, workers, say
        self.in_flight: dict[Job, Attempt] = {}
        self.held: list[Attempt] = []
        """Asked for, but the same trial is in flight already; its result will serve."""
        self.began, self.ended = time.monotonic(), 0

    def run(self) -> None:
        while True:
            while self.workers.free and (attempt := self._next()):
                self._begin(attempt)
            if not self.in_flight:
                return
            for attempt in list(self.in_flight.values()):
                if self._judged_bad(attempt):
                    self.workers.stop(attempt.job)
                    self._end(attempt, pruned=True)
            for job in self.workers.ended(POLL_SECONDS):
                self._end(self.in_flight[job], pruned=self._judged_bad(self.in_flight[job]))

    def _next(self) -> Attempt | None:
        """Of the search with the fewest trials in flight, then the fewest done: one at a time each where there are
        enough.
        """
        for attempt in self.held:
            if attempt.job not in self.in_flight:
                self.held.remove(attempt)
                return attempt
        while waiting := [search for search in self.searches if search.open]:
            attempt = min(waiting, key=lambda search: (len(search.in_flight), search.done)).ask(self.ledger)
            if attempt.job not in self.in_flight:
                return attempt
            self.held.append(attempt)
        return None

    def _begin(self, attempt: Attempt) -> None:
        self.in_flight[attempt.job] = attempt
        if (
            self.ledger.state(attempt.trial.id).status in FINAL
        ):  # trained before: for another place, or by a driver that was killed then
            self._end(attempt, pruned=self._judged_bad(attempt))
        else:
            self.ledger.begin_trial(attempt.trial, self.say)
            self.workers.start(attempt.job)

    def _judged_bad(self, attempt: Attempt) -> bool:
        """Show the pruner each evaluation but the last, in order; whether it stops the trial at one of them."""
        for number, loss in enumerate(_evaluations(attempt), 1):
            if number > attempt.reported:
                attempt.asked.report(loss, number)
                attempt.reported = number
                if attempt.asked.should_prune():
                    return True
        return False

    def _end(self, attempt: Attempt, pruned: bool) -> None:
        del self.in_flight[attempt.job]
        state = self.ledger.state(attempt.trial.id)
        status = TrialStatus.PRUNED if pruned else state.status
        if pruned:
            record_failure(
                attempt.job.trial_folder,
                f"stopped at evaluation {attempt.reported}: others were better by then",
                TrialStatus.PRUNED,
            )
            for path in (*attempt.job.trial_folder.glob("checkpoint*.pt"), attempt.job.trial_folder / "log.txt"):
                path.unlink(missing_ok=True)
        finished = status == TrialStatus.FINISHED
        attempt.search.tell(
            attempt, status, state.result.get("val_loss"), state.result.get("val_loss_se") if finished else None
        )
        self._remark(attempt, status, state.result.get("val_loss"), state.message)

    def _remark(self, attempt: Attempt, status: TrialStatus, loss: float | None, message: str) -> None:
        search, best = attempt.search, attempt.search.best()
        self.ended += 1
        left = sum(len(s.open) + len(s.in_flight) for s in self.searches)
        stopped = f"stopped at evaluation {attempt.reported}"
        came_to = {TrialStatus.FINISHED: f"{loss or 0:.4f}", TrialStatus.PRUNED: stopped}.get(status, status)
        parts = [f"{search.label}: {values_text(attempt.trial.at(search.fields))} -> {came_to}"]
        parts += [f"best {best.value:.4f} ({values_text(search.values(best))})"] if best else []
        parts += [f"{search.done} of {search.settings.trials} done"]
        parts += [f"about {duration((time.monotonic() - self.began) / self.ended * left)} left"] if left else []
        self.say(" · ".join(parts))
        if message and status not in (*FINAL, TrialStatus.PRUNED):
            self.say(
                f"trial {attempt.trial.id} {status}: {message.splitlines()[0]} (more in "
                f"{attempt.job.trial_folder / 'failure.json'})"
            )


# --- small parts ------------------------------------------------------------------------------------------------------


def _evaluations(attempt: Attempt) -> Iterator[float]:
    """Validation losses so far but the last, which is the result itself and reads the whole held-out set."""
    try:
        with open(attempt.job.trial_folder / "curve.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return
    for row in rows:
        if row["val_loss"] and int(row["tokens"]) < attempt.trial.budget.tokens:
            yield float(row["val_loss"])


def _corners(trial: Trial, settings: Tune) -> list[Trial]:
    """The trial at every combination of ends of ranges and of choices: a trial that cannot be is refused before
    anything is trained.
    """
    ends = [search.choices or (search.low, search.high) for search in settings.search.values()]
    return [changed(trial, dict(zip(settings.search, values, strict=True))) for values in itertools.product(*ends)]


def _write_winners(path: Path, study: str, outcomes: Sequence[Outcome], say: Callable[[str], None]) -> None:
    """For a study's `tuned`; a point without a finished trial is left out, and refused there by name. Other values of
    before are kept.
    """
    found = Tuned(study=study, winners=tuple(outcome.winner for outcome in outcomes if outcome.winner))
    if path.exists():
        try:
            before = [(winner.at, winner.values) for winner in load_tuned(path.name, path.parent).winners]
        except ConfigError:  # damaged; it is kept all the same
            before = []
        if before != [(winner.at, winner.values) for winner in found.winners]:
            kept = path.with_name("winners-before.yaml")
            write_text(kept, path.read_text(encoding="utf-8"))
            say(
                f"{path}: written anew with other values; a study that takes them plans new trials. The values of "
                f"before are in {kept}"
            )
    text = yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False)
    write_text(
        path,
        "# Written by `sparsemem tune`. A study takes these values by `tuned: PATH`, the path relative to its own "
        f"file.\n{text}",
    )
