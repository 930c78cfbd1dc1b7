"""`python -m analysis fit --law LAW TABLE ...`: one law fitted to any table of runs. Which columns a law needs stands
in `LAWS`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.headings import check_headings, quantities_named
from sparsemem.arguments import Parser

OPTIONS = {
    "n": "parameters (activated ones, where --total is given)",
    "d": "training tokens",
    "unique": "unique tokens among the training tokens",
    "bits": "bits of precision in training, such as 4 or 16",
    "total": "total parameters",
    "x": "the size, whichever it is",
    "flops": "training budget",
    "experts": "routed experts; 1 for a dense model",
    "share": "share of the sparse parameters in routed experts, 0 to 1",
    "mechanism": "kind of memory; empty for the backbone alone",
    "slots": "memory rows",
    "loss": "loss",
    "loss-se": "standard error of each loss",
    "seed": "seed; runs of one seed are paired",
    "run": "which rows are checkpoints of one run, to be drawn together",
}
"""Option -> what its column holds."""
TEXT = ("mechanism", "seed", "run")


@dataclass(frozen=True)
class Law:
    """How a law is asked for."""

    says: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    fit: Callable[..., Any]
    """From the table and the columns, by option."""
    example: str
    sizes: tuple[str, ...] = ()
    """Options of the columns by which runs are of one cell, of which `--best-of-cell` keeps the best; () where repeats
    are seeds.
    """
    compares: bool = False
    """Whether it needs `--reference`: a value of the column `--mechanism`."""


ARGUMENTS = {"n": "params", "d": "tokens", "share": "x", "slots": "x", "loss-se": "loss_se"}
"""Option -> what most fits call it, where that is another name."""


def _call(home: str, name: str, given: dict[str, Any] | None = None, **names: str) -> Callable[..., Any]:
    """A function of `analysis.fits`, imported only when called.

    Args:
        given: arguments that are no columns.
        names: option -> argument, where it is not that of `ARGUMENTS`.
    """

    def call(frame: pd.DataFrame, columns: dict[str, str], **chosen: str) -> Any:
        arguments = {(ARGUMENTS | names).get(option, option): column for option, column in columns.items()}
        return getattr(import_module(f"analysis.fits.{home}"), name)(frame, **arguments, **(given or {}), **chosen)

    return call


LAWS = {
    "chinchilla": Law(
        "L = E + A n^-alpha + B d^-beta (+ C total^-gamma), and the compute-optimal exponents",
        ("n", "d", "loss"),
        ("total", "run"),
        _call("surface", "fit_surface"),
        "--n params --d tokens --loss loss",
        ("n", "d", "total"),
    ),
    "data-constrained": Law(
        "the same where tokens are repeated: what repeats and excess parameters are worth (arXiv 2305.16264)",
        ("n", "d", "unique", "loss"),
        ("run",),
        _call("data_constrained", "fit_data_constrained"),
        "--n params --d tokens --unique unique_tokens --loss loss",
        ("n", "d", "unique"),
    ),
    "precision": Law(
        "the same where weights are trained in few bits: how many parameters those are worth (arXiv 2411.04330)",
        ("n", "d", "bits", "loss"),
        ("run",),
        _call("precision", "fit_precision"),
        "--n params --d tokens --bits bits --loss loss",
        ("n", "d", "bits"),
    ),
    "power": Law(
        "L = A x^-alpha",
        ("x", "loss"),
        ("run",),
        _call("power_law", "fit_power", {"floor": False}),
        "--x flops --loss loss",
        ("x",),
    ),
    "saturating-power": Law(
        "L = E + A x^-alpha", ("x", "loss"), ("run",), _call("power_law", "fit_power"), "--x flops --loss loss", ("x",)
    ),
    "isoflop": Law(
        "the best size at each budget, and the power with which it grows",
        ("flops", "n", "loss"),
        ("loss-se",),
        _call("isoflop", "fit_isoflop"),
        "--flops flops --n params --loss loss",
        ("flops", "n"),
    ),
    "routing": Law(
        "loss against size and number of routed experts (arXiv 2202.01169)",
        ("n", "experts", "loss"),
        ("run",),
        _call("routing", "fit_routing"),
        "--n params --experts experts --loss loss",
        ("n", "experts"),
    ),
    "moe-joint": Law(
        "loss against active parameters, tokens and number of routed experts (arXiv 2502.05172)",
        ("n", "d", "experts", "loss"),
        ("run",),
        _call("moe_joint", "fit_moe_joint"),
        "--n params --d tokens --experts experts --loss loss",
        ("n", "d", "experts"),
    ),
    "allocation": Law(
        "loss against the share of routed experts, its optimum and what is tied with it",
        ("share", "loss", "seed"),
        (),
        _call("allocation", "fit_allocation"),
        "--share share_moe --loss val_loss --seed seed",
    ),
    "allocation-joint": Law(
        "one law of that kind over several budgets: whether the best share moves with size, tokens for each parameter "
        "or sparsity",
        ("share", "loss", "seed", "d", "total", "n"),
        (),
        _call("joint", "fit_joint", n="active"),
        "--share share_moe --loss val_loss --seed seed --d tokens --total total_params --n active_params",
    ),
    "slots": Law(
        "loss against the rows of each kind of memory",
        ("mechanism", "slots", "loss", "seed"),
        (),
        _call("slots", "fit_slots"),
        "--mechanism mechanism --slots memory_rows --loss val_loss --seed seed",
    ),
    "scaling": Law(
        "loss against compute in each mechanism at fixed tokens for each parameter, and the compute that each saves "
        "against --reference",
        ("mechanism", "flops", "n", "d", "loss", "seed"),
        (),
        _call("scaling", "fit_scaling", n="active", d="tokens"),
        "--mechanism mechanism --reference dense --flops flops --n active_params --d tokens --loss loss --seed seed",
        compares=True,
    ),
}


def build_parser() -> Parser:
    """Its help has an example of every law."""
    width = max(map(len, LAWS))
    laws = [
        f"  {name:<{width}}  {law.says}\n  {'':<{width}}  fit --law {name} runs.csv {law.example}"
        for name, law in LAWS.items()
    ]
    codes = "exit codes: 0 fitted, whatever the status of any group; 2 refused input"
    parser = Parser(
        prog="python -m analysis fit",
        description="Fit a law to a table of runs (.csv, .tsv, .json, .jsonl, also as .gz; .parquet). Options with "
        "COLUMN name one.",
        epilog="\n".join(["laws, with an example of each:", *laws, "", codes]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "table",
        type=Path,
        help="one run a row, named by `trial_id`; rows that lack a number, or whose `status` does not say finished, "
        "are left out and told",
    )
    parser.add_argument("--law", required=True, choices=LAWS, metavar="LAW", help=", ".join(LAWS))
    for option, holds in OPTIONS.items():
        takers = {name: law for name, law in LAWS.items() if option in (*law.needs, *law.may)}
        users = ", ".join(name + ": optional" * (option in law.may) for name, law in takers.items())
        parser.add_argument(f"--{option}", metavar="COLUMN", help=f"{holds} ({users})")
    comparing = ", ".join(name for name, law in LAWS.items() if law.compares)
    parser.add_argument(
        "--reference", metavar="NAME", help=f"the mechanism that the others are held against ({comparing})"
    )
    parser.add_argument("--group", metavar="COLUMN", help="fit the rows of each value of this column apart")
    cells = ", ".join(name for name, law in LAWS.items() if law.sizes)
    parser.add_argument(
        "--best-of-cell", action="store_true", help=f"of runs of equal sizes keep the one with the least loss ({cells})"
    )
    parser.add_argument(
        "--interval", type=float, default=0.95, metavar="LEVEL", help="level of every interval (default 0.95)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the fit as .svg or .png, with what is drawn as .csv beside it"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    law = LAWS[chosen.law]
    columns = {option: getattr(chosen, option.replace("-", "_")) for option in OPTIONS}
    columns = {option: column for option, column in columns.items() if column is not None}
    what = ""
    if missing := [f"--{option}" for option in law.needs if option not in columns]:
        what = f"needs {' and '.join(missing)}"
    elif foreign := [option for option in columns if option not in (*law.needs, *law.may)]:
        what = f"has no --{foreign[0]}"
    elif law.compares is not bool(chosen.reference):
        what = "needs --reference NAME" if law.compares else "has no --reference"
    elif chosen.best_of_cell and not law.sizes:
        what = "has no --best-of-cell: its repeats are seeds, and all of them count"
    from analysis.interval import at_level
    from analysis.reader import require_file

    if law.compares:
        law = replace(law, fit=partial(law.fit, reference=chosen.reference))
    try:
        require_file(chosen.table)
        if what:
            raise AnalysisError(f"law {chosen.law} {what}; for example: {law.example}")
        with at_level(chosen.interval):
            said = _run(chosen, law, columns)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(said)
    return 0


def _run(chosen: argparse.Namespace, law: Law, columns: dict[str, str]) -> str:
    """What to print."""
    if chosen.figure:
        _check_place(chosen.figure, chosen.table)
        if chosen.group:
            raise AnalysisError("--figure draws one fit: give it without --group, for a table of one group")
    check_headings(columns, OPTIONS, chosen.table)
    from analysis.reader import read_table

    numbers, texts = ([columns[o] for o in columns if (o in TEXT) == text] for text in (False, True))
    table = read_table(chosen.table, numbers, [*texts, *([chosen.group] if chosen.group else [])])
    if not chosen.group:
        fit, left_out = _fit(law, table, columns, chosen.table, chosen.best_of_cell)
        if chosen.figure:
            _draw(fit, chosen.figure)
        return _json(_record(chosen.law, fit, left_out)) if chosen.json else _words(chosen.law, fit, left_out)
    table, nameless = _with_group(table, chosen.group, chosen.table)
    fits = {}
    for group, rows in table.groupby(chosen.group, sort=True):
        try:
            fit, left_out = _fit(law, rows, columns, chosen.table, chosen.best_of_cell)
        except AnalysisError as error:
            raise AnalysisError(f"{chosen.group} {group}: {error}") from None
        fits[str(group)] = chosen.law, fit, [*nameless, *left_out]
    if chosen.json:
        return _json({"law": chosen.law, "groups": {group: _record(*each) for group, each in fits.items()}})
    return "\n\n".join(f"{chosen.group} {group}\n{_words(*each)}" for group, each in fits.items())


def _fit(law: Law, table: pd.DataFrame, columns: dict[str, str], path: Path, best: bool) -> tuple[Any, list[str]]:
    """The fit of the rows that can be used, and which cannot."""
    from analysis.fit_doubts import best_of_cell, of_sweep, of_units, with_doubts

    frame, left_out = usable(table, columns, path)
    sizes = [columns[option] for option in law.sizes if option in columns]
    if best:
        frame, lost = best_of_cell(frame, sizes, columns["loss"])
        left_out += lost
    fit = law.fit(frame, columns)
    tokens = columns.get("d") or next((name for name in map(str, frame) if quantities_named(name) == ["tokens"]), None)
    doubts = of_units(frame, columns, tokens)
    if sizes and not best and "run" not in columns:
        doubts += of_sweep(
            frame, sizes, columns["loss"], fit, lambda: law.fit(best_of_cell(frame, sizes, columns["loss"])[0], columns)
        )
    return with_doubts(fit, doubts), left_out


def _with_group(table: pd.DataFrame, column: str, path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows that name their group, and a sentence on those that do not.

    Raises:
        AnalysisError: no row names one.
    """
    from analysis.fits.runs import listed

    empty = table[column].isna()
    if empty.all():
        raise AnalysisError(
            f"{path}: column `{column}` is empty in every row; name the group of each row, or leave --group out"
        )
    said = f"Left out: {empty.sum()} of {len(table)} rows, whose `{column}` is empty: {listed(table.index[empty])}."
    return table[~empty], [said] if empty.any() else []


