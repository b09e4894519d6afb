"""Tar shards as a `Tree`, and their samples as a `Source`: an index says where each image lies, ``pread`` reads it.

The index holds names, labels and places, and is mapped into memory. It may come from a stranger with the store: every
number in it is checked against the shards when it is opened, and a name in it never becomes a path on disk, but for the
shards' own, which are plain file names. How a store is made is the business of lars_train.pack.
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
from lars_train.data.sources.tree import Listing, Ranks
from lars_train.data.splits import SPLITS, is_split_name
from lars_train.errors import ConfigError
from lars_train.fsutil import read_at
from lars_train.messages import printable

INDEX = "index.lars"
"""The file of a store that makes it one; it is written last."""

PACKING = ".packing"
"""The folder in a store that is not finished."""

VERSION = 1
# Shards that stay open, at most and as a share of what the system allows a process; others are opened for each read.
_HANDLES, _SHARE = 512, 4


@dataclass(frozen=True)
class Shard:
    """A tar file: its path, and the bytes that it must have."""

    path: Path
    size: int


@dataclass(frozen=True)
class Places:
    """The places of samples: the shard (int32), the first byte in it (int64), and the size (int64). Each (N,)."""

    shard: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]

    def take(self, ranks: Ranks) -> Places:
        """Return the places at `ranks`."""
        return Places(self.shard[ranks], self.offset[ranks], self.size[ranks])


@dataclass(frozen=True)
class Packed:
    """One split of a store."""

    shards: tuple[Shard, ...]
    listing: Listing
    places: Places
    sums: npt.NDArray[np.uint64]
    """Shape (N,): the digest of each image (`digest`); empty in an index of shards made by others."""


class ShardSource(NamedSource):
    """Samples that are members of tar shards. Safe to use from several threads.

    `keep_open`: shards that are read stay open, as far as the system allows.
    """

    def __init__(
        self, shards: tuple[Shard, ...], names: Names, labels: Labels, places: Places, keep_open: bool = True
    ) -> None:
        super().__init__(names, labels)
        self.shard = places.shard
        self._files = _Files(shards, keep_open)
        self._places = places

    def location(self, sample: int) -> str:
        name = self._names[sample]
        path = self._files.shards[int(self._places.shard[sample])].path
        return f"{printable(os.fsencode(path))}!{printable(name)}"

    def read(self, sample: int) -> bytes:
        count = int(self._places.size[sample])
        data = self._files.read(int(self._places.shard[sample]), count, int(self._places.offset[sample]))
        if len(data) != count:
            raise OSError("the shard ends early; was it replaced during the run?")
        return data


class ShardTree:
    """A store of tar shards: splits as folders, classes as folders in them. What is not in its index is not there."""

    def __init__(
        self, path: Path, splits: dict[str, Packed], variant: str = "", inventory: Inventory | None = None
    ) -> None:
        self.place = str(path)
        self.path = path
        self.variant = variant
        self.splits = splits
        self.inventory = inventory or Inventory()

    def folders(self, inside: bytes) -> list[bytes]:
        if not inside:
            return sorted(name.encode() for name in self.splits)
        split = self.splits.get(os.fsdecode(inside))
        return list(split.listing.classes) if split else []

    def files(self, inside: bytes) -> list[bytes]:
        return []

    def hidden(self) -> Counter[str]:
        return Counter()

    def listing(self, inside: bytes) -> Listing:
        return self.splits[os.fsdecode(inside)].listing

    def read(self, path: bytes) -> bytes:
        raise FileNotFoundError(f"{printable(path)} is not there")

    def source(self, inside: bytes, names: Names, labels: Labels, ranks: Ranks | None = None) -> Source:
        split = self.splits[os.fsdecode(inside)]
        return ShardSource(split.shards, names, labels, split.places if ranks is None else split.places.take(ranks))


def digest(data: bytes) -> int:
    """The checksum of an image, 64 bits: BLAKE2b's (RFC 7693), for a digest of 8 bytes, little-endian."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def is_store(path: Path) -> bool:
    """Return True if the folder `path` is a store, or is becoming one."""
    return (path / INDEX).exists() or (path / PACKING).is_dir()


def open_shard_store(path: Path) -> ShardTree:
    """The store at `path`. Raises `ConfigError` where it is not finished, damaged, or not as its index says."""
    if not (path / INDEX).exists():
        raise ConfigError(f"data.root={path} is a store that is not finished; run its `lars-data pack` again.")
    try:
        meta, arrays = read_index(path / INDEX)
        return ShardTree(path, splits_of(path, meta, arrays), str(meta["variant"]), inventory_of(meta))
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


def splits_of(path: Path, meta: dict[str, Any], arrays: Arrays, *, elsewhere: bool = False) -> dict[str, Packed]:
    """The splits that an index describes, every number in it checked against the shards.

    `elsewhere`: the shards are not there (yet), and are not looked at.

    Raises `Damaged`, OSError, and what comes of values that are of another kind.
    """
    classes = tuple(name.encode("latin-1") for name in meta["classes"])
    if len(classes) != len(set(classes)) or any(b"\0" in name for name in classes):
        raise Damaged("a class is in it twice")
    found = {}
    for name, split in meta["splits"].items():
        if name not in SPLITS:
            raise Damaged("it has a split by another name")
        shards = tuple(_shard(path, where, size, elsewhere) for where, size in split["shards"])
        parts = {
            part: arrays[f"{name}.{part}"] for part in ("names", "starts", "labels", "shard", "offset", "size", "sums")
        }
        found[name] = _packed(classes, shards, bool(split["complete"]), parts, parse_counts(split["skipped"]))
    return found


