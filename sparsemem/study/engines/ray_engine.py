"""Trials as an explicit grid of Ray Tune, in processes of Ray's: a private Ray on this machine, or a cluster. It must
not know studies.

Ray only schedules here. Tune's own storage lives in a temporary folder of the driver that goes with the run: a Tune
experiment cannot be extended, and `Tuner.restore` cannot change its space, so nothing of a study is kept in one. No
other node ever reads that folder, since no trial reports a checkpoint to Tune.

A process that has ended a trial well is given another one; one that has not is never used again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsemem.config import ConfigError, Run
from sparsemem.failure import record_failure
from sparsemem.files import scratch_folder
from sparsemem.study.engines.ray_ending import each_error_ends_one_trial, record_ending
from sparsemem.study.engines.ray_watch import ends_with_ray
from sparsemem.study.jobs import Job, slots

CONNECT_SECONDS = 5.0
OBJECT_STORE_BYTES = 80 * 2**20  # nothing travels through it; Ray's default is 30% of the machine's memory
LOST_NODES = 3

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old reporter is the one that `verbose=0` silences
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the driver's
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",  # progress lines say how many wait for a node
}
_ON_LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_grpc_enable_http_proxy": "0",
}  # every port on 127.0.0.1, past any proxy
_PRIVATE = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20"
}  # a control store that was killed does not come back; its agents wait so long


def run_trials(jobs: Sequence[Job], run: Run, address: str | None = None) -> None:
    """See `engine.Engine`.

    A trial whose node is lost is started again up to `run.max_failures` times, as after any other failure; where its
    last attempt ended with its node, it gets as many once more when the others are done, up to `LOST_NODES` times: not
    its fault, unless it always happens.

    Args:
        address: of a running cluster, `HOST:PORT` or `auto`; by default a private Ray is started and ended.

    Raises:
        ConfigError: the nodes of the cluster do not share a disk.
        ChildProcessError: Ray did not start (it gives its own processes 30 seconds, which a busy machine may not meet)
            or was killed; there is no cluster at `address`, or its head was lost.
    """
    with scratch_folder(
        Path("/tmp") if os.path.isdir("/tmp") else None, "sparsemem-ray-"
    ) as scratch:  # short: sockets live in it
        ray = (
            _connected(address, jobs) if address else _started(min(slots(run), len(jobs)) * run.cpus_per_trial, scratch)
        )
        resources = {"cpu": run.cpus_per_trial, "gpu": run.gpus_per_trial}  # one bundle: all of it on one node
        if address and run.memory_per_trial:  # on this machine, `slots` has seen to it
            resources["memory"] = run.memory_per_trial
        with home_or(scratch) if not address else contextlib.nullcontext(), ray, ends_with_ray():
            for _ in range(1 + LOST_NODES):
                jobs = _fit(jobs, run, resources, scratch)
                if not jobs:
                    return
        for job in jobs:
            record_failure(job.trial_folder, f"it lost its node {1 + LOST_NODES} times and more (often: out of memory)")


def _fit(jobs: Sequence[Job], run: Run, resources: Mapping[str, float], scratch: Path) -> list[Job]:
    """Run every job to its end; returns those whose last attempt ended with their node."""
    from ray import tune

    by_name = {job.trial_folder.name: job for job in jobs}
    tuner = tune.Tuner(
        tune.with_resources(_trainable(), dict(resources)),
        param_space={
            "trial": tune.grid_search(list(by_name)),
            "jobs": by_name,
            "run": run,
        },
        tune_config=tune.TuneConfig(
            max_concurrent_trials=run.max_concurrent,
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
            reuse_actors=os.access(
                "/proc/self/clear_refs", os.W_OK
            ),  # else peak memory would be that of all trials of a process
        ),
        run_config=tune.RunConfig(
            name="study",
            storage_path=str(scratch / "tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=run.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        each_error_ends_one_trial(),
    ):  # results go to stdout
        try:
            outcomes = tuner.fit()
        except Exception as error:
            remedy = "the same command goes on from the last checkpoints"
            raise ChildProcessError(
                f"Ray Tune ended before its trials ({_first(error.__cause__ or error)}); {remedy}"
            ) from error
    # a trial that was killed has no config any more, hence its path
    ended = [(by_name[Path(outcomes[number].path).name], outcomes[number].error) for number in range(len(outcomes))]
    return [job for job, error in ended if error is not None and record_ending(job.trial_folder, error)]


def _trainable() -> type:
    """What Tune makes processes of; Ray is imported by then."""
    from ray import tune

    class TrialProcess(tune.Trainable):
        def step(self) -> dict[str, Any]:
            from sparsemem.study.engines.worker import run_job

            run_job(self.config["jobs"][self.config["trial"]], self.config["run"], _node_name())
            return {"done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            from sparsemem.train.process import make_as_new

            make_as_new()
            return True

    return TrialProcess


def _node_name() -> str:
    """Of the node that this process is on: what it was named by `ray start --node-name`, else its host."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return str(node["NodeName"] if node["NodeName"] != node["NodeManagerAddress"] else node["NodeManagerHostname"])


