#!/usr/bin/env bash
# The published table (batch 256, 8K, 16K, 32K) on ImageNet, on one machine or on several.
#
#   scripts/reproduce_imagenet_table.sh /data/imagenet [SETTING...]                              one machine
#   NODES=4 NODE=0 HEAD=gpu01 GPUS=8 scripts/reproduce_imagenet_table.sh /data/imagenet          the first of four
#   NODES=4 NODE=1 HEAD=gpu01 GPUS=8 scripts/reproduce_imagenet_table.sh /data/imagenet          the second, and so on
#
# On several, the current folder must be on a file system that all of them share: the runs live in ./runs.
# The same command goes on where it was, and finished rows only print themselves. What it needs (hours, disk, memory):
# docs/imagenet_table.md. What it will do, without training: the same command with mode=plan behind it, on one machine.
set -euo pipefail

data=${1:?"usage: $0 DATA_ROOT [SETTING...]"}
shift
nodes=${NODES:-1}

if [ "$nodes" -eq 1 ]; then
    exec lars-train -m batch=256,8k,16k,32k data=imagenet data.root="$data" "$@"
fi

node=${NODE:?"NODE is the number of this machine, from 0"}
head=${HEAD:?"HEAD is the name of machine 0"}
gpus=${GPUS:?"GPUS is the number of GPUs in each machine"}
for row in 32k 16k 8k; do
    torchrun --nnodes "$nodes" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "table-$row" \
        --rdzv-endpoint "$head:29400" -m lars_train batch="$row" data=imagenet data.root="$data" "$@"
done
# Eight ghost batches of 32 images feed eight GPUs at most: this row has one machine, and comes last, so that none waits.
if [ "$node" -eq 0 ]; then
    lars-train batch=256 data=imagenet data.root="$data" "$@"
fi
