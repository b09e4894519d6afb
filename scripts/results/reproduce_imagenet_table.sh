#!/usr/bin/env bash
# The published table (batch 256, 8K, 16K, 32K) on ImageNet, on one machine or on several.
#
#   scripts/results/reproduce_imagenet_table.sh /data/imagenet [SETTING...]                              one machine
#   NODES=4 NODE=0 HEAD=gpu01 GPUS=8 scripts/results/reproduce_imagenet_table.sh /data/imagenet          the first of four
#   NODES=4 NODE=1 HEAD=gpu01 GPUS=8 scripts/results/reproduce_imagenet_table.sh /data/imagenet          the second, and so on
#
# On several, the current folder must be on a file system that all of them share: the runs live in ./runs.
# The same command goes on where it was, and finished rows only print themselves. What it needs (hours, disk, memory):
# docs/results.md. What it will do, without training: the same command with mode=plan behind it, on one machine.
# Bad input ends it with exit code 2 before anything is started.
set -euo pipefail

usage() {
    echo "usage: [NODES=N NODE=0..N-1 HEAD=NAME GPUS=PER_MACHINE] $0 DATA_ROOT [SETTING...]"
    echo "DATA_ROOT is the folder or URL with ImageNet's train/ and val/; a SETTING is key=value, such as seed=1 or mode=plan"
}

refuse() {
    echo "$0: $1" >&2
    usage >&2
    exit 2
}

# A whole number, of so few digits that the shell can compare it.
whole() {
    [[ "$1" =~ ^(0|[1-9][0-9]{0,5})$ ]]
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    "") refuse "DATA_ROOT, the first argument, is missing" ;;
    -*) refuse "$1: DATA_ROOT, a folder or a URL, has to come first" ;;
esac
# A setting, and no path or URL, has a "=" before any "/".
before=${1%%/*}
if [ "$before" != "${before%%=*}" ]; then
    refuse "$1: DATA_ROOT, a folder or a URL, has to come first, and settings behind it (a folder of that name: ./$1)"
fi
data=$1
shift

nodes=${NODES:-1}
if ! whole "$nodes" || [ "$nodes" -lt 1 ]; then
    refuse "NODES=$nodes: the number of machines is a whole number from 1 on"
fi
if [ "$nodes" -gt 1 ]; then
    node=${NODE:-}
    head=${HEAD:-}
    gpus=${GPUS:-}
    if ! whole "$node" || [ "$node" -ge "$nodes" ]; then
        refuse "NODE=$node: the number of this machine is a whole number from 0 to $((nodes - 1)), for NODES=$nodes"
    fi
    if [ -z "$head" ]; then
        refuse "HEAD is missing: the name of machine 0, by which all reach it"
    fi
    if [ "$gpus" != gpu ] && { ! whole "$gpus" || [ "$gpus" -lt 1 ]; }; then
        refuse "GPUS=$gpus: the number of GPUs in each machine is a whole number from 1 on, or gpu: all of them"
    fi
fi

# One row of each kind (without LARS, with it) is planned first, so that bad input is told once and not for each row and
# process, and ends this script with 2, which torchrun would make a 1. A sweep of one's own (seed=1,2) has no single plan.
case "$*" in
    *[,\(]*) ;;
    *)
        for row in 256 32k; do
            lars-train batch="$row" data=imagenet data.root="$data" "$@" mode=plan > /dev/null
        done
        ;;
esac

if [ "$nodes" -eq 1 ]; then
    exec lars-train -m batch=256,8k,16k,32k data=imagenet data.root="$data" "$@"
fi
for row in 32k 16k 8k; do
    torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "table-$row" \
        --rdzv-endpoint "$head:29400" -m lars_train batch="$row" data=imagenet data.root="$data" "$@"
done
# Eight ghost batches of 32 images feed eight GPUs at most: this row has one machine, and comes last, so that none waits.
if [ "$node" -eq 0 ]; then
    lars-train batch=256 data=imagenet data.root="$data" "$@"
fi
