"""Orders and random numbers are pure functions of Philox, and ranks divide them without loss or repetition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lars_train.data.order import (
    batch_uniforms,
    epoch_order,
    eval_range,
    ghost_range,
    micro_batches,
    micro_bounds,
    mixing_uniforms,
    sample_uniforms,
    shard_order,
    shard_windows,
)

SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 2000)
WORLDS = st.integers(1, 40)


def philox_words(key: tuple[int, int], counter: list[int], count: int) -> list[int]:
    """Compute Philox4x64-10 of Salmon et al. 2011 in integers. Like numpy's, it counts before each block."""
    mask = 2**64 - 1
    words: list[int] = []
    while len(words) < count:
        counter = [(counter[0] + 1) & mask, *counter[1:]]
        c0, c1, c2, c3 = counter
        k0, k1 = key
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & mask, (first >> 64) ^ c3 ^ k1, first & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        words += [c0, c1, c2, c3]
    return words[:count]


@given(SEEDS, EPOCHS, st.integers(0, 60))
def test_epoch_order_sorts_philox_words(seed: int, epoch: int, count: int) -> None:
    words = philox_words((seed, epoch), [0, 0, 0, 0], count)
    order = epoch_order(seed, epoch, count)
    assert order.tolist() == sorted(range(count), key=words.__getitem__)
    assert order.dtype == np.int64


@given(SEEDS, EPOCHS, st.integers(0, 2**40), st.integers(1, 30))
def test_uniforms_are_the_upper_bits_of_philox_words(seed: int, epoch: int, sample: int, count: int) -> None:
    words = philox_words((seed, epoch), [0, 0, sample, 1], count)
    drawn = sample_uniforms(seed, epoch, sample, count)
    assert drawn.tolist() == [(word >> 11) / 2**53 for word in words]
    assert drawn.dtype == np.float64


@given(SEEDS, EPOCHS, st.integers(0, 2**40), st.integers(0, 2**20))
def test_ghost_batches_have_their_own_philox_words(seed: int, epoch: int, update: int, ghost: int) -> None:
    words = philox_words((seed, epoch), [0, ghost, update, 3], 20)
    drawn = list(itertools.islice(mixing_uniforms(seed, epoch, update, ghost), 20))
    assert drawn == [(word >> 11) / 2**53 for word in words]


def test_the_values_of_orders_and_uniforms_never_change() -> None:
    assert epoch_order(0, 0, 12).tolist() == [0, 2, 11, 9, 1, 8, 5, 4, 3, 10, 6, 7]
    assert epoch_order(2**63 - 1, 89, 12).tolist() == [0, 10, 1, 4, 11, 5, 9, 2, 6, 8, 3, 7]
    assert sample_uniforms(0, 0, 0, 3).tolist() == [
        0.34218278474233466,
        0.5765144536585864,
        0.08665198221933101,
    ]
    assert sample_uniforms(42, 7, 1_281_166, 3).tolist() == [
        0.4233928716549986,
        0.7757095767390375,
        0.30050262768468916,
    ]


@given(SEEDS, EPOCHS, st.integers(0, 3000))
def test_an_epoch_takes_every_sample_once(seed: int, epoch: int, count: int) -> None:
    assert sorted(epoch_order(seed, epoch, count).tolist()) == list(range(count))


