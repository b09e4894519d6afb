"""A pool of batch buffers, allocated once. A buffer is reused when no tensor refers to its batch anymore.

Threads share the pool; so do processes that are forked later, if requested. The memory is anonymous, so the limit of
/dev/shm does not apply. stream.py and workers.py decide what to write, and when.
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
    """`slots` buffers, each for a batch of at most `batch` views of at most `size` x `size` pixels.

    Smaller views use the start of a buffer. The pool takes slots * batch * (3 * size**2 + 16) bytes of memory when all
    are in use. `shared`: share the memory with processes that are forked later.
    """

    def __init__(self, slots: int, batch: int, size: int, *, shared: bool) -> None:
        self.slots, self._batch = slots, batch
        numbers, pixels = slots * (2 * batch + 2), slots * batch * 3 * size * size
        self._pages = _pages(max(1, pixels + 8 * numbers), shared)
        heads = np.frombuffer(self._pages, np.int64, numbers).reshape(slots, 2 * batch + 2)
        self._epochs, self._sizes = heads[:, 0], heads[:, 1]
        self._samples, self._labels = heads[:, 2 : batch + 2], heads[:, batch + 2 :]
        self._images = np.frombuffer(self._pages, np.uint8, pixels, 8 * numbers).reshape(slots, -1)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(slots):
            self._free.put(slot)

    def pin(self) -> None:
        """Page-lock the memory, so that copies to a CUDA device are asynchronous. Call after all forks."""
        self._pages.pin()

    def take(self) -> int | None:
        """Take a free slot; None if there is none."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return None

    def free_count(self) -> int:
        """Return the number of free slots."""
        return self._free.qsize()

    def assign(self, slot: int, epoch: int, size: int, samples: npt.NDArray[np.int64]) -> None:
        """Store the epoch, the size S of the views and the sample ids of the batch that a slot will hold."""
        self._epochs[slot], self._sizes[slot], self._samples[slot, : len(samples)] = epoch, size, samples

    def assigned(self, slot: int, start: int, stop: int) -> tuple[int, list[int]]:
        """Return the epoch and the sample ids from `start` to `stop` that `assign` stored."""
        samples: list[int] = self._samples[slot, start:stop].tolist()
        return int(self._epochs[slot]), samples

    def part(self, slot: int, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the buffers of a part of a batch: images, uint8 (n, S, S, 3), and labels, int64 (n,)."""
        size = int(self._sizes[slot])
        pixels = 3 * size * size
        images = self._images[slot, start * pixels : stop * pixels].reshape(stop - start, size, size, 3)
        return images, self._labels[slot, start:stop]

    def lend(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the first `count` images and labels of a slot, which becomes free when nothing refers to them."""
        images, labels = lend(self.part(slot, 0, count), lambda: self._free.put(slot))
        return images.permute(0, 3, 1, 2), labels


def lend(arrays: Iterable[npt.NDArray[Any]], give_back: Callable[[], None]) -> tuple[Tensor, ...]:
    """Return tensors that share the arrays' memory. A finalizer calls `give_back` when no reference to them is left.

    The finalizer may run during garbage collection, so `give_back` must be reentrant, as `queue.SimpleQueue.put` is.
    """
    lease = _Lease()
    weakref.finalize(lease, give_back).atexit = False
    # A tensor and all its views keep a `_LeasedArray`, and so the lease, alive. A numpy view could not hold the lease:
    # views of that view would refer to the base array instead.
    return tuple(torch.from_numpy(np.asarray(_LeasedArray(array, lease))) for array in arrays)


class _Lease:
    """An object that lives as long as the tensors that `lend` returned."""


class _LeasedArray:
    """The memory of an array; a tensor made from it keeps a lease alive."""

    def __init__(self, array: npt.NDArray[Any], lease: _Lease) -> None:
        self._array, self._lease = array, lease
        self.__array_interface__ = array.__array_interface__


class _Pages(mmap.mmap):
    """Anonymous memory that can be page-locked until it is freed."""

    _pinned: int = 0

    def pin(self) -> None:
        view = np.frombuffer(self, np.uint8)
        code = int(_cuda().cudaHostRegister(view.ctypes.data, view.nbytes, 0))
        if code:
            # CUDA keeps the error and would report it at the next kernel.
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")
            warnings.warn(
                f"{view.nbytes >> 20} MiB of the loader's buffers could not be page-locked (CUDA error {code}): copies "
                "to the device are slower and block the host.",
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
        # Few systems allow huge pages for shared memory. Small pages slow decoding into a new buffer by a tenth.
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
