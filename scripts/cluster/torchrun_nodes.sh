#!/usr/bin/env bash
# One run on several machines without a scheduler: on each of them, within ten minutes of each other,
#
#   NODES=4 HEAD=gpu01 JOB=first scripts/cluster/torchrun_nodes.sh batch=32k data=imagenet data.root=/data/imagenet
#
# HEAD is one of them, by a name or address that all reach (port 29400, or PORT); JOB is the run's name, new for each run.
# ADDRESS is this machine's own, where the others cannot look its name up. NODES=1:4 takes machines that come and go
# (docs/recovery.md). GPUS is how many of a machine's to use (all). The current folder must be on a file system that all
# share: the run lives in ./runs/JOB, and the same command goes on with it.
# First: the same with mode=check behind it.
set -euo pipefail

nodes=${NODES:?"NODES is the number of machines, or the least and the most: 1:4"}
head=${HEAD:?"HEAD is the machine where all meet"}
job=${JOB:?"JOB is the name of the run, the same on all machines"}

address=()
if [ -n "${ADDRESS:-}" ]; then
    address=(--local-addr "$ADDRESS")
fi

# So that a machine that joins late is told where the ranks' store is now (docs/recovery.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-100}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29400}" --rdzv-id "$job" \
    "${address[@]}" \
    -m lars_train run.name="$job" "$@"
