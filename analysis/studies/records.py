"""What fits.json says of a fit beside its own numbers: the cell, and how learning rates were chosen."""

from __future__ import annotations

import json
from typing import Any

from analysis.cells import Cell
from analysis.table import TPP


def record(cell: Cell, fit: dict[str, Any], noun: str) -> dict[str, Any]:
    """A fit's plain values as one record of fits.json.

    Args:
        noun: what the study compares.
    """
    if len(cell.rates):
        chosen = f"chosen per {noun}: least mean validation loss over the seeds that its rates share"
        fit = fit | {
            "conventions": fit["conventions"] | {"learning_rate": chosen},
            "learning_rates": json.loads(cell.rates.to_json(orient="records")),
        }
    planned = cell.planned if len(cell.planned) else cell.dense
    return {"cell": cell.fields, TPP: float(planned[TPP].median()) if TPP in planned else None, **fit}
