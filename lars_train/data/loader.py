"""Streams of batches, for a whole training run and for one evaluation.

A stream knows which samples come when (order.py), has each micro-batch filled by workers (workers.py, reader.py) in the
buffers of a ring (ring.py), and hands them on in order. It does not normalise, move anything to a device, or decide how
many bad pictures a run may meet.

The content and the order of the batches do not depend on the number or the kind of workers.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lars_train.data.ahead import Ahead
from lars_train.data.augment import View
from lars_train.data.decode import GPU, PILLOW
from lars_train.data.native import has_jpegs
from lars_train.data.order import checksum, epoch_order, eval_run, micro_batches, micro_bounds, shard_order
from lars_train.data.reader import BadSample, EvalReader, Outcome, Reader, TrainReader
from lars_train.data.remote import RemoteSource
from lars_train.data.ring import Ring
from lars_train.data.source import Source, shards_of
from lars_train.data.windows import Span, by_shard, evaluation_windows, training_windows
from lars_train.data.workers import Done, NoWorkers, Piece, Processes, Threads, Workers
from lars_train.errors import DataError

__all__ = ["BadSample", "Batch", "LoaderStatistics", "Stream", "View", "eval_loader", "train_loader"]

PIECE = 32
"""Samples that a worker takes on at a time: several share a micro-batch, so that few buffers keep all of them busy."""

MOST_PIECES = 64
"""Pieces of a micro-batch; of a very large one they have more samples."""

AHEAD = 4
"""Micro-batches that are being filled or wait, at least."""

LENT = 3
"""Micro-batches that a consumer may hold: computed on, being copied, and not yet known to be copied."""

PROCESSES, THREADS = "processes", "threads"


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch. Its memory is used for another one when no tensor refers to it any more."""

    images: Tensor
    """uint8 (n, 3, S, S), RGB, in channels-last memory."""
    labels: Tensor
    """int64 (n,); in evaluation -1 marks a picture that cannot be decoded, whose pixels are zeros."""
    bad: tuple[BadSample, ...]
    """The bad pictures met on the way, in order."""
    checksum: int = 0
    """In evaluation: `order.checksum` of the samples."""


class LoaderStatistics(NamedTuple):
    """What it took to fill the batches that a stream has handed on."""

    images: int = 0
    seconds: float = 0.0
    """Wall time that they took, added up over the workers; waiting for a free buffer is not in it."""
    fast: int = 0
    """Images that another decoder than Pillow decoded."""


