"""A study handed to a cluster as a job of Ray's: `sparsemem run` there, followed from here. It must not know trials."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from sparsemem.config import ConfigError, Study
from sparsemem.data.files import matching
from sparsemem.files import write_text
from sparsemem.study.console import terminated_like_interrupted, to_stderr
from sparsemem.study.engines.ray_engine import offer_token, past_proxies
from sparsemem.study.ledger.provenance import study_fields

SCHEME = "ray-job:"
UPLOAD_BYTES = 100 * 2**20
STOP_SECONDS = 30


def run_as_job(study: Study, base: Path, results: Path, address: str) -> int:
    """Run a study on the cluster at `ray-job:URL`; its log goes to stderr, and Ctrl-C stops it.

    Args:
        base: the folder that relative paths in `study.data` start from; the texts that it names are sent along.
        results: on the cluster.

    Returns:
        The exit code of `sparsemem run` there.

    Raises:
        ConfigError: refused; nothing was submitted.
        ConnectionError: the cluster's job server does not answer, or does not let us in.
        KeyboardInterrupt: the job has been stopped; the same command goes on.
    """
    if not results.is_absolute():
        raise ConfigError(
            f"--results has the value {results}: a job's own folder goes with it; give the absolute path of a folder "
            "on the cluster"
        )
    storage = study.run.storage
    if storage and "://" not in storage and not Path(storage).is_absolute():
        raise ConfigError(
            f"field `run.storage` has the value {storage!r}: a job's own folder goes with it; give an absolute path or "
            "an address"
        )
    offer_token()
    os.environ.update(past_proxies())
    try:
        import aiohttp  # noqa: F401
        from ray.job_submission import JobSubmissionClient
    except ImportError:
        raise ConfigError(
            f"--address {address} needs Ray's job client; install it with pip install 'sparsemem[cluster]'"
        ) from None
    with tempfile.TemporaryDirectory(prefix="sparsemem-job-") as folder:
        _pack(study, base, Path(folder))
        try:
            client = JobSubmissionClient(address.removeprefix(SCHEME))
            job = client.submit_job(
                entrypoint=shlex.join(
                    ["python", "-m", "sparsemem", "run", "study.yaml", "--address", "auto", "--results", str(results)]
                ),
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
            )
        except Exception as error:  # the client raises plain exceptions of many kinds here
            raise ConnectionError(f"{address}: no job could be submitted ({error})") from error
    to_stderr(f"{study.study}: job {job}")
    with terminated_like_interrupted():
        try:
            asyncio.run(_follow(client, job))
            return _exit_code(client, job)
        except KeyboardInterrupt:
            client.stop_job(job)
            _exit_code(client, job)
            raise


def _pack(study: Study, base: Path, folder: Path) -> None:
    """Write the study, with all that `--set` and `tuned` say, and the texts that it names by relative paths."""
    write_text(folder / "study.yaml", yaml.safe_dump(study_fields(study), sort_keys=False, allow_unicode=True))
    patterns = {pattern for trial in study.trials() for pattern in (*trial.data.files, *trial.data.validation_files)}
    relative = sorted(
        pattern for pattern in patterns if not Path(pattern).is_absolute()
    )  # others are looked for on the cluster
    for pattern in relative:
        if ".." in Path(pattern).parts:
            raise ConfigError(
                f"field `data.files` names {pattern!r}, outside of the study's folder, which a job cannot take along; "
                "move it inside"
            )
    files = sorted({path for pattern in relative for path in matching(pattern, base)})
    if (size := sum(path.stat().st_size for path in files)) > UPLOAD_BYTES:
        raise ConfigError(
            f"field `data.files` names {size / 2**20:,.0f} MiB, more than the {UPLOAD_BYTES // 2**20} that a job takes "
            "along; copy them to where every node sees them and give their absolute path"
        )
    for path in files:
        copy = folder / path.relative_to(base)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


async def _follow(client: Any, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", file=sys.stderr, flush=True)


def _exit_code(client: Any, job: str) -> int:
    """Wait for a job's end; 1 where it did not even begin."""
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    if details.driver_exit_code is None:
        to_stderr(f"job {job}: {details.message}")
        return 1
    return int(details.driver_exit_code)
