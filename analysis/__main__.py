"""`python -m analysis RESULTS_DIR [...]` writes the report of each study, and of several an index, and prints what
their fits say; `python -m analysis fit` fits a law to any table of runs, `python -m analysis predict` foretells a
budget. Exit code 2 for refused input.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from sparsemem.arguments import Parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["fit"]:
        from analysis.fit_command import main as fit

        return fit(arguments[1:])
    if arguments[:1] == ["predict"]:
        from analysis.predict import main as predict

        return predict(arguments[1:])
    parser = Parser(
        prog="python -m analysis",
        usage="%(prog)s RESULTS_DIR [RESULTS_DIR ...]\n       %(prog)s fit --law LAW TABLE --COLUMN NAME ... [--json] "
        "[--figure FILE]\n       %(prog)s predict RESULTS_DIR [RESULTS_DIR ...] --at FACTOR=VALUE,... [--into DIR]",
        description="Write fits.json, figures/ and report.html of finished or running studies, and over several an "
        "index.html in the deepest folder that holds them; fit a law to any table of runs; or predict the share curve "
        "of a budget that is not trained yet.",
        epilog="for example:\n"
        "  python -m analysis results/allocation-cpu\n"
        "  python -m analysis fit --law chinchilla runs.csv --n params --d tokens --loss loss\n"
        "  python -m analysis predict results/allocation-cpu --at tokens_per_active_param=60\n"
        "  python -m analysis fit --help    # all laws, an example of each (a folder called fit: ./fit)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results_dir", nargs="+", type=Path, help="results folder of a study: the one that holds trials.csv"
    )
    for command, option in (
        ("sparsemem plan STUDY.yaml --detect 0.01 --noise RESULTS_DIR", "--detect"),
        ("python -m analysis fit", "--law"),
    ):
        parser.commands[command] = Parser(add_help=False)
        parser.commands[command].add_argument(option)
    folders = parser.parse_args(arguments).results_dir
    if len(folders) > 1 and not folders[0].exists() and difflib.get_close_matches(str(folders[0]), ["fit"], cutoff=0.5):
        parser.error(f"{folders[0]} is no folder; did you mean `fit`?")
    kinds = {".csv", ".tsv", ".json", ".jsonl"}
    if tables := [folder for folder in folders if folder.is_file() and folder.suffix in kinds]:
        parser.error(
            f"{tables[0]} is a file, where the folder of a study belongs; a law is fitted to a table by `python -m "
            f"analysis fit --law LAW {tables[0]} ...`, and `python -m analysis fit --help` names the laws"
        )

    from analysis.errors import AnalysisError
    from analysis.index import write_index
    from analysis.report import summarize, write_report

    try:
        for folder in folders:
            report = write_report(folder)
            print(summarize(folder))
            print(f"report: {report}", file=sys.stderr)
        if len(folders) > 1:
            print(f"index: {write_index(folders)}", file=sys.stderr)
    except (AnalysisError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
