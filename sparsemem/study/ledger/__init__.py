"""The results folder of a study: what was planned, how far each trial is, and what came out. It must not know engines
or torch.

Files are the only state. How far a trial is follows from its own: `state`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sparsemem.config import ConfigError, Study, Trial, load_study, study_around
from sparsemem.files import TEMPORARY, remove_temporaries, set_aside, write_json, write_text
from sparsemem.locks import locked
from sparsemem.results import COLUMNS, FINAL, MEASURED, TrialStatus
from sparsemem.study.ledger.provenance import study_fields, versions
from sparsemem.study.ledger.state import State, read_state
from sparsemem.trial_files import TrialFiles, damaged

CLOCK_TICK_NS = 10**9  # two changes within less may leave a folder with one time


class Ledger:
    """A results folder and the trials planned in it."""

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """
        Args:
            rows: the columns of `trials.csv` known before training, one mapping a planned trial.
        """
        self.folder = folder
        self.files = TrialFiles(folder)
        self.rows = rows
        self._final: dict[str, State] = {}
        self._untouched: dict[str, int] = {}
        """Trial whose process has not begun -> when its folder last changed."""

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """The ledger that a run left behind.

        Raises:
            ConfigError: the folder holds no study.
        """
        rows = _listed(folder / "trials.csv")
        if not (folder / "study.yaml").exists() or not rows or not set(COLUMNS) <= rows[0].keys():
            if not folder.exists() or study_around(folder):
                raise ConfigError(
                    f"{folder}: no {'results' if folder.exists() else 'such'} folder{nearest_study(folder)}"
                )
            inside = sorted(path.parent.name for path in folder.glob("*/study.yaml"))
            usual = Path("runs") / folder.stem
            raise ConfigError(
                f"{folder}: not the results folder of a study (study.yaml and a whole trials.csv)"
                + (f"; it holds those of {', '.join(inside)}: name one, such as {folder / inside[0]}" if inside else "")
                + (f"; did you mean {usual}?" if usual != folder and (usual / "study.yaml").exists() else "")
            )
        return cls(
            folder, [{name: value for name, value in row.items() if name not in (*MEASURED, "status")} for row in rows]
        )

    @property
    def study(self) -> str:
        return self.folder.name

    @cached_property
    def cpus_per_trial(self) -> int:
        """As the study was last run."""
        run = _mapping(self.folder / "study.yaml").get("run")
        return int(run.get("cpus_per_trial", 1)) if isinstance(run, dict) else 1

    @cached_property
    def most_trials(self) -> int | None:
        """Trials that the study may come to while its shares are searched; None where all are planned from
        the start.
        """
        try:
            study = load_study(self.folder / "study.yaml")
        except ConfigError:
            return None
        return study.most_trials if study.searches else None

    def trial_folder(self, trial_id: str) -> Path:
        return self.folder / "trials" / trial_id

    def state(self, trial_id: str) -> State:
        """From the trial's files; a final state is read once, and a pending one when its folder has changed."""
        if trial_id in self._final:
            return self._final[trial_id]
        folder = f"{self.folder}/trials/{trial_id}"
        try:
            changed = os.stat(folder).st_mtime_ns
        except OSError:
            changed = 0
        packed = trial_id in self.files.packed  # looked at last: a folder goes once the pack is there
        if not packed and changed in (0, self._untouched.get(trial_id)):
            return State(TrialStatus.PENDING)
        state = read_state(self.files, trial_id)
        if state.status in FINAL:
            self._final[trial_id] = state
        elif packed:
            raise damaged(self.files.path(trial_id, "result.json"), "not the whole result of this trial")
        elif (
            state.status == TrialStatus.PENDING
            and time.time_ns() - changed > CLOCK_TICK_NS
            and not os.path.exists(f"{folder}/lock")
        ):
            self._untouched[trial_id] = changed  # whatever happens next begins with a new file, its lock
        return state

    def trial(self, trial_id: str) -> Trial | None:
        """As its `trial.yaml` describes it; None where that cannot be read."""
        try:
            return Trial.model_validate(yaml.safe_load(self.files.read(trial_id, "trial.yaml")))
        except (OSError, ValueError, yaml.YAMLError):
            return None

    def node(self, trial_id: str) -> str:
        """The node that a running trial is on; '' where that is not known."""
        try:
            return str(json.loads((self.trial_folder(trial_id) / "worker.json").read_text(encoding="utf-8"))["node"])
        except (OSError, ValueError, TypeError, KeyError):
            return ""

    def unfinished(self) -> list[str]:
        """Planned trials without a final result, in the order of the plan."""
        return [row["trial_id"] for row in self.rows if self.state(row["trial_id"]).status not in FINAL]

    def counts(self) -> Counter[str]:
        """Status -> number of trials."""
        return Counter(self.state(row["trial_id"]).status for row in self.rows)

    def table(self) -> list[dict[str, Any]]:
        """The rows of `trials.csv`: planned columns, status, and what was measured (None where it was not)."""
        rows = []
        for row in self.rows:
            state = self.state(row["trial_id"])
            measured = {name: state.result.get(name) for name in MEASURED}
            if state.status == TrialStatus.DIVERGED:
                measured |= {"val_loss": None, "val_loss_se": None, "val_bpb": None}
            merged = {**row, "status": state.status, **measured}
            rows.append({name: merged[name] for name in dict.fromkeys((*COLUMNS, *row))})
        return rows

    def texts(self) -> dict[str, str]:
        """Data id (`data_id`) -> digest of the corpus that the study's trials were begun with."""
        return {entry["id"]: entry["digest"] for entry in self._provenance().get("data", [])}

    def write_table(self) -> None:
        """Bring `trials.csv` up to date; untouched where it is."""
        text, rows = io.StringIO(), self.table()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        path = self.folder / "trials.csv"
        if not path.exists() or path.read_text(encoding="utf-8") != text.getvalue():
            write_text(path, text.getvalue())

    # --- writing, under the study's lock ---

    def check_owner(self) -> None:
        """Refuse to write into a folder that is another study's, or none.

        Raises:
            ConfigError: naming both.
        """
        for parent in (self.folder, *self.folder.parents):
            if parent.exists() and not parent.is_dir():
                raise ConfigError(f"{parent}: is a file, not a folder; give `--results` a folder")
        outer, recorded = self.folder.parent / "study.yaml", self.folder / "study.yaml"
        if outer.exists():
            raise ConfigError(
                f"{self.folder.parent}: holds the study {_name(outer)!r}, so it cannot hold the results of "
                f"{self.study!r}; give the folder that contains it, `--results {self.folder.parent.parent}`"
            )
        if recorded.exists() and _name(recorded) != self.study:
            raise ConfigError(
                f"{self.folder}: holds the study {_name(recorded)!r}, not {self.study!r}; "
                "give `--results` another folder or rename the study"
            )
        if self.folder.exists() and not recorded.exists() and _is_used(self.folder):
            raise ConfigError(
                f"{self.folder}: exists and holds no study; give `--results` another folder or move it away"
            )

    def check_precision(self, study: Study, trials: Mapping[str, Trial]) -> None:
        """Refuse to mix trials of different precision: with `train.precision: auto` the device decides it.

        Raises:
            ConfigError: naming both.
        """
        for id_, trial in trials.items():
            wanted = trial.train.precision_on(gpu=study.run.gpus_per_trial > 0)
            found = self.state(id_).result.get("precision", wanted)
            if found != wanted:
                raise ConfigError(
                    f"{self.folder}: trial {id_} was trained in {found}, but `run.gpus_per_trial` "
                    f"{study.run.gpus_per_trial:g} with `train.precision: auto` means {wanted}; set `train.precision` "
                    "in the study or give `--results` another folder"
                )

    def begin(
        self,
        study: Study,
        trials: Mapping[str, Trial],
        corpora: Mapping[str, Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        """Write down what is about to run, set aside what is damaged, and remove what kills have left.

        Args:
            corpora: data id -> manifest, of the trials that are about to run; empty: none will.
        """
        left = len({row.get("trial_id") for row in _listed(self.folder / "trials.csv")} - trials.keys())
        if left:
            say(f"{self.folder}: {left} trials of an earlier plan are kept, but left out of trials.csv and the report")
        self._write_study(study, corpora)
        digests = set(self.texts().values())
        for path in self.folder.glob("data*.json") if corpora else ():
            if _mapping(path).get("digest") not in digests:  # a text that nothing was finished on
                path.unlink()
        for number, manifest in enumerate({manifest["digest"]: manifest for manifest in corpora.values()}.values()):
            main = number == 0 and _mapping(self.folder / "data.json").get("digest") in (None, manifest["digest"])
            write_json(self.folder / ("data.json" if main else f"data-{manifest['digest']}.json"), manifest)
        remove_temporaries(self.folder)
        for path in self.folder.glob("trials/*/checkpoint*.pt"):
            if self.state(path.parent.name).status in FINAL:  # killed between its result and its end
                path.unlink(missing_ok=True)
        for id_ in self.unfinished():
            self.begin_trial(trials[id_], say)
        self.write_table()

    def begin_trial(self, trial: Trial, say: Callable[[str], None]) -> None:
        """Make an unfinished trial's folder ready for a worker."""
        folder = self.trial_folder(trial.id)
        folder.mkdir(parents=True, exist_ok=True)
        result, description = folder / "result.json", folder / "trial.yaml"
        if result.exists():
            say(
                f"{result}: not the whole result of trial {trial.id}; set aside as {set_aside(result).name}, the trial "
                "runs again"
            )
        written = self.trial(trial.id)
        if description.exists() and not (written and written.id == trial.id):
            say(
                f"{description}: not the description of trial {trial.id}; set aside as {set_aside(description).name} "
                "and written again"
            )
        if not description.exists():
            write_text(description, yaml.safe_dump(trial.model_dump(mode="json"), sort_keys=False))

    def take_over(self, other: Ledger, trial_id: str, precision: str) -> bool:
        """Copy the result of a trial from another ledger, where it was trained to its end in this precision and has not
        begun here.

        Returns:
            Whether that was so.
        """
        source, folder = other.trial_folder(trial_id), self.trial_folder(trial_id)
        found = other.state(trial_id)
        whole = (
            found.status == TrialStatus.FINISHED and not (source / "failure.json").exists()
        )  # beside a result: a search judged it bad
        if (
            not whole
            or found.result.get("precision", precision) != precision
            or self.state(trial_id).status != TrialStatus.PENDING
        ):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*sorted((*source.glob("*.csv"), *source.glob("*.yaml"))), source / "result.json"):
            write_text(folder / path.name, path.read_text(encoding="utf-8"))
        return True

    def _write_study(self, study: Study, corpora: Mapping[str, Mapping[str, Any]]) -> None:
        provenance = self._provenance()
        if corpora or not provenance:
            data = {entry["id"]: entry for entry in provenance.get("data", [])}
            for name, manifest in corpora.items():
                data[name] = {
                    "id": name,
                    **{key: manifest[key] for key in ("corpus", "digest", "train_tokens", "validation_tokens")},
                }
            started = provenance.get("started") or datetime.now(UTC).isoformat(timespec="seconds")
            provenance = {**versions(), "started": started, "data": list(data.values())}
        text = yaml.safe_dump(
            study_fields(study) | {"provenance": provenance}, sort_keys=False, allow_unicode=True, width=120
        )
        path = self.folder / "study.yaml"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)

    def _provenance(self) -> dict[str, Any]:
        recorded = _mapping(self.folder / "study.yaml").get("provenance")
        return recorded if isinstance(recorded, dict) else {}


