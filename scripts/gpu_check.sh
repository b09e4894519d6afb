#!/usr/bin/env bash
# usage: scripts/gpu_check.sh [--dry-run] [--report FILE] [STAGE ...]
#
# Test, measure and train on a GPU, in stages of at most four minutes; without STAGE all of them in this order:
#
#   tests      the tests marked cuda
#   step       ResNet-50 updates for several micro-batches and ghost batches, fused, unfused and with CUDA
#              graphs, and a bare loop; eager, then compiled
#   lars       the step of LARS, other optimizers and other implementations
#   training   compares a run with the same run stopped by SIGTERM and resumed; then a run at full speed
#   more       the other contenders of bench_step.py
#
# Every line is appended to FILE (gpu_check.txt) at once, so that a limit, a crash or a signal loses no printed line.
# A failed part does not stop the next one. A second start of `step` gets further, because compiled code is cached.
#
# The script runs the package of its checkout, installed or not. PYTHON names the interpreter; PYTHONPATH may name a
# folder with packages. --dry-run prints the commands.
#
# Exit codes: 0 everything passed, 1 a part failed, 2 nothing could start.
#
# Takes 20 minutes in all. Figures: docs/performance.md.
set -uo pipefail

all=(tests step lars training more)
most=240 grace=8

usage() { sed -n '/^# usage/,/^[^#]/s/^# \{0,1\}//p' "$0"; }

begin() { # print the machine and versions; return 2 if nothing can run
    "$python" - <<'PYTHON' || return 2
import pathlib, sys
try:
    import torch
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA device here")
    import torchvision, lars_train
except Exception as error:
    sys.exit(f"cannot import torch, torchvision and lars_train: {error}")
for number in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_name(number), "capability", torch.cuda.get_device_capability(number))
print("Python", sys.version.split()[0], "torch", torch.__version__, "torchvision", torchvision.__version__, "CUDA", torch.version.cuda)
print("lars_train", lars_train.__version__, "from", pathlib.Path(lars_train.__file__).parent)
PYTHON
    echo "commit $(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)"
    echo "driver $(timeout 20 nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || echo unknown)"
}

# Run COMMAND for at most SECONDS, including the grace after SIGTERM. `expected`: the exit code of success (0).
# `may_be_cut`: reaching the limit is a success, too. `stop_at`: send SIGTERM when a file matches this pattern.
part() { # NAME SECONDS COMMAND...
    local name="$1" seconds="$2" started="$SECONDS" code=0 cut=""
    shift 2
    echo "== $name, at most $seconds s: ${*@Q}"
    total=$((total + seconds))
    [ -z "$dry" ] || return 0
    timeout --preserve-status --kill-after "$grace" $((seconds - grace)) "$@" </dev/null &
    child=$!
    if [ -n "${stop_at:-}" ]; then
        until compgen -G "$stop_at" >/dev/null || ! kill -0 "$child" 2>/dev/null; do sleep 0.1; done
        kill -TERM "$child" 2>/dev/null
    fi
    wait "$child" || code=$?
    child=""
    [ $((SECONDS - started)) -lt $((seconds - grace)) ] || cut=", cut at its limit"
    echo "== $name: exit code $code after $((SECONDS - started)) s$cut"
    [ "$code" -eq "${expected:-0}" ] || [ -n "${cut:+${may_be_cut:-}}" ] || failed+=("$name")
}

stage_tests() {
    local files
    mapfile -t files < <(grep -rl --include='*.py' 'pytest\.mark\.cuda' tests | sort)
    # The pytest options in pyproject.toml need a plugin that may be missing.
    part tests 240 "$python" -m pytest -o addopts= --import-mode=importlib --continue-on-collection-errors -m cuda \
        -v -rs --tb=short "${files[@]}"
}

stage_step() {
    local sweep=("$python" scripts/bench/bench_step.py --device cuda --case resnet50 --ghost 32 --sweep 32 256 64 128
        --rounds 5 --seconds 0.3)
    may_be_cut=yes part "step, eager" 100 "${sweep[@]}" --only "(d) lars-train" "(d) lars-train, unfused" "(d) lars-train, graphs" \
        "(c) best bare, eager"
    # Compiling takes minutes.
    may_be_cut=yes part "step, compiled" 140 "${sweep[@]}" --only "(d) lars-train, compiled" "(c) best bare, compiled"
}

stage_lars() {
    part lars 240 "$python" scripts/bench/bench_lars.py --device cuda --rounds 20
}

