"""A packed store that lies at a URL, as a `Tree`: its index and shards come through a cache on a local disk.

The index is fetched when the store is opened; a shard when an image in it is read or, for a stream, before
(shard_prefetch.py). All that comes is checked by the index.
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
from lars_train.data.sources.index_files import MALFORMED, Damaged, describe_damage, read_mapped
from lars_train.data.sources.shard_cache import Entry, Held, ShardCache, Wait
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
from lars_train.data.sources.tree import Ranks
from lars_train.errors import ConfigError, DataError
from lars_train.fsutil import cache_folder, read_at, user_path
from lars_train.messages import complain, first_line, printable

ATTEMPTS_AT_OPEN = 4
"""Fewer requests when a store is opened: there it may be the URL or the credentials that are wrong."""

# By these, whichever of them a file system has, an object is known to be the one that it was.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "Content-MD5", "VersionId", "generation", "ino"),
    *("mtime", "created", "updated", "LastModified", "last_modified", "Last-Modified"),
)
_TRIES = 2  # to get a shard whose checksums are right


@dataclass(frozen=True)
class CacheSettings:
    """The folder of the cache (None: among the user's caches), and the bytes that it may take."""

    folder: str | None = None
    limit: int = 64 * 10**9

    def cache(self) -> ShardCache:
        """The cache."""
        if self.folder is not None:
            return ShardCache(user_path(self.folder), self.limit)
        return ShardCache(cache_folder() / "shards", self.limit)


@dataclass(frozen=True)
class RemoteSplit:
    """The shards of one split, which are fetched into `cache` below its folder `name`.

    `index`: the file that `packed` is mapped from; it is not to make room meanwhile.
    """

    objects: Objects
    cache: ShardCache
    name: str
    packed: Packed
    index: Held

    def hold(self, number: int, wait: Wait = time.sleep) -> Held:
        """A shard, held in the cache: every image in it is what the index says. Raises `DataError`, OSError."""
        shard = self.packed.shards[number]
        inside = self.inside(shard)

        def fetch(handle: int) -> None:
            for _ in range(_TRIES):
                self.objects.fetch(inside, shard.size, handle, wait)
                wrong = self._wrong(number, handle)
                if not wrong:
                    return
            raise DataError(
                f"{self.objects.place(inside)}: {wrong}; the store was changed or damaged. Copy it again, and see what "
                "lars-data verify says of the original."
            )

        entry = Entry(f"{self.name}/{inside}", shard.size, fetch, lambda handle: self._wrong(number, handle))
        return self.cache.hold(entry, wait)

    def inside(self, shard: Shard) -> str:
        """The path of a shard within the store."""
        return shard.path.relative_to(self.cache.folder / self.name).as_posix()

    def _wrong(self, number: int, handle: int) -> str:
        """Return what is wrong with the content of a shard; empty where each image has its checksum."""
        places = self.packed.places
        samples = np.flatnonzero(places.shard == number)
        for sample in samples[np.argsort(places.offset[samples])].tolist():
            data = read_at(handle, int(places.size[sample]), int(places.offset[sample]))
            if digest(data) != int(self.packed.sums[sample]):
                return f"the checksum of {printable(self.packed.listing.names[sample])} in it is wrong"
        return ""


class HeldSource(ShardSource):
    """Samples of a remote split, for a caller that holds the shards. Raises `DataError` where they are not held."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, ranks: Ranks | None) -> None:
        packed = split.packed
        places = packed.places if ranks is None else packed.places.take(ranks)
        # Open files would take disk when they make room.
        super().__init__(packed.shards, names, labels, places, keep_open=False)
        self.split = split

    def location(self, sample: int) -> str:
        shard = self.split.packed.shards[int(self.shard[sample])]
        return f"{self.split.objects.place(self.split.inside(shard))}!{printable(self._names[sample])}"

    def read(self, sample: int) -> bytes:
        try:
            return super().read(sample)
        except OSError as error:
            # Not the image is bad, so nothing may stand in for it.
            raise DataError(
                f"{self.location(sample)}: it cannot be read in the cache {self.split.cache.folder} "
                f"({error.strerror or error}); was something removed there? The same command goes on."
            ) from error


class RemoteSource(HeldSource):
    """Samples of a remote split; a shard is fetched when one of its samples is read."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, ranks: Ranks | None) -> None:
        super().__init__(split, names, labels, ranks)
        self.held = HeldSource(split, names, labels, ranks)
        """The same samples, for a caller that holds the shards."""

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of all shards: int64 (shards,)."""
        return np.array([shard.size for shard in self.split.packed.shards], np.int64)

    def read(self, sample: int) -> bytes:
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

    def source(self, inside: bytes, names: Names, labels: Labels, ranks: Ranks | None = None) -> Source:
        return RemoteSource(self._remote[os.fsdecode(inside)], names, labels, ranks)


def open_remote(url: str, settings: CacheSettings) -> RemoteTree:
    """The store at `url`. Raises `ConfigError` where there is none, or none that can be used."""
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
    """The index, held, and where it lies. Raises `DataError`, OSError."""
    try:
        about = objects.about(INDEX, ATTEMPTS_AT_OPEN)
    except DataError as error:
        raise DataError(
            f"{error} Only packed stores are read from URLs: lars-data pack the images, and copy the store there."
        ) from error
    size = about.get("size")
    if type(size) is not int:
        raise DataError(f"{objects.place(INDEX)}: the server does not tell how long it is.")
    # Without a mark of its version it is fetched each time.
    versions = {key: str(about[key]) for key in _VERSIONS if about.get(key)} or {"unknown": str(time.time_ns())}
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

    return cache.hold(Entry(f"{name}/{path.name}", size, fetch, wrong)), path


T = TypeVar("T")

ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 8, 1.0, 30.0
"""Attempts of a request, with pauses that double and are shortened at random by up to a half: 90 s in all."""

PIECE = 16 << 20
"""Bytes of a shard that are asked for at a time."""

# What no second attempt mends.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)


class Objects:
    """The objects below a URL. Can be pickled, and used after a fork: each process connects on first use.

    Its methods raise `DataError`, which names the object and the reason, for what cannot be had.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._made: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.url,)

    def about(self, name: str, attempts: int = ATTEMPTS, wait: Wait = time.sleep) -> dict[str, Any]:
        """Return what the file system knows of an object: its ``size`` in bytes and more."""
        return self._tried(name, _about, attempts, wait)

    def fetch(self, name: str, size: int, handle: int, wait: Wait = time.sleep, attempts: int = ATTEMPTS) -> None:
        """Write an object, which must have `size` bytes, to a file descriptor. Raises OSError of the latter alone."""
        length = self.about(name, attempts, wait).get("size")
        if length is not None and length != size:
            raise DataError(
                f"{self.place(name)} has {length:,} bytes, not {size:,}: the store was changed, or not copied whole; "
                "copy it again."
            )
        at = 0
        while at < size:
            piece = partial(_range, start=at, stop=min(at + PIECE, size), size=size)
            data = self._tried(name, piece, attempts, wait)
            while data:
                written = os.pwrite(handle, data, at)
                data, at = data[written:], at + written
            wait(0)

    def place(self, name: str) -> str:
        """An object's URL, to be shown."""
        return f"{self.url}/{printable(name)}"

    def _tried(self, name: str, ask: Callable[[Any, str], T], attempts: int, wait: Wait) -> T:
        fs, root = self._file_system()
        pause = FIRST_PAUSE_S
        for left in reversed(range(attempts)):
            try:
                return ask(fs, f"{root}/{name}")
            except _FINAL as error:
                raise DataError(f"{self.place(name)} cannot be read ({_told(error)}).") from error
            # Each library that fsspec builds on has errors of its own.
            except Exception as error:
                reason = _told(error)
                if not left:
                    raise DataError(f"{self.place(name)} cannot be read ({reason}); tried {attempts} times.") from error
            seconds = pause * random.SystemRandom().uniform(0.5, 1)
            complain(f"{self.place(name)}: {reason}; tried again in {seconds:.1f} s.")
            wait(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError

    def _file_system(self) -> tuple[Any, str]:
        # Not the one of the process that this one was forked from.
        if self._made is None or self._made[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                remedy = "for s3:// and https://: pip install 'lars-train[remote]'"
                raise DataError(f"{self.url}: a library is missing ({error}; {remedy}).") from error
            except Exception as error:
                raise DataError(f"{self.url} cannot be used ({_told(error)}).") from error
            self._made = (os.getpid(), fs, root.rstrip("/"))
        return self._made[1:]


def _about(fs: Any, path: str) -> dict[str, Any]:
    return dict(fs.info(path))


def _range(fs: Any, path: str, start: int, stop: int, size: int) -> bytes:
    data: bytes = fs.cat_file(path, start=start, end=stop)
    # A plain web server may know no ranges, and send it all.
    if len(data) == size:
        data = data[start:stop]
    if len(data) != stop - start:
        raise OSError(f"{len(data):,} bytes came, not the {stop - start:,} from {start:,} on")
    return data


def _told(error: BaseException) -> str:
    text = first_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
