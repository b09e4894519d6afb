"""malloc keeps freed memory for the next tensor, unless the user has set malloc options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lars_train.training import device

NEW_PAGES = """
import ctypes, resource
from lars_train.training.device import keep_freed_memory
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
fresh = pages()
kept = keep_freed_memory()
pages()
print(kept, fresh, pages())
"""
GLIBC = "CS_GNU_LIBC_VERSION" in os.confstr_names and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")


def without_settings() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc")
def test_a_large_block_reuses_freed_memory() -> None:
    command = [sys.executable, "-c", NEW_PAGES]
    done = subprocess.run(command, env=without_settings(), capture_output=True, text=True, check=True)
    kept, fresh, reused = done.stdout.split()
    assert kept == "True"
    # A fresh block has 25,600 pages, or 50 if the kernel uses huge pages by default.
    assert int(reused) < 20
    assert int(fresh) > int(reused)


def no_library(name: str | None) -> None:
    raise AssertionError("unexpected call of the C library")


@pytest.mark.parametrize("variable", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_malloc_settings_of_the_environment_take_precedence(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ.keys() - without_settings().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "4194304")
    monkeypatch.setattr(device.ctypes, "CDLL", no_library)
    assert not device.keep_freed_memory()


@pytest.mark.parametrize("answer", ["musl 1.2.5", None, ValueError("unrecognized configuration name")])
def test_another_c_library_is_unchanged(answer: str | Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def confstr(name: str) -> str | None:
        if isinstance(answer, Exception):
            raise answer
        return answer

    for name in os.environ.keys() - without_settings().keys():
        monkeypatch.delenv(name)
    monkeypatch.setattr(device.os, "confstr", confstr)
    monkeypatch.setattr(device.ctypes, "CDLL", no_library)
    assert not device.keep_freed_memory()