stage_training() {
    local train=("$python" -m lars_train data=synthetic data.num_classes=1000 model=resnet50 device=cuda launch.nproc=1
        compile=false)
    local short=("${train[@]}" data.train_count=16384 data.val_count=512 batch.size=256 optimizer.lr=2 epochs=1
        schedule.warmup_epochs=0 micro_batch=256 deterministic=true checkpoint.every_updates=16 log_every=8)
    part "training, not stopped" 60 "${short[@]}" run.dir="$scratch/whole"
    expected=75 stop_at="$scratch/stopped/checkpoints/*.pt" \
        part "training, stopped" 45 "${short[@]}" run.dir="$scratch/stopped"
    part "training, resumed" 55 "${short[@]}" run.dir="$scratch/stopped"
    [ -n "$dry" ] || same_weights
    may_be_cut=yes part "training, full speed" 80 "${train[@]}" data.train_count=65536 data.val_count=2048 batch=32k \
        batch.scaled=true max_updates=60 log_every=5 run.dir="$scratch/fast"
}

same_weights() {
    local whole resumed
    whole=$(grep sha256_float32 "$scratch/whole/final.json")
    resumed=$(grep sha256_float32 "$scratch/stopped/final.json")
    if [ -n "$whole" ] && [ "$whole" = "$resumed" ]; then
        echo "== training: the resumed run has the same weights as the run that was not stopped: $whole"
    else
        echo "== training: WEIGHTS DIFFER: not stopped:${whole:- none}; resumed:${resumed:- none}"
        failed+=("training, equal weights")
    fi
}

stage_more() {
    local turns=("$python" scripts/bench/bench_step.py --device cuda --starts 1 --rounds 7 --seconds 0.5)
    part "more, eager" 120 "${turns[@]}" --only "(a) bare, fp32 NCHW" "(b) timm" "(c) best bare, eager" \
        "(d) lars-train" "(d) without the trainer"
    may_be_cut=yes part "more, compiled" 120 "${turns[@]}" --only "(c) best bare, eager" "(c) best bare, compiled" \
        "(d) lars-train" "(d) lars-train, compiled"
}

end() {
    [ -z "$child" ] || { kill -TERM "$child" && wait "$child"; } 2>/dev/null
    rm -rf "$scratch"
    exec >&- 2>&-
    [ -n "$writer" ] || return
    # A process left behind by a part may keep the output open.
    for _ in {1..30}; do
        kill -0 "$writer" 2>/dev/null || break
        sleep 0.1
    done
}

refuse() {
    echo "gpu_check.sh: $1" >&2
    exit 2
}

dry="" report="" stages=()
while [ $# -gt 0 ]; do
    case "$1" in
        --dry-run) dry=yes ;;
        --report)
            [ -n "${2:-}" ] || refuse "--report: name a file"
            report="$2"
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        *)
            [[ " ${all[*]} " == *" $1 "* ]] || refuse "$1: unknown stage or option; the stages are ${all[*]}"
            stages+=("$1")
            ;;
    esac
    shift
done
[ "${#stages[@]}" -gt 0 ] || stages=("${all[@]}")
if [ -n "${PYTHON:-}" ]; then
    python=$(command -v "$PYTHON") || refuse "PYTHON=$PYTHON: no such program"
else
    python=$(command -v python || command -v python3) || refuse "no python on the PATH; set PYTHON"
fi
[[ "$python" == /* ]] || python="$PWD/$python"
# Relative to the caller's folder.
report=${report:+$(realpath -m -- "$report")}
root=$(dirname "$0")/..
cd "$root" || exit 2
report=${report:-$PWD/gpu_check.txt}
scratch=$(mktemp -d) writer="" child="" failed=()
trap end EXIT
trap 'echo "== stopped by a signal"; exit 143' TERM HUP
trap 'echo "== stopped by Ctrl-C"; exit 130' INT
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -z "$dry" ]; then
    header="=== $(date -u '+%Y-%m-%d %H:%M') UTC, gpu_check.sh ${stages[*]}"
    { echo "$header" >>"$report"; } 2>/dev/null || refuse "$report: cannot be written; --report names another file"
    echo "$header"
    # tee ends when all output is closed.
    exec > >(trap '' INT TERM HUP && exec tee -a "$report") 2>&1
    writer=$!
    begin || exit 2
fi
for stage in "${stages[@]}"; do
    total=0
    "stage_$stage"
    echo "=== $stage: $total s at most"
    [ "$total" -le "$most" ] || failed+=("$stage, $total s instead of $most")
done
if [ "${#failed[@]}" -gt 0 ]; then
    wrong=$(IFS=';' && echo "${failed[*]}")
    echo "=== failed: $wrong"
    exit 1
fi
[ -n "$dry" ] || echo "=== everything passed"
