"""`python -m analysis RESULTS_DIR [...]`: write the report of each study, print what its fits say. Exit code 2 for refused input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description="Write fits.json, figures/ and report.html of finished or running studies."
    )
    parser.add_argument("results_dir", nargs="+", type=Path, help="results folder of a study: the one that holds trials.csv")
    folders = parser.parse_args(arguments).results_dir

    from analysis.errors import AnalysisError
    from analysis.report import summarize, write_report

    for folder in folders:
        try:
            report = write_report(folder)
            print(summarize(folder))
        except (AnalysisError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"report: {report}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