def usable(table: pd.DataFrame, columns: dict[str, str], path: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows that say that they finished and have every number, and a sentence for each reason to leave others out.

    Args:
        columns: option -> column.

    Raises:
        AnalysisError: no row is left.
    """
    from analysis.columns import FINISHED
    from analysis.fits.runs import finished, listed, unfinished

    left_out = [unfinished(table)] if unfinished(table) else []
    frame = finished(table)
    if frame.empty:
        raise AnalysisError(
            f"{path}: {left_out[0]} Only rows that say {', '.join(FINISHED)} are used; rename the column or its words"
        )
    # The backbone alone has no slots.
    backbone = frame[columns["mechanism"]].isna() if "mechanism" in columns else pd.Series(False, frame.index)
    for option, column in columns.items():
        if option in TEXT:
            continue
        lacking = ~np.isfinite(frame[column]) & ~(backbone & (option == "slots"))
        if lacking.any():
            left_out.append(
                f"Left out: {lacking.sum()} of {len(table)} rows, whose `{column}` is no number: "
                f"{listed(frame.index[lacking])}."
            )
            frame, backbone = frame[~lacking], backbone[~lacking]
    if frame.empty:
        raise AnalysisError(f"{path}: no row is left. {' '.join(left_out)}")
    return frame, left_out


def _record(law: str, fit: Any, left_out: list[str]) -> dict[str, Any]:
    """`Fit.to_dict`, with `parameters` and `objective` also where the fit has several laws in it and so none of its
    own.
    """
    first: dict[str, Any] = {"law": law, "status": str(fit.status), "parameters": {}, "objective": None}
    return {**first, "left_out": left_out, **fit.to_dict()}


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, allow_nan=False)


def _words(law: str, fit: Any, left_out: list[str]) -> str:
    """Status, sentences and an aligned table of the parameters."""
    from analysis.interval import percent

    lines = [f"{law}: {fit.status}, {len(fit.rows)} rows", *left_out, fit.summary()]
    parameters = _record(law, fit, left_out)["parameters"]
    if parameters:
        rows = [("parameter", "value", f"{percent()} low", f"{percent()} high", "s.e.")]
        for name, each in parameters.items():
            rows.append((name, *(f"{each[key]:.6g}" for key in ("value", "low", "high", "se"))))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for name, *cells in rows:
            lines.append("  ".join([f"{name:<{widths[0]}}", *map(str.rjust, cells, widths[1:])]))
    return "\n".join(lines)


def _check_place(figure: Path, table: Path) -> None:
    """Refuse, before anything is fitted, a figure that cannot be written, or whose data would be written over the
    table.
    """
    if figure.suffix.lower() not in (".svg", ".png"):
        raise AnalysisError(f"{figure}: a figure is .svg or .png")
    if not figure.parent.is_dir():
        raise AnalysisError(f"{figure}: there is no folder {figure.parent}; make it first")
    data = figure.with_suffix(".csv")
    if data.exists() and table.exists() and data.samefile(table):
        raise AnalysisError(
            f"{figure}: what it draws would be written over the table {data}; give the figure another name"
        )


def _draw(fit: Any, path: Path) -> None:
    """The picture, and what is drawn in it as CSV; a CSV of other columns is not this command's, and is left alone."""
    drawn, data = fit.drawn(), path.with_suffix(".csv")
    if drawn.empty:
        raise AnalysisError(f"--figure: there is nothing to draw: {fit.status}. {fit.message}")
    heading = ",".join(map(str, drawn.columns))
    if data.exists() and data.read_bytes().partition(b"\n")[0].strip() != heading.encode():
        raise AnalysisError(
            f"{path}: what it draws would be written over {data}, which is no such table; give the figure another name"
        )
    from analysis.figures.style import ONE_COLUMN, new_figure, style, write_figure
    from sparsemem.files import write_text

    with style():
        figure = new_figure(ONE_COLUMN, 2.7)
        fit.plot(figure.subplots())
        write_figure(figure, path)
    write_text(data, drawn.to_csv(index=False, lineterminator="\n"))
