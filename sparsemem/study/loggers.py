"""Tells experiment trackers of a study's trials: `run: {loggers: [tensorboard, mlflow, wandb]}`. It must not know
engines or training.

The driver follows the ledger's files and forwards what is new: the resolved config, the rows of the curve, at the end
the result and how it came out. So training knows no tracker, and every engine is followed alike. Each row is told once,
also after a driver was killed:

- `logs/NAME/done.txt` lists the trials that a tracker knows to their end; nothing more is said of them.
- The others are told again by the next driver. TensorBoard's folder and W&B's offline folder of a trial are written
  anew, since neither can be continued; MLflow, and W&B's server, are asked which steps they have.

A tracker that fails is switched off with one line: what it is told can be told again from the ledger, a training
cannot. Nothing of the environment, the command or the machine is sent.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from sparsemem.config import ConfigError, Trial
from sparsemem.results import FINAL, TrialStatus
from sparsemem.study.display.progress import axes_of, label, shown
from sparsemem.study.ledger import Ledger

LOOK_SECONDS = 2.0
END_SECONDS = 60.0  # the end of a study waits so long for a tracker that does not answer
LONGEST_NAME = 120  # of a folder, beside the trial's id
LONGEST_TAG = 64  # of W&B
BATCH = 100  # MLflow takes so many parameters at once, and more metrics

_LIBRARIES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_QUIET = {  # unless the user has set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "WANDB_ERROR_REPORTING": "false",
}

Row = tuple[int, dict[str, float]]
"""A step of the training and what was measured there, by the names of `curve.csv`."""


@dataclass(frozen=True)
class Told:
    """A trial as a tracker is told of it."""

    study: str
    trial_id: str
    label: str
    """Its rho, its seed and what else distinguishes it in its study, such as `rho 0.75, seed 1`."""
    axes: Mapping[str, str]
    """The same, by name."""
    config: Mapping[str, str | int | float | bool]
    """Dotted path -> value of every field that it uses; lists as JSON."""
    folder: Path
    """Of the tracker's local files, absolute."""


class Tracker(Protocol):
    """One trial in one tracker. Whatever its library raises is caught by `Loggers`."""

    def __init__(self, trial: Told) -> None: ...

    def rows(self, rows: Sequence[Row]) -> None: ...

    def end(self, status: TrialStatus, step: int, result: Mapping[str, float]) -> None:
        """
        Args:
            status: of the ledger; one that is not final leaves the trial open to be told of again.
            step: the last one.
            result: the numbers of `result.json`; empty without one.
        """


def check_loggers(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the library of one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_LIBRARIES[name]) is None:
            raise ConfigError(
                f"field `run.loggers` names {name}, whose library is not installed; `pip install 'sparsemem[{name}]'`, "
                "or leave it out"
            )


class Loggers:
    """Tells trackers of a study's trials while its body runs, and what is left at its end."""

    def __init__(
        self, names: Sequence[str], ledger: Ledger, trials: Mapping[str, Trial], say: Callable[[str], None]
    ) -> None:
        self._followers = [_Follower(name, ledger, trials) for name in dict.fromkeys(names)]
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        if self._followers:
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._followers:
            self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._say(
                f"logger {', '.join(f.name for f in self._followers)}: no answer for {END_SECONDS:.0f} s; run again to "
                "send the rest"
            )

    def _follow(self) -> None:
        last = False
        while self._followers and not last:
            last = self._ended.wait(LOOK_SECONDS)
            for follower in list(self._followers):
                try:
                    follower.look(last)
                except Exception as error:  # libraries and their networks raise dozens of kinds
                    self._followers.remove(follower)
                    reason = (str(error).splitlines() or [""])[0]
                    self._say(
                        f"logger {follower.name} is off ({type(error).__name__}: {reason}); training goes on, run "
                        "again to send the rest"
                    )


