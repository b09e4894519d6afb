"""A stream of batches: workers fill pooled buffers ahead of time, and the stream returns the batches in order.

loader.py decides which samples a batch holds. The content and the order of the batches do not depend on the number or
the kind of workers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lars_train.data.dataset import Source
from lars_train.data.decode.native import has_jpegs
from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.buffers import BufferPool
from lars_train.data.loading.reader import BadSample, Outcome, Reader
from lars_train.data.loading.shard_prefetch import ShardPrefetcher
from lars_train.data.loading.shard_windows import Span
from lars_train.data.loading.workers import Done, NoWorkers, Piece, Processes, Threads, Workers
from lars_train.data.mixing import GhostMix
from lars_train.data.sources.items import ItemSource
from lars_train.errors import DataError

PIECE = 32
"""Samples in a piece of work. Several workers share a micro-batch, so that few buffers keep all workers busy."""

MOST_PIECES = 64
"""The most pieces per micro-batch. In a very large micro-batch, the pieces have more samples."""

AHEAD = 4
"""The fewest micro-batches to prefetch, counting those being filled and those that are ready."""

LENT = 3
"""Micro-batches that a consumer may hold: one in use, one being copied, one that is copied but not yet released."""

PROCESSES, THREADS = "processes", "threads"


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. Its memory is reused once no tensor refers to it."""

    images: Tensor
    """uint8 (n, 3, S, S), RGB, in channels-last memory. S may differ between epochs."""
    labels: Tensor
    """int64 (n,). In evaluation, -1 marks an image that cannot be decoded; its pixels are zeros."""
    bad: tuple[BadSample, ...]
    """The bad images encountered, in order."""
    checksum: int = 0
    """In evaluation, `order.checksum` of the samples."""
    mixes: tuple[GhostMix, ...] = ()
    """The mix of each ghost batch, which is not applied to `images` yet; empty without mixup and cutmix."""


class LoaderStatistics(NamedTuple):
    """Counts and times, summed over the batches that a stream returned."""

    images: int = 0
    seconds: float = 0.0
    """Wall time of filling the batches, summed over the workers, without waits for free buffers."""
    fast: int = 0
    """Images decoded by a decoder other than Pillow."""


