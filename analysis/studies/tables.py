"""Numbers as text, and the tables that several kinds of study show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.cells import RATE, Cell
from analysis.fits.types import Estimate
from analysis.studies.types import Section, Table
from analysis.table import as_text, fixed, shown
from sparsemem.config import Tuned


def interval(estimate: Estimate | None, digits: int = 4) -> str:
    """`0.3500 (0.3100 to 0.3900)`; '' for none."""
    if estimate is None:
        return ""
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def led(label: str, sentence: str) -> str:
    """A sentence on one part of a study, which its label names; '' for a study of one part."""
    return f"{label}: {sentence}" if label else sentence


def numbered(name: str, count: int) -> list[str]:
    """Names of the figures of so many parts.

    >>> numbered("ladder", 1), numbered("ladder", 2)
    (['ladder'], ['ladder-1', 'ladder-2'])
    """
    return [name] if count == 1 else [f"{name}-{place}" for place in range(1, count + 1)]


def facts(pairs: Sequence[tuple[str, str]], title: str = "") -> Table:
    """Names and values, one line each; those without a value are left out."""
    return Table(pd.DataFrame([pair for pair in pairs if pair[1]], columns=["name", "value"]), title, header=False)


def status_facts(fit: Any, counted: str, *counts: int, law: str = "") -> list[tuple[str, str]]:
    """Status and law of a fit, and over how much it is: its runs, then `counts`, as `counted` names them."""
    numbers = ", ".join(map(str, (len(fit.rows), *counts)))
    return [("status", str(fit.status).replace("_", " ")), ("law", law), (counted, numbers)]


def noise_fact(fit: Any) -> list[tuple[str, str]]:
    """The noise of a fit that is paired by seed; none where no seed is repeated."""
    if fit.paired_sd is None:
        return []
    return [("paired noise, sd (nats/token)", f"{fit.paired_sd:.4f} ({fit.noise_df} degrees of freedom)")]


def of_cells(tables: Sequence[tuple[str, pd.DataFrame]]) -> pd.DataFrame:
    """What is drawn of several cells, the label of each in the first column, `cell`; empty for no cell."""
    if not tables:
        return pd.DataFrame()
    data = pd.concat([table.assign(cell=label) for label, table in tables], ignore_index=True)
    return data[["cell", *data.columns.drop("cell")]]


def tuned_sections(tuned: Tuned | None) -> list[Section]:
    """What each point took from `sparsemem tune`; empty for a study that took nothing."""
    if tuned is None or not tuned.winners:
        return []
    rows = []
    for winner in tuned.winners:
        row = {path: _told(value) for path, value in winner.at.items()} or {"point": "all trials"}
        row |= {f"{path} (tuned)": _told(value) for path, value in winner.values.items()}
        row["val loss (nats/token)"] = fixed(winner.val_loss)
        row["values tried"] = ", ".join(f"{tried}" for tried in winner.tried.values())
        row["doubt"] = "; ".join(f"{path} {why}" for path, why in winner.doubts().items())
        rows.append(row)
    table = pd.DataFrame(rows).fillna("")
    note = (
        f"Found by `sparsemem tune` for the study {tuned.study}, on the held-out set, with one seed. Each trial took "
        "the values of its own point."
    )
    return [Section("Tuned settings", (Table(table.loc[:, (table != "").any()], "", wide=True),), note)]


def _told(value: Any) -> str:
    """A value as a study writes it; a group of them, such as `shares`, by name."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(inner)}" for name, inner in value.items())
    return shown(value) if isinstance(value, int | float) else str(value)


def rates_sections(cells: Sequence[Cell], noun: str) -> list[Section]:
    """The check of the learning rate, where several were tried at a point; empty otherwise."""
    tables = []
    for cell in cells:
        if len(rates := cell.rates):
            measured = {
                "learning rate": [f"{rate:g}" for rate in rates[RATE]],
                "shared seeds": [str(seeds) for seeds in rates["seeds"]],
                "val loss (nats/token)": [fixed(loss) for loss in rates["val_loss"]],
                "used": ["yes" if chosen else "" for chosen in rates["chosen"]],
            }
            point = as_text(rates.drop(columns=[RATE, "seeds", "val_loss", "chosen"]).reset_index(drop=True))
            tables.append(Table(pd.concat([point, pd.DataFrame(measured)], axis=1), cell.label, wide=True))
    note = (
        f"Where several rates were tried at a {noun}, the one with the least mean validation loss over the seeds that "
        "all have is used."
    )
    return [Section(f"Learning rate chosen per {noun}", tuple(tables), note)] if tables else []
