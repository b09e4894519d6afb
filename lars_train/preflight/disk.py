"""The folders that a run writes to: their room, their speed, and whether other machines see them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lars_train.config import Config
from lars_train.data.dataset import Dataset
from lars_train.data.sources.remote import RemoteSource
from lars_train.preflight.facts import OutputFolder

MOST_WRITTEN = 10**9
_CHUNK = 1 << 24
_SOON = 0.1
_PREFIX = ".lars-train-check-"


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that there is."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def checkpoint_folder(config: Config, directory: Path, checkpoint_bytes: int, seconds: float) -> OutputFolder:
    """Where checkpoints go; as many bytes as one has are written there, for `seconds` at most, and are gone again.

    Raises OSError where nothing can be written.
    """
    # The last `keep`, the best one, and one that is being written.
    kept = checkpoint_bytes * (config.checkpoint.keep + 2)
    there = sum(path.stat().st_size for path in (directory / "checkpoints").glob("*.pt"))
    place = existing(directory)
    free = shutil.disk_usage(place).free
    written, took = write_speed(place, min(checkpoint_bytes, MOST_WRITTEN, free // 2), seconds)
    needed = max(0, kept - there)
    return OutputFolder("checkpoints", "run.dir", str(directory), _filesystem(place), free, needed, written, took)


def shard_cache_folder(config: Config, dataset: Dataset) -> OutputFolder | None:
    """Where shards of a remote store are kept; None for a local one."""
    if not isinstance(dataset.train, RemoteSource):
        return None
    cache = dataset.train.split.cache
    place = existing(cache.folder)
    needed = max(0, round(config.data.cache_gb * 1e9) - cache.used())
    free = shutil.disk_usage(place).free
    return OutputFolder("cache", "data.cache_dir", str(cache.folder), _filesystem(place), free, needed)


def write_speed(folder: Path, count: int, seconds: float) -> tuple[int, float]:
    """Write up to `count` bytes to a file in `folder` that has no name, until `seconds` have passed.

    Returns the bytes and the seconds until they were on disk.
    """
    chunk = os.urandom(min(count, _CHUNK))  # no file system makes them smaller
    with tempfile.TemporaryFile(dir=folder, prefix=_PREFIX) as file:
        started, written = time.perf_counter(), 0
        # What waits in memory to be put on disk. It is little at first, and twice as much where that was soon done: the
        # clock is not run over by gigabytes for a slow disk, and a fast one is not kept waiting.
        waiting, most_waiting = 0, _CHUNK
        while written < count and time.perf_counter() - started < seconds:
            try:
                done = file.write(chunk[: count - written])
                written, waiting = written + done, waiting + done
                if waiting >= most_waiting:
                    since = time.perf_counter()
                    file.flush()
                    os.fsync(file.fileno())
                    waiting, quick = 0, time.perf_counter() - since < _SOON * seconds
                    most_waiting *= 2 if quick else 1
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    break
                raise
        file.flush()
        os.fsync(file.fileno())
        return written, time.perf_counter() - started


@contextmanager
def mark(folder: Path) -> Iterator[tuple[str, str]]:
    """A file in `folder` for others to see, by its name, and what it holds; it is gone afterwards. Raises OSError."""
    token = uuid.uuid4().hex
    path = folder / f"{_PREFIX}{token}"
    path.write_text(token)
    try:
        yield path.name, token
    finally:
        path.unlink(missing_ok=True)


def _filesystem(folder: Path) -> str:
    return str(folder.stat().st_dev)