class _Follower:
    """What one tracker has been told of a study."""

    def __init__(self, name: str, ledger: Ledger, trials: Mapping[str, Trial]) -> None:
        self.name = name
        self._ledger, self._trials = ledger, trials
        self._folder = (ledger.folder / "logs" / name).resolve()
        self._done = self._folder / "done.txt"
        left = set(self._done.read_text(encoding="utf-8").split()) if self._done.exists() else set()
        self._left = {row["trial_id"]: row for row in ledger.rows if row["trial_id"] not in left}
        self._axes = axes_of(ledger.rows)
        self._open: dict[str, Tracker] = {}
        self._step: dict[str, int] = {}

    def look(self, last: bool) -> None:
        """Tell of what is new; `last`: and that trials without a result have stopped."""
        for id_ in list(self._left):
            state = self._ledger.state(id_)  # before the curve, which is whole once there is a result
            try:
                curve = self._ledger.files.read(id_, "curve.csv").decode()
            except FileNotFoundError:
                continue
            rows = [row for row in _curve(curve) if row[0] > self._step.get(id_, -1)]
            if id_ not in self._open:
                self._open[id_] = TRACKERS[self.name](self._told(id_))
            if rows:
                self._open[id_].rows(rows)
                self._step[id_] = rows[-1][0]
            if state.status in FINAL or last:
                numbers = {name: float(value) for name, value in state.result.items() if type(value) in (int, float)}
                self._open.pop(id_).end(state.status, self._step.get(id_, 0), numbers)
            if state.status in FINAL:
                del self._left[id_]
                with open(self._done, "a", encoding="utf-8") as file:
                    file.write(f"\n{id_}\n")  # a line that a killed driver cut short stays one of its own

    def _told(self, id_: str) -> Told:
        self._folder.mkdir(parents=True, exist_ok=True)
        config = dict(_flat(self._trials[id_].model_dump(mode="json", exclude_none=True)))
        row, axes = self._left[id_], list(dict.fromkeys(("rho", "seed", *self._axes)))
        values = {axis: shown(axis, row[axis]) for axis in axes}
        return Told(self._ledger.study, id_, label(row, axes), values, config, self._folder)


def _curve(text: str) -> list[Row]:
    """Rows of a curve; what was not measured there, or is no number, is left out."""
    lines = [
        {name: float(value) for name, value in line.items() if value} for line in csv.DictReader(text.splitlines())
    ]
    return [
        (int(line.pop("step")), {name: value for name, value in line.items() if math.isfinite(value)}) for line in lines
    ]


