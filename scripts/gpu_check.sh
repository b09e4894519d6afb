#!/usr/bin/env bash
# On a machine with a GPU, in under five minutes: the tests that want one, the benchmarks, two minutes of training; a report.
#
#     pip install '.[test]' && scripts/gpu_check.sh [PICTURES]        # writes gpu_check.txt; PICTURES: a folder with JPEGs
#
# Ends with 1 if a test, a benchmark or the training failed. Each has its limit, so that none takes the time of the others.
set -uo pipefail
root=$(dirname "$0")/..
cd "$root" || exit 1
pictures=${1:-}
report=${REPORT:-gpu_check.txt}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

part() { # NAME SECONDS COMMAND...
    local name="$1" seconds="$2"
    shift 2
    echo "== $name: $*"
    timeout --preserve-status --kill-after 10 "$seconds" "$@" 2>&1 | tail -n 40
    local code="${PIPESTATUS[0]}"
    echo "== $name: exit code $code"
    # A training that its time is up for ends with a checkpoint and 75.
    [ "$code" -eq 0 ] || { [ "$name" = training ] && [ "$code" -eq 75 ]; } || failed+=("$name")
}

check() {
    python - <<'PYTHON' || { echo "torch finds no CUDA device here"; return 1; }
import sys, torch, torchvision
if not torch.cuda.is_available():
    sys.exit(1)
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())
PYTHON
    git rev-parse HEAD 2>/dev/null
    part tests 60 python -m pytest -q -n0 -m cuda -rs
    part "LARS's step" 30 python scripts/bench_lars.py --device cuda --rounds 5
    part "batch norm" 30 python scripts/bench_batchnorm.py --device cuda
    if [ -n "$pictures" ]; then
        part input 40 python scripts/bench_input.py "$pictures" --rounds 2 --files 100
    fi
    part training 120 lars-train data=synthetic data.train_count=65536 data.val_count=2048 data.num_classes=1000 \
        model=resnet50 batch=32k batch.scaled=true device=cuda launch.nproc=1 log_every=5 \
        run.dir="$scratch/run"
    tail -n 3 "$scratch/run/metrics.jsonl" 2>/dev/null
    if [ "${#failed[@]}" -eq 0 ]; then echo "== all well"; else echo "== failed: ${failed[*]}"; fi
    [ "${#failed[@]}" -eq 0 ]
}

check 2>&1 | tee "$report"
exit "${PIPESTATUS[0]}"
