"""The commands' arguments and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from sparsemem.arguments import Parser
from sparsemem.study.jobs import ENGINES

_ABOUT = """\
At a fixed number of parameters and of activated parameters: where should the sparse ones live, in routed experts or
in memory tables? Write a study in YAML, look at its plan, run it, read its report.

  sparsemem plan sweeps/allocation-quick.yaml      every trial, solved and timed, nothing trained
  sparsemem run sweeps/allocation-quick.yaml       train what is not finished, then write the report
  sparsemem status runs/allocation-quick --watch   how far it is, from another terminal
  sparsemem tune my-study.yaml                     find the learning rate at each share, apart from the study
  sparsemem report runs/allocation-quick           fits, figures and report again, from the result files
  sparsemem evaluate runs/my-study/trials/ID       loss of a kept model on its held-out text or on yours
  sparsemem probe runs/my-study                    what the layers of its kept models predict and share
  sparsemem pack runs/allocation-quick             all finished trials' files in one, to keep or to commit
  sparsemem bench step                             speed of a training step here; more with `sparsemem bench --help`

exit codes: 0 done, 1 some trials failed, 2 refused input, 130 interrupted and resumable"""

_BENCHES = """\
  step     a training step against the dense model and `transformers`, at three sizes
  profile  where the time of a step goes
  moe      ways of dispatch to routed experts
  memory   each kind of memory against routed experts, updates of large tables, gathers against random reads
  data     batches, hashing and tokenising as shares of a step
  eval     the held-out loss against training
  fit      a loss surface with 4,000 refits against SciPy from every start
  sweep    overhead of a trial and busy share of the slots under both engines, planning and skipping 10,000 trials

Each takes some minutes on an otherwise idle machine and prints its measurements as they come."""


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> Parser:
    """The parser of `sparsemem`. Each command's own sets `command` to the function of that name.

    Args:
        commands: name -> what runs it, given the parsed arguments; returns the exit code.
    """
    whole = Parser(prog="sparsemem", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers, known = whole.add_subparsers(required=True, metavar="COMMAND"), dict[str, Parser]()

    def add(name: str, does: str, example: str) -> Parser:
        sub = subparsers.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=commands[name])
        sub.commands = known
        known[name] = sub
        return sub

    _add_to_train(add)
    _add_to_read(add)
    _add_bench(add)
    return whole


def _add_to_train(add: Callable[[str, str, str], Parser]) -> None:
    """plan, run and tune: commands on a study's file."""
    plan = add(
        "plan",
        "show every trial before anything is trained",
        "sparsemem plan sweeps/allocation-quick.yaml --json",
    )
    plan.add_argument(
        "--json", action="store_true", help='print {"trials": [...], "memory_access": [...]}, names as in trials.csv'
    )
    plan.add_argument(
        "--detect", type=float, metavar="NATS", help="also say how many seeds a difference of so many nats/token takes"
    )
    plan.add_argument(
        "--noise", type=Path, metavar="DIR", help="results of a similar study, for --detect (default: this one's own)"
    )
    plan.add_argument(
        "--diff",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="DIR",
        help="also say what of these results stays, what is new and what is no longer planned (default: this study's "
        "own)",
    )
    run = add(
        "run",
        "train what a study has not finished yet, then write its report; safe to repeat",
        "sparsemem run sweeps/allocation-quick.yaml --set budget.tokens=100k --set 'vary.rho=[1, 0.5, 0]'",
    )
    tune = add(
        "tune",
        "find the learning rate and other training fields at each point of a study, as its block `tune` says, in local "
        "processes",
        "sparsemem tune my-study.yaml --set tune.trials=24",
    )
    tune.add_argument("--json", action="store_true", help="print one object a point: its winner and what was tried")
    for sub in (run, tune):
        sub.add_argument(
            "--results",
            type=Path,
            default=Path("runs"),
            metavar="DIR",
            help="receives the folder <study>/ (default: runs)",
        )
    run.add_argument(
        "--engine", choices=ENGINES, default="ray", help="ray: Ray Tune; local: forked processes (default: ray)"
    )
    run.add_argument(
        "--address",
        metavar="ADDR",
        help="run on a Ray cluster: HOST:PORT of its head, auto, or ray-job:http://HOST:8265",
    )
    for sub in (plan, run, tune):
        sub.add_argument("study", type=Path, metavar="STUDY.yaml")
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="path=value",
            help="replace a field of the file, by its dotted path; the value is YAML; repeatable",
        )


def _add_to_read(add: Callable[[str, str, str], Parser]) -> None:
    """status, report, pack, evaluate and probe: commands on results."""
    status = add("status", "show how far a study is, from its files alone", "sparsemem status runs/allocation-quick")
    report = add(
        "report",
        "write fits, figures and report again, from the result files",
        "sparsemem report runs/allocation-quick",
    )
    does = "put the files of finished trials into one, which every command reads as it reads folders"
    pack = add("pack", does, "sparsemem pack results/allocation-quick")
    evaluate = add(
        "evaluate",
        "give the loss of a kept model (`run.keep_models`) on a text, also by document and by how often n-grams occur "
        "in the training text",
        "sparsemem evaluate runs/my-study/trials/0123456789ab --text corpus/*.txt",
    )
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="folder of a trial, or a copy of its three files")
    evaluate.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="texts or globs (default: the trial's held-out text)"
    )
    evaluate.add_argument(
        "--train",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts to count n-grams in (default: the trial's training text, where the cache still has it)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one object: loss, documents, ngrams")
    probe = add(
        "probe",
        "look inside the kept models of a study: what each layer would predict, and which layers of two models are "
        "alike",
        "sparsemem probe runs/my-study --trial 1.0 0.5",
    )
    probe.add_argument(
        "--trial", nargs="+", default=[], metavar="TRIAL", help="shares, `dense` or ids (default: every kept model)"
    )
    probe.add_argument(
        "--sequences", type=int, default=256, metavar="N", help="sequences of the text at most (default: %(default)s)"
    )
    probe.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="texts or globs (default: each trial's held-out text)"
    )
    for sub in (report, pack, probe):
        sub.add_argument("folder", type=Path, metavar="DIR", help="results folder of one study")
    status.add_argument(
        "folder", metavar="DIR|URI", help="results folder of one study, or its address in a storage (`run.storage`)"
    )
    shown = status.add_mutually_exclusive_group()
    shown.add_argument(
        "--watch",
        action="store_true",
        help="keep showing it until no process runs it any more; Ctrl-C leaves at any time",
    )
    shown.add_argument("--log", metavar="TRIAL", help="print what this trial's process said, and why it failed")


def _add_bench(add: Callable[[str, str, str], Parser]) -> None:
    bench = add("bench", "measure this machine, as ratios taken in one run", "sparsemem bench memory --json")
    bench.add_argument(
        "what",
        choices=("step", "profile", "moe", "memory", "data", "eval", "fit", "sweep"),
        help="what to measure, see above",
    )
    bench.description = f"{bench.description}\n\n{_BENCHES}"
    bench.add_argument("--json", action="store_true", help="print one JSON object a line")
