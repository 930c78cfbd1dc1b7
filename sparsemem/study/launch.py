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

from sparsemem.config import ConfigError, Study, Trial
from sparsemem.study.console import terminated_like_interrupted, to_stderr
from sparsemem.study.display.progress import Progress
from sparsemem.study.jobs import ENGINES, Engine, Job, slots
from sparsemem.study.ledger import Ledger, data_id, study_lock
from sparsemem.study.loggers import Loggers, check_loggers
from sparsemem.study.plan import PlannedTrial, in_order, labelled, plan
from sparsemem.study.plan.corpora import finished_notes, prepare_corpora, texts_begun
from sparsemem.study.plan.kept import check_kept, without_model
from sparsemem.study.remote.exchange import corpus_in, driving
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
    adaptive = Adaptive(study, ledger, judge)
    planned = _plan(adaptive, ledger)
    check_kept(study, [p.trial for p in planned])
    ledger.check_owner()
    storage = storage_of(study, base, ledger)
    with ExitStack() as held:
        if ledger.folder.exists():
            held.enter_context(study_lock(ledger.folder))
        shared = held.enter_context(driving(storage, ledger, say)) if storage else None
        if shared and shared.holds_study():
            if not ledger.folder.exists():
                _make(ledger.folder, held)
            shared.begin()
            while adaptive.advance():  # the storage knew of finished batches
                planned = _plan(adaptive, ledger)
                shared.pull(shared.storage)
        trials = {p.trial.id: p.trial for p in planned}
        waiting = ledger.unfinished()
        for line in foresee(adaptive.study, planned) if waiting else ():
            say(labelled(line))
        begun, fetch = texts_begun(ledger, trials.values()), partial(corpus_in, storage) if storage else None
        for line in finished_notes(list(trials.values()), waiting, base, begun, ledger)[0]:
            say(line)
        folders, corpora = prepare_corpora([trials[id_] for id_ in waiting], base, begun, say, fetch)
        ledger.check_precision(study, trials)
        if not ledger.folder.exists():
            _make(ledger.folder, held)
        if taken := _take_over(study, ledger, trials, corpora):
            say(
                f"{study.study}: {taken} of its trials were trained to their end by `sparsemem tune`; their results "
                "are taken over"
            )
            waiting = ledger.unfinished()
        ledger.begin(study, trials, corpora, say)
        if shared:
            shared.send(waiting, folders, say)
        say(
            f"{study.study}: {len(trials)} trials, {len(trials) - len(waiting)} of them finished before; results in "
            f"{ledger.folder}"
        )
        damaged = set(ledger.folder.glob("trials/*/checkpoint*.corrupt-*"))
        uri = storage.uri if storage else None
        for line in (*adaptive.remarks, *without_model(study.run, trials.values(), ledger)):
            say(line)
        try:
            while True:
                left = set(waiting)
                ahead = [p.trial for p in in_order(planned, study.run) if p.trial.id in left]
                jobs = [
                    Job(ledger.trial_folder(trial.id).resolve(), folders[data_id(trial.data)], uri) for trial in ahead
                ]
                with terminated_like_interrupted(), Loggers(study.run.loggers, ledger, trials, say):
                    if jobs:
                        with Progress(ledger, together), shared.following(say) if shared else nullcontext():
                            run_trials(jobs, study.run)
                if not adaptive.advance(say):
                    break
                tried, planned = trials, _plan(adaptive, ledger)
                trials = {p.trial.id: p.trial for p in planned}
                waiting = [id_ for id_ in ledger.unfinished() if id_ not in tried]
                ledger.begin(study, trials, corpora, say)
                if shared:
                    shared.send(waiting, folders, say)
        finally:
            ledger.write_table()
            for path in sorted(set(ledger.folder.glob("trials/*/checkpoint*.corrupt-*")) - damaged):
                say(
                    f"{path}: a damaged checkpoint was found and set aside; its trial went on from the one before, or "
                    "started again"
                )
    return ledger


def _take_over(
    study: Study, ledger: Ledger, trials: Mapping[str, Trial], corpora: Mapping[str, Mapping[str, Any]]
) -> int:
    """Take over what the study's own tuning has trained: its winners are trials of the study. Returns their number."""
    tuning = Ledger(ledger.folder / "tune", [])
    if not study.tuned or not (tuning.folder / "journal.log").exists():
        return 0
    from sparsemem.study.tune.search import texts_searched

    digests, _ = texts_searched(tuning.folder / "journal.log")
    texts = {name: manifest["digest"] for name, manifest in corpora.items()}
    same = [
        trials[id_]
        for id_ in ledger.unfinished()
        if digests.get(name := data_id(trials[id_].data)) == texts.get(name) and not study.run.keeps(trials[id_])
    ]
    gpu = study.run.gpus_per_trial > 0
    return sum(ledger.take_over(tuning, trial.id, trial.train.precision_on(gpu)) for trial in same)


def _plan(adaptive: Adaptive, ledger: Ledger) -> list[PlannedTrial]:
    """All trials asked for so far, which are the ledger's from now on."""
    planned = plan(adaptive.study)
    ledger.rows = [p.row() for p in planned]
    return planned


def _make(folder: Path, held: ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)  # another driver may begin at the same moment
    held.enter_context(study_lock(folder))


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
