"""The windows of shards, against a simulation of streams that follow the real order of samples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lars_train.data.loading.shard_windows import (
    Span,
    Windows,
    by_shard,
    evaluation_room,
    evaluation_windows,
    last_to_hold,
    training_room,
    training_windows,
    window_numbers,
)
from lars_train.data.order import eval_range, micro_batches, micro_bounds, shard_order


def shards_in(windows: Windows, first: int, last: int) -> set[int]:
    return {s for inside in windows.shards[first : last + 1] for s in inside.tolist()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_training_finds_its_samples_in_its_windows(
    data: st.DataObject,
) -> None:
    draw = data.draw
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda found: sum(found) >= 8))
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    window, epochs, ghost = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    batch = draw(st.integers(ghost, min(40, len(shard))))
    per_epoch = len(shard) // batch
    updates, seed = draw(st.integers(1, epochs * per_epoch)), draw(st.integers(0, 99))
    world = draw(st.integers(1, 3))
    sizes = np.array(counts, np.int64) * 7 + 1
    kwargs: dict[str, Any] = {"seed": seed, "batch": batch, "updates_per_epoch": per_epoch}
    windows = training_windows(shard, window, updates=updates, **kwargs)
    assert windows.ends[-1] == updates * batch

    def spans(update: int, rank: int) -> list[Span]:
        bounds = micro_bounds(batch, ghost, 1, rank, world)
        return [Span(update * batch + i, update * batch + j, (update + 2) * batch - 1) for i, j in bounds]

    room = training_room(windows, batch, sizes)
    for update in range(updates):
        order = shard_order(seed, update // per_epoch, shard, window)
        for rank in range(world):
            cut = {"batch": batch, "updates_per_epoch": per_epoch, "ghost_batch": ghost, "ghosts_per_micro": 1}
            micros = micro_batches(order, update, rank=rank, world=world, **cut)
            for span, micro in zip(spans(update, rank), micros, strict=True):
                first, last = windows.at(span.start), windows.at(span.stop - 1)
                assert set(shard[micro].tolist()) <= shards_in(windows, first, last)
                assert last <= last_to_hold(windows, span)
        # A rank may be anywhere in this update, and another up to two updates ahead.
        slow = min((s for rank in range(world) for s in spans(update, rank)), key=lambda s: s.start)
        ahead = [s for u in (update, update + 1, update + 2) if u < updates for r in range(world) for s in spans(u, r)]
        held = [
            set(range(windows.at(slow.start), min(last_to_hold(windows, s), len(windows.shards) - 1) + 1))
            for s in ahead
        ]
        # A shard in the windows of two epochs is stored once, but may be counted twice.
        taken = sum(sizes[list(shards_in(windows, n, n))].sum() for n in set().union(*held))
        assert taken <= room
    everything = [span for update in range(updates) for span in spans(update, 0)]
    numbers = list(window_numbers(windows, everything))
    touched = {windows.at(p) for span in everything for p in range(span.start, span.stop)}
    assert numbers == sorted(touched)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda found: sum(found) > 0),
    st.integers(1, 20),
    st.integers(1, 4),
)
def test_evaluation_takes_each_sample_once_within_the_cache(counts: list[int], micro: int, world: int) -> None:
    shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    shard = shard[np.random.default_rng(0).permutation(len(shard))]
    order, windows = by_shard(shard), evaluation_windows(shard)
    assert sorted(order.tolist()) == list(range(len(shard)))
    assert [(s, i) for s, i in zip(shard[order].tolist(), order.tolist(), strict=True)] == sorted(
        zip(shard.tolist(), range(len(shard)), strict=True)
    )
    sizes = np.array(counts, np.int64) * 5 + 3
    most_held = []
    for rank in range(world):
        start, stop = eval_range(len(shard), rank, world)
        held = [0]
        for first in range(start, stop, micro):
            span = Span(first, min(first + micro, stop), min(first + 2 * micro, stop) - 1)
            inside = shards_in(windows, windows.at(span.start), windows.at(span.stop - 1))
            assert inside == set(shard[order[span.start : span.stop]].tolist())
            held.append(sum(sizes[list(shards_in(windows, windows.at(span.start), last_to_hold(windows, span)))]))
        most_held.append(max(held))
    all_bytes = int(sizes[np.unique(shard)].sum())
    for local_world in range(1, world + 1):
        together = max(sum(part) for part in itertools.combinations(most_held, local_world))
        assert min(together, all_bytes) <= evaluation_room(shard, micro, local_world, world, sizes) <= all_bytes


def test_imagenet_needs_the_cache_that_the_docs_state() -> None:
    # 1,281,167 images in 321 shards of 3,991 or 3,992 images and 440 MB.
    shard = np.repeat(np.arange(321, dtype=np.int32), [3992] * 56 + [3991] * 265)
    assert len(shard) == 1_281_167
    sizes = np.full(321, 440_000_000)
    for batch, expected in ((256, 21.1e9), (8192, 21.1e9), (32768, 28.2e9), (65536, 42.2e9)):
        per_epoch = len(shard) // batch
        run = {"seed": 0, "batch": batch, "updates_per_epoch": per_epoch, "updates": 5 * per_epoch}
        room = training_room(training_windows(shard, 16, **run), batch, sizes)
        assert room == pytest.approx(expected, rel=0.03), batch