def _flat(fields: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value if isinstance(value, str | int | float) else json.dumps(value)


# --- trackers ---------------------------------------------------------------------------------------------------------


class _TensorBoard:
    """`logs/tensorboard/<label and trial id>/`, for `tensorboard --logdir`; config and result stand under its tab
    HParams too.

    Events are written one by one: the library's own writer would lose an error in a thread and put the machine's name
    into the file's.
    """

    def __init__(self, trial: Told) -> None:
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import hparams, text

        for left in trial.folder.glob(f"*{trial.trial_id}"):
            shutil.rmtree(left)
        name = re.sub(r"[^\w.,+ -]+", "-", trial.label, flags=re.ASCII)[:LONGEST_NAME]
        folder = trial.folder / f"{name} {trial.trial_id}"
        folder.mkdir()
        self._file = RecordWriter(str(folder / "events.out.tfevents"))
        self._write(0, file_version="brain.Event:2")
        experiment, start, self._session_end = hparams(dict(trial.config), {"result/val_loss": 0})
        lines = [f"    {path}: {value}" for path, value in trial.config.items()]  # Markdown: as it stands
        for summary in (experiment, start, text("config", "\n".join([f"{trial.study}, {trial.label}", "", *lines]))):
            self._write(0, summary=summary)
        self._file.flush()

    def rows(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            self._scalars(step, values)
        self._file.flush()

    def end(self, status: TrialStatus, step: int, result: Mapping[str, float]) -> None:
        from tensorboardX.summary import text

        self._scalars(step, {f"result/{name}": value for name, value in result.items()})
        self._write(step, summary=text("status", status))
        if status in FINAL:
            self._write(step, summary=self._session_end)
        self._file.flush()
        self._file.close()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


class _MLflow:
    """A run tagged `trial_id` in the experiment of the study's name, at `MLFLOW_TRACKING_URI` or in
    `logs/mlflow/mlflow.db`.
    """

    def __init__(self, trial: Told) -> None:
        from mlflow.entities import Param, RunTag

        self._client, experiment = _experiment(trial.folder, trial.study)
        found = self._client.search_runs([experiment], f"tags.trial_id = '{trial.trial_id}'", max_results=1)
        run = (
            found[0]
            if found
            else self._client.create_run(experiment, run_name=trial.label, tags={"trial_id": trial.trial_id})
        )
        self._run: str = run.info.run_id
        self._known = {
            (name, m.step) for name in run.data.metrics for m in self._client.get_metric_history(self._run, name)
        }
        tags = [RunTag(axis, value) for axis, value in trial.axes.items()]
        self._client.log_batch(self._run, tags=[RunTag("status", "running"), *tags])
        params = [Param(path, str(value)) for path, value in trial.config.items()]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self._run, params=params[start : start + BATCH])
        self._client.update_run(self._run, status="RUNNING", name=trial.label)

    def rows(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            (name, value, step)
            for step, values in rows
            for name, value in values.items()
            if (name, step) not in self._known
        ]
        for start in range(0, len(new), BATCH):
            metrics = [Metric(name, value, now, step) for name, value, step in new[start : start + BATCH]]
            self._client.log_batch(self._run, metrics=metrics)

    def end(self, status: TrialStatus, step: int, result: Mapping[str, float]) -> None:
        self.rows([(step, {f"result/{name}": value for name, value in result.items()})])
        self._client.set_tag(self._run, "status", status)
        ended = {
            TrialStatus.FINISHED: "FINISHED",
            TrialStatus.INTERRUPTED: "KILLED",
            TrialStatus.RUNNING: "KILLED",
        }.get(status, "FAILED")
        self._client.set_terminated(self._run, ended)


@functools.cache
def _experiment(folder: Path, study: str) -> tuple[Any, str]:
    """MLflow's client and the id of the study's experiment."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(uri or f"sqlite:///{folder / 'mlflow.db'}")
    found = client.get_experiment_by_name(study)
    if found:
        return client, found.experiment_id
    return client, client.create_experiment(study, artifact_location=None if uri else (folder / "artifacts").as_uri())


class _WandB:
    """A run whose id is the trial's, in the project of the study's name: under `logs/wandb/` for `wandb sync`, unless
    WANDB_MODE is set.
    """

    def __init__(self, trial: Told) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            for left in trial.folder.glob(f"offline-run-*-{trial.trial_id}"):
                shutil.rmtree(left)
        settings = wandb.Settings(
            root_dir=str(trial.folder.parent),  # it adds `wandb`
            reinit="create_new",
            finish_timeout=END_SECONDS / 2,
            silent=True,
            console="off",
            symlink=False,
            disable_git=True,
            disable_code=True,
            save_code=False,
            program="",
            host="",
            username="",
            email="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=trial.study,
            id=trial.trial_id,
            name=trial.label,
            tags=list(dict.fromkeys(f"{axis} {value}"[:LONGEST_TAG] for axis, value in trial.axes.items())),
            config=dict(trial.config),
            resume="allow",
            mode=mode,
            settings=settings,
        )
        self._first = self._run.step  # after those that the server has

    def rows(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            if step >= self._first:
                self._run.log(values, step=step)

    def end(self, status: TrialStatus, step: int, result: Mapping[str, float]) -> None:
        self._run.summary.update({"status": status.value} | {f"result/{name}": value for name, value in result.items()})
        self._run.finish(exit_code=0 if status == TrialStatus.FINISHED else 1)


TRACKERS: Mapping[str, type[Tracker]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WandB}
