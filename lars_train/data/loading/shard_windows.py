"""Compute which shards a stream needs, in order, as a sequence of windows: pure arithmetic on sample counts.

A window is a set of shards that are needed together. Training takes the windows of `order.shard_order`, epoch after
epoch; an evaluation takes one shard after the other. shard_prefetch.py fetches the shards into the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels
from lars_train.data.order import eval_range, shard_windows

Shards = npt.NDArray[np.int64]


class Span(NamedTuple):
    """The positions [start, stop) of a request's samples, and `soon`, the last position whose shard is prefetched."""

    start: int
    stop: int
    soon: int


@dataclass(frozen=True)
class Windows:
    """The windows of a stream, in order. A position is the index of a sample among all that the windows supply."""

    ends: npt.NDArray[np.int64]
    """Shape (K,): the position at which each window ends."""
    shards: list[Shards]
    """For each window, its shards that are not empty."""

    def at(self, position: int) -> int:
        """Return the index of the window that contains a position; beyond the end, that of the last window."""
        return min(int(self.numbers(np.array(position))), len(self.shards) - 1)

    def numbers(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the index of each position's window; for positions beyond the end, the number of windows."""
        return np.searchsorted(self.ends, positions, side="right").astype(np.int64, copy=False)

    def most_bytes(self, firsts: npt.NDArray[np.int64], lasts: npt.NDArray[np.int64], sizes: Shards) -> int:
        """Return the size in bytes of the largest range of windows. `sizes`: the size of each shard in bytes.

        Range i has the windows `firsts[i]` to `lasts[i]`, both included.
        """
        total = np.cumsum([0, *(int(sizes[inside].sum()) for inside in self.shards)])
        beyond = len(self.shards)
        return int((total[np.minimum(lasts + 1, beyond)] - total[np.minimum(firsts, beyond)]).max(initial=0))


def training_windows(
    shard: Labels, window: int, *, seed: int, batch: int, updates_per_epoch: int, updates: int
) -> Windows:
    """Return the windows of a run's first `updates` updates. Position p is sample p % batch of update p // batch.

    `shard`, (N,): the shard of each sample. `window`: see `order.shard_windows`.
    """
    counts = np.bincount(shard).astype(np.int64)
    taken = updates_per_epoch * batch
    ends: list[int] = []
    shards: list[Shards] = []
    for epoch in range(-(-updates // updates_per_epoch)):
        stop = min((epoch + 1) * taken, updates * batch)
        begin = epoch * taken
        for inside in shard_windows(seed, epoch, len(counts), window):
            end = min(begin + int(counts[inside].sum()), stop)
            if end > begin:
                ends.append(end)
                shards.append(inside[counts[inside] > 0])
            begin = end
    return Windows(np.array(ends, np.int64), shards)


def evaluation_windows(shard: Labels) -> Windows:
    """Return one window per non-empty shard, in ascending order. Position p is the p-th sample of `by_shard`."""
    counts = np.bincount(shard).astype(np.int64)
    held = np.flatnonzero(counts)
    return Windows(np.cumsum(counts[held]), [held[i : i + 1] for i in range(len(held))])


def by_shard(shard: Labels) -> npt.NDArray[np.int64]:
    """Return the sample ids shard by shard, ascending in each: int64 (N,)."""
    return np.argsort(shard, kind="stable").astype(np.int64, copy=False)


def window_numbers(windows: Windows, spans: Iterable[Span]) -> Iterator[int]:
    """Yield the index of each window that overlaps one of the ascending `spans`, once."""
    following = 0
    for span in spans:
        for number in range(max(windows.at(span.start), following), windows.at(span.stop - 1) + 1):
            yield number
            following = number + 1


def last_to_hold(windows: Windows, span: Span) -> int:
    """Return the last window to hold at `span`.

    It is the window of `span.soon` or the window after that of `span.start`, whichever is later.
    """
    return max(windows.at(span.soon), windows.at(span.start) + 1)


def training_room(windows: Windows, batch: int, sizes: Shards) -> int:
    """Return the most bytes that the ranks of a machine hold at the same time in training: the cache's minimum size.

    The ranks synchronize at the end of each update. While a rank waits for the others there, it has taken at most one
    micro-batch of the next update. So while the slowest rank is in update u, another rank may already have taken one
    micro-batch of update u + 1. If update u + 1 has no further micro-batch for that rank, the rank's next micro-batch
    belongs to update u + 2, and the rank already holds its windows. All windows that the ranks hold then lie between
    the start of update u and `last_to_hold` of the last span of update u + 2.
    """
    updates = np.arange(int(windows.ends[-1]) // batch if len(windows.ends) else 0)
    firsts = windows.numbers(updates * batch)
    lasts = np.maximum(windows.numbers((updates + 4) * batch - 1), windows.numbers((updates + 3) * batch - 1) + 1)
    return windows.most_bytes(firsts, lasts, sizes)


def evaluation_room(shard: Labels, micro_batch: int, local_world: int, world: int, sizes: Shards) -> int:
    """Return the most bytes that the ranks of a machine hold at the same time in an evaluation.

    `local_world` of the `world` ranks run on the machine, and each reads `micro_batch` samples at a time.
    """
    windows = evaluation_windows(shard)
    most = 0
    for rank in range(world):
        start, stop = eval_range(len(shard), rank, world)
        begins = np.arange(start, stop, micro_batch)
        firsts, soon = windows.numbers(begins), windows.numbers(np.minimum(begins + 2 * micro_batch, stop) - 1)
        most = max(most, windows.most_bytes(firsts, np.maximum(soon, firsts + 1), sizes))
    return min(local_world * most, int(sizes[np.unique(shard)].sum()))
