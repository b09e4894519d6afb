"""Streams of batches, for a whole training run and for one evaluation.

A stream knows which samples come when (order.py) and turns each request for a micro-batch into tensors, in
worker processes or in the calling one. It does not normalise, move anything to a device, or decide how
many bad pictures a run may meet.

The content and the order of the batches do not depend on the number of workers.
"""

from __future__ import annotations

import mmap
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lars_train.data.augment import UNIFORMS, Geometry, View
from lars_train.data.decode import BadImage, decode
from lars_train.data.order import batch_uniforms, checksum, epoch_order, eval_run, micro_batches
from lars_train.errors import DataError
from lars_train.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from lars_train.data.source import Source

__all__ = ["BadSample", "Batch", "Stream", "View", "eval_loader", "train_loader"]

_PREFETCH = 2  # micro-batches in flight per worker
_BEGIN_S = 20.0  # for all workers of a stream to begin
_STARTS = 4  # of a stream whose workers do not begin
_MAX_TRIES = 1000  # neighbours tried in place of a bad picture: more in a row is a broken data set


class BadSample(NamedTuple):
    """A picture that was asked for and cannot be read or decoded."""

    sample: int
    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch."""

    images: Tensor
    """uint8 (n, 3, S, S), RGB, in channels-last memory."""
    labels: Tensor
    """int64 (n,); in evaluation -1 marks a picture that cannot be decoded, whose pixels are zeros."""
    bad: tuple[BadSample, ...]
    """The bad pictures met on the way, in order."""
    checksum: int = 0
    """In evaluation: `order.checksum` of the samples."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; DataLoader calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class Stream(Iterator[Batch]):
    """An iterator of batches whose workers start with it and end with it, or with `close`."""

    def __init__(
        self, requests: Callable[[], Iterable[_Request]], reader: _Reader, workers: int, pin_memory: bool
    ) -> None:
        # Forked workers share the source's memory; elsewhere fork is unsafe or absent.
        forks = workers > 0 and sys.platform == "linux"
        self._items: Iterator[Batch | _Failure] | None = None
        for _ in range(_STARTS if forks else 1):
            begun = mmap.mmap(-1, workers) if forks else None
            self._items = _iterate(requests(), reader, workers, pin_memory, begun)
            if begun is None or _all_begin(self._items, begun):
                break

    def __next__(self) -> Batch:
        if self._items is None:
            raise StopIteration
        try:
            item = next(self._items)
        except BaseException:
            self.close()
            raise
        if isinstance(item, _Failure):
            self.close()
            raise DataError(item.message)
        return item

    def close(self) -> None:
        """End the workers. The stream is at its end afterwards; closing it twice does no harm."""
        self._items = None


def _iterate(
    requests: Iterable[_Request], reader: _Reader, workers: int, pin_memory: bool, begun: mmap.mmap | None
) -> Iterator[Batch | _Failure]:
    with warnings.catch_warnings():
        # The number of workers is the user's choice, and a worker touches none of the parent's threads.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return iter(
            DataLoader(
                reader,
                batch_size=None,  # one request in, one batch out, handed on as it is
                sampler=requests,
                num_workers=workers,
                prefetch_factor=_PREFETCH if workers else None,
                pin_memory=pin_memory,
                worker_init_fn=_leave_signals_to_the_parent if begun is None else partial(_begin, begun),
                multiprocessing_context=None if begun is None else "fork",
                # DataLoader draws a seed; from the global generator it would change the caller's.
                generator=torch.Generator(),
            )
        )


