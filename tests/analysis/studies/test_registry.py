"""The report asks the analysis that the study names, and says which there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from analysis import AnalysisError, write_report
from analysis.results import Results
from analysis.studies import KINDS, analyse
from analysis.studies.allocation import Allocation
from analysis.studies.types import Analysis
from sparsemem.config import Study

New = Callable[..., Path]


def test_every_kind_that_a_study_may_name_has_its_class(new_points: New) -> None:
    assert set(get_args(Study.model_fields["analysis"].annotation)) == set(KINDS)
    for kind, name in KINDS.items():
        found = analyse(Results(new_points(kind, [{"rho": 1.0, "loss": 4.0}])))
        assert isinstance(found, Analysis)
        assert type(found).__name__ == name


def test_a_study_that_names_none_is_an_allocation_study(study: Path) -> None:
    assert type(analyse(Results(study))) is Allocation


def test_an_unknown_kind_is_refused_by_name(new_points: New) -> None:
    with pytest.raises(
        AnalysisError, match=r"unheard-of/study.yaml: field `analysis` has the value 'unheard-of'; known: allocation, "
    ):
        write_report(new_points("unheard-of", [{"rho": 1.0, "loss": 4.0}]))
