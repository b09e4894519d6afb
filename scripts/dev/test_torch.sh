#!/usr/bin/env bash
# Run the tests under another version of torch, in a separate environment that is kept.
#
#     scripts/dev/test_torch.sh VERSION [PYTEST_ARGUMENT ...]
#     scripts/dev/test_torch.sh 2.6                           # every test on the newest 2.6.x
#     scripts/dev/test_torch.sh 2.11 -n 0 tests/optim         # a part of them
#
# The environment is build/torch-VERSION, about 6 GB; the first call downloads it. pip chooses the matching torchvision.
# Exits with pytest's exit code, or with 2 if it cannot create the environment.
#
# Takes hours for all tests, minutes for a part. Figures: none; docs/getting_started.md names the supported versions.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac
version=${1:-}
if ! grep -Eqx '[0-9]+\.[0-9]+(\.[0-9]+)?' <<<"$version"; then
    echo "usage: scripts/dev/test_torch.sh VERSION [PYTEST_ARGUMENT ...], for example scripts/dev/test_torch.sh 2.6 tests/optim" >&2
    exit 2
fi
shift
root=$(dirname "$0")/../..
cd "$root"
environment=build/torch-$version
# An incomplete environment has no pip.
[ -x "$environment/bin/pip" ] || python3 -m venv --clear "$environment" || exit 2
"$environment/bin/pip" install -q "torch==$version.*" -e '.[test]' || exit 2
"$environment/bin/python" -c 'import torch, torchvision; print("torch", torch.__version__, "torchvision", torchvision.__version__)' || exit 2
exec "$environment/bin/python" -m pytest "$@"