def _all_begin(items: Any, begun: mmap.mmap) -> bool:
    """Whether all workers have begun; those that do not in time are ended.

    Before Python 3.12 a forked process waits for ever on the interpreter's list of threads if another thread (gloo's,
    NCCL's: each of their calls into Python makes an entry) held its lock at the fork.
    """
    end = time.monotonic() + _BEGIN_S
    while begun.find(b"\0") >= 0:
        if time.monotonic() > end:
            break
        time.sleep(0.001)
    stuck = [worker for worker, mark in zip(items._workers, begun[:], strict=True) if not mark]
    for worker in stuck:
        # DataLoader's handler of SIGCHLD raises at some instruction after the death, once.
        with suppress(RuntimeError):
            worker.kill()
            worker.join()
            time.sleep(0.05)
    return not stuck


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
    by_native: bool = False,
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
    updates need more samples than there are, and for another `on_error`. `by_native`: see `decode.decode`.
    """
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error is {on_error!r}; it can be 'skip' or 'fail'")
    if updates_per_epoch * batch > len(source):
        raise ValueError(f"{updates_per_epoch} updates of {batch} need more than {len(source)} samples")

    def requests() -> Iterator[_Request]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for update in range(start_update, stop_update):
            if update // updates_per_epoch != epoch:
                epoch = update // updates_per_epoch
                order = epoch_order(seed, epoch, len(source))
            for samples in micro_batches(
                order,
                update,
                batch=batch,
                updates_per_epoch=updates_per_epoch,
                ghost_batch=ghost_batch,
                ghosts_per_micro=ghosts_per_micro,
                rank=rank,
                world=world,
            ):
                yield _Request(epoch, samples)

    return Stream(requests, _TrainReader(source, view, by_native, seed, on_error), workers, pin_memory)


def eval_loader(
    source: Source,
    view: View,
    *,
    micro_batch: int,
    rank: int,
    world: int,
    workers: int,
    pin_memory: bool,
    by_native: bool = False,
) -> Stream:
    """The samples of one rank in order, `micro_batch` at a time, each once; the last batch may be smaller.

    A picture that cannot be read or decoded keeps its place, with zeros for pixels and -1 for a label.
    """
    start, stop = eval_run(len(source), rank, world)
    requests = [
        _Request(0, np.arange(first, min(first + micro_batch, stop))) for first in range(start, stop, micro_batch)
    ]
    return Stream(lambda: requests, _EvalReader(source, view, by_native), workers, pin_memory)


class _Request(NamedTuple):
    epoch: int
    samples: npt.NDArray[np.int64]


class _Failure(NamedTuple):
    """What a reader returns to end the stream: an exception would arrive wrapped in a worker's traceback."""

    message: str


class _Reader(Dataset["Batch | _Failure"]):
    def __init__(self, source: Source, view: View, by_native: bool) -> None:
        self._source = source
        self._view = view
        self._by_native = by_native

    def _load(
        self, sample: int, geometry: Callable[[int, int], Geometry], out: npt.NDArray[np.uint8]
    ) -> BadSample | None:
        """Decode into `out`; a bad sample leaves zeros there."""
        try:
            decode(self._source.read(sample), geometry, self._view.size, by_native=self._by_native, out=out)
            return None
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        return BadSample(sample, self._source.where(sample), printable(reason))

    def _buffers(self, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        size = self._view.size
        return np.zeros((count, size, size, 3), dtype=np.uint8), np.full(count, -1, dtype=np.int64)


class _TrainReader(_Reader):
    def __init__(self, source: Source, view: View, by_native: bool, seed: int, on_error: str) -> None:
        super().__init__(source, view, by_native)
        self._seed = seed
        self._on_error = on_error

    def __getitem__(self, request: _Request) -> Batch | _Failure:
        samples = request.samples.tolist()
        images, labels = self._buffers(len(samples))
        uniforms = batch_uniforms(self._seed, request.epoch, samples, UNIFORMS).tolist()
        bad: list[BadSample] = []
        for slot, wanted in enumerate(samples):
            geometry = partial(self._view.train, uniforms=uniforms[slot])
            for step in range(min(_MAX_TRIES, len(self._source))):
                sample = (wanted + step) % len(self._source)
                found = self._load(sample, geometry, images[slot])
                if found is None:
                    labels[slot] = self._source.labels[sample]
                    break
                bad.append(found)
                if self._on_error == "fail":
                    return _Failure(
                        f"{found.where}: {found.reason}. Mend or remove the file, or set data.on_error=skip "
                        "to put the next sample in its place."
                    )
            else:
                return _Failure(
                    f"{bad[-1].where}: {bad[-1].reason}. It is the last of {step + 1} samples in a row that "
                    "cannot be read; see whether the data set is whole and data.root reachable."
                )
        return _batch(images, labels, bad)


class _EvalReader(_Reader):
    def __getitem__(self, request: _Request) -> Batch | _Failure:
        samples = request.samples.tolist()
        images, labels = self._buffers(len(samples))
        bad: list[BadSample] = []
        for slot, sample in enumerate(samples):
            found = self._load(sample, self._view.evaluate, images[slot])
            if found is None:
                labels[slot] = self._source.labels[sample]
            else:
                bad.append(found)
        return replace(_batch(images, labels, bad), checksum=checksum(request.samples))


def _batch(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], bad: Iterable[BadSample]) -> Batch:
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), tuple(bad))


def _begin(begun: mmap.mmap, worker: int) -> None:
    _leave_signals_to_the_parent(worker)
    begun[worker] = 1


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches the whole process group, and Slurm's notice all processes of a step; the parent decides how to
    # end, and then ends the workers, who also end when it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
