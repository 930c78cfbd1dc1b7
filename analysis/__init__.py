"""From a results folder to tables, fits with intervals, figures and a report. It must know neither torch nor Ray, and
starts fast.

>>> import analysis
>>> trials = analysis.load_trials("results/allocation-quick")  # doctest: +SKIP
>>> fit = analysis.fit_allocation(analysis.split_cells(trials)[0].trials)  # doctest: +SKIP
>>> print(fit.summary())  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AnalysisError": "analysis.errors",
    "load_trials": "analysis.table",
    "load_curves": "analysis.table",
    "load_sequence_losses": "analysis.table",
    "paired_differences": "analysis.table",
    "average_differences": "analysis.table",
    "format_table": "analysis.table",
    "split_cells": "analysis.cells",
    "fit_allocation": "analysis.fits.allocation",
    "AllocationFit": "analysis.fits.allocation_result",
    "Estimate": "analysis.fits.types",
    "Fit": "analysis.fits.types",
    "IsoflopFit": "analysis.fits.isoflop",
    "JointFit": "analysis.fits.joint_result",
    "LogLogFit": "analysis.fits.log_log",
    "PowerFit": "analysis.fits.surface",
    "RoutingFit": "analysis.fits.routing",
    "SlotsFit": "analysis.fits.slots_result",
    "SurfaceFit": "analysis.fits.surface",
    "DataConstrainedFit": "analysis.fits.data_constrained",
    "PrecisionFit": "analysis.fits.precision",
    "fit_precision": "analysis.fits.precision",
    "fit_data_constrained": "analysis.fits.data_constrained",
    "MoeJointFit": "analysis.fits.moe_joint",
    "fit_moe_joint": "analysis.fits.moe_joint",
    "fit_density": "analysis.fits.density",
    "fit_isoflop": "analysis.fits.isoflop",
    "fit_joint": "analysis.fits.joint",
    "fit_ladder": "analysis.fits.ladder",
    "fit_log_log": "analysis.fits.log_log",
    "fit_power": "analysis.fits.surface",
    "fit_routing": "analysis.fits.routing",
    "fit_simplex": "analysis.fits.simplex",
    "fit_slots": "analysis.fits.slots",
    "fit_surface": "analysis.fits.surface",
    "read_table": "analysis.reader",
    "SimplexFit": "analysis.fits.simplex_result",
    "Status": "analysis.status",
    "write_report": "analysis.report",
    "write_index": "analysis.index",
    "summarize": "analysis.report",
}


__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
