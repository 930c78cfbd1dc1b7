"""Trials as an explicit grid of Ray Tune, one process each. It must not know studies.

Ray only schedules here. Its own storage and its session live in a temporary folder that goes with the run: a Tune experiment cannot be
extended, and `Tuner.restore` cannot change its space, so nothing of a study is kept in one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsemem.config import Run
from sparsemem.files import scratch_folder
from sparsemem.study.engine import Job, record_failure, slots
from sparsemem.study.ray_watch import ends_with_ray

OBJECT_STORE_BYTES = 80 * 2**20  # nothing travels through it; Ray's default is 30% of the machine's memory

_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every port on 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old reporter is the one that `verbose=0` silences
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's
}


def run_trials(jobs: Sequence[Job], run: Run) -> None:
    """See `engine.Engine`.

    Raises:
        ChildProcessError: Ray did not start, for which it gives its own processes 30 seconds: a busy machine may not meet that; or it was
            killed.
    """
    with scratch_folder(Path("/tmp") if os.path.isdir("/tmp") else None, "sparsemem-ray-") as scratch:  # short: sockets live in it
        _run_trials(jobs, run, str(scratch))


def _run_trials(jobs: Sequence[Job], run: Run, scratch: str) -> None:
    os.environ.update(_ENVIRONMENT)
    import ray
    from ray import tune

    together = min(slots(run), len(jobs))
    resources = {"cpu": run.cpus_per_trial, "gpu": run.gpus_per_trial}
    folders = [str(job.trial_folder) for job in jobs]
    tokens = {str(job.trial_folder): str(job.tokens_folder) for job in jobs}
    tuner_arguments: dict[str, Any] = {
        "param_space": {
            "trial_folder": tune.grid_search(folders),
            "tokens": tokens,
            "run": run,
        },
        "tune_config": tune.TuneConfig(reuse_actors=False, max_concurrent_trials=together),
        "run_config": tune.RunConfig(
            name="study",
            storage_path=os.path.join(scratch, "tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=run.max_failures),
        ),
    }
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # results go to stdout, Ray's remarks do not
            _start(together * run.cpus_per_trial, scratch)
            with ends_with_ray():
                outcomes = tune.Tuner(tune.with_resources(_run, resources), **tuner_arguments).fit()
        for number in range(len(outcomes)):
            error, folder = outcomes[number].error, Path((outcomes[number].config or {})["trial_folder"])
            if isinstance(error, ray.exceptions.OutOfMemoryError):
                record_failure(folder, "ended by Ray: the machine ran out of memory", "out_of_memory")
            elif isinstance(error, ray.exceptions.RayActorError):
                record_failure(folder, "its process was killed (often: out of memory)")
    finally:
        ray.shutdown()


def _start(cpus: int, scratch: str) -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=scratch,
        )
    except Exception as error:  # Ray raises plain exceptions of many kinds here
        raise ChildProcessError(f"Ray did not start ({error}); run again when the machine is less busy, or with --engine local") from error


def _run(config: dict[str, Any]) -> None:
    """One trial, in a process of Ray's."""
    from sparsemem.study.worker import run_job

    folder = Path(config["trial_folder"])
    run_job(Job(folder, Path(config["tokens"][str(folder)])), config["run"])
