"""What an edited study would do to the results it has: which trials stay, which are new and in what, which are no
longer planned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sparsemem.config import ConfigError, Study, Trial, Tuned
from sparsemem.results import FINAL, TrialStatus
from sparsemem.study.display.progress import look, shown
from sparsemem.study.ledger import Ledger, nearest_study
from sparsemem.study.ledger.provenance import study_fields
from sparsemem.study.plan import PlannedTrial
from sparsemem.study.text import table

STATES = ("finished", "partly trained", "not begun", "new", "no longer planned")
Changes = dict[str, tuple[Any, Any]]
"""Dotted path -> (there, now)."""


def diff(study: Study, planned: Sequence[PlannedTrial], folder: Path | None) -> dict[str, Any]:
    """Compare a plan with a results folder, by default `runs/<study>` or `results/<study>`.

    Returns:
        `folder`; `study`: the fields of the file that have changed; `trials`: one record a trial of either side, with
        `trial_id`, `state` (one of `STATES`), `done` (share of its tokens), what the study varies and, of a new trial,
        in what it differs from the most similar one there (`nearest`, `changes`).

    Raises:
        ConfigError: there are no results.
    """
    usual = [Path("runs") / study.study, Path("results") / study.study]
    found = next((each for each in ([folder] if folder else usual) if (each / "study.yaml").is_file()), None)
    if found is None:
        if folder:
            what = "holds none" if folder.exists() else "does not exist"
            raise ConfigError(f"--diff needs the results of a study, and {folder} {what}{nearest_study(folder)}")
        raise ConfigError(
            f"--diff needs the results of a study, and {study.study} has not been run yet: "
            f"{' and '.join(map(str, usual))} hold none; train it by `sparsemem run`, leave out --diff to see its "
            "plan, or name other results by --diff DIR"
        )
    axes = list(planned[0].varied) or ["rho", "seed"]
    ledger = Ledger(found, [p.row() for p in planned])
    there = {id_: _comparable(trial) if (trial := ledger.trial(id_)) else {} for id_ in ledger.files.begun()}
    ids = {p.trial.id for p in planned}
    gone = {id_: fields for id_, fields in there.items() if id_ not in ids}
    candidates = {
        id_: _leaves(fields) for id_, fields in {**gone, **there}.items() if fields
    }  # of equally similar ones the one that goes
    records = []
    for p, progress in zip(planned, look(ledger), strict=True):
        record: dict[str, Any] = {
            "trial_id": p.trial.id,
            "state": "finished",
            "done": progress.tokens_done / progress.tokens,
        }
        if p.trial.id not in there:
            record["state"] = "new"
        elif progress.status not in FINAL:
            record["state"] = "not begun" if progress.status == TrialStatus.PENDING else "partly trained"
        record |= p.trial.at(axes)
        if record["state"] == "new" and candidates:
            now = _comparable(p.trial)
            leaves = _leaves(now)
            nearest = min(candidates, key=lambda id_: len(candidates[id_] ^ leaves))
            record |= {"nearest": nearest, "changes": changes(there[nearest], now)}
        records.append(record)
    for id_, fields in gone.items():
        records.append(
            {"trial_id": id_, "state": "no longer planned", "done": None, **{axis: _at(fields, axis) for axis in axes}}
        )
    recorded = yaml.safe_load((found / "study.yaml").read_text(encoding="utf-8"))
    recorded.pop("provenance", None)
    if recorded.get("tuned"):
        recorded["tuned"] = Tuned.model_validate(recorded["tuned"]).model_dump(mode="json")
    return {"folder": str(found), "study": changes(recorded, study_fields(study)), "trials": records}


def changed_texts(
    study: Study, planned: Sequence[PlannedTrial], base: Path, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """What `run` will say of texts that have changed since these results were begun.

    Returns:
        The notes, and text id -> digest of the tokens that are used in place of the text.

    Raises:
        ConfigError: `run` will refuse: finished trials were trained on a text that is not to be had any more, or some
            text cannot be read.
    """
    from sparsemem.study.plan.corpora import finished_notes, text_notes, texts_begun
    from sparsemem.study.remote.exchange import FIRST_PATIENCE_SECONDS
    from sparsemem.study.remote.staging import corpus_in
    from sparsemem.study.remote.storage import storage_of

    ledger = Ledger(folder, [p.row() for p in planned])
    storage = storage_of(study, base, ledger)
    waiting = set(ledger.unfinished())
    fetch = partial(corpus_in, storage.at_once(FIRST_PATIENCE_SECONDS)) if storage else None
    trials = [p.trial for p in planned]
    begun = texts_begun(ledger, trials)
    notes, digests = text_notes([trial for trial in trials if trial.id in waiting], base, begun, fetch)
    rest, others = finished_notes(trials, waiting, base, begun, ledger)
    return [*notes, *rest], digests | others


def describe_diff(found: Mapping[str, Any]) -> str:
    """The records of `diff` for people."""
    axes = [name for name in found["trials"][0] if name not in ("trial_id", "state", "done", "nearest", "changes")]
    rows = []
    for record in found["trials"]:
        differs = f"{_listed(record['changes'])} (than {record['nearest']})" if record.get("nearest") else ""
        done = "" if record["done"] is None else f"{record['done']:.0%}"
        rows.append([record["trial_id"], *(shown(axis, record[axis]) for axis in axes), record["state"], done, differs])
    counts = Counter(record["state"] for record in found["trials"])
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    words = [table(["trial", *axes, "state", "done", "differs in"], rows), f"{found['folder']}: {', '.join(parts)}"]
    if found["study"]:
        words.append(f"changed since it was last run: {_listed(found['study'])}")
    return "\n".join([*words, *found.get("text", ())])


def changes(there: Any, now: Any, path: str = "") -> Changes:
    """Where two nested mappings differ: the deepest paths that both have, or that one lacks."""
    if isinstance(there, dict) and isinstance(now, dict):
        found: Changes = {}
        for name in dict.fromkeys((*there, *now)):
            found |= changes(there.get(name), now.get(name), f"{path}.{name}" if path else name)
        return found
    return {} if there == now else {path: (there, now)}


def _comparable(trial: Trial) -> dict[str, Any]:
    """All fields, the shares of two pools as `rho`."""
    fields = trial.model_dump(mode="json")
    return fields if len(trial.shares) > 2 else {**fields, "shares": None, "rho": trial.rho}


def _leaves(fields: Mapping[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in fields.items():
        found |= _leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}={json.dumps(value)}"}
    return found


def _at(fields: Mapping[str, Any], path: str) -> Any:
    value: Any = fields
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _listed(found: Changes) -> str:
    def text(value: Any) -> str:
        return "set" if isinstance(value, dict) else "none" if value is None else json.dumps(value).strip('"')

    def both(there: Any, now: Any) -> str:
        if isinstance(there, list) and isinstance(now, list) and any(isinstance(item, dict) for item in [*there, *now]):
            return f"({sum(item not in there for item in now)} of {len(now)} are new)"
        return f"{text(there)} -> {text(now)}"

    return ", ".join(f"{path} {both(there, now)}" for path, (there, now) in found.items())
