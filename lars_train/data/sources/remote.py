"""Read a packed store at a URL as a `Tree`, with a cache of its index and shards on a local disk.

The index is fetched when the store is opened. A shard is fetched when one of its images is read or, for a stream, ahead
of time (shard_prefetch.py). Every image is verified by its checksum in the index.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels, Names, Source
from lars_train.data.inventory import Inventory, parse_inventory
from lars_train.data.shard_cache import CacheEntry, Held, ShardCache, Wait
from lars_train.data.sources.index_files import MALFORMED, Damaged, describe_damage, read_mapped
from lars_train.data.sources.shards import (
    INDEX,
    Packed,
    Shard,
    ShardSource,
    ShardTree,
    digest,
    parse_splits,
    read_index,
)
from lars_train.data.sources.tree import Rows
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import cache_folder, read_at, user_path
from lars_train.messages import complain, first_line, printable

ATTEMPTS_AT_OPEN = 4
"""Attempts of a request while a store is opened: fewer than later, because the URL or the credentials may be wrong."""

# Keys of metadata that identify the version of an object. Each file system reports some of them.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "VersionId", "generation", "ino"),
    *("mtime", "created", "updated", "LastModified", "last_modified", "Last-Modified"),
)
_FETCHES = 2  # attempts to get a shard with correct checksums


@dataclass(frozen=True)
class CacheSettings:
    """The folder of the cache, and the most bytes that it may take. None stands for a folder in the user's cache."""

    folder: str | None = None
    limit: int = 64 * 10**9

    def cache(self) -> ShardCache:
        """Return the cache with these settings."""
        folder = cache_folder() / "shards" if self.folder is None else user_path(self.folder)
        return ShardCache(folder, self.limit)


@dataclass(frozen=True)
class RemoteSplit:
    """The shards of one split, which are fetched into the folder `name` of `cache`.

    `index`: the index file that `packed` is mapped from, held so that it stays in the cache.
    """

    objects: Objects
    cache: ShardCache
    name: str
    packed: Packed
    index: Held

    def hold(self, number: int, wait: Wait = time.sleep) -> Held:
        """Hold a shard in the cache, after verifying every image in it. Raises `DataError` and OSError."""
        shard = self.packed.shards[number]
        inside = self.shard_path(shard)

        def fetch(handle: int) -> None:
            for _ in range(_FETCHES):
                self.objects.fetch(inside, shard.size, handle, wait)
                wrong = self._find_damage(number, handle)
                if not wrong:
                    return
            raise DataError(
                f"{self.objects.location(inside)}: {wrong}; the store was changed or damaged. Copy it again, and check "
                "the original with lars-data verify."
            )

        entry = CacheEntry(f"{self.name}/{inside}", shard.size, fetch, lambda handle: self._find_damage(number, handle))
        return self.cache.hold(entry, wait)

    def shard_path(self, shard: Shard) -> str:
        """Return the path of a shard within the store."""
        return shard.path.relative_to(self.cache.folder / self.name).as_posix()

    def _find_damage(self, number: int, handle: int) -> str:
        """Verify the checksums of a shard. Return the first failure; empty if all are correct."""
        places = self.packed.places
        samples = np.flatnonzero(places.shard == number)
        for sample in samples[np.argsort(places.offset[samples])].tolist():
            data = read_at(handle, int(places.size[sample]), int(places.offset[sample]))
            if digest(data) != int(self.packed.sums[sample]):
                return f"the checksum of {printable(self.packed.listing.names[sample])} in it is wrong"
        return ""


