"""Read tar shards as a `Tree`, and their samples as a `Source`: an index locates each image, ``pread`` reads it.

The index holds names, labels and positions, and is memory-mapped. Since a store may come from somebody else, opening it
checks every number in the index against the shards. No name in the index becomes a path on disk, except the names of
the shards, which must be plain file names. lars_train.pack writes stores.
"""

from __future__ import annotations

import hashlib
import os
import resource
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels, NamedSource, Names, Source
from lars_train.data.inventory import Inventory, parse_counts, parse_inventory
from lars_train.data.sources.index_files import MALFORMED, Arrays, Damaged, describe_damage, read_mapped
from lars_train.data.sources.tree import Listing, Rows
from lars_train.data.splits import SPLITS, is_split_name
from lars_train.errors import ConfigError
from lars_train.fsutil import read_at
from lars_train.messages import printable

INDEX = "index.lars"
"""The index file of a store. It is written last, so a store with an index is complete."""

PACKING = ".packing"
"""A folder that exists in a store while it is being packed."""

VERSION = 1
# Limits on the shards that stay open: their number, and the share (1 / _SHARE) of the process's limit on open files.
# Other shards are opened for each read.
_HANDLES, _SHARE = 512, 4


@dataclass(frozen=True)
class Shard:
    """A tar file: its path, and the size in bytes that it must have."""

    path: Path
    size: int


@dataclass(frozen=True)
class Places:
    """The positions of samples: shard number (int32), first byte in the shard (int64), and size (int64). Each (N,)."""

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]

    def take(self, rows: Rows) -> Places:
        """Return the positions of the samples at `rows`."""
        return Places(self.shard[rows], self.offset[rows], self.size[rows])


@dataclass(frozen=True)
class Packed:
    """One split of a store."""

    shards: tuple[Shard, ...]
    listing: Listing
    places: Places
    sums: npt.NDArray[np.uint64]
    """Shape (N,): the `digest` of each image; empty in an index of webdataset's tars."""


class ShardSource(NamedSource):
    """Samples that are members of tar shards. Safe to use from several threads.

    `keep_open`: keep shards open after a read, as far as the system allows.
    """

    def __init__(
        self, shards: tuple[Shard, ...], names: Names, labels: Labels, places: Places, keep_open: bool = True
    ) -> None:
        super().__init__(names, labels)
        self.shard = places.shard
        self._files = _ShardFiles(shards, keep_open)
        self._places = places

    def location(self, sample: int) -> str:
        """Return ``SHARD!NAME`` for messages."""
        name = self._names[sample]
        path = self._files.shards[int(self._places.shard[sample])].path
        return f"{printable(os.fsencode(path))}!{printable(name)}"

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        count = int(self._places.size[sample])
        data = self._files.read(int(self._places.shard[sample]), count, int(self._places.offset[sample]))
        if len(data) != count:
            raise OSError("the shard is too short; was it replaced during the run?")
        return data


class ShardTree:
    """A store of tar shards as a tree of the entries in its index: folders are splits, with classes as subfolders."""

    def __init__(
        self, path: Path, splits: dict[str, Packed], variant: str = "", inventory: Inventory | None = None
    ) -> None:
        self.place = str(path)
        self.path = path
        self.variant = variant
        self.splits = splits
        self.inventory = inventory or Inventory()

    def folders(self, inside: bytes) -> list[bytes]:
        """Return the splits of the store, or the classes of the split `inside`."""
        if not inside:
            return sorted(name.encode() for name in self.splits)
        split = self.splits.get(os.fsdecode(inside))
        return list(split.listing.classes) if split else []

    def files(self, inside: bytes) -> list[bytes]:
        """Return an empty list: a store has no files beside its images."""
        return []

    def hidden(self) -> Counter[str]:
        """Return no counts: the index lists no hidden entries."""
        return Counter()

    def listing(self, inside: bytes) -> Listing:
        """Return the listing of the split `inside`."""
        return self.splits[os.fsdecode(inside)].listing

    def read(self, path: bytes) -> bytes:
        """Raise FileNotFoundError: a store has no files beside its images."""
        raise FileNotFoundError(f"{printable(path)} does not exist")

    def source(self, inside: bytes, names: Names, labels: Labels, rows: Rows | None = None) -> Source:
        """Return a source that reads `names` of the split `inside` from its shards."""
        split = self.splits[os.fsdecode(inside)]
        return ShardSource(split.shards, names, labels, split.places if rows is None else split.places.take(rows))


