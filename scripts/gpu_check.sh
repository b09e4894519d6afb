#!/usr/bin/env bash
# On a machine with a GPU, in under five minutes: the tests that want one, the benchmarks, some training; a report.
#
#     pip install '.[test]' && scripts/gpu_check.sh [PICTURES]        # PICTURES: a folder with JPEGs, a store or a zip
#
# Writes gpu_check.txt in the checkout, or the file that REPORT names. Ends with 1 if a test, a benchmark or the training
# failed, with 2 if PICTURES is not there. Each has its limit, so that none takes the time of the others. Where a machine
# is new, each start of Python takes ten seconds; the input is measured in CPU time, beside the tests.
set -uo pipefail
pictures=${1:-}
if [ -n "$pictures" ]; then
    [ -e "$pictures" ] || { echo "$pictures: there is no such folder or file" >&2; exit 2; }
    pictures=$(realpath -- "$pictures")
fi
# Before the way there: both are meant from where the script was called.
report=${REPORT:+$(realpath -m -- "$REPORT")}
root=$(dirname "$0")/..
cd "$root" || exit 1
report=${report:-gpu_check.txt}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
touch "$scratch/failed"

part() { # NAME SECONDS GRACE COMMAND...
    local name="$1" seconds="$2" grace="$3"
    shift 3
    echo "== $name: $*"
    timeout --preserve-status --kill-after "$grace" "$seconds" "$@" 2>&1 | tail -n 40
    local code="${PIPESTATUS[0]}"
    echo "== $name: exit code $code"
    # A training that its time is up for ends with a checkpoint and 75.
    [ "$code" -eq 0 ] || { [ "$name" = training ] && [ "$code" -eq 75 ]; } || echo "$name" >>"$scratch/failed"
}

check() {
    command -v python >/dev/null || { echo "there is no python here"; return 1; }
    python - <<'PYTHON' || return 1
import os, sys
try:
    import torch, torchvision
except Exception as error:
    sys.exit(f"torch and torchvision cannot be imported here: {error}")
if not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device here")
# As the benchmarks find it: this folder, which is first here, is none that they look into by themselves.
here = os.getcwd()
sys.path[:] = [path for path in sys.path if path]
try:
    import lars_train
except Exception as error:
    sys.exit(f"lars_train cannot be imported here: {error}; pip install '.[test]'")
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))
print("torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version())
place = os.path.dirname(os.path.abspath(lars_train.__file__))
print("lars_train", lars_train.__version__, "from", place)
if place != os.path.join(here, "lars_train"):
    print("which is not that of this checkout: benchmarks and training measure the one, tests may see the other")
PYTHON
    echo "checkout: $PWD, commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
    local but="" beside=""
    if [ -n "$pictures" ]; then
        part input 80 2 python scripts/bench_input.py "$pictures" --rounds 1 --files 30 --no-copies >"$scratch/input" &
        beside=$!
    else
        but=", input left out"
        echo "== input: left out, give a folder of pictures" >"$scratch/input"
    fi
    part tests 80 2 python -m pytest -q -n0 -m cuda -rs
    [ -z "$beside" ] || wait "$beside"
    cat "$scratch/input"
    part "LARS's step" 24 2 python scripts/bench_lars.py --device cuda --model resnet50 --rounds 5
    # Compiling takes minutes.
    part "training step" 68 2 python scripts/bench_step.py --device cuda --case resnet50 --starts 1 --rounds 7 \
        --seconds 0.5 --only "(a) bare, fp32 NCHW" "(b) timm" "(c) best bare, eager" "(d) lars-train"
    part training 105 10 lars-train data=synthetic data.train_count=65536 data.val_count=2048 data.num_classes=1000 \
        model=resnet50 batch=32k batch.scaled=true device=cuda launch.nproc=1 log_every=5 compile=false \
        run.dir="$scratch/run"
    tail -n 3 "$scratch/run/metrics.jsonl" 2>/dev/null
    local failed
    failed=$(paste -sd ' ' "$scratch/failed")
    if [ -z "$failed" ]; then echo "== all well$but"; else echo "== failed: $failed$but"; fi
    [ -z "$failed" ]
}

check 2>&1 | tee "$report"
exit "${PIPESTATUS[0]}"
