"""Define `Dataset`, the `Source` protocol of its splits, and `Names`, which stores millions of paths compactly.

Nothing here opens files or decodes images.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from lars_train.data.inventory import Inventory
from lars_train.errors import ConfigError
from lars_train.messages import printable

Labels = npt.NDArray[np.int32]
# Names are built and copied this many at a time, so that temporary memory does not grow with the split.
_CHUNK = 65536


class Source(Protocol):
    """Samples of one split, addressed by sample id.

    Sources can be pickled, and used after a fork: each process opens its file handles on first use.
    """

    labels: Labels
    """Shape (N,): the label of every sample."""

    def __len__(self) -> int: ...

    def name(self, sample: int) -> str:
        """Return the path of a sample within its split, such as ``n01440764/x.JPEG``."""
        ...

    def location(self, sample: int) -> str:
        """Return the full path, for messages: ``/data/train/cat/1.jpg`` or ``pets.zip!train/cat/1.jpg``."""
        ...

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        """Return the encoded image, or decoded pixels: uint8 (H, W) or (H, W, 3). Raises OSError if reading fails."""
        ...


@runtime_checkable
class Sharded(Source, Protocol):
    """A source whose samples are stored in shards."""

    shard: Labels
    """Shape (N,): the shard number of every sample."""


def sample_shards(source: Source) -> Labels:
    """Return the shard number of every sample, int32 (N,). Raises ValueError for a source without shards."""
    if not isinstance(source, Sharded):
        raise ValueError("the samples of this source are not stored in shards")
    return source.shard


class Names:
    """A read-only sequence of byte strings, stored in two numpy arrays: the text, and an 8-byte offset per name.

    Reading a name updates no reference count of a shared object, so forked workers keep sharing the memory pages.
    """

    def __init__(self, blob: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> None:
        self._blob = blob
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"sample id {index} is not in [0, {len(self)})")
        return self._blob[self._starts[index] : self._starts[index + 1] - 1].tobytes()

    @classmethod
    def from_arrays(cls, blob: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> Names:
        """Build names from the two `arrays` of an untrusted file. Raises ValueError if they are malformed."""
        if blob.dtype != np.uint8 or starts.dtype != np.int64:
            raise ValueError(f"the names are {blob.dtype} and {starts.dtype} instead of uint8 and int64")
        complete = len(starts) > 0 and starts[0] == 0 and starts[-1] == len(blob)
        if not complete or np.any(starts[1:] <= starts[:-1]) or np.any(blob[starts[1:] - 1]):
            raise ValueError("the text and the offsets of the names do not match")
        if np.count_nonzero(blob == 0) != len(starts) - 1:
            raise ValueError("a name holds a NUL byte")
        return cls(blob, starts)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """The text, uint8, with a NUL after each name; and int64 (N + 1,): the start of each name, then the end."""
        return self._blob, self._starts

    def take(self, rows: npt.NDArray[np.int64]) -> Names:
        """Return the names at `rows`, int64 (M,), in that order."""
        lengths = self._starts[rows + 1] - self._starts[rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        blob = np.empty(starts[-1], np.uint8)
        for first in range(0, len(rows), _CHUNK):
            stop = min(first + _CHUNK, len(rows))
            shift = np.repeat(self._starts[rows[first:stop]] - starts[first:stop], lengths[first:stop])
            blob[starts[first] : starts[stop]] = self._blob[np.arange(starts[first], starts[stop]) + shift]
        return Names(blob, starts)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the text of all names in order, each followed by a NUL byte, as `fingerprint` hashes it."""
        yield self._blob.data


class NamedSource:
    """Base class of sources that keep the names and labels of all samples in memory."""

    def __init__(self, names: Names, labels: Labels) -> None:
        self.labels = labels
        self._names = names

    @property
    def names(self) -> Names:
        """The paths of all samples."""
        return self._names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        """Return the path of a sample within its split."""
        return os.fsdecode(self._names[sample])


class NamesBuilder:
    """Collects names one by one; `build` returns them as `Names`."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._starts = array("q", [0])

    def extend(self, names: Iterable[bytes]) -> None:
        """Append `names`."""
        for name in names:
            self._blob += name
            self._blob.append(0)
            self._starts.append(len(self._blob))

    def build(self) -> Names:
        """Return the appended names."""
        return Names(np.array(self._blob, np.uint8), np.array(self._starts, np.int64))


def check_classes(place: str, classes: Sequence[str]) -> None:
    """Raise `ConfigError` for fewer than two classes: a network with one output is always right and learns nothing."""
    if len(classes) < 2:
        found = f"one class ({printable(classes[0])})" if classes else "no class"
        raise ConfigError(
            f"{place}: found {found}, but training needs at least two; check that each class has its own "
            "folder or label."
        )


def class_names(classes: Iterable[bytes]) -> tuple[str, ...]:
    """Decode the names of class folders; bytes that are not UTF-8 become escapes such as ``\\xff``."""
    return tuple(name.decode("utf-8", "backslashreplace") for name in classes)


def numbered_name(prefix: str, sample: int) -> str:
    """Return a name for a sample without a file. The id is zero-padded, so that bytewise order is the order of ids."""
    return f"{prefix}/{sample:08d}"


def numbered_name_chunks(prefix: str, count: int) -> Iterator[bytes]:
    """Yield ``numbered_name(prefix, i)`` for i from 0 to `count` - 1, in the format of `Names.chunks`."""
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        # One format for all names of a chunk takes a third of the time of one call per name.
        names = f"{prefix.replace('%', '%%')}/%08d\0" * (stop - start)
        yield (names % tuple(range(start, stop))).encode()


def fingerprint(
    classes: Iterable[str],
    *splits: tuple[Iterable[bytes | memoryview], npt.NDArray[np.integer]],
    variant: str = "",
) -> str:
    """Return 16 hex digits of the SHA-256 over the class names and the names and labels of each split.

    The storage format does not affect the fingerprint: a folder and a zip of that folder have the same one.

    `splits`: pairs of names (see `Names.chunks`) and labels, shape (N,). `variant`: describes how the images were
    re-encoded; empty if they were not. It is included because re-encoding changes the data but not the names.
    """
    digest = hashlib.sha256()
    for name in classes:
        digest.update(os.fsencode(name) + b"\0")
    for chunks, labels in splits:
        # The empty name and the count separate splits, so that moving a sample to another split changes the hash.
        digest.update(b"\0" + len(labels).to_bytes(8, "little"))
        for chunk in chunks:
            digest.update(chunk)
        digest.update(labels.astype("<i4").tobytes())
    if variant:
        digest.update(b"\0\0" + variant.encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split with the same classes. A label is an index into `classes`."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    fingerprint: str
    """16 hex digits of the SHA-256 over the classes, and the names and labels of both splits."""
    layout: str = ""
    """16 hex digits of the SHA-256 over the shard numbers of the training samples; empty unless the order uses them."""
    numbers: tuple[int, ...] = ()
    """The number that the data set's files use for each class; empty if they use names."""
    inventory: Inventory = field(default_factory=Inventory)
    """The names of the splits, and counts of skipped entries."""
