"""From a results folder to `fits.json`, `figures/` and one self-contained `report.html`; and to a few lines for a terminal.

Everything is generated from the ledger, so a report says only what the files hold, and a study in progress has one too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis import prose
from analysis.cells import Cell, split_cells
from analysis.errors import AnalysisError
from analysis.figures.allocation import allocation_data, allocation_figure, differences_data, differences_figure
from analysis.figures.curves import curves_data, curves_figure
from analysis.figures.style import save
from analysis.fits.allocation import AllocationFit, fit_allocation
from analysis.fits.types import Estimate, Status
from analysis.table import (
    RHO,
    average_differences,
    load_curves,
    load_sequence_losses,
    load_trials,
    paired_differences,
    si,
    trials_for_reading,
)
from sparsemem.files import write_json, write_text

Fitted = Sequence[tuple[Cell, AllocationFit]]


def write_report(results_dir: Path | str) -> Path:
    """Write `fits.json`, `figures/` and `report.html` into the folder, from the ledger alone; finished trials only.

    Returns:
        The path of `report.html`.

    Raises:
        AnalysisError: the folder holds no study, or one of its files cannot be used; names it and says what to do.
    """
    study = _Study(Path(results_dir))
    record = _fits_record(study)  # reads the ledger: what is refused is refused before anything is written
    figures = _write_figures(study)
    write_json(study.folder / "fits.json", record)
    write_text(study.folder / "report.html", _page(study, figures))
    return study.folder / "report.html"


def summarize(results_dir: Path | str) -> str:
    """For each cell of the study its label, if it has several, and what its fit says, in words for a terminal."""
    study = _Study(Path(results_dir))
    lines = [prose.counts(study.trials)]
    for cell, fit in study.fitted:
        lines.append((f"{cell.label}: " if cell.label else "") + fit.summary())
    return "\n".join([*lines, *prose.shifts(study.fitted)])


@dataclass(frozen=True)
class _Study:
    """A results folder, read once."""

    folder: Path

    @cached_property
    def trials(self) -> pd.DataFrame:
        return load_trials(self.folder)

    @cached_property
    def described(self) -> dict[str, Any]:
        path = self.folder / "study.yaml"
        try:
            described = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AnalysisError(
                f"{path}: no such file; give the results folder of a study, which holds study.yaml and trials.csv"
            ) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise AnalysisError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(described, dict):
            raise AnalysisError(f"{path}: not a study; it starts with `study: NAME`")
        return described

    @cached_property
    def corpus(self) -> dict[str, Any]:
        """The manifest of the data; empty before the data is prepared."""
        path = self.folder / "data.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise AnalysisError(f"{path}: cannot be read as JSON: {error}") from None

    @cached_property
    def fitted(self) -> list[tuple[Cell, AllocationFit]]:
        return [(cell, fit_allocation(cell.trials)) for cell in split_cells(self.trials)]

    @cached_property
    def sequence_losses(self) -> pd.DataFrame:
        return load_sequence_losses(self.folder)


# --- fits.json --------------------------------------------------------------------------------------------------------------


def _fits_record(study: _Study) -> dict[str, Any]:
    records = []
    for cell, fit in study.fitted:
        record = fit.to_dict()
        if len(cell.rates):
            record["conventions"]["learning_rate"] = "chosen per share: least mean validation loss over the seeds that its rates share"
            record["learning_rates"] = json.loads(cell.rates.to_json(orient="records"))
        records.append(
            {"cell": {name: value.item() if isinstance(value, np.generic) else value for name, value in cell.fields.items()}, **record}
        )
    provenance = {
        "trials_csv_sha256": hashlib.sha256((study.folder / "trials.csv").read_bytes()).hexdigest(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "scipy", "pandas")},
    }
    return {"study": study.described.get("study", study.folder.name), "provenance": provenance, "fits": records}


# --- figures ----------------------------------------------------------------------------------------------------------------


def _write_figures(study: _Study) -> list[dict[str, str]]:
    """Draw and save what the finished trials allow -> name, caption, width on the page and data URI of each figure."""
    folder = study.folder / "figures"
    folder.mkdir(exist_ok=True)
    fitted = [(cell, fit) for cell, fit in study.fitted if len(cell.trials)]
    drawn: list[tuple[str, str, Figure, pd.DataFrame]] = []
    if fitted:
        data = allocation_data(fitted)
        drawn.append(("allocation", prose.allocation_caption(set(data["series"])), allocation_figure(data), data))
    differences = differences_data(fitted, study.sequence_losses)
    if len(differences):
        drawn.append(("differences", prose.DIFFERENCES_CAPTION, differences_figure(differences), differences))
    lines = curves_data([cell for cell, _ in fitted], load_curves(study.folder)) if fitted else pd.DataFrame()
    if len(lines):
        drawn.append(("curves", prose.CURVES_CAPTION, curves_figure(lines), lines))
    for name, _, figure, data in drawn:
        save(figure, data, folder, name)
    return [
        {"name": name, "caption": caption, "inches": f"{1.3 * figure.get_figwidth():.1f}", "uri": _uri(folder / f"{name}.svg")}
        for name, caption, figure, _ in drawn
    ]


def _uri(path: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()


# --- the page ---------------------------------------------------------------------------------------------------------------


def _page(study: _Study, figures: list[dict[str, str]]) -> str:
    environment = Environment(
        loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": lambda value: "" if value is None else f"{value:,.0f}",
        "share": lambda value: "dense" if pd.isna(value) else f"{value:.4g}",
        "nats": _nats,
        "estimate": _estimate,
    }
    trials, described = study.trials, study.described
    return environment.get_template("report.html").render(
        name=described.get("study", study.folder.name),
        question=described.get("question", ""),
        counts=prose.counts(trials),
        complete=bool((trials["status"] == "finished").all()),
        readings=[{"label": cell.label, "sentences": fit.summary(), "sure": fit.status is Status.CONVERGED} for cell, fit in study.fitted],
        shifts=prose.shifts(study.fitted),
        figures=figures,
        plan=_plan(trials),
        lengths=", ".join(si(tokens) for tokens in sorted(trials["tokens"].dropna().unique())),
        settings=_settings(described),
        fits=[_fit_tables(cell, fit) for cell, fit in study.fitted],
        rates=[{"label": cell.label, "rows": cell.rates.to_dict("records")} for cell, _ in study.fitted if len(cell.rates)],
        differences=_differences(study),
        trials=trials_for_reading(trials),
        ids=list(trials["trial_id"]),
        statuses=list(trials["status"]),
        failures=_failures(study),
        corpus=study.corpus,
        provenance=_flat(described.get("provenance") or {}),
        caveats=prose.caveats(study.trials, study.described, study.corpus),
    )


def _plan(trials: pd.DataFrame) -> pd.DataFrame:
    """What each share came to: one row for each distinct set of sizes."""
    names = {
        "rho": (RHO, lambda value: "dense" if pd.isna(value) else f"{value:.4g}"),
        "share_moe": ("share reached", lambda value: "" if pd.isna(value) else f"{value:.4f}"),
        "total_params": ("P_tot", si),
        "active_params": ("P_act", si),
        "budget_error_total": ("error of P_tot", lambda value: "" if pd.isna(value) else f"{value:+.2%}"),
        "budget_error_active": ("error of P_act", lambda value: "" if pd.isna(value) else f"{value:+.2%}"),
        "routed_experts": ("routed experts", si),
        "shared_width": ("shared width", si),
        "memory_rows": ("memory rows", si),
        "flops_per_token": ("FLOPs/token", si),
        "memory_bytes_per_token": ("bytes/token", si),
    }
    there = [name for name in names if name in trials]
    sizes = trials[there].drop_duplicates()
    return pd.DataFrame({names[name][0]: [names[name][1](value) for value in sizes[name]] for name in there})


def _settings(described: dict[str, Any]) -> list[tuple[str, str]]:
    """The study as written, one line a field."""
    fields: dict[str, Any] = {
        name: described[name] for name in ("data", "model", "budget", "train", "shares", "rho", "seed") if name in described
    }
    vary = described.get("vary") or {}
    for number, grid in enumerate(vary if isinstance(vary, list) else [vary], 1):
        for path, values in grid.items():
            fields[f"vary {path}" if not isinstance(vary, list) else f"vary (grid {number}) {path}"] = values
    return _flat(fields)


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [line for name, inner in value.items() for line in _flat(inner, f"{path}.{name}" if path else str(name))]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [line for place, item in enumerate(value, 1) for line in _flat(item, f"{path}[{place}]")]
    return [(path, ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value))]


def _fit_tables(cell: Cell, fit: AllocationFit) -> dict[str, Any]:
    facts = [
        ("status", str(fit.status).replace("_", " ")),
        ("law", fit.law),
        ("runs, shares, seeds", f"{len(fit.rows)}, {len(fit.shares)}, {fit.seeds}"),
    ]
    if fit.best_end is not None:
        facts.append(("winning end (share)", f"{fit.best_end:.4g}"))
    if fit.argmin:
        facts.append(("best share", _estimate(fit.argmin, 3)))
    for name, estimate in (("loss there", fit.loss_at_best), (f"depth against {RHO} = 1", fit.depth)):
        if estimate:
            facts.append((f"{name} (nats/token)", _estimate(estimate, 4)))
    for name, value, form in (
        ("minimum inside, part of resamples", fit.p_interior, ".1%"),
        ("paired noise, sd (nats/token)", fit.paired_sd, ".4f"),
        ("spread between seeds, sd (nats/token)", fit.seed_sd, ".4f"),
        ("depth over paired noise", fit.depth_over_noise, ".1f"),
        ("lack of fit, p", fit.lack_of_fit_p, ".2g"),
    ):
        if value is not None:
            facts.append((name, format(value, form)))
    if fit.tied:
        facts.append(("shares tied with the best", ", ".join(f"{share:.3g}" for share in fit.tied)))
    return {"label": cell.label, "facts": facts, "parameters": fit.parameters, "candidates": fit.candidates, "chosen": fit.law}


def _differences(study: _Study) -> list[dict[str, Any]]:
    """For each cell a table as text: the mean difference to rho = 1 of each share with both standard errors, then every seed's own."""
    tables = []
    for cell, _ in study.fitted:
        differences = paired_differences(pd.concat([cell.trials, cell.dense]), study.sequence_losses)
        if differences.empty:
            continue
        rows = []
        for average in average_differences(differences.sort_values("rho", ascending=False)).to_dict("records"):
            same = differences["rho"].isna() if pd.isna(average["rho"]) else differences["rho"] == average["rho"]
            own = differences[same].set_index("seed")["difference"]
            rows.append(
                {
                    RHO: "dense" if pd.isna(average["rho"]) else f"{average['rho']:.4g}",
                    "mean difference": _nats(average["difference"], sign=True),
                    "s.e. between seeds": _nats(average["se_seeds"]),
                    "s.e. over sequences": _nats(average["se_sequences"]),
                    **{f"seed {seed}": _nats(own.get(seed), sign=True) for seed in sorted(differences["seed"].unique())},
                }
            )
        tables.append({"label": cell.label, "rows": pd.DataFrame(rows)})
    return tables


def _failures(study: _Study) -> list[dict[str, str]]:
    found = []
    for trial in study.trials[study.trials["status"].isin(("diverged", "failed", "out_of_memory", "interrupted"))].to_dict("records"):
        path = study.folder / "trials" / trial["trial_id"] / "failure.json"
        try:
            message = str(json.loads(path.read_text(encoding="utf-8"))["message"])
        except FileNotFoundError:
            message = (
                "the loss left the range in which training goes on; the curve is kept"
                if trial["status"] == "diverged"
                else "stopped before its end; run the study again to go on"
            )
        except (OSError, ValueError, TypeError, KeyError):
            message = "failure.json cannot be read"
        share = "dense" if pd.isna(trial["rho"]) else f"{trial['rho']:.4g}"
        found.append(
            {
                "id": trial["trial_id"],
                "status": trial["status"].replace("_", " "),
                "rho": share,
                "seed": str(trial["seed"]),
                "message": message,
            }
        )
    return found


def _nats(value: Any, digits: int = 4, sign: bool = False) -> str:
    return "" if value is None or pd.isna(value) else format(value, f"{'+' if sign else ''}.{digits}f")


def _estimate(estimate: Estimate, digits: int = 4) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
