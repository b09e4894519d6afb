"""Measure a rank's input and output: the loader, a sample of images, and writes to the run's folders.

judge.py judges the results.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lars_train.config import Config
from lars_train.data.auto_augment import AutoAugment
from lars_train.data.dataset import Dataset, Sharded, Source
from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.loader import LoaderSpec, train_loader
from lars_train.data.loading.reader import BadSample, EvalReader, TrainReader
from lars_train.data.loading.stream import LENT, LoaderStatistics, pool_slots
from lars_train.data.sources.remote import RemoteSource
from lars_train.data.transforms import View
from lars_train.launch import Ranks
from lars_train.preflight.findings import Counts, Input, OutputFolder, TrialRead
from lars_train.run_plan import Plan, check_micro_batch
from lars_train.training.resolve import Resolved

MAX_WRITTEN = 10**9
"""Maximum number of bytes written to measure a disk."""
_CHUNK = 1 << 24
# A sync is quick if it takes less than this share of the time for the disk.
_QUICK_SYNC = 0.1
_PREFIX = ".lars-train-check-"
_IMAGES_AT_ONCE = 32


def count_images(config: Config, dataset: Dataset) -> Counts:
    """Return the number of images and classes."""
    train, val = len(dataset.train), len(dataset.val)
    held_out = config.data.holdout is not None
    return Counts(config.data.name, train, val, len(dataset.classes), held_out, dataset.fingerprint, dataset.inventory)


def measure_loader(
    config: Config,
    plan: Plan,
    resolved: Resolved,
    source: Source,
    ranks: Ranks,
    device: torch.device,
    workers: int,
    seconds: float,
) -> Input:
    """Take batches from this rank's loader as fast as possible for about `seconds`.

    Before that, the workers have at most `seconds` to fill their buffers. From a store at a URL only one shard is
    fetched; the result is the speed at which one core decodes the shard, times the number of workers.
    """
    view = View.for_training(config.data)
    slots = pool_slots(resolved.micro_batch, workers)
    buffers = slots * resolved.micro_batch * (3 * view.size**2 + 16)
    if isinstance(source, RemoteSource):
        per_core = _decode_one_shard(config, view, source, resolved.decoder, seconds)
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
        # Discard the batches that fill the buffers: they are loaded before timing starts.
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
        elapsed, statistics = time.perf_counter() - started, stream.statistics()
    return Input(images / elapsed, _per_core(statistics), workers, resolved.decoder, buffers)


def _per_core(statistics: LoaderStatistics) -> float:
    return statistics.images / statistics.seconds if statistics.seconds else 0.0


def _decode_one_shard(config: Config, view: View, source: RemoteSource, decoder: str, seconds: float) -> float:
    """Return the images per second of one core."""
    auto = AutoAugment.from_config(config.augment)
    reader = TrainReader(source.held, view, decoder, config.seed, "skip", source.shard, auto)
    shard = source.split.hold(0)
    try:
        members = np.flatnonzero(source.shard == 0)
        images = np.empty((_IMAGES_AT_ONCE, view.size, view.size, 3), np.uint8)
        labels = np.empty(_IMAGES_AT_ONCE, np.int64)
        started, done = time.perf_counter(), 0
        while not done or time.perf_counter() - started < seconds:
            samples = members[(done + np.arange(_IMAGES_AT_ONCE)) % len(members)].tolist()
            reader.fill(0, samples, images, labels)
            done += _IMAGES_AT_ONCE
        return done / (time.perf_counter() - started)
    finally:
        shard.release()


def read_sample(config: Config, dataset: Dataset, rank: int, count: int, seconds: float) -> TrialRead:
    """Read `count` images drawn for `rank`, half from each split, and decode them in full with Pillow.

    Fewer are read if a split has fewer, or if its half of `seconds` is up.
    """
    generator = np.random.default_rng([config.seed, rank])
    images = drawn = bytes_read = 0
    read_s = 0.0
    bad: list[BadSample] = []
    for source in (dataset.train, dataset.val):
        samples = _draw(source, max(1, count // 2), generator)
        drawn += len(samples)
        reader = EvalReader(source, View.from_config(config.data), PILLOW)
        out = np.empty((1, reader.size, reader.size, 3), np.uint8)
        end = time.perf_counter() + seconds / 2
        for sample in samples:
            started = time.perf_counter()
            if started > end:
                break
            images += 1
            with contextlib.suppress(OSError):  # `reader.fill` below returns it among the bad samples
                item = source.read(sample)
                bytes_read += item.nbytes if isinstance(item, np.ndarray) else len(item)
            read_s += time.perf_counter() - started
            bad += reader.fill(0, [sample], out, np.empty(1, np.int64)).bad
    return TrialRead(images, bytes_read, read_s, tuple(f"{image.where} ({image.reason})" for image in bad), drawn)


def _draw(source: Source, count: int, generator: np.random.Generator) -> list[int]:
    choices = np.arange(len(source))
    if isinstance(source, RemoteSource) and isinstance(source, Sharded):
        # Draw all images from one shard, instead of fetching a shard per image.
        choices = np.flatnonzero(source.shard == source.shard[generator.integers(len(source))])
    samples: list[int] = generator.choice(choices, min(count, len(choices)), replace=False).tolist()
    return samples


def nearest_existing(folder: Path) -> Path:
    """Return `folder`, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def inspect_checkpoint_folder(config: Config, directory: Path, checkpoint_bytes: int, seconds: float) -> OutputFolder:
    """Return the space and speed of the run `directory`'s disk.

    Writes up to a checkpoint's bytes for at most `seconds`, and removes them. Raises `OSError` if nothing can be
    written.
    """
    # The last `keep`, the best one, and the one being written.
    kept = checkpoint_bytes * (config.checkpoint.keep + 2)
    present = sum(path.stat().st_size for path in (directory / "checkpoints").glob("*.pt"))
    parent = nearest_existing(directory)
    free = shutil.disk_usage(parent).free
    written, elapsed = measure_write_speed(parent, min(checkpoint_bytes, MAX_WRITTEN, free // 2), seconds)
    needed = max(0, kept - present)
    return OutputFolder("checkpoints", "run.dir", str(directory), _filesystem(parent), free, needed, written, elapsed)


def inspect_shard_cache(config: Config, dataset: Dataset) -> OutputFolder | None:
    """Return the space for cached shards of a store at a URL; None for local data."""
    if not isinstance(dataset.train, RemoteSource):
        return None
    cache = dataset.train.split.cache
    parent = nearest_existing(cache.folder)
    needed = max(0, round(config.data.cache_gb * 1e9) - cache.used())
    free = shutil.disk_usage(parent).free
    return OutputFolder("cache", "data.cache_dir", str(cache.folder), _filesystem(parent), free, needed)


def measure_write_speed(folder: Path, count: int, seconds: float) -> tuple[int, float]:
    """Write up to `count` bytes to an unnamed file in `folder` for at most `seconds`.

    Return the bytes written, and the seconds until they were on disk.
    """
    chunk = os.urandom(min(count, _CHUNK))  # random, so that no file system can compress it
    with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX) as file:
        started, written = time.perf_counter(), 0
        # Bytes between syncs: few at first, twice as many after each quick sync. A slow disk never has gigabytes to
        # write when time is up, and a fast one is not slowed down by syncs.
        unsynced, max_unsynced = 0, _CHUNK
        while written < count and time.perf_counter() - started < seconds:
            try:
                done = file.write(chunk[: count - written])
                written, unsynced = written + done, unsynced + done
                if unsynced >= max_unsynced:
                    sync_started = time.perf_counter()
                    file.flush()
                    os.fsync(file.fileno())
                    unsynced, quick = 0, time.perf_counter() - sync_started < _QUICK_SYNC * seconds
                    max_unsynced *= 2 if quick else 1
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    break
                raise
        file.flush()
        os.fsync(file.fileno())
        return written, time.perf_counter() - started


@contextmanager
def marker_file(folder: Path) -> Iterator[tuple[str, str]]:
    """Keep a file in `folder` within the context; yield its name and content. Raises `OSError`."""
    token = uuid.uuid4().hex
    path = folder / f"{_PREFIX}{token}"
    path.write_text(token)
    try:
        yield path.name, token
    finally:
        path.unlink(missing_ok=True)


def _filesystem(folder: Path) -> str:
    return str(folder.stat().st_dev)
