#!/usr/bin/env bash
# One run on several machines without a scheduler. Start it on each machine, within ten minutes:
#
#   NODES=4 HEAD=gpu01 JOB=first scripts/cluster/torchrun_nodes.sh batch=32k data=imagenet data.root=/data/imagenet
#
# HEAD is the name or address of one of the machines, which all can reach (port 29400, or PORT). JOB is a new name for each
# run. ADDRESS is the address of this machine, if the others cannot look up its name. With NODES=1:4 machines may come and
# go (docs/recovery.md). GPUS is the number of GPUs to use per machine (all). The current folder must be on a file system
# that all machines share; the run is in ./runs/JOB, and the same command resumes it.
# Check the machines first: the same command with mode=check at the end.
#
# Takes as long as the run. Figures: none. See docs/clusters.md.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac

nodes=${NODES:?"NODES is the number of machines, or the minimum and maximum: 1:4"}
head=${HEAD:?"HEAD is the machine to which all others connect"}
job=${JOB:?"JOB is the name of the run, the same on all machines"}

address=()
if [ -n "${ADDRESS:-}" ]; then
    address=(--local-addr "$ADDRESS")
fi

# Lets a machine that joins late find the current address of the ranks' store (docs/recovery.md).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "$nodes" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-100}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29400}" --rdzv-id "$job" \
    "${address[@]}" \
    -m lars_train run.name="$job" "$@"
