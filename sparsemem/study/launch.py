"""Trains a study: plan, corpus, ledger, engine, in this order. What is refused is refused before anything
is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Study
from sparsemem.study.console import terminated_like_interrupted, to_stderr
from sparsemem.study.display.progress import Progress
from sparsemem.study.jobs import ENGINES, Engine, Job, slots
from sparsemem.study.ledger import Ledger, study_lock
from sparsemem.study.ledger.provenance import data_id
from sparsemem.study.loggers import Loggers, check_loggers
from sparsemem.study.plan import PlannedTrial, in_order, labelled, plan
from sparsemem.study.plan.corpora import finished_notes, prepare_corpora, texts_begun
from sparsemem.study.plan.kept import check_kept, without_model
from sparsemem.study.remote.exchange import Driver, driver_lease
from sparsemem.study.remote.staging import corpus_in
from sparsemem.study.remote.storage import storage_of
from sparsemem.study.tune.adapt import Adaptive, Judge

Foresee = Callable[[Study, Sequence[PlannedTrial]], list[str]]
"""What the report will not be able to tell, line by line; refuses trials that it could not read."""


def train_study(
    study: Study,
    base: Path,
    results: Path,
    foresee: Foresee,
    judge: Judge,
    engine: str = "ray",
    say: Callable[[str], None] = to_stderr,
    address: str | None = None,
) -> Ledger:
    """Train every trial of a study that is not finished. Running it again is always safe.

    Args:
        base: the folder that relative paths in `study.data` start from.
        results: receives the folder `<study>/`.
        foresee: is asked before anything is trained.
        judge: says of searched shares how far they are.
        engine: `ray` or `local`.
        say: takes remarks, one line each.
        address: of a running Ray cluster, see `ray_engine.run_trials`.

    Raises:
        ConfigError: refused, before any trial of it started.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every trial goes on from its last checkpoint the next time.
    """
    run_trials = find_engine(engine, address)
    together = 0 if address else slots(study.run)  # a cluster's slots are not known before Ray has it
    check_loggers(study.run.loggers)
    ledger = Ledger(results / study.study, [])
    training = _Training(study, base, ledger, Adaptive(study, ledger, judge), say)
    check_kept(study, list(training.trials.values()))
    ledger.check_owner()
    with ExitStack() as held:
        training.join(held)
        training.prepare(foresee)
        training.begin(held)
        training.train(run_trials, together)
    return ledger


class _Training:
    """A study on its way through the phases of `train_study`, which call each method once, in their order here."""

    shared: Driver | None = None
    _holds = False
    waiting: list[str]
    """Ids of the trials to train in this round."""
    folders: Mapping[str, Path]
    """Tokens, by the id of their data."""
    corpora: Mapping[str, Mapping[str, Any]]
    """Manifests of the texts, by the id of their data."""

    def __init__(self, study: Study, base: Path, ledger: Ledger, adaptive: Adaptive, say: Callable[[str], None]):
        self.study, self.base, self.ledger, self.adaptive, self.say = study, base, ledger, adaptive, say
        self._plan()

    def _plan(self) -> None:
        """All trials asked for so far, which are the ledger's from now on."""
        self.planned = plan(self.adaptive.study)
        self.ledger.rows = [p.row() for p in self.planned]
        self.trials = {p.trial.id: p.trial for p in self.planned}

    def join(self, held: ExitStack) -> None:
        """Lock what there is of the study, here and in its storage, and catch up with what the storage knows."""
        self.storage = storage_of(self.study, self.base, self.ledger)
        if self.ledger.folder.exists():
            self._hold_folder(held)
        if not self.storage:
            return
        self.shared = held.enter_context(driver_lease(self.storage, self.ledger, self.say))
        if self.shared.holds_study():
            self._hold_folder(held)
            self.shared.begin()
            while self.adaptive.advance():  # the storage knew of finished batches
                self._plan()
                self.shared.pull(self.shared.storage)

    def _hold_folder(self, held: ExitStack) -> None:
        """Make the study's folder and lock it, once. Another driver may have made it since this one looked: then it is
        refused here, or its trials are finished by now.
        """
        if not self._holds:
            self.ledger.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(study_lock(self.ledger.folder))
            self._holds = True

    def prepare(self, foresee: Foresee) -> None:
        """Say what can be known before training, and prepare the texts. The last phase that refuses anything."""
        self.waiting = self.ledger.unfinished()
        for line in foresee(self.adaptive.study, self.planned) if self.waiting else ():
            self.say(labelled(line))
        begun = texts_begun(self.ledger, self.trials.values())
        for line in finished_notes(list(self.trials.values()), self.waiting, self.base, begun, self.ledger)[0]:
            self.say(line)
        fetch = partial(corpus_in, self.storage) if self.storage else None
        untrained = [self.trials[id_] for id_ in self.waiting]
        self.folders, self.corpora = prepare_corpora(untrained, self.base, begun, self.say, fetch)
        self.ledger.check_precision(self.study, self.trials)

    def begin(self, held: ExitStack) -> None:
        """Write the study's folder, with the results that its tuning has already."""
        name = self.study.study
        self._hold_folder(held)
        self.waiting = self.ledger.unfinished()
        if taken := self._take_over():
            self.say(
                f"{name}: {taken} of its trials were trained to their end by `sparsemem tune`; their results are taken "
                "over"
            )
            self.waiting = self.ledger.unfinished()
        self._begin_trials()
        self.say(
            f"{name}: {len(self.trials)} trials, {len(self.trials) - len(self.waiting)} of them finished before; "
            f"results in {self.ledger.folder}"
        )
        for line in (*self.adaptive.remarks, *without_model(self.study.run, self.trials.values(), self.ledger)):
            self.say(line)

    def _take_over(self) -> int:
        """Take over the study's trials that its own tuning has trained: its winners. Returns their number."""
        tuning = Ledger(self.ledger.folder / "tune", [])
        if not self.study.tuned or not (tuning.folder / "journal.log").exists():
            return 0
        from sparsemem.study.tune.search import texts_searched

        run, waiting = self.study.run, [self.trials[id_] for id_ in self.ledger.unfinished()]
        digests, _ = texts_searched(tuning.folder / "journal.log")
        texts = {name: manifest["digest"] for name, manifest in self.corpora.items()}
        same = [t for t in waiting if digests.get(name := data_id(t.data)) == texts.get(name) and not run.keeps(t)]
        gpu = run.gpus_per_trial > 0
        return sum(self.ledger.take_over(tuning, trial.id, trial.train.precision_on(gpu)) for trial in same)

    def _begin_trials(self) -> None:
        self.ledger.begin(self.study, self.trials, self.corpora, self.say)
        if self.shared:
            self.shared.send(self.waiting, self.folders, self.say)

    def train(self, run_trials: Engine, together: int) -> None:
        """Train round by round: searched shares ask for the next one."""
        damaged = self._damaged()
        try:
            self._train_waiting(run_trials, together)
            while self.adaptive.advance(self.say):
                tried = self.trials
                self._plan()
                self.waiting = [id_ for id_ in self.ledger.unfinished() if id_ not in tried]
                self._begin_trials()
                self._train_waiting(run_trials, together)
        finally:
            self.ledger.write_table()
            for path in sorted(self._damaged() - damaged):
                self.say(
                    f"{path}: a damaged checkpoint was found and set aside; its trial went on from the one before, or "
                    "started again"
                )

    def _damaged(self) -> set[Path]:
        return set(self.ledger.folder.glob("trials/*/checkpoint*.corrupt-*"))

    def _train_waiting(self, run_trials: Engine, together: int) -> None:
        run, ledger, waiting = self.study.run, self.ledger, set(self.waiting)
        uri = self.storage.uri if self.storage else None
        ahead = [p.trial for p in in_order(self.planned, run) if p.trial.id in waiting]
        jobs = [Job(ledger.trial_folder(t.id).resolve(), self.folders[data_id(t.data)], uri) for t in ahead]
        with terminated_like_interrupted(), Loggers(run.loggers, ledger, self.trials, self.say):
            if jobs:
                with Progress(ledger, together), self.shared.following(self.say) if self.shared else nullcontext():
                    run_trials(jobs, run)


def find_engine(name: str, address: str | None = None) -> Engine:
    """`ray` or `local`; only the one asked for is imported.

    Raises:
        ConfigError: there is no such engine, or it takes no such address.
    """
    if name == "ray":
        from sparsemem.study.engines.ray_engine import run_trials as ray

        if address is not None and not re.fullmatch(r"auto|[^/:]+:\d+|\[[0-9a-fA-F:]+\]:\d+", address):
            raise ConfigError(
                f"--address has the value {address!r}: give HOST:PORT of a cluster's head, or auto on one of its "
                "machines; from elsewhere, submit the study as a job: ray-job:http://HOST:8265"
            )
        return partial(ray, address=address)
    if address is not None:
        raise ConfigError(f"--address {address} names a Ray cluster; leave out --engine {name}")
    if name == "local":
        from sparsemem.study.engines.local import run_trials as local

        return local
    raise ConfigError(f"engine {name!r} is unknown; choose one of {', '.join(ENGINES)}")