class HeldSource(ShardSource):
    """Samples of a remote split, for a caller that holds the shards. A missing shard raises `DataError`."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, rows: Rows | None) -> None:
        packed = split.packed
        places = packed.places if rows is None else packed.places.take(rows)
        # Files that stay open would take disk space after they are removed to make room.
        super().__init__(packed.shards, names, labels, places, keep_open=False)
        self.split = split

    def location(self, sample: int) -> str:
        """Return ``URL!NAME`` for messages."""
        shard = self.split.packed.shards[int(self.shard[sample])]
        return f"{self.split.objects.location(self.split.shard_path(shard))}!{printable(self._names[sample])}"

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises `DataError`."""
        try:
            return super().read(sample)
        except OSError as error:
            # A `DataError`, because the image is not bad and must not be replaced.
            raise DataError(
                f"{self.location(sample)} cannot be read in the cache {self.split.cache.folder} "
                f"({error.strerror or error}); were files removed there? Run the same command again to resume."
            ) from error


class RemoteSource(HeldSource):
    """Samples of a remote split; reading a sample fetches its shard."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, rows: Rows | None) -> None:
        super().__init__(split, names, labels, rows)
        self.held = HeldSource(split, names, labels, rows)
        """The same samples, for a caller that holds the shards."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """The size of each shard in bytes: int64 (shards,)."""
        return np.array([shard.size for shard in self.split.packed.shards], np.int64)

    def read(self, sample: int) -> bytes:
        """Return the encoded image, after fetching its shard if necessary. Raises `DataError` and OSError."""
        held = self.split.hold(int(self.shard[sample]))
        try:
            return super().read(sample)
        finally:
            held.release()


class RemoteTree(ShardTree):
    """A store at a URL."""

    def __init__(
        self, url: str, path: Path, remote: dict[str, RemoteSplit], variant: str, inventory: Inventory
    ) -> None:
        super().__init__(path, {name: split.packed for name, split in remote.items()}, variant, inventory)
        self.place = url
        self._remote = remote

    def source(self, inside: bytes, names: Names, labels: Labels, rows: Rows | None = None) -> Source:
        """Return a source of the split `inside` that fetches a shard when one of its samples is read."""
        return RemoteSource(self._remote[os.fsdecode(inside)], names, labels, rows)


def open_remote(url: str, settings: CacheSettings) -> RemoteTree:
    """Open the store at `url`. Raises `ConfigError` if there is no usable store."""
    objects, cache = Objects(url), settings.cache()
    name = f"store-{hashlib.sha256(objects.url.encode()).hexdigest()[:16]}"
    try:
        held, path = _index(objects, cache, name)
        meta, arrays = read_index(path)
        splits = parse_splits(cache.folder / name, meta, arrays, check_files=False)
        if any(len(packed.sums) != len(packed.listing.names) for packed in splits.values()):
            raise Damaged("it has no checksums")
        remote = {split: RemoteSplit(objects, cache, name, packed, held) for split, packed in splits.items()}
        return RemoteTree(
            objects.url, cache.folder / name, remote, str(meta["variant"]), parse_inventory(meta["inventory"])
        )
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache.folder} cannot be used ({error.strerror or error}); give a folder on a local disk."
        ) from error
    except DataError as error:
        raise ConfigError(f"data.root={url}: {error}") from error
    except MALFORMED as error:
        raise ConfigError(
            f"data.root={url}: {INDEX} cannot be used ({describe_damage(error)}); copy the store again."
        ) from error


def _index(objects: Objects, cache: ShardCache, name: str) -> tuple[Held, Path]:
    """Hold the index in the cache, and return it with its path. Raises `DataError` and OSError."""
    try:
        info = objects.info(INDEX, ATTEMPTS_AT_OPEN)
    except DataError as error:
        raise DataError(
            f"{error} Only packed stores can be read from URLs: pack the images with lars-data pack, and copy the "
            "store there."
        ) from error
    size = info.get("size")
    if type(size) is not int:
        raise DataError(f"{objects.location(INDEX)}: the server does not report its size.")
    # Without version metadata, the index is fetched at every start.
    versions = {key: str(info[key]) for key in _VERSIONS if info.get(key)} or {"unknown": str(time.time_ns())}
    version = hashlib.sha256(repr((size, sorted(versions.items()))).encode()).hexdigest()[:16]
    path = cache.folder / name / f"{version}.index"

    def fetch(handle: int) -> None:
        objects.fetch(INDEX, size, handle, attempts=ATTEMPTS_AT_OPEN)

    def wrong(handle: int) -> str:
        try:
            read_mapped(path)
        except Damaged as error:
            return str(error)
        return ""

    return cache.hold(CacheEntry(f"{name}/{path.name}", size, fetch, wrong)), path


T = TypeVar("T")

ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 8, 1.0, 30.0
"""Attempts of a request. Pauses double up to a limit, and jitter shortens them by up to half: 91 s at most in total."""

PIECE_BYTES = 16 << 20
"""Bytes of a shard per request."""

# Errors that a retry cannot fix.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)


class Objects:
    """The objects below a URL. Can be pickled, and used after a fork: each process connects on first use.

    Its methods raise `DataError` with the object and the reason if a request fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connection: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.url,)

    def info(self, name: str, attempts: int = ATTEMPTS, wait: Wait = time.sleep) -> dict[str, Any]:
        """Return the metadata of an object: its ``size`` in bytes and more, depending on the file system."""
        return self._retry(name, _info, attempts, wait)

    def fetch(self, name: str, size: int, handle: int, wait: Wait = time.sleep, attempts: int = ATTEMPTS) -> None:
        """Write an object, which must have `size` bytes, to a file descriptor. Raises OSError if writing fails."""
        length = self.info(name, attempts, wait).get("size")
        if length is not None and length != size:
            raise DataError(
                f"{self.location(name)} has {length:,} bytes, not {size:,}: the store was changed, or copied "
                "incompletely; copy it again."
            )
        at = 0
        while at < size:
            piece = partial(_range, start=at, stop=min(at + PIECE_BYTES, size), size=size)
            data = self._retry(name, piece, attempts, wait)
            while data:
                written = os.pwrite(handle, data, at)
                data, at = data[written:], at + written
            wait(0)

    def location(self, name: str) -> str:
        """Return the URL of an object, for messages."""
        return f"{self.url}/{printable(name)}"

    def _retry(self, name: str, ask: Callable[[Any, str], T], attempts: int, wait: Wait) -> T:
        fs, root = self._file_system()
        pause = FIRST_PAUSE_S
        for left in reversed(range(attempts)):
            try:
                return ask(fs, f"{root}/{name}")
            except _FINAL as error:
                raise DataError(f"{self.location(name)} cannot be read ({_describe_error(error)}).") from error
            # Each library below fsspec has its own exceptions.
            except Exception as error:
                reason = _describe_error(error)
                if not left:
                    raise DataError(
                        f"{self.location(name)} cannot be read ({reason}); tried {attempts} times."
                    ) from error
            seconds = pause * random.SystemRandom().uniform(0.5, 1)
            complain(f"{self.location(name)}: {reason}; retrying in {seconds:.1f} s.")
            wait(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError

    def _file_system(self) -> tuple[Any, str]:
        # A connection of the parent process cannot be used after a fork.
        if self._connection is None or self._connection[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                remedy = "for s3:// and https://: pip install s3fs aiohttp"
                raise DataError(f"{self.url}: a library is missing ({error}; {remedy}).") from error
            except Exception as error:
                raise DataError(f"{self.url} cannot be used ({_describe_error(error)}).") from error
            self._connection = (os.getpid(), fs, root.rstrip("/"))
        return self._connection[1:]


def _info(fs: Any, path: str) -> dict[str, Any]:
    return dict(fs.info(path))


def _range(fs: Any, path: str, start: int, stop: int, size: int) -> bytes:
    data: bytes = fs.cat_file(path, start=start, end=stop)
    # A simple web server may ignore the range and send the whole object.
    if len(data) == size:
        data = data[start:stop]
    if len(data) != stop - start:
        raise OSError(f"received {len(data):,} bytes instead of {stop - start:,} from offset {start:,}")
    return data


def _describe_error(error: BaseException) -> str:
    text = first_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
