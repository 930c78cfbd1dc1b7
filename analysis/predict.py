"""`python -m analysis predict STUDY... --at 'active_params=540k,...'`: what the law over several budgets expects of one
not trained yet.

The prediction is appended to `predictions.json` with what shows when it was made and from what; nothing there is ever
replaced. The report of a study that holds the budget later compares the two (`studies.foretold`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import number
from analysis.errors import AnalysisError
from analysis.fits.joint import fit_joint
from analysis.fits.joint_budgets import BUDGET, FACTORS, UNIT_WORDS
from analysis.fits.joint_result import Extrapolation, JointFit
from analysis.fits.types import plain
from analysis.results import Results
from analysis.studies import analyse
from analysis.studies.allocation import Allocation
from sparsemem.arguments import Parser
from sparsemem.checkout import checkout
from sparsemem.config.nearest import nearest_name
from sparsemem.files import write_json


def predict(
    folders: Sequence[Path], points: Sequence[Mapping[str, float]], into: Path | None = None
) -> tuple[Path, list[str]]:
    """Add a prediction for each point to the `predictions.json` of a folder.

    Args:
        folders: results of studies of one text, whose share curves one law describes.
        points: factor (`joint_budgets.FACTORS`) -> value; those that the studies vary.
        into: where; by default the first of `folders`.

    Returns:
        The file, and each prediction in words.

    Raises:
        AnalysisError: a folder holds no share curves or several at one budget, texts differ, no law can be fitted, or a
            point cannot be placed on it.
    """
    studies = [Results(folder) for folder in folders]
    curves = [_curves(results) for results in studies]
    texts = [results.described.get("data") for results in studies]
    for results, text in zip(studies, texts, strict=True):
        if text != texts[0]:
            raise AnalysisError(
                f"{results.folder}: has another `data` than {studies[0].folder}, so no law holds for both; name "
                "studies of one text"
            )
    kept = [name for name in BUDGET if all(name in own for own in curves)]
    lost = [name for name in BUDGET if name not in kept]
    runs = pd.concat([own.drop(columns=lost, errors="ignore") for own in curves], ignore_index=True)
    law = fit_joint(runs.drop_duplicates("trial_id"))
    there = [law.extrapolate(**point) for point in points]  # what is refused is refused before anything is written
    commit, dirty = checkout()
    made: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "git_dirty": dirty,
        "data": texts[0],
        "studies": [_ledger(results) for results in studies],
        "rows": law.rows,
        "law": law.law,
        "moves_with": law.moves_with,
        "moved": law.moved,
    }
    target = Results(into or folders[0])
    earlier = target.predictions
    target.folder.mkdir(parents=True, exist_ok=True)
    path = target.folder / "predictions.json"
    records = [plain({**made, **vars(each), "at": _whole(law, each)}) for each in there]
    write_json(path, {"predictions": [*earlier, *records]})
    return path, [_words(each) for each in there]


def _curves(results: Results) -> pd.DataFrame:
    """Finished runs of the study's share curves."""
    analysis = analyse(results)
    if not isinstance(analysis, Allocation) or analysis.share != "share_moe":
        raise AnalysisError(
            f"{results.folder}: its `analysis` has no curves over the share of routed experts; name an allocation study"
        )
    if not analysis.over:
        raise AnalysisError(f"{results.folder}: no trial has finished; run the study first")
    if len(analysis.over) > 1:
        held = "; ".join(analysis.over)
        raise AnalysisError(
            f"{results.folder}: has several curves at one budget ({held}); predict from a study that varies its budget "
            "alone"
        )
    (places,) = analysis.over.values()
    return pd.concat([analysis.cells[place].trials for place in places])


def _ledger(results: Results) -> dict[str, Any]:
    """What the ledger held."""
    finished = sorted(results.trained["trial_id"])
    return {"study": results.name, "trials_csv_sha256": results.digest, "finished": finished}


def _whole(law: JointFit, there: Extrapolation) -> dict[str, float]:
    """The budget with the factors that were not studied, which stay what they were."""
    return {name: there.at.get(name, float(np.median([budget[name] for budget in law.budgets]))) for name in FACTORS}


def _words(there: Extrapolation) -> str:
    def between(estimate: Any, digits: int) -> str:
        return f"{estimate.value:.{digits}f} (95% interval {estimate.low:.{digits}f} to {estimate.high:.{digits}f})"

    where = ", ".join(f"{value:.4g} {UNIT_WORDS[name]}" for name, value in there.at.items())
    lines = [f"Caution: {there.message}"] if there.message else []
    lines.append(f"At {where}: best share {between(there.optimum, 2)}.")
    if there.depth:
        lines.append(f"Loss there below that of share 1: {between(there.depth, 4)} nats/token.")
    first, last = there.tied
    lines.append(f"A study like these would not tell shares {first.value:.2f} to {last.value:.2f} from the best.")
    return " ".join(lines)


def read_point(text: str) -> dict[str, float]:
    """`active_params=540k,tokens_per_active_param=15` -> {"active_params": 540000.0, "tokens_per_active_param": 15.0}.

    Raises:
        AnalysisError: it is not written so.
    """
    point: dict[str, float] = {}
    for part in text.split(","):
        name, _, written = (each.strip() for each in part.partition("="))
        value = number(written)
        if name not in FACTORS:
            raise AnalysisError(f"--at {text}: `{name}` is no factor of the law; {nearest_name(name, FACTORS)}")
        if name in point:
            raise AnalysisError(f"--at {text}: `{name}` stands twice; keep one of them")
        if value is None or not 0 < value < float("inf"):
            raise AnalysisError(
                f"--at {text}: `{name}` is {written!r}; write a number above 0, such as {name}=15 or {name}=540k"
            )
        point[name] = value
    return point


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code: 2 for refused input."""
    parser = Parser(
        prog="python -m analysis predict",
        description="Predict the share curve of a budget that is not trained yet from the results of others, and write "
        "it down in predictions.json; the report of a study that holds that budget later compares the two.",
        epilog="for example:\n"
        "  python -m analysis predict runs/allocation-tpp --at active_params=34k,tokens_per_active_param=960\n"
        "  python -m analysis predict runs/small runs/middle --at active_params=540k,tokens_per_active_param=15 --into "
        "runs/large",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results_dir", nargs="+", type=Path, help="results folder of a study of share curves")
    budget = f"a budget ({', '.join(FACTORS)}); may be given again"
    parser.add_argument("--at", action="append", required=True, metavar="FACTOR=VALUE,...", help=budget)
    into = "results folder of the study that is to hold the budget (default: the first)"
    parser.add_argument("--into", type=Path, metavar="DIR", help=into)
    given = parser.parse_args(arguments)
    try:
        path, lines = predict(given.results_dir, [read_point(text) for text in given.at], given.into)
    except (AnalysisError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"predictions: {path}", file=sys.stderr)
    return 0
