"""A results folder, read once and only as far as it is asked for. Knows no kind of study."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.errors import AnalysisError
from analysis.table import load_curves, load_sequence_losses, load_trials


@dataclass(frozen=True)
class Results:
    """What the ledger holds. Every property raises `AnalysisError` where its file cannot be used, naming the file and the remedy."""

    folder: Path

    @cached_property
    def trials(self) -> pd.DataFrame:
        """`load_trials`: one row a planned trial."""
        return load_trials(self.folder)

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The trials that have a result."""
        return self.trials[self.trials["status"] == "finished"]

    @cached_property
    def curves(self) -> pd.DataFrame:
        """`load_curves`."""
        return load_curves(self.folder)

    @cached_property
    def sequence_losses(self) -> pd.DataFrame:
        """`load_sequence_losses`."""
        return load_sequence_losses(self.folder)

    @cached_property
    def described(self) -> dict[str, Any]:
        """`study.yaml`."""
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
        """`data.json`, the manifest of the data; empty before the data is prepared."""
        path = self.folder / "data.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise AnalysisError(f"{path}: cannot be read as JSON: {error}") from None

    @property
    def name(self) -> str:
        """Of the study."""
        return str(self.described.get("study", self.folder.name))
