"""A data set as the rest of the package sees it: two `Source`s, class names, a fingerprint, and skipped entries.

Also the compact containers that sources keep their names in. Nothing here opens files or decodes images.
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
# Numbered names are made in runs of this many, so that their memory does not grow with the split.
_RUN = 65536


class Source(Protocol):
    """Samples of one split, addressed by sample id.

    Sources can be pickled, and used after a fork: file handles are opened on first use in each process.
    """

    labels: Labels
    """Shape (N,): the label of every sample."""

    def __len__(self) -> int: ...

    def name(self, sample: int) -> str:
        """Path within the split's root, such as ``n01440764/x.JPEG``."""
        ...

    def where(self, sample: int) -> str:
        """The whole place, for a human: ``/data/train/cat/1.jpg`` or ``pets.zip!train/cat/1.jpg``."""
        ...

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        """Encoded image, or decoded uint8 (H, W) or (H, W, 3). Raises OSError when it cannot be read."""
        ...


@runtime_checkable
class Sharded(Source, Protocol):
    """A source whose samples lie in shards."""

    shard: Labels
    """Shape (N,): the number of the shard of every sample."""


def shards_of(source: Source) -> Labels:
    """The number of the shard of every sample, int32 (N,). Raises ValueError for a source without shards."""
    if not isinstance(source, Sharded):
        raise ValueError("its samples do not lie in shards")
    return source.shard


class Names:
    """A read-only sequence of byte strings in two numpy arrays: about 8 bytes a name more than its text.

    Reading a name touches no Python object that a forked worker shares, so it copies no memory page.
    """

    def __init__(self, blob: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> None:
        self._blob = blob
        self._starts = starts

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._blob.nbytes + self._starts.nbytes

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"sample id {index} is not in [0, {len(self)})")
        return self._blob[self._starts[index] : self._starts[index + 1] - 1].tobytes()

    @classmethod
    def of(cls, blob: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> Names:
        """The names in two arrays out of a file, which should be what `arrays` gave. Raises ValueError."""
        if blob.dtype != np.uint8 or starts.dtype != np.int64:
            raise ValueError("the names are of another kind")
        whole = len(starts) > 0 and starts[0] == 0 and starts[-1] == len(blob)
        if not whole or np.any(starts[1:] <= starts[:-1]) or np.any(blob[starts[1:] - 1]):
            raise ValueError("the names do not fit together")
        if np.count_nonzero(blob == 0) != len(starts) - 1:
            raise ValueError("a name holds a NUL byte")
        return cls(blob, starts)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """All names in order, each with a NUL byte: uint8; where each begins, and the end: int64 (N + 1,)."""
        return self._blob, self._starts

    def take(self, rows: npt.NDArray[np.int64]) -> Names:
        """The names at `rows`, int64 (M,), in that order."""
        lengths = self._starts[rows + 1] - self._starts[rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        blob = np.empty(starts[-1], np.uint8)
        for first in range(0, len(rows), _RUN):
            stop = min(first + _RUN, len(rows))
            shift = np.repeat(self._starts[rows[first:stop]] - starts[first:stop], lengths[first:stop])
            blob[starts[first] : starts[stop]] = self._blob[np.arange(starts[first], starts[stop]) + shift]
        return Names(blob, starts)

    def runs(self) -> Iterator[bytes | memoryview]:
        """All names in order, each followed by a NUL byte, in pieces: what `fingerprint` hashes."""
        yield self._blob.data


class NamedSource:
    """Base of sources that keep the names and labels of all samples in memory."""

    def __init__(self, names: Names, labels: Labels) -> None:
        self.labels = labels
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        """Return the path of a sample within its split."""
        return os.fsdecode(self._names[sample])


class NamesBuilder:
    """Collects names one after the other; `build` gives the `Names`."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._starts = array("q", [0])

    def extend(self, names: Iterable[bytes]) -> None:
        for name in names:
            self._blob += name
            self._blob.append(0)
            self._starts.append(len(self._blob))

    def build(self) -> Names:
        return Names(np.array(self._blob, np.uint8), np.array(self._starts, np.int64))


def check_classes(place: str, classes: Sequence[str]) -> None:
    """Raise `ConfigError` for a single class: a network with one output learns nothing, and is right every time."""
    if len(classes) < 2:
        called = printable(classes[0]) if classes else "none"
        raise ConfigError(
            f"{place}: there is a single class ({called}), where two or more are needed; check that the folders or "
            "labels below it are the classes."
        )


def class_names(classes: Iterable[bytes]) -> tuple[str, ...]:
    """The names of class folders as text that any file can hold: bytes that are no UTF-8 become ``\\xff``."""
    return tuple(name.decode("utf-8", "backslashreplace") for name in classes)


def numbered(prefix: str, sample: int) -> str:
    """The name of a sample that has no file: zero-padded, so that bytewise order is the order of ids."""
    return f"{prefix}/{sample:08d}"


def numbered_runs(prefix: str, count: int) -> Iterator[bytes]:
    """`Names.runs` for the names ``numbered(prefix, 0..count-1)``."""
    for start in range(0, count, _RUN):
        stop = min(start + _RUN, count)
        yield "".join(f"{numbered(prefix, i)}\0" for i in range(start, stop)).encode()


def fingerprint(
    classes: Iterable[str],
    *splits: tuple[Iterable[bytes | memoryview], npt.NDArray[np.integer]],
    variant: str = "",
) -> str:
    """16 hex digits of the SHA-256 over class names and, for each split, its names and labels.

    `splits`: the runs of NUL-terminated names (see `Names.runs`) and the labels, shape (N,). It does not
    depend on the kind of store: a folder and a zip of it have the same fingerprint. `variant`: how the images were
    re-encoded, if they were: that is other data by the same names.
    """
    digest = hashlib.sha256()
    for name in classes:
        digest.update(os.fsencode(name) + b"\0")
    for runs, labels in splits:
        # An empty name and the count: no other division into splits gives the same stream.
        digest.update(b"\0" + len(labels).to_bytes(8, "little"))
        for run in runs:
            digest.update(run)
        digest.update(labels.astype("<i4").tobytes())
    if variant:
        digest.update(b"\0\0" + variant.encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Dataset:
    """A training and a validation split over the same classes (label = index into `classes`)."""

    train: Source
    val: Source
    classes: tuple[str, ...]
    fingerprint: str
    """16 hex digits of the SHA-256 over the classes, and the names and labels of both splits."""
    layout: str = ""
    """16 hex digits of the SHA-256 over the training samples' shards, where the order of an epoch depends on them."""
    numbers: tuple[int, ...] = ()
    """The number that labels each class in the files, where they have numbers."""
    inventory: Inventory = field(default_factory=Inventory)
    """The names of the splits, and counts of what was skipped."""
