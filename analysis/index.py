"""One page over several studies: what each asked, how far it is, what it found, and the way to its report.

It reads what `write_report` left and fits nothing anew. It stands in the deepest folder that holds all studies, so that
its links to the reports are short and relative: that folder can be moved or published as a whole. The figures are
inside the page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import AnalysisError
from analysis.report import data_uri, render
from analysis.results import Results
from analysis.table import si
from sparsemem.files import write_text


def write_index(results_dirs: Sequence[Path | str]) -> Path:
    """Write `index.html` into the deepest folder that holds all of the results folders, in whose order it lists them.

    Returns:
        Its path.

    Raises:
        AnalysisError: no folder is given, they have no folder in common, or one of them has no report yet.
    """
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in results_dirs))
    if not folders:
        raise AnalysisError("an index needs the results folder of at least one study")
    try:
        parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    except ValueError:
        apart = f"{folders[0]} and {folders[-1]} have no folder in common"
        raise AnalysisError(f"{apart}; move the studies to one disk") from None
    page = render("index.html", studies=[_row(folder, parent) for folder in folders])
    write_text(parent / "index.html", page)
    return parent / "index.html"


def _row(folder: Path, parent: Path) -> dict[str, Any]:
    """What the page says of one study."""
    results = Results(folder)
    record, trials = results.report, results.trials
    figures = [folder / "figures" / f"{name}.svg" for name in record["figures"][:1]]
    try:
        figure = "".join(map(data_uri, figures))
    except OSError as error:
        raise AnalysisError(
            f"{figures[0]}: cannot be read ({error.strerror}); run `python -m analysis {folder}`"
        ) from None
    sparse = trials[trials["rho"].notna()] if trials["rho"].notna().any() else trials  # without the dense baseline
    return {
        "name": results.name,
        "link": (folder / "report.html").relative_to(parent).as_posix(),
        "question": results.described.get("question", ""),
        "kind": results.described.get("analysis", "allocation"),
        "finished": f"{len(results.finished)} of {len(trials)}",
        "scale": [_span(sparse[name]) for name in ("total_params", "active_params", "tokens")],
        "statuses": ", ".join(dict.fromkeys(fit["status"].replace("_", " ") for fit in record["fits"])),
        "readings": [reading | {"sentences": first_sentence(reading["sentences"])} for reading in record["readings"]],
        "figure": figure,
    }


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()  # integer sizes meet a budget within its tolerance
    return si(values.median()) if high < 1.01 * low else f"{si(low)} to {si(high)}"


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence; with a caution, the sentence that it is about.

    >>> first_sentence("It is least at 0.35 (0.2 to 0.4). It gains.")
    'It is least at 0.35 (0.2 to 0.4).'
    """
    sentences = re.split(r"(?<=\.) (?=[A-Z])", text)
    return " ".join(sentences[: 2 if text.startswith("Caution: ") else 1])
