"""A results folder, read once and only as far as it is asked for. Knows no kind of study."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic import ValidationError

from analysis.errors import AnalysisError
from analysis.table import load_curves, load_sequence_losses, load_trials, trial_files, typed_trials
from sparsemem.config import Tuned, nearest_path, study_around
from sparsemem.results import FREQUENCY_NATS, LEARNED_NATS, TrialStatus
from sparsemem.trial_files import TrialFiles

LEARNED_NOTHING = "learned_nothing"
COUNTS = (
    *("documents", "train_tokens", "validation_tokens", "duplicates_exact", "duplicates_near"),
    *("bytes_per_token", "vocab_size", "canonical_size", "token_frequency_loss"),
)
"""Numbers of `data.json`."""


def learned_nothing(trials: pd.DataFrame, chance: pd.Series) -> pd.Series:
    """Whether each trial's loss is that of equally likely tokens, whatever the trial is.

    Args:
        chance: that loss, nats per token, of each trial.
    """
    return trials["val_loss"] > chance - LEARNED_NATS


@dataclass(frozen=True)
class Results:
    """What the ledger holds. Every property raises `AnalysisError` where its file cannot be used, naming the file and
    the remedy.
    """

    folder: Path

    @classmethod
    def planned(cls, folder: Path, described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Results:
        """What the ledger will hold before anything is trained.

        Args:
            described: `study.yaml`.
            rows: the columns of `trials.csv` known before training, one mapping a trial.
        """
        results = cls(folder)
        text = pd.DataFrame(rows).assign(status=TrialStatus.PENDING.value, val_loss=None).to_csv(index=False)
        trials = typed_trials(pd.read_csv(io.StringIO(text), dtype=str), folder / "trials.csv")
        results.__dict__.update(trials=trials, described=dict(described))  # in the place of what is read on first use
        return results

    @cached_property
    def trials(self) -> pd.DataFrame:
        """`load_trials`: one row a planned trial. The status of a finished one that learned nothing is
        `learned_nothing`: its loss is that of chance, whatever the point is, so it enters no fit and no comparison.
        """
        trials = load_trials(self.folder)
        idle = (trials["status"] == TrialStatus.FINISHED) & learned_nothing(trials, self.chance(trials))
        return trials.assign(status=trials["status"].mask(idle, LEARNED_NOTHING))

    def chance(self, trials: pd.DataFrame) -> pd.Series:
        """Loss of equally likely tokens, nats per token, of each trial; infinite where the number of tokens is not
        known.
        """
        entries = trials["data.vocab_size"] if "data.vocab_size" in trials else self.corpus.get("vocab_size")
        return pd.Series(np.log(entries) if entries is not None else np.inf, index=trials.index).fillna(np.inf)

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The trials that have a result."""
        return self.trials[self.trials["status"] == TrialStatus.FINISHED]

    @property
    def trained(self) -> pd.DataFrame:
        """Those and the ones that learned nothing."""
        return self.trials[self.trials["status"].isin((TrialStatus.FINISHED, LEARNED_NOTHING))]

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
        except (FileNotFoundError, NotADirectoryError):
            near = study_around(self.folder) or Path("" if self.folder.exists() else nearest_path(path)).parent
            raise AnalysisError(
                f"{path}: no such file; give the results folder of a study, which holds study.yaml and trials.csv"
                + f"; did you mean {near}?" * (near != Path())
            ) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise AnalysisError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(described, dict):
            raise AnalysisError(f"{path}: not a study; it starts with `study: NAME`")
        sections = ("data", "model", "budget", "train", "provenance")
        _check(path, described, dict.fromkeys(sections, _is_mapping), "fields belong there")
        _check(path, described, {"analysis": _is_text}, "the name of an analysis belongs there")
        _check(path, described, {"vary": _is_vary}, "a grid or a list of grids belongs there")
        return described

    @cached_property
    def tuned(self) -> Tuned | None:
        """What the study took from `sparsemem tune`, if anything."""
        found, path = self.described.get("tuned"), self.folder / "study.yaml"
        try:
            return None if found is None else Tuned.model_validate(found)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise AnalysisError(f"{path}: `tuned` is not what `sparsemem tune` writes: {problem}") from None

    @cached_property
    def corpus(self) -> dict[str, Any]:
        """`data.json`, the manifest of the data; empty before the data is prepared."""
        path = self.folder / "data.json"
        corpus = _json(path, {}, "`sparsemem run` the study again")
        if not isinstance(corpus, dict):
            raise AnalysisError(f"{path}: not the manifest of a corpus; `sparsemem run` the study again")
        _check(path, corpus, dict.fromkeys(COUNTS, _is_number), "a number belongs there")
        _check(path, corpus, {"overlap": _is_mapping, "packages": _are_mappings}, "several values belong there")
        _check(path, corpus, {"text": _is_account}, "`total`, `train`, `validation` and `unused` bytes belong there")
        _check(path, corpus, {"remarks": _are_texts}, "lines of text belong there")
        overlap = corpus.get("overlap") or {}
        _check(path, overlap, dict.fromkeys(overlap, _is_number), "a number belongs there")
        return corpus

    @property
    def only_frequencies(self) -> pd.DataFrame:
        """Finished trials whose loss is that of token frequencies alone, or above; none where the study has several
        texts, or was begun before that loss was written down.
        """
        least = self.corpus.get("token_frequency_loss", np.inf)
        several = len(list(self.folder.glob("data*.json"))) > 1
        return self.finished[self.finished["val_loss"] > (np.inf if several else least - FREQUENCY_NATS)]

    @cached_property
    def predictions(self) -> list[dict[str, Any]]:
        """`predictions.json`, what `python -m analysis predict` wrote; empty without it."""
        path = self.folder / "predictions.json"
        record = _json(path, {"predictions": []}, "set it aside")
        found = record.get("predictions") if _is_mapping(record) else None
        parts: dict[str, Callable[[Any], bool]] = {
            **dict.fromkeys(("at", "optimum", "differences"), _is_mapping),
            **{"made": _is_time, "rows": _are_texts, "tied": _are_mappings, "distance": _is_number},
            "studies": lambda value: _are_records(value, {"study": str, "trials_csv_sha256": str, "finished": list}),
        }
        listed: list[dict[str, Any]] = found if _are_mappings(found) else [{}]  # type: ignore[assignment]
        for place, each in enumerate(listed, 1):
            if wrong := [name for name, right in parts.items() if not right(each.get(name))]:
                raise AnalysisError(
                    f"{path}: prediction {place} is not what `python -m analysis predict` writes (field `{wrong[0]}`); "
                    "set the file aside"
                )
        return listed

    @cached_property
    def report(self) -> dict[str, Any]:
        """`fits.json`, what `write_report` left: study, provenance, counts, readings, remarks, fits, figures."""
        path = self.folder / "fits.json"
        remedy = f"run `python -m analysis {self.folder}`"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AnalysisError(f"{path}: not the record of a report ({error}); {remedy}") from None
        parts: dict[str, Callable[[Any], bool]] = {
            "counts": _is_text,
            "readings": lambda value: _are_records(value, {"label": str, "sentences": str, "sure": bool}),
            "remarks": _are_texts,
            "fits": lambda value: _are_records(value, {"status": str}),
            "figures": _are_texts,
        }
        lacking = [name for name, right in parts.items() if not _is_mapping(record) or not right(record.get(name))]
        if lacking:
            problem = f"field `{lacking[0]}` is missing or damaged"
            raise AnalysisError(f"{path}: not the record of a report ({problem}); {remedy}")
        return dict(record)

    @cached_property
    def files(self) -> TrialFiles:
        """Of the trials."""
        return trial_files(self.folder)

    @property
    def digest(self) -> str:
        """SHA-256 of `trials.csv`."""
        return hashlib.sha256((self.folder / "trials.csv").read_bytes()).hexdigest()

    @property
    def name(self) -> str:
        """Of the study."""
        return str(self.described.get("study", self.folder.name))


def _json(path: Path, missing: Any, remedy: str) -> Any:
    """What the file holds; `missing` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise AnalysisError(f"{path}: cannot be read as JSON ({error}); {remedy}") from None


def _check(path: Path, record: dict[str, Any], fields: dict[str, Callable[[Any], bool]], words: str) -> None:
    """Refuse a field that is there and not what it should be."""
    for name, right in fields.items():
        if record.get(name) is not None and not right(record[name]):
            raise AnalysisError(f"{path}: field `{name}` has the value {record[name]!r}; {words}")


def _is_account(value: Any) -> bool:
    if not _is_mapping(value) or not _is_mapping(value.get("unused")):
        return False
    sizes = [value.get(name) for name in ("total", "train", "validation")]
    return all(map(_is_number, [*sizes, *value["unused"].values()])) and value["total"] > 0


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_mapping, value))


def _is_vary(value: Any) -> bool:
    return _is_mapping(value) or _are_mappings(value)


def _are_records(value: Any, fields: dict[str, type]) -> bool:
    return _are_mappings(value) and all(
        isinstance(record.get(name), kind) for record in value for name, kind in fields.items()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
