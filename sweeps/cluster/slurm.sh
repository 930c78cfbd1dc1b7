#!/usr/bin/env bash
# A study on the nodes of a Slurm allocation: `sbatch sweeps/cluster/slurm.sh`, from a checkout with its .venv on a disk that all nodes see.
# Edit the three lines marked EDIT. Cancelled or out of time, the same command goes on from the last checkpoints.
#
# Ray runs for as long as the job does, on ports of the nodes' own network; its token is made anew and never leaves the job's environment.
#SBATCH --job-name=sparsemem
#SBATCH --nodes=2          # EDIT: how many machines
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@60
set -euo pipefail

study=sweeps/allocation-quick.yaml  # EDIT: what to run
results=runs                        # EDIT: a folder that all nodes see

cd "${SLURM_SUBMIT_DIR:?start me with sbatch}"
PATH="$PWD/.venv/bin:$PATH"
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export PATH RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000))

ray_node() { # options of srun, then, after --, those of ray start
  local where=()
  while [ "$1" != -- ]; do where+=("$1") && shift; done
  shift
  srun --overlap "${where[@]}" ray start --block --object-store-memory=100000000 "$@" &
}

ray_node --nodes=1 --ntasks=1 --nodelist="$head" -- --head --node-ip-address="$address" --port="$port" \
  --dashboard-host=127.0.0.1 --include-dashboard=false --temp-dir="/tmp/ray-$SLURM_JOB_ID"
timeout 120 bash -c "until : > /dev/tcp/$address/$port; do sleep 1; done" 2> /dev/null
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  ray_node --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" -- --address="$address:$port"
fi

storage=$(realpath -m "$results")-exchange # where the nodes fetch texts and leave checkpoints
mkdir -p "$storage"
sparsemem run "$study" --results "$results" --set run.storage="$storage" --address "$address:$port" &
driver=$!
trap 'kill -TERM "$driver"' TERM # a minute before the job's time is over, and when it is cancelled
code=0
wait "$driver" || code=$?
if kill -0 "$driver" 2> /dev/null; then # the signal came first: the trials end at their last checkpoint
  code=0
  wait "$driver" || code=$?
fi
jobs -p | xargs --no-run-if-empty kill 2> /dev/null || true # the nodes
wait || true
exit "$code"
