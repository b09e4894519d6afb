"""How this process takes memory for tensors on the CPU from the system."""

from __future__ import annotations

import ctypes
import os

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_GROW_BY = 64 << 20


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next tensor, instead of giving it back; whether that could be arranged.

    By default glibc maps each block of more than 32 MiB anew and unmaps it when it is freed, and gives back the top of
    its heap: the activations of each pass are then new pages, which the kernel has to clear and enter one by one
    (https://man7.org/linux/man-pages/man3/mallopt.3.html). Nothing is arranged where the environment has settings for
    malloc, and under another C library.
    """
    named = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if named or not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: _GROW_BY}
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted.items())


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False