class Stream(Iterator[Batch]):
    """An iterator of batches whose workers start with it and end with it, or with `close`.

    It holds `slots` (see `ring_slots`) buffers of a micro-batch each. A consumer that holds more than `LENT` batches
    gets copies.
    """

    def __init__(
        self,
        requests: Iterable[_Request],
        reader: Reader,
        batch: int,
        workers: int,
        pin_memory: bool,
        kind: str,
        ahead: Callable[[], Ahead] | None = None,
    ) -> None:
        self._requests, self._batch = iter(requests), batch
        self._request: _Request | None = None
        self._ring = Ring(ring_slots(batch, workers), batch, reader.size, shared=kind == PROCESSES and workers > 0)
        self._pending: deque[_Pending] = deque()
        self._by_slot: dict[int, _Pending] = {}
        self._most_pending = self._ring.slots - LENT
        self._statistics = LoaderStatistics()
        self._workers: Workers | None = _workers(kind, reader, self._ring, workers)
        if pin_memory:
            self._ring.pin()
        # After all forks: a forked worker would keep files open that are to make room.
        self._ahead = ahead() if ahead is not None else None

    def __next__(self) -> Batch:
        if self._workers is None:
            raise StopIteration
        try:
            if not self._head_is_there(None):
                raise StopIteration
            return self._handed_on(self._pending.popleft())
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        """Whether the next batch is there, so that `next` returns at once."""
        if self._workers is None:
            return False
        try:
            return self._head_is_there(0)
        except BaseException:
            self.close()
            raise

    def statistics(self) -> LoaderStatistics:
        """Of the batches since the last call."""
        found, self._statistics = self._statistics, LoaderStatistics()
        return found

    def close(self) -> None:
        """End the workers. The stream is at its end afterwards; closing it twice does no harm."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None
            self._pending.clear()
            if self._ahead is not None:
                self._ahead.close()

    def _ask(self, wait: bool) -> None:
        """Have as many more batches filled as there is room for, and shards; `wait` for those of the next batch."""
        assert self._workers is not None
        while len(self._pending) < self._most_pending:
            self._request = request = self._request or next(self._requests, None)
            if request is None or not self._shards_are_there(request, wait and not self._pending):
                return
            slot = self._ring.take()
            if slot is None:
                return
            self._request = None
            count = len(request.samples)
            self._ring.ask(slot, request.epoch, request.samples)
            piece = piece_of(self._batch)
            pending = _Pending(slot, request, -(-count // piece))
            self._pending.append(pending)
            self._by_slot[slot] = pending
            for start in range(0, count, piece):
                self._workers.put(Piece(slot, start, min(start + piece, count)))

    def _shards_are_there(self, request: _Request, wait: bool) -> bool:
        if self._ahead is None:
            return True
        oldest = self._pending[0].request if self._pending else request
        return self._ahead.holds(oldest.span, request.span, wait=wait)

    def _head_is_there(self, timeout: float | None) -> bool:
        assert self._workers is not None
        self._ask(wait=timeout is None)
        while self._pending and self._pending[0].left:
            done = self._workers.get(timeout)
            if done is None:
                return False
            self._note(done)
        return bool(self._pending)

    def _note(self, done: Done) -> None:
        pending = self._by_slot[done.piece.slot]
        pending.left -= 1
        pending.outcomes[done.piece.start] = done.outcome
        pending.seconds += done.seconds

    def _handed_on(self, pending: _Pending) -> Batch:
        outcomes = [pending.outcomes[start] for start in sorted(pending.outcomes)]
        for outcome in outcomes:
            if outcome.failure is not None:
                raise DataError(outcome.failure)
        bad = tuple(sample for outcome in outcomes for sample in outcome.bad)
        self._count(pending, outcomes)
        lent = self._ring.slots - self._ring.free() - len(self._pending) - 1
        images, labels = self._ring.lend(pending.slot, len(pending.request.samples))
        if lent >= LENT:
            images, labels = images.clone(), labels.clone()
        return Batch(images, labels, bad, pending.request.checksum)

    def _count(self, pending: _Pending, outcomes: list[Outcome]) -> None:
        images, seconds, fast = self._statistics
        images, seconds = images + len(pending.request.samples), seconds + pending.seconds
        self._statistics = LoaderStatistics(images, seconds, fast + sum(outcome.fast for outcome in outcomes))


def piece_of(batch: int) -> int:
    """Samples in a piece of a micro-batch of `batch`."""
    return max(PIECE, -(-batch // MOST_PIECES))


def ring_slots(batch: int, workers: int) -> int:
    """Buffers of a stream of micro-batches of `batch` samples: enough for two pieces for each worker, `AHEAD` at least.

    A buffer takes about batch * 3 * S**2 bytes: 8 of them with 256 samples of 224 x 224 are 0.3 GB.
    """
    if workers == 0:
        return LENT + 1
    return LENT + max(AHEAD, 1 - (-2 * workers // -(-batch // piece_of(batch))))


def worker_kind(source: Source, decoder: str) -> str:
    """Threads where another decoder than Pillow does the work, for it leaves the interpreter to others; else processes.

    Threads need no fork, which is a risk beside the threads of NCCL and gloo and takes memory for each worker. Outside
    of Linux there are threads alone: fork is unsafe or absent there. So are there with GPU, for a forked process cannot
    use its parent's CUDA device.
    """
    if sys.platform != "linux" or decoder == GPU:
        return THREADS
    return THREADS if decoder != PILLOW and has_jpegs(source) else PROCESSES


def _workers(kind: str, reader: Reader, ring: Ring, workers: int) -> Workers:
    if workers == 0:
        return NoWorkers(reader, ring)
    return Processes(reader, ring, workers) if kind == PROCESSES else Threads(reader, ring, workers)


def train_loader(
    source: Source,
    view: View,
    *,
    seed: int,
    batch: int,
    ghost_batch: int,
    ghosts_per_micro: int,
    updates_per_epoch: int,
    start_update: int,
    stop_update: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool,
    on_error: str,
    decoder: str = PILLOW,
    kind: str | None = None,
    window: int | None = None,
) -> Stream:
    """The micro-batches of one rank for the updates [start_update, stop_update), across epochs.

    `batch` is the global batch. An update has as many micro-batches as order.micro_bounds says, the same
    number each time and none for a rank without ghost batches. A stream that starts at update k equals
    the rest of one that started at 0.

    A picture that cannot be read or decoded stops the stream with DataError under `on_error="fail"`.
    Under "skip" the next sample id that can be decoded takes its place, with that sample's label and the
    augmentation of the id it stands in for. Ids follow the paths, so the neighbour nearly always has the
    same class and the balance of the classes stays. The bad picture is recorded each time it is met;
    after 1,000 of them in a row the stream ends with DataError. Raises ValueError where an epoch's
    updates need more samples than there are, and for another `on_error`. `decoder`: see `decode.decode_into`, or
    GPU, on the current CUDA device.
    `kind` of the workers: "processes" (on Linux) or "threads"; None: `worker_kind` decides.

    `window`: the order is `order.shard_order` with windows of so many shards, and the next sample id of the same shard
    takes a bad picture's place. Of a remote source, the shards are fetched and held as they are needed.
    """
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error is {on_error!r}; it can be 'skip' or 'fail'")
    if updates_per_epoch * batch > len(source):
        raise ValueError(f"{updates_per_epoch} updates of {batch} need more than {len(source)} samples")
    _check_order(source, window is not None)
    shard = shards_of(source) if window is not None else None
    bounds = micro_bounds(batch, ghost_batch, ghosts_per_micro, rank, world)

    def requests() -> Iterator[_Request]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for update in range(start_update, stop_update):
            if update // updates_per_epoch != epoch:
                epoch = update // updates_per_epoch
                if shard is None or window is None:
                    order = epoch_order(seed, epoch, len(source))
                else:
                    order = shard_order(seed, epoch, shard, window)
            micros = micro_batches(
                order,
                update,
                batch=batch,
                updates_per_epoch=updates_per_epoch,
                ghost_batch=ghost_batch,
                ghosts_per_micro=ghosts_per_micro,
                rank=rank,
                world=world,
            )
            for samples, span in zip(micros, spans(update), strict=True):
                yield _Request(epoch, samples, span)

    def spans(update: int) -> list[Span]:
        # Ranks are at most an update apart, and what the next one needs must be on its way by then.
        return [Span(update * batch + i, update * batch + j, (update + 2) * batch - 1) for i, j in bounds]

    def ahead(source: RemoteSource) -> Ahead:
        assert shard is not None
        assert window is not None
        windows = training_windows(
            shard, window, seed=seed, batch=batch, updates_per_epoch=updates_per_epoch, updates=stop_update
        )
        every = (span for update in range(start_update, stop_update) for span in spans(update))
        return Ahead(source.split.hold, windows, every, rank, source.split.objects.url)

    reader = TrainReader(_for_workers(source), view, decoder, seed, on_error, shard)
    return Stream(
        requests(),
        reader,
        max((j - i for i, j in bounds), default=1),
        workers,
        pin_memory,
        kind or worker_kind(source, decoder),
        partial(ahead, source) if isinstance(source, RemoteSource) else None,
    )


def _check_order(source: Source, by_shards: bool) -> None:
    if isinstance(source, RemoteSource) and not by_shards:
        raise ValueError("a remote source can be read shard by shard alone")


def _for_workers(source: Source) -> Source:
    """The source that workers read from: of a remote one, the shards are held for them."""
    return source.held if isinstance(source, RemoteSource) else source


def eval_loader(
    source: Source,
    view: View,
    *,
    micro_batch: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool,
    decoder: str = PILLOW,
    kind: str | None = None,
    by_shards: bool = False,
) -> Stream:
    """The samples of one rank, `micro_batch` at a time, each once; the last batch may be smaller.

    They come in order, or with `by_shards` shard by shard. A picture that cannot be read or decoded keeps its place,
    with zeros for pixels and -1 for a label.
    """
    _check_order(source, by_shards)
    start, stop = eval_run(len(source), rank, world)
    shard = shards_of(source) if by_shards else None
    order = np.arange(len(source)) if shard is None else by_shard(shard)
    spans = [
        Span(first, min(first + micro_batch, stop), min(first + 2 * micro_batch, stop) - 1)
        for first in range(start, stop, micro_batch)
    ]

    def ahead(source: RemoteSource) -> Ahead:
        assert shard is not None
        return Ahead(source.split.hold, evaluation_windows(shard), spans, rank, source.split.objects.url)

    return Stream(
        (_Request(0, part := order[span.start : span.stop], span, checksum(part)) for span in spans),
        EvalReader(_for_workers(source), view, decoder),
        max(1, min(micro_batch, stop - start)),
        workers,
        pin_memory,
        kind or worker_kind(source, decoder),
        partial(ahead, source) if isinstance(source, RemoteSource) else None,
    )


class _Request(NamedTuple):
    epoch: int
    samples: npt.NDArray[np.int64]
    span: Span
    checksum: int = 0


@dataclass
class _Pending:
    """A batch that was asked for; `left` of its pieces are not there yet."""

    slot: int
    request: _Request
    left: int
    seconds: float = 0.0
    outcomes: dict[int, Outcome] = field(default_factory=dict)