class Stream(Iterator[Batch]):
    """An iterator of batches. The constructor starts the workers; the last batch, an error or `close` ends them.

    The stream has `pool_slots` buffers of one micro-batch each. A consumer that holds more than `LENT` batches gets
    copies.
    """

    def __init__(
        self,
        requests: Iterable[BatchRequest],
        reader: Reader,
        batch: int,
        workers: int,
        pin_memory: bool,
        kind: str,
        prefetcher: Callable[[], ShardPrefetcher] | None = None,
    ) -> None:
        self._requests, self._batch = iter(requests), batch
        self._next_request: BatchRequest | None = None
        self._pool = BufferPool(
            pool_slots(batch, workers), batch, reader.size, shared=kind == PROCESSES and workers > 0
        )
        self._pending: deque[_Pending] = deque()
        self._by_slot: dict[int, _Pending] = {}
        self._most_pending = self._pool.slots - LENT
        self._statistics = LoaderStatistics()
        self._workers: Workers | None = _start_workers(kind, reader, self._pool, workers)
        if pin_memory:
            self._pool.pin()
        # Start the prefetcher after all forks: a forked worker would keep files open that the cache removes.
        self._prefetcher = prefetcher() if prefetcher is not None else None

    def __next__(self) -> Batch:
        if self._workers is None:
            raise StopIteration
        try:
            if not self._wait_for_next(None):
                raise StopIteration
            return self._finish(self._pending.popleft())
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        """Return True if the next batch is filled, so that `next` returns at once."""
        if self._workers is None:
            return False
        try:
            return self._wait_for_next(0)
        except BaseException:
            self.close()
            raise

    def statistics(self) -> LoaderStatistics:
        """Return the statistics of the batches returned since the last call."""
        found, self._statistics = self._statistics, LoaderStatistics()
        return found

    def close(self) -> None:
        """End the workers and the stream. Repeated calls have no effect."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
            self._pending.clear()
            if self._prefetcher is not None:
                self._prefetcher.close()

    def _request_batches(self, wait: bool) -> None:
        """Request batches while buffers are free and shards are held. `wait`: wait for the shards of the next batch."""
        assert self._workers is not None
        while len(self._pending) < self._most_pending:
            self._next_request = request = self._next_request or next(self._requests, None)
            if request is None or not self._shards_are_held(request, wait and not self._pending):
                return
            slot = self._pool.take()
            if slot is None:
                return
            self._next_request = None
            count = len(request.samples)
            self._pool.assign(slot, request.epoch, request.size, request.samples)
            piece = piece_size(self._batch)
            pending = _Pending(slot, request, -(-count // piece))
            self._pending.append(pending)
            self._by_slot[slot] = pending
            for start in range(0, count, piece):
                self._workers.put(Piece(slot, start, min(start + piece, count)))

    def _shards_are_held(self, request: BatchRequest, wait: bool) -> bool:
        if self._prefetcher is None:
            return True
        oldest = self._pending[0].request if self._pending else request
        return self._prefetcher.holds(oldest.span, request.span, wait=wait)

    def _wait_for_next(self, timeout: float | None) -> bool:
        """Return True once the next batch is filled; False after `timeout` seconds, or at the end of the stream."""
        assert self._workers is not None
        self._request_batches(wait=timeout is None)
        while self._pending and self._pending[0].left:
            done = self._workers.get(timeout)
            if done is None:
                return False
            self._record(done)
        return bool(self._pending)

    def _record(self, done: Done) -> None:
        pending = self._by_slot[done.piece.slot]
        pending.left -= 1
        pending.outcomes[done.piece.start] = done.outcome
        pending.seconds += done.seconds

    def _finish(self, pending: _Pending) -> Batch:
        outcomes = [pending.outcomes[start] for start in sorted(pending.outcomes)]
        for outcome in outcomes:
            if outcome.failure is not None:
                raise DataError(outcome.failure)
        bad = tuple(sample for outcome in outcomes for sample in outcome.bad)
        self._count(pending, outcomes)
        lent = self._pool.slots - self._pool.free_count() - len(self._pending) - 1
        images, labels = self._pool.lend(pending.slot, len(pending.request.samples))
        if lent >= LENT:
            images, labels = images.clone(), labels.clone()
        return Batch(images, labels, bad, pending.request.checksum, pending.request.mixes)

    def _count(self, pending: _Pending, outcomes: list[Outcome]) -> None:
        images, seconds, fast = self._statistics
        images, seconds = images + len(pending.request.samples), seconds + pending.seconds
        self._statistics = LoaderStatistics(images, seconds, fast + sum(outcome.fast for outcome in outcomes))


def piece_size(batch: int) -> int:
    """Return the samples in a piece of a micro-batch of `batch` samples."""
    return max(PIECE, -(-batch // MOST_PIECES))


def pool_slots(batch: int, workers: int) -> int:
    """Return the number of buffers of a stream of micro-batches of `batch` samples.

    The consumer may hold `LENT`. The others are for prefetching: the buffers for two pieces per worker, plus one
    buffer, but at least `AHEAD`. Without workers, the number is `LENT` + 1. A buffer takes about batch * 3 * S**2
    bytes: 8 buffers of 256 samples of 224 x 224 take 0.3 GB.
    """
    if workers == 0:
        return LENT + 1
    return LENT + max(AHEAD, 1 - (-2 * workers // -(-batch // piece_size(batch))))


def worker_kind(source: Source, decoder: str) -> str:
    """Return `THREADS` for the C decoder, which releases the GIL, if the source has JPEGs; else `PROCESSES`.

    Threads need less memory than processes. Processes need a fork, which may hang while NCCL or gloo run threads.
    Outside Linux, fork is unsafe or missing, so all sources except dataset objects get `THREADS` there. Dataset objects
    need not be thread-safe, so they always get `PROCESSES`; outside Linux, `usable_workers` returns 0 for them.
    """
    if isinstance(source, ItemSource):
        return PROCESSES
    if sys.platform != "linux":
        return THREADS
    return THREADS if decoder != PILLOW and has_jpegs(source) else PROCESSES


def usable_workers(source: Source, workers: int) -> int:
    """Return `workers`, or 0 for a dataset object outside Linux."""
    return 0 if isinstance(source, ItemSource) and sys.platform != "linux" else workers


def _start_workers(kind: str, reader: Reader, pool: BufferPool, workers: int) -> Workers:
    if workers == 0:
        return NoWorkers(reader, pool)
    return Processes(reader, pool, workers) if kind == PROCESSES else Threads(reader, pool, workers)


class BatchRequest(NamedTuple):
    """The samples of one batch, the size of their views, and their span in the order of the run."""

    epoch: int
    size: int
    samples: npt.NDArray[np.int64]
    span: Span
    checksum: int = 0
    mixes: tuple[GhostMix, ...] = ()


@dataclass
class _Pending:
    """A requested batch, of which `left` pieces are not filled yet."""

    slot: int
    request: BatchRequest
    left: int
    seconds: float = 0.0
    outcomes: dict[int, Outcome] = field(default_factory=dict)
