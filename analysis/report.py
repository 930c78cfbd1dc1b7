"""From a results folder to `fits.json`, `figures/` and one self-contained `report.html`; and to a few lines for a
terminal.

Everything is generated from the ledger, so a report says only what the files hold, and a study in progress has one too.
"""

from __future__ import annotations

import base64
import json
import platform
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from analysis import prose
from analysis.figures.style import save
from analysis.fits.types import plain
from analysis.inside.found import Found
from analysis.inside.parts import Part, inside, scope
from analysis.results import LEARNED_NOTHING, Results
from analysis.studies import analyse
from analysis.studies.tables import led, rates_sections, tuned_sections
from analysis.studies.types import Analysis, Drawing
from analysis.table import TPP, as_text, fixed, si, trials_for_reading, varied_fields
from sparsemem.files import write_json, write_text
from sparsemem.results import TrialStatus

PLANNED = (
    *("rho", "share_moe", "total_params", "active_params", "budget_error_total", "budget_error_active"),
    *("routed_experts", "shared_width", "memory_rows", "memory_rows_read", "memory_params", "memory_flops_share"),
    *("flops_per_token", "memory_bytes_per_token"),
)
"""Columns of `trials.csv` that say what a point of the plan came to."""


def write_report(results_dir: Path | str) -> Path:
    """Write `fits.json`, `figures/` and `report.html` into the folder, from the ledger alone; finished trials only.

    Returns:
        The path of `report.html`.

    Raises:
        AnalysisError: the folder holds no study, one of its files cannot be used, or the trials are not what the
            study's `analysis` needs; names it and says what to do.
    """
    results = Results(Path(results_dir))
    analysis = analyse(results)
    record = _fits_record(results, analysis)  # reads the ledger: what is refused is refused before anything is written
    found = Found(results)
    parts = inside(found)
    drawings = [*analysis.drawings(), *(drawing for part in parts for drawing in part.drawings)]
    record["figures"] = [drawing.name for drawing in drawings]
    if parts:
        record["inside"] = [{"label": part.heading, "sentences": part.sentences, "sure": part.sure} for part in parts]
    page = _page(
        results,
        analysis,
        [_save(drawing, results.folder / "figures") for drawing in drawings],
        parts,
        scope(found) if parts else "",
    )
    write_json(results.folder / "fits.json", record)
    write_text(results.folder / "report.html", page)
    return results.folder / "report.html"


def summarize(results_dir: Path | str) -> str:
    """What the last report says, in words for a terminal: trials finished, warnings, and each part of the study, by its
    label if it has several.

    Raises:
        AnalysisError: there is no report, or its `fits.json` is not whole.
    """
    record = Results(Path(results_dir)).report
    warnings = [line for line in record["remarks"] if line.startswith("Warning: ")]
    others = [line for line in record["remarks"] if line not in warnings]
    lines = [
        led(reading["label"], reading["sentences"]) for reading in (*record["readings"], *record.get("inside", ()))
    ]
    return "\n".join([record["counts"], *warnings, *lines, *others])


def _fits_record(results: Results, analysis: Analysis) -> dict[str, Any]:
    fits = plain(analysis.fits())
    readings = [asdict(reading) for reading in analysis.readings()]
    provenance = {
        "trials_csv_sha256": results.digest,
        "python": platform.python_version(),
        **{package: version(package) for package in ("sparsemem", "numpy", "scipy", "pandas", "matplotlib", "pillow")},
    }
    remarks = [*prose.remarks(results), *analysis.remarks()]
    words = {"counts": prose.counts(results.trials), "readings": readings, "remarks": remarks}
    return {"study": results.name, "provenance": provenance, **words, "fits": fits}


def _save(drawing: Drawing, folder: Path) -> dict[str, str]:
    """Save a figure -> its name, caption, width on the page and data URI."""
    folder.mkdir(exist_ok=True)
    save(drawing.figure, drawing.data, folder, drawing.name)
    inches, uri = f"{1.3 * drawing.figure.get_figwidth():.1f}", data_uri(folder / f"{drawing.name}.svg")
    return {"name": drawing.name, "caption": drawing.caption, "inches": inches, "uri": uri}