def digest(data: bytes) -> int:
    """Return the 64-bit checksum of an image: BLAKE2b (RFC 7693) with a digest of 8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_store(path: Path) -> bool:
    """Return True if the folder `path` is a store, or one is being packed there."""
    return (path / INDEX).exists() or (path / PACKING).is_dir()


def open_shard_store(path: Path) -> ShardTree:
    """Open the store at `path`. Raises `ConfigError` if it is incomplete, damaged, or does not match its index."""
    if not (path / INDEX).exists():
        raise ConfigError(f"data.root={path} is an incomplete store; run its `lars-data pack` command again.")
    try:
        meta, arrays = read_index(path / INDEX)
        return ShardTree(
            path, parse_splits(path, meta, arrays), str(meta["variant"]), parse_inventory(meta["inventory"])
        )
    except OSError as error:
        where = path / INDEX if error.filename is None else Path(error.filename)
        name = where.relative_to(path) if where.is_relative_to(path) else where
        raise ConfigError(
            f"data.root={path}: {name} cannot be read ({error.strerror}); copy the store again, or pack it again."
        ) from error
    except MALFORMED as error:
        raise ConfigError(
            f"data.root={path}: {INDEX} cannot be used ({describe_damage(error)}); copy the store again, or pack it "
            "again."
        ) from error


def read_index(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and the arrays of a store's index file. Raises OSError, and `MALFORMED` if it is damaged."""
    meta, arrays = read_mapped(path)
    if meta["kind"] != "store" or meta["version"] != VERSION:
        raise Damaged(f"it is of kind {meta['kind']}, version {meta['version']}")
    return meta, arrays


def parse_splits(path: Path, meta: dict[str, Any], arrays: Arrays, *, check_files: bool = True) -> dict[str, Packed]:
    """Return the splits that an index describes, after checking every number in it against the shards.

    `check_files`: check that the shards exist and have the right size; False if they are not downloaded yet. Raises
    OSError, and `MALFORMED`.
    """
    classes = tuple(name.encode("latin-1") for name in meta["classes"])
    if len(classes) != len(set(classes)):
        raise Damaged("a class is listed twice")
    if any(b"\0" in name for name in classes):
        raise Damaged("the name of a class holds a NUL byte")
    splits = {}
    for name, split in meta["splits"].items():
        if name not in SPLITS:
            raise Damaged(f"it has a split named {printable(name)}")
        shards = tuple(_parse_shard(path, file, size, check_files) for file, size in split["shards"])
        parts = {
            part: arrays[f"{name}.{part}"] for part in ("names", "starts", "labels", "shard", "offset", "size", "sums")
        }
        splits[name] = _parse_split(classes, shards, bool(split["complete"]), parts, parse_counts(split["skipped"]))
    return splits


