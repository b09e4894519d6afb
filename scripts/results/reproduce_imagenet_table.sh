#!/usr/bin/env bash
# The published table (batch 256, 8K, 16K, 32K) on ImageNet: on one machine, on several, or as jobs of Slurm.
#
#   scripts/results/reproduce_imagenet_table.sh /data/imagenet [SETTING...]                          one machine
#   NODES=4 NODE=0 HEAD=gpu01 GPUS=8 scripts/results/reproduce_imagenet_table.sh /data/imagenet      first of four
#   NODES=4 NODE=1 HEAD=gpu01 GPUS=8 scripts/results/reproduce_imagenet_table.sh /data/imagenet      second, and so on
#   SBATCH="--nodes=4" scripts/results/reproduce_imagenet_table.sh /data/imagenet                    Slurm: a job for each row
#
# /data/imagenet is the folder or URL with ImageNet's train/ and val/; a SETTING is key=value, such as seed=1. Several
# machines must share the file system of the current folder; the runs are in ./runs. The same command resumes, and finished
# rows only print their results. mode=plan at the end prints the plan for one machine, without training. Bad input ends
# the script with exit code 2 before anything starts. SBATCH has options of sbatch for scripts/cluster/slurm_run.sbatch,
# which checks the machines and requeues the job. The number of machines does not change the curves.
#
# Takes hours to days: docs/results.md has hours, disk and memory. Figures: docs/results.md.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac

refuse() {
    echo "$0: $1" >&2
    echo "usage: [NODES=N NODE=0..N-1 HEAD=NAME GPUS=PER_MACHINE | SBATCH=OPTIONS] $0 DATA_ROOT [SETTING...]" >&2
    exit 2
}

# True for a whole number that the shell can compare.
whole() {
    [[ "$1" =~ ^(0|[1-9][0-9]{0,5})$ ]]
}

case "${1:-}" in
    "") refuse "DATA_ROOT, the first argument, is missing" ;;
    -*) refuse "$1: DATA_ROOT, a folder or a URL, must come first" ;;
esac
# Only a setting has a "=" before any "/".
before=${1%%/*}
if [ "$before" != "${before%%=*}" ]; then
    refuse "$1: pass DATA_ROOT, a folder or a URL, before the settings; for a folder of this name, pass ./$1"
fi
data=$1
shift

nodes=${NODES:-1}
if ! whole "$nodes" || [ "$nodes" -lt 1 ]; then
    refuse "NODES=$nodes: the number of machines is a whole number of at least 1"
fi
if [ "$nodes" -gt 1 ]; then
    node=${NODE:-}
    head=${HEAD:-}
    gpus=${GPUS:-}
    if ! whole "$node" || [ "$node" -ge "$nodes" ]; then
        refuse "NODE=$node: the number of this machine is a whole number from 0 to $((nodes - 1)), for NODES=$nodes"
    fi
    if [ -z "$head" ]; then
        refuse "HEAD is missing: the name of machine 0, which all can reach"
    fi
    if [ "$gpus" != gpu ] && { ! whole "$gpus" || [ "$gpus" -lt 1 ]; }; then
        refuse "GPUS=$gpus: the number of GPUs in each machine is a whole number of at least 1, or gpu for all"
    fi
fi

# Plan a row of each kind first (without and with LARS): then bad input is reported once, not for each row and process,
# and the exit code is 2, which torchrun would turn into 1. A sweep by the user (seed=1,2) has no single plan.
case "$*" in
    *[,\(]*) ;;
    *)
        for row in 256 32k; do
            lars-train batch="$row" data=imagenet data.root="$data" "$@" mode=plan > /dev/null
        done
        ;;
esac

# Row 256 has eight ghost batches, for at most eight GPUs. It uses one machine, and runs last, so that no other waits.
if [ -n "${SBATCH:-}" ]; then
    read -ra options <<<"$SBATCH"
    job=$(dirname "$0")/../cluster/slurm_run.sbatch
    for row in 32k 16k 8k; do
        sbatch "${options[@]}" --job-name="table-$row" "$job" batch="$row" data=imagenet data.root="$data" "$@"
    done
    sbatch "${options[@]}" --nodes=1 --job-name=table-256 "$job" batch=256 data=imagenet data.root="$data" "$@"
    exit
fi
if [ "$nodes" -eq 1 ]; then
    exec lars-train -m batch=256,8k,16k,32k data=imagenet data.root="$data" "$@"
fi
for row in 32k 16k 8k; do
    torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "table-$row" \
        --rdzv-endpoint "$head:29400" -m lars_train batch="$row" data=imagenet data.root="$data" "$@"
done
if [ "$node" -eq 0 ]; then
    lars-train batch=256 data=imagenet data.root="$data" "$@"
fi