def data_uri(svg: Path) -> str:
    """A figure as an address that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


# --- the page ---------------------------------------------------------------------------------------------------------


def render(template: str, **values: Any) -> str:
    """A page from its template; what is put in is text unless it says otherwise."""
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: "" if value is None else f"{value:,.0f}",
        "nats": fixed,
        "linked": linked,
    }
    return environment.get_template(template).render(**values)


def _page(results: Results, analysis: Analysis, figures: list[dict[str, str]], parts: list[Part], scope: str) -> str:
    trials, described = results.trials, results.described
    of_parts = {drawing.name for part in parts for drawing in part.drawings}
    return render(
        "report.html",
        name=results.name,
        kind=described.get("analysis", "allocation"),
        question=described.get("question", ""),
        counts=prose.counts(trials),
        complete=bool((trials["status"] == TrialStatus.FINISHED).all()),
        readings=analysis.readings(),
        remarks=[*prose.remarks(results), *analysis.remarks()],
        terms=analysis.terms,
        figures=[figure for figure in figures if figure["name"] not in of_parts],
        inside=[
            (part, [each for each in figures if each["name"] in {one.name for one in part.drawings}]) for part in parts
        ],
        scope=scope,
        caveats=[*prose.caveats(results, analysis.point, analysis.axis), *analysis.caveats()],
        sections=[
            *analysis.sections(),
            *rates_sections(analysis.cells, analysis.point),
            *tuned_sections(results.tuned),
        ],
        plan=_plan(trials),
        lengths=_lengths(trials),
        settings=_settings(results),
        trials=trials_for_reading(trials),
        ids=list(trials["trial_id"]),
        statuses=[status.replace("_", " ") for status in trials["status"]],
        failures=_failures(results),
        corpus=results.corpus,
        text_words=prose.text(results),
        sources=prose.sources(results),
        provenance=_flat(described.get("provenance") or {}),
    )


def _plan(trials: pd.DataFrame) -> pd.DataFrame:
    """What each point came to: one row for each distinct set of sizes."""
    shares = [name for name in trials if name.startswith("share_") and trials[name].nunique() > 1]
    varied = [name for name in varied_fields(trials) if name.startswith("model.")]
    planned = [name for name in PLANNED if name in trials and trials[name].notna().any()]
    return as_text(trials[[*dict.fromkeys([*planned[:2], *shares, *varied, *planned])]].drop_duplicates())


def _lengths(trials: pd.DataFrame) -> str:
    """Training tokens, and how many these are for each activated parameter of the models so trained."""
    found = []
    for tokens, ratio in trials.groupby("tokens")[TPP]:
        low, high = f"{ratio.min():.2g}", f"{ratio.max():.2g}"
        found.append(f"{si(tokens)} ({low if low == high else f'{low} to {high}'} for each activated parameter)")
    return ", ".join(found)


def _settings(results: Results) -> list[tuple[str, str]]:
    """The study as written, one line a field; a tuned field points to where its values are."""
    described = results.described
    names = ("analysis", "data", "model", "budget", "train", "shares", "rho", "seed")
    fields: dict[str, Any] = {name: described[name] for name in names if name in described}
    vary = described.get("vary") or {}
    grids = {"vary": vary}
    if isinstance(vary, list):
        grids = {f"vary (grid {place})": grid for place, grid in enumerate(vary, 1)}
    fields |= {f"{name} {path}": values for name, grid in grids.items() for path, values in grid.items()}
    tuned = results.tuned.fields if results.tuned else ()
    return [(path, "tuned, see Tuned settings" if path in tuned else values) for path, values in _flat(fields)]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _flat(inner, f"{path}.{name}" if path else str(name))]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        items = [", ".join(f"{name} {inner}" for name, inner in _flat(item)) for item in value]
        return [(path, "; ".join(item or "all defaults" for item in items))]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value))]


def linked(text: str) -> Markup:
    """Text for the page: its arXiv numbers as links, what stands in backticks as code.

    >>> linked("a < b (arXiv 2601.07372)")
    Markup('a &lt; b (<a href="https://arxiv.org/abs/2601.07372">arXiv 2601.07372</a>)')
    >>> linked("lower `train.lr`")
    Markup('lower <code>train.lr</code>')
    """
    coded = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"arXiv (\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">\g<0></a>', coded))  # nosec B704: escaped


def _failures(results: Results) -> list[dict[str, str]]:
    """Trials that ended without a result: which point, and why."""
    without = {TrialStatus.DIVERGED, TrialStatus.FAILED, TrialStatus.OUT_OF_MEMORY, TrialStatus.INTERRUPTED}
    trials = results.trials[results.trials["status"].isin({LEARNED_NOTHING, *without})]
    points = as_text(trials[["rho", *varied_fields(results.trials), "seed"]]).to_dict("records")
    found = []
    for trial, point in zip(trials.to_dict("records"), points, strict=True):
        name, field, otherwise = "failure.json", "message", "stopped before its end; run the study again to go on"
        if trial["status"] == TrialStatus.DIVERGED:
            name, field = "result.json", "why"
            otherwise = "the loss left the range in which training goes on; the curve is kept"
        try:
            message = str(json.loads(results.files.read(trial["trial_id"], name)).get(field, otherwise))
        except FileNotFoundError:
            message = "its loss is that of equally likely tokens" if trial["status"] == LEARNED_NOTHING else otherwise
        except (OSError, ValueError, TypeError, AttributeError):
            message = f"{name} cannot be read"
        where = ", ".join(f"{name} {value}" for name, value in point.items() if value)
        status = trial["status"].replace("_", " ")
        found.append({"id": trial["trial_id"], "status": status, "point": where, "message": message})
    return found