# --- Ray itself -------------------------------------------------------------------------------------------------------


def _init(**arguments: Any) -> None:
    """`ray.init`, which takes SIGTERM for itself: the driver's own way of ending is put back."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(**arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _started(cpus: int, scratch: Path) -> Iterator[None]:
    os.environ.update(_ENVIRONMENT | _ON_LOOPBACK | _PRIVATE | past_proxies())
    import ray

    try:
        try:
            _init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(scratch),
            )
        except Exception as error:  # Ray raises plain exceptions of many kinds here
            remedy = "run again when the machine is less busy, or with --engine local"
            raise ChildProcessError(f"Ray did not start ({error}); {remedy}") from error
        yield
    finally:
        ray.shutdown()


@contextmanager
def home_or(folder: Path) -> Iterator[None]:
    """Ray keeps a token in the user's home. Where there is none that can be written, as in a container, it is this
    folder for the body.
    """
    home, before = Path(os.path.expanduser("~")), os.environ.get("HOME")
    if home.is_absolute() and ((home.is_dir() and os.access(home, os.W_OK)) or (home / ".ray" / "auth_token").exists()):
        yield
        return
    os.environ["HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["HOME"]
        os.environ.update({"HOME": before} if before is not None else {})


def past_proxies() -> dict[str, str]:
    """Environment variables by which what is on this machine is reached without a proxy; other addresses as before."""
    given = {
        name: filter(None, os.environ.get(name, "").split(",")) for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    }
    return {name: ",".join(dict.fromkeys((*hosts, "127.0.0.1", "localhost", "::1"))) for name, hosts in given.items()}


@contextmanager
def _connected(address: str, jobs: Sequence[Job]) -> Iterator[None]:
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    offer_token()
    os.environ.update(
        _ENVIRONMENT
        | (_ON_LOOPBACK if address.startswith(("127.0.0.1:", "localhost:", "[::1]:")) else {})
        | past_proxies()
    )
    import ray

    remedy = "start one with `ray start --head`, or name its head as HOST:PORT"
    if address != "auto":
        try:
            host, _, port = address.rpartition(":")
            socket.create_connection(
                (host, int(port)), CONNECT_SECONDS
            ).close()  # Ray itself would try for minutes, deaf to signals
        except OSError as error:
            raise ChildProcessError(f"there is no Ray cluster at {address} ({error}); {remedy}") from None
    try:
        try:
            _init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except Exception as error:
            raise ChildProcessError(
                f"there is no Ray cluster at {address}, or it does not let us in ({_first(error)}); {remedy}"
            ) from error
        if not all(job.storage for job in jobs):
            _refuse_separate_disks()
        yield
    finally:
        ray.shutdown()


def offer_token() -> None:
    """Let Ray send the user's token where there is one; of its own accord it does so for a private Ray only."""
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or os.path.exists(
        os.path.expanduser("~/.ray/auth_token")
    ):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _refuse_separate_disks() -> None:
    """
    Raises:
        ConfigError: a node is another machine than this one, and nothing says what disk they share.
    """
    import ray

    others = sorted({node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} - {socket.gethostname()})
    if others:
        raise ConfigError(
            f"field `run.storage` is missing: the cluster has nodes on {', '.join(others)}, which need not see this "
            "machine's disk; set it to a folder that every node sees, or to the address of an object store"
        )


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
