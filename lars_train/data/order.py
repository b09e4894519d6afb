"""Compute the samples of each update, and the random numbers that augment each sample.

Pure functions of (seed, epoch, update, sample id), in numpy alone. The results depend neither on the number of workers
nor on whether a run was resumed. The world size only decides which part of a batch a rank takes.

All random bits come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
the key (seed, epoch). The four words of its counter are (block, 0, sample id, domain), or (block, ghost batch, update,
domain) to mix samples. So two samples never share a block, and neither do two of the four domains below. All
functions use the raw bits, because numpy guarantees them across versions, unlike the results of `Generator.permutation`
(https://numpy.org/doc/stable/reference/random/compatibility.html).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ORDER, _AUGMENTATION, _SHARD_ORDER, _MIXING = 0, 1, 2, 3  # domains: the last counter word
_UNIT = 2.0**-53  # the spacing of uniform numbers with 53 random bits

SHARDS = "shards"
"""The value of data.order that shuffles the shards, and then the samples of a few shards at a time (`shard_order`)."""


def _philox(seed: int, epoch: int, domain: int) -> np.random.Philox:
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, domain], dtype=np.uint64))


def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the order of the sample ids 0 .. count - 1 in an epoch: a permutation, int64 (count,).

    The order is the stable argsort of `count` raw 64-bit words. `seed` and `epoch` lie in 0 .. 2**63 - 1.
    """
    words = _philox(seed, epoch, _ORDER).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def shard_windows(seed: int, epoch: int, shards: int, window: int) -> list[npt.NDArray[np.int64]]:
    """Shuffle the shards 0 .. shards - 1 for an epoch, and cut them into the fewest windows of at most `window` shards.

    The lengths of the windows differ by at most one. The order is the stable argsort of raw 64-bit words.
    """
    words = _philox(seed, epoch, _SHARD_ORDER).random_raw(shards)
    return np.array_split(np.argsort(words, kind="stable").astype(np.int64, copy=False), max(1, -(-shards // window)))


def shard_order(seed: int, epoch: int, shard: npt.NDArray[np.integer[Any]], window: int) -> npt.NDArray[np.int64]:
    """Return the order of an epoch that reads a few shards at a time: a permutation of the sample ids, int64 (N,).

    `shard`, (N,): the shard number of each sample. The order visits the windows of `shard_windows` in turn. Within a
    window, the samples are sorted by the same random words as in `epoch_order`. With a single
    window, both orders are the same.
    """
    words = _philox(seed, epoch, _ORDER).random_raw(len(shard))
    shards = int(shard.max(initial=-1)) + 1
    window_of = np.empty(shards, np.int64)
    for number, members in enumerate(shard_windows(seed, epoch, shards, window)):
        window_of[members] = number
    return np.lexsort((words, window_of[shard])).astype(np.int64, copy=False)


def batch_uniforms(seed: int, epoch: int, samples: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each sample id: float64 (len(samples), count).

    Row i depends only on (seed, epoch, samples[i]), and a larger `count` only adds columns. Each number is the upper 53
    bits of a raw word, times 2**-53.
    """
    bits = _philox(seed, epoch, _AUGMENTATION)
    start = bits.state
    counter = start["state"]["counter"]
    words = np.empty((len(samples), count), dtype=np.uint64)
    for row, sample in enumerate(samples):
        # Setting the counter of a generator takes a quarter of the time of building a new one.
        counter[2] = sample
        bits.state = start
        words[row] = bits.random_raw(count)
    uniforms: npt.NDArray[np.float64] = (words >> np.uint64(11)) * _UNIT
    return uniforms


def sample_uniforms(seed: int, epoch: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for one sample id: float64 (count,), a row of `batch_uniforms`."""
    return batch_uniforms(seed, epoch, [sample], count).reshape(count)


def mixing_uniforms(seed: int, epoch: int, update: int, ghost: int) -> Iterator[float]:
    """Yield numbers in [0, 1) without end, to mix the samples of one ghost batch.

    They depend only on the arguments. `update`: the number of the global batch in the run; `ghost`: the number of the
    ghost batch in the global batch. The numbers are made as in `batch_uniforms`.
    """
    bits = _philox(seed, epoch, _MIXING)
    start = bits.state
    start["state"]["counter"][1:3] = ghost, update
    bits.state = start
    while True:
        yield from ((bits.random_raw(8) >> np.uint64(11)) * _UNIT).tolist()


def _share(count: int, rank: int, world: int) -> tuple[int, int]:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} does not exist in a world of {world}")
    return rank * count // world, (rank + 1) * count // world


def ghost_range(ghosts: int, rank: int, world: int) -> tuple[int, int]:
    """Return the ghost batches [start, stop) of an update that a rank takes.

    The ranges of successive ranks are adjacent, and their lengths differ by at most one. Some are empty if there are
    fewer ghost batches than ranks. Raises ValueError for a rank outside the world.
    """
    return _share(ghosts, rank, world)


def micro_bounds(batch: int, ghost_batch: int, ghosts_per_micro: int, rank: int, world: int) -> list[tuple[int, int]]:
    """Return the micro-batches of one rank, as [start, stop) positions within the global batch.

    They are the same for every update, so the length of the list is the rank's accumulation. The global batch of
    `batch` samples is cut into ghost batches of `ghost_batch` samples; the last takes the remainder, so a global batch
    smaller than `ghost_batch` is a single ghost batch. A rank's range is cut into micro-batches of `ghosts_per_micro`
    ghost batches; the last may hold fewer. A rank without ghost batches gets an empty list. Raises ValueError for
    sizes below one and for a rank outside the world.
    """
    if min(batch, ghost_batch, ghosts_per_micro) < 1:
        raise ValueError(f"sizes below one: {batch=}, {ghost_batch=}, {ghosts_per_micro=}")
    start, stop = ghost_range(-(-batch // ghost_batch), rank, world)
    return [
        (ghost * ghost_batch, min(min(ghost + ghosts_per_micro, stop) * ghost_batch, batch))
        for ghost in range(start, stop, ghosts_per_micro)
    ]


def micro_batches(
    order: npt.NDArray[np.int64],
    update: int,
    *,
    batch: int,
    updates_per_epoch: int,
    ghost_batch: int,
    ghosts_per_micro: int,
    rank: int,
    world: int,
) -> list[npt.NDArray[np.int64]]:
    """Return the sample ids of each micro-batch of one rank for one update, as views of `order`.

    `update` counts from 0 over the whole run, and `order` is the permutation of its epoch,
    `update // updates_per_epoch`. Update u of an epoch takes order[u * batch : (u + 1) * batch], which `micro_bounds`
    cuts into micro-batches. Raises ValueError if the order is too short for the epoch.
    """
    if updates_per_epoch * batch > len(order):
        raise ValueError(f"{updates_per_epoch} updates of {batch} need more than {len(order)} samples")
    first = update % updates_per_epoch * batch
    bounds = micro_bounds(batch, ghost_batch, ghosts_per_micro, rank, world)
    return [order[first + start : first + stop] for start, stop in bounds]


def checksum(samples: npt.NDArray[np.int64]) -> int:
    """Return an order-independent checksum of sample ids, in [0, 2**32): the sum of their hashes modulo 2**32.

    The hash is the upper half of the finalizer of SplitMix64 (Steele, Lea, Flood 2014,
    https://doi.org/10.1145/2660193.2660195). The checksums of parts add up, modulo 2**32, to the checksum of the
    whole, so a missing or repeated sample changes the sum.
    """
    x = samples.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(((x ^ (x >> np.uint64(31))) >> np.uint64(32)).sum() % np.uint64(2**32))


def eval_range(count: int, rank: int, world: int) -> tuple[int, int]:
    """Return the sample ids [start, stop) out of `count` that a rank evaluates.

    Every sample belongs to exactly one rank; a range may be empty. Raises ValueError for a rank outside the world.
    """
    return _share(count, rank, world)
