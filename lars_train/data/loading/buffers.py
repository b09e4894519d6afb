"""The buffers of a stream's batches: allocated once and reused, but never while something still refers to a batch.

Threads share them and, on request, processes that are forked later (anonymous memory, so no limit of /dev/shm counts).
stream.py and workers.py decide what is written there, and when.
"""

from __future__ import annotations

import mmap
import queue
import warnings
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class BufferPool:
    """`slots` buffers for a batch of at most `batch` views of `size` x `size` pixels each.

    It takes slots * batch * (3 * size**2 + 16) bytes of memory, as far as they are written to. `shared`: processes that
    are forked later share it.
    """

    def __init__(self, slots: int, batch: int, size: int, *, shared: bool) -> None:
        self.slots, self._batch = slots, batch
        self._pages = _pages(max(1, slots * batch * (3 * size * size + 16) + 8 * slots), shared)
        numbers, views = slots * (2 * batch + 1), slots * batch * 3 * size * size
        heads = np.frombuffer(self._pages, np.int64, numbers).reshape(slots, 2 * batch + 1)
        self._epochs, self._samples, self._labels = heads[:, 0], heads[:, 1 : batch + 1], heads[:, batch + 1 :]
        self._images = np.frombuffer(self._pages, np.uint8, views, 8 * numbers).reshape(slots, batch, size, size, 3)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)

    def pin(self) -> None:
        """Lock the pages, so that a CUDA device can copy from them while the host continues. Call after all forks."""
        self._pages.pin()

    def take(self) -> int | None:
        """Take a free slot; None if there is none."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return None

    def free(self) -> int:
        """Return the number of free slots."""
        return self._free.qsize()

    def ask(self, slot: int, epoch: int, samples: npt.NDArray[np.int64]) -> None:
        """Write the epoch and the sample ids that a slot is to hold."""
        self._epochs[slot], self._samples[slot, : len(samples)] = epoch, samples

    def asked(self, slot: int, start: int, stop: int) -> tuple[int, list[int]]:
        """Return the epoch, and the sample ids from `start` to `stop`, that `ask` wrote."""
        samples: list[int] = self._samples[slot, start:stop].tolist()
        return int(self._epochs[slot]), samples

    def part(self, slot: int, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the images, uint8 (n, S, S, 3), and labels, int64 (n,), to write to."""
        return self._images[slot, start:stop], self._labels[slot, start:stop]

    def lend(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` images and labels of a slot, which becomes free when nothing refers to them any more."""
        images, labels = lend(self.part(slot, 0, count), lambda: self._free.put(slot))
        return images.permute(0, 3, 1, 2), labels


def lend(arrays: Iterable[npt.NDArray[Any]], give_back: Callable[[], None]) -> tuple[Tensor, ...]:
    """Tensors on the arrays' memory; `give_back` is called when nothing refers to any of them any more.

    It may be called in the garbage collector, so it can put something into a `queue.SimpleQueue`, which is made for
    that, and not do much else.
    """
    lease = _Lease()
    weakref.finalize(lease, give_back).atexit = False
    # A tensor, and all views of it, keep the lease alive; of an array numpy would let views refer past it.
    return tuple(torch.from_numpy(np.asarray(_Held(array, lease))) for array in arrays)


class _Lease:
    """Lives as long as what is lent."""


class _Held:
    """An array's memory, in the possession of a lease."""

    def __init__(self, array: npt.NDArray[Any], lease: _Lease) -> None:
        self._array, self._lease = array, lease
        self.__array_interface__ = array.__array_interface__


class _Pages(mmap.mmap):
    """Memory that forked processes share, page-locked on demand until it is freed."""

    _pinned: int = 0

    def pin(self) -> None:
        view = np.frombuffer(self, np.uint8)
        code = int(_cuda().cudaHostRegister(view.ctypes.data, view.nbytes, 0))
        if code:
            # CUDA keeps the error, and the next kernel would be blamed for it.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            warnings.warn(
                f"{view.nbytes >> 20} MiB of the loader's buffers could not be page-locked (CUDA error {code}): copies "
                "to the device are slower and hold up the host.",
                RuntimeWarning,
                stacklevel=2,
            )
        else:
            self._pinned = view.ctypes.data

    def __del__(self) -> None:
        if self._pinned:
            _cuda().cudaHostUnregister(self._pinned)


def _pages(size: int, shared: bool) -> _Pages:
    if shared or not hasattr(mmap, "MAP_PRIVATE"):
        return _Pages(-1, size)
    pages = _Pages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Memory that is shared has large pages on few systems; with small ones, first use costs a tenth of a decoding.
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