def make_index(path: Path, splits: Mapping[str, Packed]) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and the arrays of an index of `splits`, which are stored at `path`; see `parse_splits`."""
    described: dict[str, Any] = {}
    arrays: Arrays = {}
    for name, split in splits.items():
        blob, starts = split.listing.names.arrays
        parts: Arrays = {"names": blob, "starts": starts, "labels": split.listing.labels, "sums": split.sums}
        parts |= {"shard": split.places.shard, "offset": split.places.offset, "size": split.places.size}
        arrays |= {f"{name}.{part}": array for part, array in parts.items()}
        shards = [(shard.path.relative_to(path).as_posix(), shard.size) for shard in split.shards]
        skipped = dict(split.listing.skipped)
        described[name] = {"complete": split.listing.complete, "shards": shards, "skipped": skipped}
    classes = [name.decode("latin-1") for name in next(iter(splits.values())).listing.classes]
    return {"classes": classes, "splits": described}, arrays


def _parse_shard(path: Path, name: str, size: int, check_file: bool) -> Shard:
    folder, _, file = name.rpartition("/")
    plain = file.lower().endswith(".tar") and not file.startswith(".") and "\0" not in file
    if (folder and not is_split_name(folder)) or not plain or type(size) is not int or size < 0:
        raise Damaged("the name or the size of a shard is invalid")
    shard = Shard(path / folder / file, size)
    if check_file:
        status = shard.path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise Damaged(f"{name} is not a file of {size:,} bytes")
    return shard


def _parse_split(
    classes: tuple[bytes, ...], shards: tuple[Shard, ...], complete: bool, parts: Arrays, skipped: dict[str, int]
) -> Packed:
    names, labels = Names.from_arrays(parts["names"], parts["starts"]), parts["labels"]
    places = Places(parts["shard"], parts["offset"], parts["size"])
    kinds = [labels.dtype, places.shard.dtype, places.offset.dtype, places.size.dtype, parts["sums"].dtype]
    lengths = {len(names), len(labels), len(places.shard), len(places.offset), len(places.size)}
    if kinds != [np.int32, np.int32, np.int64, np.int64, np.uint64] or len(lengths) != 1:
        raise Damaged("its arrays do not match")
    if len(parts["sums"]) not in (0, len(names)):
        raise Damaged("its arrays do not match")
    if len(labels):
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise Damaged("a label has no class")
        _check_places(places, np.array([shard.size for shard in shards], np.int64))
    return Packed(shards, Listing(classes, names, labels, complete, skipped), places, parts["sums"])


def _check_places(places: Places, lengths: npt.NDArray[np.int64]) -> None:
    """Raise `Damaged` unless each image lies within its shard, and no two overlap."""
    if not 0 <= places.shard.min() <= places.shard.max() < len(lengths):
        raise Damaged("an image lies in a shard that does not exist")
    length = lengths[places.shard]
    # Compare by subtraction: `offset + size` could overflow.
    if np.any(places.offset < 0) or np.any(places.size < 0) or np.any(places.offset > length):
        raise Damaged("an image lies outside its shard")
    if np.any(places.size > length - places.offset):
        raise Damaged("an image extends beyond the end of its shard")
    if sum(lengths.tolist()) >= 1 << 62:
        raise Damaged("its shards are larger than any disk")
    # Positions as if all shards were one file: sorting single numbers is several times as fast as sorting pairs.
    begin = (np.cumsum(lengths) - lengths)[places.shard] + places.offset
    order = np.argsort(begin)
    begin, size = begin[order], places.size[order]
    if np.any(begin[:-1] + size[:-1] > begin[1:]):
        raise Damaged("two images overlap")


class _ShardFiles:
    """The shards of a source. ``pread`` reads them, so threads and forked processes share no file position.

    An open file stays open while the source lives, because another thread may be reading from it.
    """

    def __init__(self, shards: tuple[Shard, ...], keep_open: bool) -> None:
        self.shards, self._keep_open = shards, keep_open
        self._handles: dict[int, int] = {}
        self._opening = threading.Lock()
        weakref.finalize(self, _close_all, self._handles)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = _HANDLES if allowed == resource.RLIM_INFINITY else min(_HANDLES, allowed // _SHARE)
        if not keep_open:
            self._max_open = 0

    def __reduce__(self) -> tuple[type[_ShardFiles], tuple[tuple[Shard, ...], bool]]:
        return _ShardFiles, (self.shards, self._keep_open)

    def read(self, shard: int, count: int, offset: int) -> bytes:
        """Read `count` bytes, or fewer where the file ends."""
        handle = self._handles.get(shard)
        if handle is not None:
            return read_at(handle, count, offset)
        with self._opening:
            if shard not in self._handles and len(self._handles) < self._max_open:
                self._handles[shard] = _open(self.shards[shard].path)
            handle = self._handles.get(shard)
        if handle is not None:
            return read_at(handle, count, offset)
        handle = _open(self.shards[shard].path)
        try:
            return read_at(handle, count, offset)
        finally:
            os.close(handle)


def _close_all(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def _open(path: Path) -> int:
    # O_NONBLOCK: opening a pipe in place of a shard would block forever.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
