"""The data set at work: how fast pictures come through the configured loader, and whether a sample of them is whole."""

from __future__ import annotations

import contextlib
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from lars_train.config import Config
from lars_train.data.dataset import Dataset, Sharded, Source
from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.loader import LoaderSpec, train_loader
from lars_train.data.loading.reader import BadSample, EvalReader, TrainReader
from lars_train.data.loading.stream import LENT, LoaderStatistics, pool_slots
from lars_train.data.sources.remote import RemoteSource
from lars_train.data.transforms import View
from lars_train.launch import Ranks
from lars_train.plan import Plan, check_micro_batch
from lars_train.preflight.facts import Counts, Input, TrialRead
from lars_train.training.resolve import Resolved

_AT_ONCE = 32


def counts(config: Config, dataset: Dataset) -> Counts:
    """How many images and classes there are."""
    train, val = len(dataset.train), len(dataset.val)
    held_out = config.data.holdout is not None
    classes = len(dataset.classes)
    return Counts(config.data.name, train, val, classes, held_out, dataset.fingerprint, dataset.inventory)


def loader_rate(
    config: Config,
    plan: Plan,
    resolved: Resolved,
    source: Source,
    ranks: Ranks,
    device: torch.device,
    workers: int,
    seconds: float,
) -> Input:
    """Images per second that this rank's loader brings, taken from it as fast as it can, for about `seconds`, after
    as long a time at most in which its workers fill their buffers.

    Of a store at a URL only one shard is fetched: what one core decodes of it counts for each worker.
    """
    view = View.from_config(config.data)
    slots = pool_slots(resolved.micro_batch, workers)
    buffers = slots * resolved.micro_batch * (3 * view.size**2 + 16)
    if isinstance(source, RemoteSource):
        per_core = _of_one_shard(config, view, source, resolved.decoder, seconds)
        return Input(per_core * max(1, workers), per_core, workers, resolved.decoder, buffers)
    spec = LoaderSpec.from_config(
        config,
        plan,
        source,
        ranks,
        ghosts_per_micro=check_micro_batch(plan, resolved.micro_batch),
        workers=workers,
        pin_memory=device.type == "cuda",
        decoder=resolved.decoder,
    )
    with closing(train_loader(replace(spec, on_error="skip"), 0, plan.updates)) as stream:
        # What the workers had done before they were asked is no measure of their speed.
        filled = time.perf_counter() + seconds
        for _ in range(slots - LENT if workers else 1):
            if next(stream, None) is None or time.perf_counter() > filled:
                break
        stream.statistics()
        started, images, end = time.perf_counter(), 0, time.perf_counter() + seconds
        for batch in stream:
            images += len(batch.labels)
            if time.perf_counter() > end:
                break
        took, loaded = time.perf_counter() - started, stream.statistics()
    return Input(images / took, _per_core(loaded), workers, resolved.decoder, buffers)


def _per_core(loaded: LoaderStatistics) -> float:
    return loaded.images / loaded.seconds if loaded.seconds else 0.0


def _of_one_shard(config: Config, view: View, source: RemoteSource, decoder: str, seconds: float) -> float:
    reader = TrainReader(source.held, view, decoder, config.seed, "skip", source.shard)
    shard = source.split.hold(0)
    try:
        near = np.flatnonzero(source.shard == 0)
        images = np.empty((_AT_ONCE, view.size, view.size, 3), np.uint8)
        labels = np.empty(_AT_ONCE, np.int64)
        started, done = time.perf_counter(), 0
        while not done or time.perf_counter() - started < seconds:
            samples = near[(done + np.arange(_AT_ONCE)) % len(near)].tolist()
            reader.fill(0, samples, images, labels)
            done += _AT_ONCE
        return done / (time.perf_counter() - started)
    finally:
        shard.release()


def try_sample(config: Config, dataset: Dataset, rank: int, count: int, seconds: float) -> TrialRead:
    """Read and decode in full, with Pillow, `count` pictures drawn by `rank`: half of each split, or all there are.

    They are fewer where `seconds` do not suffice, half of which are for each split.
    """
    draw = np.random.default_rng([config.seed, rank])
    images = drawn = bytes_read = 0
    read_s = 0.0
    bad: list[BadSample] = []
    for source in (dataset.train, dataset.val):
        samples = _drawn(source, max(1, count // 2), draw)
        drawn += len(samples)
        reader = EvalReader(source, View.from_config(config.data), PILLOW)
        out = np.empty((1, reader.size, reader.size, 3), np.uint8)
        end = time.perf_counter() + seconds / 2
        for sample in samples:
            started = time.perf_counter()
            if started > end:
                break
            images += 1
            with contextlib.suppress(OSError):  # the reader tells of it
                item = source.read(sample)
                bytes_read += item.nbytes if isinstance(item, np.ndarray) else len(item)
            read_s += time.perf_counter() - started
            bad += reader.fill(0, [sample], out, np.empty(1, np.int64)).bad
    return TrialRead(images, bytes_read, read_s, tuple(f"{one.where} ({one.reason})" for one in bad), drawn)


def _drawn(source: Source, count: int, draw: np.random.Generator) -> list[int]:
    choices = np.arange(len(source))
    if isinstance(source, RemoteSource) and isinstance(source, Sharded):
        # One shard is fetched, not one for each picture.
        choices = np.flatnonzero(source.shard == source.shard[draw.integers(len(source))])
    found: list[int] = draw.choice(choices, min(count, len(choices)), replace=False).tolist()
    return found
