"""Runs a study: plan, corpus, ledger, engine, report, in this order. What is refused is refused before anything is written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Study, Trial
from sparsemem.study.adapt import Adaptive
from sparsemem.study.engine import ENGINES, Engine, Job, slots
from sparsemem.study.ledger import Ledger, data_id, study_lock
from sparsemem.study.loggers import Loggers, check_loggers
from sparsemem.study.plan import plan
from sparsemem.study.progress import Progress


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_study(study: Study, base: Path, results: Path, engine: str = "ray", say: Callable[[str], None] = to_stderr) -> Ledger:
    """Train every trial of a study that is not finished, then write the report. Running it again is always safe.

    Args:
        base: the folder that relative paths in `study.data` start from.
        results: receives the folder `<study>/`.
        engine: `ray` or `local`.
        say: takes remarks, one line each.

    Raises:
        ConfigError: refused; nothing was written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every trial goes on from its last checkpoint the next time.
    """
    run_trials = find_engine(engine)
    together = slots(study.run)
    check_loggers(study.run.loggers)
    ledger = Ledger(results / study.study, [])
    adaptive = Adaptive(study, ledger)
    trials = _plan(adaptive, ledger)
    ledger.check_owner()
    with ExitStack() as held:
        if ledger.folder.exists():
            held.enter_context(study_lock(ledger.folder))
        waiting = ledger.unfinished()
        folders, corpora = prepare_corpora([trials[id_] for id_ in waiting], base, say)
        ledger.check_corpora(corpora, trials)
        ledger.check_precision(study, trials)
        if not ledger.folder.exists():
            ledger.folder.mkdir(parents=True, exist_ok=True)  # another driver may begin at the same moment
            held.enter_context(study_lock(ledger.folder))
        ledger.begin(study, trials, corpora, say)
        say(f"{study.study}: {len(trials)} trials, {len(trials) - len(waiting)} of them finished before; results in {ledger.folder}")
        damaged = set(ledger.folder.glob("trials/*/checkpoint*.corrupt-*"))
        for line in adaptive.remarks:
            say(line)
        try:
            while True:
                jobs = [Job(ledger.trial_folder(id_).resolve(), folders[data_id(trials[id_].data)]) for id_ in waiting]
                with terminated_like_interrupted(), Loggers(study.run.loggers, ledger, trials, say):
                    if jobs:
                        with Progress(ledger, together):
                            run_trials(jobs, study.run)
                if not adaptive.advance(say):
                    break
                tried, trials = trials, _plan(adaptive, ledger)
                ledger.begin(study, trials, corpora, say)
                waiting = [id_ for id_ in ledger.unfinished() if id_ not in tried]
        finally:
            ledger.write_table()
            for path in sorted(set(ledger.folder.glob("trials/*/checkpoint*.corrupt-*")) - damaged):
                say(f"{path}: a damaged checkpoint was found and set aside; its trial went on from the one before, or started again")
        _report(ledger, say)
    return ledger


def _plan(adaptive: Adaptive, ledger: Ledger) -> dict[str, Trial]:
    """Enter all trials asked for so far into the ledger; trial id -> trial."""
    planned = plan(adaptive.study)
    ledger.rows = [p.row() for p in planned]
    return {p.trial.id: p.trial for p in planned}


def find_engine(name: str) -> Engine:
    """`ray` or `local`; only the one asked for is imported."""
    if name == "ray":
        from sparsemem.study.ray_engine import run_trials as ray

        return ray
    if name == "local":
        from sparsemem.study.local import run_trials as local

        return local
    raise ConfigError(f"engine {name!r} is unknown; choose one of {', '.join(ENGINES)}")


def prepare_corpora(
    trials: Sequence[Trial], base: Path, say: Callable[[str], None]
) -> tuple[Mapping[str, Path], Mapping[str, Mapping[str, Any]]]:
    """Folder and manifest of each text that the trials read, by data id.

    Raises:
        ConfigError: the text cannot be had, or is too short for a trial.
    """
    if not trials:
        return {}, {}
    from sparsemem.data import Batches, Tokens, prepare

    folders = {name: prepare(data, base, report=say).resolve() for name, data in {data_id(t.data): t.data for t in trials}.items()}
    tokens = {name: Tokens.load(folder) for name, folder in folders.items()}
    for trial in trials:
        Batches(tokens[data_id(trial.data)].train, trial.data.context, trial.train.batch_tokens, trial.seed)
    epochs = max(trial.budget.tokens / len(tokens[data_id(trial.data)].train) for trial in trials)
    if epochs > 1:
        say(f"note: trials read their text up to {epochs:.1f} times, which favours memory; `data.max_bytes` admits more")
    return folders, {name: found.manifest for name, found in tokens.items()}


def _report(ledger: Ledger, say: Callable[[str], None]) -> None:
    if ledger.counts()["finished"]:
        from analysis.errors import AnalysisError
        from analysis.report import write_report

        try:
            write_report(ledger.folder)
        except AnalysisError as error:
            say(f"no report: {error}")


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (a scheduler's preemption, `kill`) ends a run as Ctrl-C does. Signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
