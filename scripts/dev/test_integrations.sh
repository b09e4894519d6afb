#!/usr/bin/env bash
# Run the tests and examples that need the packages of the extra `integrations`, in a separate environment.
#
#     scripts/dev/test_integrations.sh [FOLDER] [PYTEST_ARGUMENT ...]
#     scripts/dev/test_integrations.sh                             # in a temporary environment
#     scripts/dev/test_integrations.sh build/integrations          # in one that is kept
#     scripts/dev/test_integrations.sh build/integrations -k hugging_face
#
# The environment has the newest torch in the project's range, about 6 GB. Exits with pytest's exit code, or with 2 if it
# cannot create the environment.
#
# Takes minutes, and the download of torch. Figures: none; docs/own_loop.md names the examples, docs/tools.md the tools.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac
case "${1:-}" in
    "" | -*)
        environment=$(mktemp -d) || exit 2
        trap 'rm -rf "$environment"' EXIT
        ;;
    *)
        mkdir -p "$1" || exit 2
        environment=$(cd "$1" && pwd)
        shift
        ;;
esac
root=$(dirname "$0")/../..
cd "$root"
# An incomplete environment has no pip.
[ -x "$environment/bin/pip" ] || python3 -m venv --clear "$environment" || exit 2
"$environment/bin/pip" install -q -e '.[integrations]' -e ./packaging/torch-lars pytest pytest-xdist || exit 2
"$environment/bin/python" - <<'END' || exit 2
import re
from importlib.metadata import requires, version

wanted = [line for line in requires("lars-train") if re.search(r"extra == .integrations", line)]
names = [re.match(r"[\w-]+", line)[0] for line in wanted]
print(*(f"{name} {version(name)}" for name in ("torch", *names)), sep=", ")
END
"$environment/bin/python" -m pytest -n 0 tests/integrations "$@"
