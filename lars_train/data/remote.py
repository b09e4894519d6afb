"""A packed store that lies at a URL, as a `Tree`: its index and shards come through a cache on a local disk.

The index is fetched when the store is opened; a shard when a picture in it is read or, for a stream, before (ahead.py).
All that comes is checked by the index. Which requests are made, and how often, is objects.py's business.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lars_train.data.directory import user_path
from lars_train.data.mapped import Damaged, read_mapped
from lars_train.data.objects import Objects
from lars_train.data.shard_cache import Entry, Held, ShardCache, Wait
from lars_train.data.shards import INDEX, VERSION, Packed, Shard, ShardSource, ShardTree, digest, splits_of
from lars_train.data.source import Labels, Names, Source
from lars_train.data.tree import Ranks
from lars_train.errors import ConfigError, DataError
from lars_train.text import printable

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
    """Where the cache is (None: among the user's caches), and how many bytes it may take."""

    folder: str | None = None
    limit: int = 64 * 10**9

    def cache(self) -> ShardCache:
        """The cache."""
        if self.folder is not None:
            return ShardCache(user_path(self.folder), self.limit)
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return ShardCache(Path(caches) / "lars_train" / "shards", self.limit)


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
        """A shard, held in the cache: every picture in it is what the index says. Raises `DataError`, OSError."""
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
        """What is wrong with the content of a shard; empty where each picture has its checksum."""
        places = self.packed.places
        samples = np.flatnonzero(places.shard == number)
        for sample in samples[np.argsort(places.offset[samples])].tolist():
            data = os.pread(handle, int(places.size[sample]), int(places.offset[sample]))
            if digest(data) != int(self.packed.sums[sample]):
                return f"the checksum of {printable(self.packed.listing.names[sample])} in it is wrong"
        return ""


class HeldSource(ShardSource):
    """Samples of a remote split, for who sees to it that the shards are held. Raises `DataError` where they are not."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, ranks: Ranks | None) -> None:
        packed = split.packed
        places = packed.places if ranks is None else packed.places.take(ranks)
        # Open files would take disk when they make room.
        super().__init__(packed.shards, names, labels, places, keep_open=False)
        self.split = split

    def where(self, sample: int) -> str:
        shard = self.split.packed.shards[int(self.shard[sample])]
        return f"{self.split.objects.place(self.split.inside(shard))}!{printable(self._names[sample])}"

    def read(self, sample: int) -> bytes:
        try:
            return super().read(sample)
        except OSError as error:
            # Not the picture is bad, so nothing may stand in for it.
            raise DataError(
                f"{self.where(sample)}: it cannot be read in the cache {self.split.cache.folder} "
                f"({error.strerror or error}); was something removed there? The same command goes on."
            ) from error


class RemoteSource(HeldSource):
    """Samples of a remote split; a shard is fetched when one of its samples is read."""

    def __init__(self, split: RemoteSplit, names: Names, labels: Labels, ranks: Ranks | None) -> None:
        super().__init__(split, names, labels, ranks)
        self.held = HeldSource(split, names, labels, ranks)
        """The same samples, for who holds the shards."""

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

    def __init__(self, url: str, path: Path, remote: dict[str, RemoteSplit], variant: str) -> None:
        super().__init__(path, {name: split.packed for name, split in remote.items()}, variant)
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
        meta, arrays = read_mapped(path)
        if meta["kind"] != "store" or meta["version"] != VERSION:
            raise Damaged(f"it is of kind {meta['kind']}, version {meta['version']}")
        splits = splits_of(cache.folder / name, meta, arrays, elsewhere=True)
        if any(len(packed.sums) != len(packed.listing.names) for packed in splits.values()):
            raise Damaged("it has no checksums")
        remote = {split: RemoteSplit(objects, cache, name, packed, held) for split, packed in splits.items()}
        return RemoteTree(objects.url, cache.folder / name, remote, str(meta["variant"]))
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {cache.folder} cannot be used ({error.strerror or error}); give a folder on a local disk."
        ) from error
    except DataError as error:
        raise ConfigError(f"data.root={url}: {error}") from error
    except (Damaged, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = error if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"data.root={url}: {INDEX} cannot be used ({reason}); copy the store again.") from error


def _index(objects: Objects, cache: ShardCache, name: str) -> tuple[Held, Path]:
    """The index, held, and where it lies. Raises `DataError`, OSError."""
    try:
        about = objects.about(INDEX, ATTEMPTS_AT_OPEN)
    except DataError as error:
        raise DataError(f"{error} A copy of a store that lars-data pack has made is wanted there.") from error
    size = about.get("size")
    if type(size) is not int:
        raise DataError(f"{objects.place(INDEX)}: the server does not tell how long it is.")
    # Where nothing tells one version from another it is fetched each time.
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
