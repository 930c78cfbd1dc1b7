"""The kinds of study, by the name that `study.yaml` gives in its field `analysis`. Each is loaded on first use."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

from analysis.errors import AnalysisError
from analysis.results import Results
from analysis.studies.types import Analysis

KINDS = {
    "allocation": "Allocation",
    "compute-ratio": "ComputeRatio",
    "ladder": "Ladder",
    "density": "Density",
    "slots": "Slots",
    "simplex": "Simplex",
    "sparsity": "Sparsity",
    "memories": "Memories",
    "scaling": "Scaling",
}
"""Value of `analysis` -> its class, in the module of the same name."""


def analyse(results: Results) -> Analysis:
    """The analysis of the kind that the study names.

    Raises:
        AnalysisError: study.yaml names an unknown kind.
    """
    kind = results.described.get("analysis", "allocation")
    if kind not in KINDS:
        raise AnalysisError(
            f"{results.folder / 'study.yaml'}: field `analysis` has the value {kind!r}; known: {', '.join(KINDS)}"
        )
    return _of_kind(kind, results)


def readable_by(results: Results) -> list[str]:
    """The kinds that do not refuse these trials, planned or finished."""
    found = []
    for kind in KINDS:
        with suppress(AnalysisError):
            _of_kind(kind, results).check()
            found.append(kind)
    return found


def _of_kind(kind: str, results: Results) -> Analysis:
    module = import_module(f"analysis.studies.{kind.replace('-', '_')}")
    analysis: Analysis = getattr(module, KINDS[kind])(results)
    return analysis
