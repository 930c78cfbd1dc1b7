"""The `sparsemem` command. Progress and prose go to stderr, results to stdout; exit codes: see `main`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemem.cli.parser import parser
from sparsemem.config import ConfigError, load_study
from sparsemem.config.reading import read_value
from sparsemem.failure import impersonal

if TYPE_CHECKING:
    from sparsemem.study.plan import PlannedTrial

DONE, SOME_FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 some trials failed, 2 refused input (nothing was written), 130 interrupted and resumable.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser(_COMMANDS).parse_args(given)
    try:
        with _libraries_in_a_line():
            return int(parsed.command(parsed))
    except ConfigError as error:
        message, file = str(error), str(getattr(parsed, "study", ""))
        _say(f"sparsemem: refused: {message if message.startswith(file) else f'{file}: {message}'}")
        return REFUSED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        _say(f"sparsemem: {error}; what was finished is kept{'; this user must be let write there' * closed}")
        return SOME_FAILED
    except KeyboardInterrupt:
        if parsed.command in (_run, _tune):
            _say("\ninterrupted; finished trials are kept, the others go on from their last checkpoint. To continue:")
            _say(f"  {shlex.join([_name(), *given])}")
        return INTERRUPTED


@contextlib.contextmanager
def _libraries_in_a_line() -> Iterator[None]:
    """Warnings of libraries are said in a line each, without the place in their source; Python's `-W`
    shows them whole.
    """

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        if str(message).strip():
            _say(f"warning: {impersonal(str(message).strip().splitlines()[0])}")

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that there is no home to keep the list of fonts in
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.showwarning = show
        yield


def _name() -> str:
    """How the command is called here: `make` calls it by a path that is not on PATH."""
    invoked = sys.argv[0]
    return invoked if Path(invoked).name == "sparsemem" and not shutil.which("sparsemem") else "sparsemem"


def _plan(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study, _overrides(arguments.set))
    from sparsemem.api import foresee
    from sparsemem.data.prepare import given_tokenizer
    from sparsemem.study.display.diff import changed_texts, describe_diff, diff
    from sparsemem.study.ledger import Ledger
    from sparsemem.study.plan import describe, estimate_seconds, labelled, plan
    from sparsemem.study.plan.access import describe_access, memory_access
    from sparsemem.study.plan.kept import check_kept, describe_kept, kept_size, without_model
    from sparsemem.study.plan.texts import describe_texts

    planned = plan(study)
    check_kept(study, [p.trial for p in planned])
    foreseen = foresee(study, planned)
    found = _detect(arguments, study.study, planned)
    compared = (
        diff(study, planned, arguments.diff if arguments.diff != Path() else None)
        if arguments.diff is not None
        else None
    )
    base = arguments.study.resolve().parent
    for data in {p.trial.data for p in planned}:
        given_tokenizer(data, base)
    usual = Path("runs") / study.study
    there = Path(compared["folder"]) if compared else usual if (usual / "study.yaml").is_file() else None
    noted, kept = changed_texts(study, planned, base, there) if there else ([], {})
    if compared:
        compared["text"] = noted
    finished = (
        {p.trial.id for p in planned} - set(Ledger(there, [p.row() for p in planned]).unfinished()) if there else set()
    )
    texts = describe_texts([p.trial for p in planned], base, kept, finished)
    _say(f"{study.study}: {len(planned)} trials; timing a few training steps ...")
    estimate = estimate_seconds(planned, study)
    if arguments.json:
        seconds = [round(each, 1) for each in estimate[0]] if estimate else [None] * len(planned)
        rows = [
            {
                **p.row(),
                "tokens_per_active_param": p.tokens_per_active_param,
                "tuned": p.tuned,
                "estimated_seconds": each,
            }
            for p, each in zip(planned, seconds, strict=True)
        ]
        asked = {**({"detect": found[0]} if found else {}), **({"diff": compared} if compared else {})}
        most: dict[str, Any] = {"most_trials": study.most_trials} if study.searches else {}
        most |= {"kept_models": kept_size(study.run, planned)} if study.run.keep_models else {}
        print(
            json.dumps(
                {"trials": rows, "memory_access": memory_access(planned), "texts": texts[0], **most, **asked}, indent=2
            )
        )
    else:
        words = (found[1] if found else "", describe_diff(compared) if compared else "")
        whole = describe(planned, estimate, study.most_trials if study.searches else None)
        whole = "\n".join(filter(None, (whole, describe_kept(study.run, planned))))
        print("\n\n".join(filter(None, (describe_access(memory_access(planned)), texts[1], whole, *words))))
    for line in without_model(study.run, [p.trial for p in planned], Ledger(there, [])) if there else ():
        _say(line)
    for line in () if compared else noted:
        _say(line)
    for line in foreseen:
        _say(labelled(line))
    return DONE


def _detect(
    arguments: argparse.Namespace, name: str, planned: Sequence[PlannedTrial]
) -> tuple[dict[str, Any], str] | None:
    """What the plan can detect, as a record and in words; None where that is not asked.

    Raises:
        ConfigError: the noise is not known.
    """
    if arguments.detect is None:
        if arguments.noise:
            raise ConfigError(
                "--noise says where --detect takes the noise from: give --detect with a number of nats/token, such as "
                "0.01"
            )
        return None
    own = (folder / name for folder in (Path("runs"), Path("results")))
    folder = arguments.noise or next((each for each in own if (each / "trials.csv").is_file()), None)
    if folder is None:
        raise ConfigError(
            f"--detect needs the noise of runs, and {name} has none in runs/ or results/; "
            "give --noise with the results folder of a similar study"
        )
    import pandas as pd

    from analysis.detect import describe_detect, detect
    from analysis.errors import AnalysisError

    try:
        found = detect(arguments.detect, pd.DataFrame([p.row() for p in planned]), folder)
    except AnalysisError as error:
        raise ConfigError(str(error)) from None
    return found, describe_detect(found)


def _run(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study, _overrides(arguments.set))
    if (arguments.address or "").startswith("ray-job:"):
        from sparsemem.study.engines.ray_job import run_as_job

        return run_as_job(study, arguments.study.resolve().parent, arguments.results, arguments.address)
    from sparsemem.api import run_study
    from sparsemem.study.display.progress import results_table

    said = list[str]()

    def say(line: str) -> None:
        said.append(line)
        _say(line)

    ledger = run_study(
        study, arguments.study.resolve().parent, arguments.results, arguments.engine, say, arguments.address
    )
    print(results_table(ledger.table()))
    _print_findings(ledger.folder, said)
    for id_ in (row["trial_id"] for row in ledger.rows):
        state = ledger.state(id_)
        more = "" if state.result else f" (more in {ledger.trial_folder(id_) / 'failure.json'})"
        if state.message:
            _say(f"trial {id_} {state.status}: {state.message.splitlines()[0]}{more}")
    if ledger.unfinished():
        _say("running the same command again tries these trials once more, from their last checkpoint")
        return SOME_FAILED
    return DONE


def _tune(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study, {**_overrides(arguments.set), "tuned": None})
    from sparsemem.study.tune.study import tune_study
    from sparsemem.study.tune.tuned import as_json, describe_outcomes

    outcomes = tune_study(study, arguments.study.resolve().parent, arguments.results, _say)
    assert study.tune is not None
    winners = arguments.results / study.study / "tune" / "winners.yaml"
    if arguments.json:
        print(json.dumps(as_json(outcomes), indent=2))
    else:
        path = os.path.relpath(winners.resolve(), arguments.study.resolve().parent)
        line = f"tuned: {path if re.fullmatch(r'[A-Za-z0-9_./-]+', path) else json.dumps(path)}"
        taken = (
            f"winners  {winners}\nto take them, put this line into {arguments.study}, under another `study` name if "
            f"its trials so far are to keep their report:\n{line}"
        )
        print(f"{describe_outcomes(outcomes, study.tune)}\n\n{taken}")
    if any(outcome.statuses.get("failed") or not outcome.winner for outcome in outcomes):
        _say("running the same command again tries failed trials once more")
        return SOME_FAILED
    return DONE


def _status(arguments: argparse.Namespace) -> int:
    from sparsemem.study.display.progress import look, overview
    from sparsemem.study.display.watch import trial_log, watch
    from sparsemem.study.ledger import Ledger
    from sparsemem.study.remote.exchange import mirrored

    with mirrored(arguments.folder) as folder:
        if arguments.log:
            if log := trial_log(folder, arguments.log):
                print(log)
            else:
                what = "`--engine local` keeps a log while it is running and once it failed, Ray only the failure"
                _say(f"nothing is kept of this trial: {what}")
        elif arguments.watch:
            with contextlib.suppress(KeyboardInterrupt):  # the way to leave
                watch(folder)
        else:
            ledger = Ledger.read(folder)
            print(overview(look(ledger), ledger.most_trials))
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from sparsemem.study.ledger import Ledger

    ledger = Ledger.read(arguments.folder)
    ledger.write_table()
    from analysis.errors import AnalysisError
    from analysis.report import write_report

    try:
        write_report(ledger.folder)
    except AnalysisError as error:
        raise ConfigError(str(error)) from None
    _print_findings(ledger.folder)
    return DONE


def _pack(arguments: argparse.Namespace) -> int:
    from sparsemem.study.ledger.pack import pack_study

    print(pack_study(arguments.folder, _say))
    return DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    import torch

    from sparsemem.study.display.evaluation import describe_evaluation
    from sparsemem.train.kept import load_model
    from sparsemem.train.step import default_device
    from sparsemem.train.text_loss import evaluate, held_out_text, read_text, training_ids

    torch.set_flush_denormal(True)  # as in training
    kept, base = load_model(arguments.folder, default_device()), Path.cwd()
    text = read_text(kept, arguments.text, base, "--text") if arguments.text else held_out_text(kept)
    train = training_ids(kept, arguments.train, base)
    found = evaluate(kept, text, train)
    print(json.dumps(found, indent=2) if arguments.json else describe_evaluation(found))
    if train is None:
        _say(
            f"nothing is said of n-grams: the cache does not hold the corpus {kept.corpus} that this model was trained "
            "on; give its training text by --train FILE"
        )
    return DONE


def _probe(arguments: argparse.Namespace) -> int:
    import torch

    from sparsemem.study.probing import probe_study
    from sparsemem.train.step import default_device

    torch.set_flush_denormal(True)  # as in training
    asked = (arguments.folder, arguments.trial, arguments.sequences)
    print(probe_study(*asked, default_device(), _say, arguments.text))
    return DONE


def _bench(arguments: argparse.Namespace) -> int:
    from sparsemem.bench import bench

    bench(arguments.what, as_json=arguments.json)
    return DONE


def _print_findings(folder: Path, said: Sequence[str] = ()) -> None:
    """The fit in words, but for lines that this run has said, and where the figures and the report are."""
    if not (folder / "report.html").exists():
        return
    from analysis.errors import AnalysisError
    from analysis.report import summarize

    try:
        lines = [line for line in summarize(folder).splitlines() if line not in said]
    except AnalysisError as error:
        raise ConfigError(str(error)) from None
    print("\n".join(["", *lines, ""]))
    print(f"figures  {folder / 'figures'}")
    print(f"report   {folder / 'report.html'}")


def _overrides(settings: Sequence[str]) -> dict[str, Any]:
    """`path=value` pairs as dotted path -> value.

    Raises:
        ConfigError: a setting is not of that form.
    """
    found = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        path = path.strip()
        try:
            if not equals or not all(path.split(".")):
                raise ValueError("write path=value, such as budget.tokens=100k")
            found[path] = read_value(value)
        except ValueError as error:
            raise ConfigError(f"--set {setting}: {error}") from None
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_COMMANDS = {
    "plan": _plan,
    "run": _run,
    "tune": _tune,
    "status": _status,
    "report": _report,
    "pack": _pack,
    "evaluate": _evaluate,
    "probe": _probe,
    "bench": _bench,
}
