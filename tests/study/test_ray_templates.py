"""What `sweeps/cluster/` starts clusters with: each file is whole, holds no secret, and the script for Slurm really
trains.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "sweeps" / "cluster"
TEMPLATES = ("aws.yaml", "kuberay.yaml", "slurm.sh")


def _only(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAMED = _only("name", name=TEXT, namespace=TEXT, labels={"type": "object"})
CONTAINER = {"type": "object", "required": ["name", "image", "resources"]}
POD = _only(
    "spec",
    metadata={"type": "object"},
    spec=_only("containers", containers={"type": "array", "items": CONTAINER}, volumes={"type": "array"}),
)
PARAMS = {"type": "object", "additionalProperties": TEXT}  # numbers have to be quoted
HEAD = _only(
    "rayStartParams template",
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    rayStartParams=PARAMS,
    template=POD,
)
WORKER = _only(
    "groupName rayStartParams template",
    **{
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": COUNT,
        "rayStartParams": PARAMS,
        "template": POD,
    },
)
CLUSTER = _only(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=_only("mode", mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKER},
)
JOB = _only(
    "entrypoint",
    entrypoint=TEXT,
    clusterSelector=PARAMS,
    rayClusterSpec=CLUSTER,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
)
KUBERAY = {"RayCluster": CLUSTER, "RayJob": JOB}
"""The documented fields of KubeRay's resources (its API reference, ray.io/v1) that the manifest may use."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_three_lines_are_to_be_edited_and_nothing_is_secret(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert len(re.findall(r"# EDIT: ", text)) == 3
    assert not re.search(r"[0-9a-fA-F]{32}|AKIA|BEGIN .*PRIVATE KEY", text)
    assert re.search(r"RAY_AUTH_MODE=token|authOptions: \{mode: token\}", text)
    assert "0.0.0.0" not in text


def test_the_cluster_file_is_what_ray_up_takes() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = yaml.safe_load((FOLDER / "aws.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(written))
    starts = [
        line for name in ("head", "worker") for line in written[f"{name}_start_ray_commands"] if "ray start" in line
    ]
    assert ["--dashboard-host=127.0.0.1" in line for line in starts] == [True, False]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(written | {"file_mount": {}}))


def test_the_manifest_is_what_kuberay_takes() -> None:
    cluster, job = yaml.safe_load_all((FOLDER / "kuberay.yaml").read_text(encoding="utf-8"))
    for document in (cluster, job):
        whole = _only(
            "apiVersion kind metadata spec",
            apiVersion={"const": "ray.io/v1"},
            kind=TEXT,
            metadata=NAMED,
            spec=KUBERAY[document["kind"]],
        )
        jsonschema.validate(document, whole)
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_the_script_for_slurm_is_sound() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "slurm.sh")], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (Debian: shellcheck)")
    subprocess.run(["shellcheck", str(FOLDER / "slurm.sh")], check=True)


STUBS = {
    "sbatch": """
        nodes=$(sed -n 's/^#SBATCH --nodes=\\([0-9]*\\).*/\\1/p' "$1")
        export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=$(( $$ )) SLURM_JOB_NODELIST='node[1-2]' SLURM_JOB_NUM_NODES=$nodes
        exec bash "$1"
    """,
    "scontrol": "printf 'node1\\nnode2\\n'",
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        exec "$@"
    """,
    "hostname": "echo 127.0.0.1",
    "ray": f'exec "{sys.executable}" "{FOLDER}/loopback.py" "$@" --node-name="node-$$" --num-cpus=1',
    "sparsemem": f'exec "{sys.executable}" -m sparsemem "$@"',
    "python": f'exec "{sys.executable}" "$@"',
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_the_script_for_slurm_trains_a_study_on_the_nodes_of_its_allocation(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in STUBS.items():
        (bin_ / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (bin_ / name).chmod(0o755)
    long = {"total_params": "30k", "active_params": "7k", "tokens": 150_000, "tolerance": "5%"}
    study, folder = write_study(budget=long, vary={"rho": [1.0, 0.5], "seed": [0, 1]}), tmp_path / "runs" / "tiny"
    script = (FOLDER / "slurm.sh").read_text(encoding="utf-8")
    script = re.sub(r"^study=\S+", f"study={study.name}", script, flags=re.M)  # what a user edits
    (tmp_path / "slurm.sh").write_text(script, encoding="utf-8")
    mark = f"SPARSEMEM_TEST={tmp_path}"
    environment = os.environ | {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SPARSEMEM_TEST": str(tmp_path),
    }
    with open(tmp_path / "said", "w+", encoding="utf-8") as said:
        batch = subprocess.Popen(["sbatch", "slurm.sh"], cwd=tmp_path, env=environment, stdout=said, stderr=said)
        nodes = set()
        while batch.poll() is None:
            for place in folder.glob("trials/*/worker.json"):
                nodes |= set(re.findall(r"node-\d+", _text(place)))
        deadline = time.monotonic() + 20
        while (left := _marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        said.seek(0)
        assert batch.returncode == 0, said.read()
    assert len(nodes) == 2
    assert (folder / "report.html").exists()
    assert not left


def _marked(mark: str) -> list[int]:
    """Processes that this test's have started."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if mark in _text(path).split("\0")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
