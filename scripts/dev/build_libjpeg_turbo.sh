#!/usr/bin/env bash
# Build libjpeg-turbo as a shared library, to be bundled with wheels.
#
#     scripts/dev/build_libjpeg_turbo.sh PREFIX
#
# Downloads a fixed version of the source, checks its digest, and installs headers and library into PREFIX/include and
# PREFIX/lib. Needs curl, cmake, a C compiler and, on x86-64, nasm. cibuildwheel runs it (pyproject.toml), because
# manylinux_2_28 has libjpeg-turbo 1.5.3, and lars_train/data/decode/jpeg.c needs 2.1.
#
# Takes about two minutes. Figures: none; docs/releasing.md says where it runs.
set -euo pipefail
case "${1:-}" in -h | --help)
    sed -n '2,/^\(#[^ ]\|[^#]\)/{s/^# //p;s/^#$//p}' "$0"
    exit
    ;;
esac
version=3.1.3
digest=3a13a5ba767dc8264bc40b185e41368a80d5d5f945944d1dbaa4b2fb0099f4e5

[ $# -eq 1 ] || { echo "usage: $0 PREFIX" >&2; exit 2; }
prefix=$(realpath -m -- "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

curl -fsSL --retry 3 -o source.tar.gz \
    "https://github.com/libjpeg-turbo/libjpeg-turbo/archive/refs/tags/$version.tar.gz"
echo "$digest  source.tar.gz" | sha256sum --check --quiet
tar -xzf source.tar.gz
# Without REQUIRE_SIMD, a missing nasm causes only a warning, and the library lacks vector instructions.
cmake -S "libjpeg-turbo-$version" -B build -DCMAKE_BUILD_TYPE=Release -DREQUIRE_SIMD=ON -DWITH_TURBOJPEG=OFF \
    -DENABLE_STATIC=OFF -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_INSTALL_LIBDIR="$prefix/lib"
cmake --build build --parallel "$(nproc)"
cmake --install build