@contextmanager
def study_lock(folder: Path) -> Iterator[None]:
    """Hold a study for one driver. The system drops the lock when the driver ends, however it ends.

    Raises:
        ConfigError: another driver holds it; names its process and machine.
    """
    lock = folder / "lock"
    with ExitStack() as held:
        try:
            file = held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            holder = lock.read_text(encoding="utf-8").strip() or "another process"
            shown = f", `sparsemem status {folder}` shows it" if (folder / "study.yaml").exists() else ""  # no search
            raise ConfigError(f"{folder}: is being run by {holder}; wait for it or stop it{shown}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def nearest_study(folder: Path) -> str:
    """A remedy for the folder of a study that is not there: the one in which it lies, the most similar, or those of the
    usual places.
    """
    if around := study_around(folder):
        return f"; did you mean {around}, in which it lies?"
    places = dict.fromkeys((folder.parent, Path("runs"), Path("results")))
    there = {path.parent.name: path.parent for place in places for path in sorted(place.glob("*/study.yaml"))}
    close = difflib.get_close_matches(folder.name, list(there), n=1)
    names = [close[0]] if close else list(there)[:5]
    return (
        f"; did you mean {' or '.join(str(there[name]) for name in names)}?" if names else "; `sparsemem run` makes it"
    )


def _listed(path: Path) -> list[dict[str, str]]:
    """Rows of a `trials.csv`; none where it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _is_used(folder: Path) -> bool:
    """Whether there is anything but what a driver leaves that was killed before it wrote down its study, or what was
    foretold of it.
    """
    unused = ("lock", ".lock.held", "tune", "predictions.json")
    return any(path.name not in unused and not path.name.endswith(TEMPORARY) for path in folder.iterdir())


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(study_yaml: Path) -> str:
    return str(_mapping(study_yaml).get("study", "(unreadable study.yaml)"))
