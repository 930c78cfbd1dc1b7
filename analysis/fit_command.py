"""`python -m analysis fit --law LAW TABLE ...`: one law fitted to any table of runs. Which columns a law needs stands
in `LAWS`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import AnalysisError
from analysis.fit_laws import LAWS, OPTIONS, TEXT, Law
from analysis.headings import check_headings, quantities_named
from sparsemem.arguments import Parser


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
    from sparsemem.values import listed

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
    from analysis.fits.runs import finished, unfinished
    from sparsemem.values import listed

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