def index_of(path: Path, splits: Mapping[str, Packed]) -> tuple[dict[str, Any], Arrays]:
    """The classes and the `splits` of the store at `path` for an index file, from which `splits_of` has them again."""
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


def inventory_of(meta: dict[str, Any]) -> Inventory:
    """Return the inventory of the data set that the store was made from.

    Raises ValueError and what comes of values that are of another kind.
    """
    return parse_inventory(meta["inventory"])


def _shard(path: Path, where: str, size: int, elsewhere: bool) -> Shard:
    folder, _, name = where.rpartition("/")
    plain = name.lower().endswith(".tar") and not name.startswith(".") and "\0" not in name
    if (folder and not is_split_name(folder)) or not plain or type(size) is not int or size < 0:
        raise Damaged("a shard's name is none")
    shard = Shard(path / folder / name, size)
    if elsewhere:
        return shard
    found = shard.path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != size:
        raise Damaged(f"{where} is not the file of {size:,} bytes that it should be")
    return shard


def _packed(
    classes: tuple[bytes, ...], shards: tuple[Shard, ...], complete: bool, parts: Arrays, skipped: dict[str, int]
) -> Packed:
    names, labels = Names.from_arrays(parts["names"], parts["starts"]), parts["labels"]
    places = Places(parts["shard"], parts["offset"], parts["size"])
    kinds = [labels.dtype, places.shard.dtype, places.offset.dtype, places.size.dtype, parts["sums"].dtype]
    lengths = {len(names), len(labels), len(places.shard), len(places.offset), len(places.size)}
    if kinds != [np.int32, np.int32, np.int64, np.int64, np.uint64] or len(lengths) != 1:
        raise Damaged("its parts do not fit together")
    if len(parts["sums"]) not in (0, len(names)):
        raise Damaged("its parts do not fit together")
    if len(labels):
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise Damaged("a label has no class")
        _check_places(places, np.array([shard.size for shard in shards], np.int64))
    return Packed(shards, Listing(classes, names, labels, complete, skipped), places, parts["sums"])


def _check_places(places: Places, lengths: npt.NDArray[np.int64]) -> None:
    """Raise `Damaged` unless each place lies within its shard, and no two overlap."""
    if not 0 <= places.shard.min() <= places.shard.max() < len(lengths):
        raise Damaged("a picture lies in a shard that is not there")
    room = lengths[places.shard]
    # Written so that no sum can overflow.
    if np.any(places.offset < 0) or np.any(places.size < 0) or np.any(places.offset > room):
        raise Damaged("a picture lies outside of its shard")
    if np.any(places.size > room - places.offset):
        raise Damaged("a picture reaches beyond the end of its shard")
    if sum(lengths.tolist()) >= 1 << 62:
        raise Damaged("its shards are larger than any disk")
    # As if all shards were one file: sorting one number is several times as fast as sorting pairs.
    begin = (np.cumsum(lengths) - lengths)[places.shard] + places.offset
    order = np.argsort(begin)
    begin, size = begin[order], places.size[order]
    if np.any(begin[:-1] + size[:-1] > begin[1:]):
        raise Damaged("two pictures overlap")


class _Files:
    """The shards' files, read with ``pread``: there is no file position for threads and forked processes to share.

    An open file is never closed while the source lives, for another thread may be reading from it.
    """

    def __init__(self, shards: tuple[Shard, ...], keep_open: bool) -> None:
        self.shards, self._keep_open = shards, keep_open
        self._handles: dict[int, int] = {}
        self._opening = threading.Lock()
        weakref.finalize(self, _close, self._handles)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = _HANDLES if allowed == resource.RLIM_INFINITY else min(_HANDLES, allowed // _SHARE)
        if not keep_open:
            self._most = 0

    def __reduce__(self) -> tuple[type[_Files], tuple[tuple[Shard, ...], bool]]:
        return _Files, (self.shards, self._keep_open)

    def read(self, shard: int, count: int, offset: int) -> bytes:
        """`count` bytes, or fewer where the file ends."""
        handle = self._handles.get(shard)
        if handle is not None:
            return read_at(handle, count, offset)
        with self._opening:
            if shard not in self._handles and len(self._handles) < self._most:
                self._handles[shard] = _open(self.shards[shard].path)
            handle = self._handles.get(shard)
        if handle is not None:
            return read_at(handle, count, offset)
        handle = _open(self.shards[shard].path)
        try:
            return read_at(handle, count, offset)
        finally:
            os.close(handle)


def _close(handles: dict[int, int]) -> None:
    for handle in handles.values():
        os.close(handle)


def _open(path: Path) -> int:
    # Without waiting: a pipe in the place of a shard would hold the run for good.
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
