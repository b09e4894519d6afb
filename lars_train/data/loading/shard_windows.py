"""The shards that a stream needs, in order, as a row of windows: pure arithmetic on sample counts.

A window is a set of shards that are needed together. Training takes those of order.shard_order, one epoch after the
other; an evaluation takes one shard after the other. shard_prefetch.py brings shards into the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels
from lars_train.data.order import eval_run, shard_windows

Shards = npt.NDArray[np.int64]


class Span(NamedTuple):
    """The positions [start, stop) that a request takes its samples from; what lies up to `soon` is needed soon."""

    start: int
    stop: int
    soon: int


@dataclass(frozen=True)
class Windows:
    """The windows that a stream passes through, in order, as far as samples are taken from them.

    Positions count the samples that are taken: `ends`, int64 (K,), is where each window ends, and `shards` are those of
    each that hold samples.
    """

    ends: npt.NDArray[np.int64]
    shards: list[Shards]

    def at(self, position: int) -> int:
        """The number of the window in which a position lies; the last one for positions beyond the end."""
        return min(int(self.numbers(np.array(position))), len(self.shards) - 1)

    def numbers(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The same for many positions, with the number of windows for those beyond the end."""
        return np.searchsorted(self.ends, positions, side="right").astype(np.int64, copy=False)

    def most_bytes(self, firsts: npt.NDArray[np.int64], lasts: npt.NDArray[np.int64], sizes: Shards) -> int:
        """The most bytes that the windows from first to last take, over all pairs; `sizes`: bytes of all shards."""
        total = np.cumsum([0, *(int(sizes[inside].sum()) for inside in self.shards)])
        beyond = len(self.shards)
        return int((total[np.minimum(lasts + 1, beyond)] - total[np.minimum(firsts, beyond)]).max(initial=0))


def training_windows(
    shard: Labels, window: int, *, seed: int, batch: int, updates_per_epoch: int, updates: int
) -> Windows:
    """Those of a run's first `updates` updates; position p is sample p % batch of update p // batch.

    `shard`, (N,): the shard that each sample lies in. `window`: see `order.shard_windows`.
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
    """One for each shard that holds samples, in ascending order; position p is the p-th sample of `by_shard`."""
    counts = np.bincount(shard).astype(np.int64)
    held = np.flatnonzero(counts)
    return Windows(np.cumsum(counts[held]), [held[i : i + 1] for i in range(len(held))])


def by_shard(shard: Labels) -> npt.NDArray[np.int64]:
    """The sample ids shard by shard, ascending in each: int64 (N,)."""
    return np.argsort(shard, kind="stable").astype(np.int64, copy=False)


def passed(windows: Windows, spans: Iterable[Span]) -> Iterator[int]:
    """The numbers of the windows that a row of spans, in ascending order, passes through, each once."""
    following = 0
    for span in spans:
        for number in range(max(windows.at(span.start), following), windows.at(span.stop - 1) + 1):
            yield number
            following = number + 1


def reach(windows: Windows, span: Span) -> int:
    """The last window that may be held by who is at `span`: of what it needs soon, and at least the next one."""
    return max(windows.at(span.soon), windows.at(span.start) + 1)


def training_room(windows: Windows, batch: int, sizes: Shards) -> int:
    """Bytes that the ranks of a machine need at once in training, and the most that they hold at once.

    All ranks agree on each update's end, and each has taken at most one micro-batch more by then: one is in update u or
    later, none beyond u + 2, and that one holds what `reach` says for the end of u + 3.
    """
    updates = np.arange(int(windows.ends[-1]) // batch if len(windows.ends) else 0)
    firsts = windows.numbers(updates * batch)
    lasts = np.maximum(windows.numbers((updates + 4) * batch - 1), windows.numbers((updates + 3) * batch - 1) + 1)
    return windows.most_bytes(firsts, lasts, sizes)


def evaluation_room(shard: Labels, micro_batch: int, local_world: int, world: int, sizes: Shards) -> int:
    """The same for an evaluation by `local_world` ranks of this machine, of `world` in all, by `micro_batch` each."""
    windows = evaluation_windows(shard)
    most = 0
    for rank in range(world):
        start, stop = eval_run(len(shard), rank, world)
        begins = np.arange(start, stop, micro_batch)
        firsts, soon = windows.numbers(begins), windows.numbers(np.minimum(begins + 2 * micro_batch, stop) - 1)
        most = max(most, windows.most_bytes(firsts, np.maximum(soon, firsts + 1), sizes))
    return min(local_world * most, int(sizes[np.unique(shard)].sum()))