def test_neighboring_seeds_and_epochs_give_different_orders() -> None:
    orders = [epoch_order(*key, 50).tolist() for key in [(0, 0), (0, 1), (1, 0), (2**63 - 1, 0), (2**63 - 2, 0)]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


LAYOUTS = st.lists(st.integers(0, 6), max_size=60).map(lambda shard: np.array(shard, np.int32))


@given(SEEDS, EPOCHS, LAYOUTS, st.integers(1, 9))
def test_the_order_by_shards_sorts_philox_words_within_windows(
    seed: int, epoch: int, shard: np.ndarray, window: int
) -> None:
    count = max(shard.tolist(), default=-1) + 1
    of_shards = philox_words((seed, epoch), [0, 0, 0, 2], count)
    shards = sorted(range(count), key=of_shards.__getitem__)
    windows = [part.tolist() for part in shard_windows(seed, epoch, count, window)]
    assert [s for part in windows for s in part] == shards
    lengths = [len(part) for part in windows]
    assert max(lengths, default=0) <= window
    assert max(lengths) - min(lengths) <= 1
    assert len(windows) == max(1, -(-count // window))
    words = philox_words((seed, epoch), [0, 0, 0, 0], len(shard))
    expected = [
        sample
        for part in windows
        for sample in sorted((i for i in range(len(shard)) if shard[i] in part), key=words.__getitem__)
    ]
    order = shard_order(seed, epoch, shard, window)
    assert order.tolist() == expected
    assert order.dtype == np.int64
    assert sorted(expected) == list(range(len(shard)))


@given(SEEDS, EPOCHS, LAYOUTS)
def test_a_window_of_all_shards_gives_the_order_of_all_samples(seed: int, epoch: int, shard: np.ndarray) -> None:
    assert shard_order(seed, epoch, shard, 7).tolist() == epoch_order(seed, epoch, len(shard)).tolist()


def test_the_values_of_the_order_by_shards_never_change() -> None:
    shard = np.arange(12, dtype=np.int32) % 4
    assert shard_order(0, 0, shard, 2).tolist() == [11, 9, 1, 5, 3, 7, 0, 2, 8, 4, 10, 6]
    assert shard_order(2**63 - 1, 89, shard, 2).tolist() == [0, 1, 4, 5, 9, 8, 10, 11, 2, 6, 3, 7]


def test_the_order_by_shards_shuffles_all_samples() -> None:
    shard = np.repeat(np.arange(6, dtype=np.int32), 4)
    orders = np.array([shard_order(5, epoch, shard, 2) for epoch in range(4000)])
    places = np.argsort(orders, axis=1)
    # For uniform places: chi-square with 23 degrees of freedom, mean 23, standard deviation 6.8.
    for sample in (0, 13, 23):
        counts = np.bincount(places[:, sample], minlength=24)
        assert ((counts - 4000 / 24) ** 2 / (4000 / 24)).sum() < 60
    # Samples of the same shard always share a window; those of two shards do in a fifth of the epochs.
    together = [(places[:, 0] // 8 == places[:, other] // 8).mean() for other in (1, 4, 23)]
    assert together == pytest.approx([1, 0.2, 0.2], abs=0.03)


@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=8))
def test_the_uniforms_of_a_sample_do_not_depend_on_the_batch(samples: list[int]) -> None:
    together = batch_uniforms(3, 5, samples, 23)
    assert together.shape == (len(samples), 23)
    for row, sample in zip(together, samples, strict=True):
        assert row.tolist() == sample_uniforms(3, 5, sample, 23).tolist()
        assert row[:4].tolist() == sample_uniforms(3, 5, sample, 4).tolist()


def test_samples_epochs_and_the_order_share_no_uniforms() -> None:
    drawn = [sample_uniforms(9, epoch, sample, 23) for epoch in range(3) for sample in range(200)]
    order = np.random.Philox(key=np.array([9, 0], dtype=np.uint64)).random_raw(10_000)
    numbers = np.concatenate([*drawn, (order >> np.uint64(11)) * 2.0**-53])
    assert len(np.unique(numbers)) == len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1


@given(st.integers(0, 500), WORLDS)
def test_ghost_runs_are_contiguous_and_differ_by_at_most_one(ghosts: int, world: int) -> None:
    runs = [ghost_range(ghosts, rank, world) for rank in range(world)]
    assert [ghost for start, stop in runs for ghost in range(start, stop)] == list(range(ghosts))
    lengths = [stop - start for start, stop in runs]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), WORLDS, st.integers(1, 3), st.integers(0, 8))
def test_all_ranks_together_take_the_batch_in_order(
    batch: int, ghost_batch: int, ghosts_per_micro: int, world: int, updates_per_epoch: int, update: int
) -> None:
    order = epoch_order(1, update // updates_per_epoch, batch * updates_per_epoch + 5)
    taken = []
    ghosts = -(-batch // ghost_batch)
    for rank in range(world):
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
        assert len(micros) <= -(-ghosts // (world * ghosts_per_micro))  # the bound of accumulation
        assert all(0 < len(micro) <= ghost_batch * ghosts_per_micro for micro in micros)
        # A micro-batch that starts inside a ghost batch would split it.
        bounds = micro_bounds(batch, ghost_batch, ghosts_per_micro, rank, world)
        assert all(start % ghost_batch == 0 for start, _ in bounds)
        assert [stop - start for start, stop in bounds] == [len(micro) for micro in micros]
        taken += [sample for micro in micros for sample in micro.tolist()]
    first = (update % updates_per_epoch) * batch
    assert taken == order[first : first + batch].tolist()


def test_a_batch_smaller_than_a_ghost_batch_goes_to_one_rank() -> None:
    assert [micro_bounds(10, 32, 4, rank, 3) for rank in range(3)] == [[], [], [(0, 10)]]


def test_an_uneven_batch_is_cut_into_whole_ghost_batches() -> None:
    # 7 ghost batches of 4 (the last of 2) on 2 ranks: 3 and 4 of them, two to a micro-batch.
    assert micro_bounds(26, 4, 2, 0, 2) == [(0, 8), (8, 12)]
    assert micro_bounds(26, 4, 2, 1, 2) == [(12, 20), (20, 26)]


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        ghost_range(4, 2, 2)
    with pytest.raises(ValueError, match="rank -1"):
        eval_range(4, -1, 2)
    with pytest.raises(ValueError, match="ghost_batch=0"):
        micro_bounds(8, 0, 1, 0, 1)
    with pytest.raises(ValueError, match="3 updates of 4"):
        micro_batches(
            np.arange(11), 0, batch=4, updates_per_epoch=3, ghost_batch=4, ghosts_per_micro=1, rank=0, world=1
        )


@given(st.integers(0, 500), WORLDS)
def test_evaluation_gives_every_sample_to_exactly_one_rank(count: int, world: int) -> None:
    runs = [eval_range(count, rank, world) for rank in range(world)]
    assert [sample for start, stop in runs for sample in range(start, stop)] == list(range(count))
