"""malloc keeps freed memory for the next tensor, unless the user has set malloc options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lars_train.training import device

PAGES_OF_A_SECOND_BLOCK = """
import ctypes, resource, sys
from lars_train.training.device import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "asked" else False
c = ctypes.CDLL(None)
c.malloc.restype = ctypes.c_void_p
c.malloc.argtypes = [ctypes.c_size_t]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def pages():
    size, before = 100 << 20, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = c.malloc(size)
    c.memset(block, 1, size)
    c.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pages()
print(kept, pages())
"""
GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")


def new_pages(asked: str, **variables: str) -> tuple[str, int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", PAGES_OF_A_SECOND_BLOCK, asked]
    done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept, int(pages)


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
def test_a_large_block_reuses_freed_memory() -> None:
    _, fresh = new_pages("not")
    kept, reused = new_pages("asked")
    assert kept == "True"
    # Out of 25,600. A kernel that uses huge pages by default counts 50 in any case.
    assert reused < 20
    assert fresh > reused


@pytest.mark.parametrize("variable", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_malloc_settings_of_the_environment_take_precedence(variable: str) -> None:
    value = "glibc.malloc.arena_max=4" if variable == "GLIBC_TUNABLES" else "4194304"
    kept, pages = new_pages("asked", **{variable: value})
    assert kept == "False"
    assert pages == pytest.approx(new_pages("not", **{variable: value})[1], abs=50)


@pytest.mark.parametrize("answer", ["musl 1.2.5", None, ValueError("unrecognized configuration name")])
def test_another_c_library_is_unchanged(answer: str | Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str | None:
        if isinstance(answer, Exception):
            raise answer
        return answer

    def no_library(name: str | None) -> None:
        raise AssertionError("nothing is to be called")

    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(device.os, "confstr", confstr)
    monkeypatch.setattr(device.ctypes, "CDLL", no_library)
    assert not device.keep_freed_memory()
