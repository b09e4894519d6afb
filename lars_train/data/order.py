"""Which samples make up an update, and the random numbers that augment each of them.

Pure functions of (seed, epoch, update, sample id) in numpy alone. They open no file and know no device,
and neither the number of workers nor a resumed run can change their answers; the world size only says
which part of a batch a rank takes.

All random bits come from Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) under the key (seed, epoch). The four words of its counter are (block, 0, sample id, domain), so no
two samples, and none of the three uses below, can share a block. Raw bits are used throughout, because
numpy promises them to be the same in all versions, and `Generator.permutation` not
(https://numpy.org/doc/stable/reference/random/compatibility.html).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_ORDER, _AUGMENTATION, _SHARD_ORDER = 0, 1, 2  # domains: the last counter word
_UNIT = 2.0**-53  # between neighbours of 53 random bits in [0, 1)

SHARDS = "shards"
"""The value of data.order that shuffles whole shards and the samples within windows of them (`shard_order`)."""


def _philox(seed: int, epoch: int, domain: int) -> np.random.Philox:
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, domain], dtype=np.uint64))


def epoch_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The permutation of the sample ids 0 .. count - 1 in which an epoch takes them: int64 (count,).

    It is the stable argsort of `count` raw 64-bit words. `seed` and `epoch` lie in 0 .. 2**63 - 1.
    """
    words = _philox(seed, epoch, _ORDER).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def shard_windows(seed: int, epoch: int, shards: int, window: int) -> list[npt.NDArray[np.int64]]:
    """The shards 0 .. shards - 1 in the order of an epoch, cut into the fewest windows of at most `window` each.

    The windows' lengths differ by at most one. The order is the stable argsort of raw 64-bit words.
    """
    words = _philox(seed, epoch, _SHARD_ORDER).random_raw(shards)
    return np.array_split(np.argsort(words, kind="stable").astype(np.int64, copy=False), max(1, -(-shards // window)))


def shard_order(seed: int, epoch: int, shard: npt.NDArray[np.integer[Any]], window: int) -> npt.NDArray[np.int64]:
    """The order of an epoch at the granularity of shards: a permutation of the sample ids, int64 (N,).

    `shard`, (N,): the shard that each sample lies in. The windows of `shard_windows` follow each other, and within each
    the samples of its shards are permuted: sorted by the words that `epoch_order` sorts all samples by. So a single
    window gives the order of `epoch_order`.
    """
    words = _philox(seed, epoch, _ORDER).random_raw(len(shard))
    shards = int(shard.max(initial=-1)) + 1
    place = np.empty(shards, np.int64)
    for number, inside in enumerate(shard_windows(seed, epoch, shards, window)):
        place[inside] = number
    return np.lexsort((words, place[shard])).astype(np.int64, copy=False)


def batch_uniforms(seed: int, epoch: int, samples: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for each sample id: float64 (len(samples), count).

    Row i depends on (seed, epoch, samples[i]) alone, and a larger `count` only adds columns. Each number
    is the upper 53 bits of a raw word, times 2**-53.
    """
    bits = _philox(seed, epoch, _AUGMENTATION)
    start = bits.state
    counter = start["state"]["counter"]
    words = np.empty((len(samples), count), dtype=np.uint64)
    for row, sample in enumerate(samples):
        # Setting the counter of one generator takes a quarter of the time of building another.
        counter[2] = sample
        bits.state = start
        words[row] = bits.random_raw(count)
    uniforms: npt.NDArray[np.float64] = (words >> np.uint64(11)) * _UNIT
    return uniforms


def sample_uniforms(seed: int, epoch: int, sample: int, count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for one sample id: float64 (count,), a row of `batch_uniforms`."""
    return batch_uniforms(seed, epoch, [sample], count).reshape(count)


def _share(count: int, rank: int, world: int) -> tuple[int, int]:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} does not exist in a world of {world}")
    return rank * count // world, (rank + 1) * count // world


def ghost_run(ghosts: int, rank: int, world: int) -> tuple[int, int]:
    """The ghost batches [start, stop) of an update that a rank takes.

    The runs of all ranks follow each other, and their lengths differ by at most one. A run is empty where
    there are fewer ghost batches than ranks. Raises ValueError for a rank outside the world.
    """
    return _share(ghosts, rank, world)


def micro_bounds(batch: int, ghost_batch: int, ghosts_per_micro: int, rank: int, world: int) -> list[tuple[int, int]]:
    """The micro-batches of one rank, as [start, stop) positions within the global batch.

    The same for every update, so its length is the rank's accumulation. The global batch of `batch`
    samples is cut into ghost batches of `ghost_batch`; the last one takes what is left, so a global batch
    smaller than one ghost batch is a single ghost batch. A rank's run is cut into micro-batches of
    `ghosts_per_micro` ghost batches, of which the last may hold fewer. A rank without ghost batches gets
    an empty list. Raises ValueError for sizes below one and for a rank outside the world.
    """
    if min(batch, ghost_batch, ghosts_per_micro) < 1:
        raise ValueError(f"sizes below one: {batch=}, {ghost_batch=}, {ghosts_per_micro=}")
    start, stop = ghost_run(-(-batch // ghost_batch), rank, world)
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
    """The sample ids of each micro-batch of one rank for one update, as views of `order`.

    `update` counts from 0 over the whole run and `order` is the permutation of its epoch,
    `update // updates_per_epoch`. Update u of an epoch takes order[u * batch : (u + 1) * batch]; see
    `micro_bounds` for how that is cut. Raises ValueError where the order is too short for the epoch.
    """
    if updates_per_epoch * batch > len(order):
        raise ValueError(f"{updates_per_epoch} updates of {batch} need more than {len(order)} samples")
    first = update % updates_per_epoch * batch
    bounds = micro_bounds(batch, ghost_batch, ghosts_per_micro, rank, world)
    return [order[first + start : first + stop] for start, stop in bounds]


def checksum(samples: npt.NDArray[np.int64]) -> int:
    """A number in [0, 2**32) for a set of sample ids, in any order: the sum modulo 2**32 of a hash of each.

    The hash is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195),
    upper half. Checksums of parts add up, modulo 2**32, to that of the whole; a sample too many or too few shows.
    """
    x = samples.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(((x ^ (x >> np.uint64(31))) >> np.uint64(32)).sum() % np.uint64(2**32))


def eval_run(count: int, rank: int, world: int) -> tuple[int, int]:
    """The sample ids [start, stop) that a rank evaluates, out of `count`.

    Every sample falls to exactly one rank; a run may be empty. Raises ValueError for a rank outside the
    world.
    """
    return _share(count, rank, world)
