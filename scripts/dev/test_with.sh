#!/usr/bin/env bash
# Run tests in a separate environment that is kept: with another version of torch, or with other frameworks.
#
#     scripts/dev/test_with.sh torch-2.6 [PYTEST_ARGUMENT ...]         # all tests with the newest 2.6.x
#     scripts/dev/test_with.sh torch-2.11 -n 0 tests/optim             # a part of them
#     scripts/dev/test_with.sh integrations [PYTEST_ARGUMENT ...]      # the packages of that extra
#
# The environment is build/ENVIRONMENT, about 6 GB; the first call downloads it. For integrations it has the newest torch
# in the project's range. Exits with pytest's exit code, or with 2 if it cannot create the environment.
#
# Takes hours for all tests, minutes for a part. Figures: none; docs/getting_started.md names the supported versions.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac
name=${1:-}
if [ "$name" = integrations ]; then
    packages=(-e '.[integrations]' -e ./packaging/torch-lars pytest pytest-xdist hypothesis)
    tests=(-n 0 tests/integrations)
elif grep -Eqx 'torch-[0-9]+\.[0-9]+(\.[0-9]+)?' <<<"$name"; then
    # pip chooses the matching torchvision.
    packages=("torch==${name#torch-}.*" -e '.[test]')
    tests=()
else
    echo "usage: scripts/dev/test_with.sh torch-VERSION|integrations [PYTEST_ARGUMENT ...], such as torch-2.6 tests/optim" >&2
    exit 2
fi
shift
root=$(dirname "$0")/../..
cd "$root"
environment=build/$name
# An incomplete environment has no pip.
[ -x "$environment/bin/pip" ] || python3 -m venv --clear "$environment" || exit 2
"$environment/bin/pip" install -q "${packages[@]}" || exit 2
"$environment/bin/pip" list | grep -E '^(torch|torchvision|lightly|lightning|transformers|accelerate|timm|datasets|wandb|mlflow) '
exec "$environment/bin/python" -m pytest "${tests[@]}" "$@"
