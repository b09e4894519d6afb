"""The listing of a directory's class folders, kept in the cache directory: 1.28 million names are not read anew.

An index holds paths, labels and sizes, and of every folder that was read the time of its last change (mtime) and its
own size. It is used while all of these are as they were; so files that come, go or are renamed are noticed, files whose
content alone changes are not, and need not be: content is read from the file itself. The data folder is only read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lars_train.data.index_cache import alone, keep, load
from lars_train.data.listing import Listing, listing_of, ranked
from lars_train.data.mapped import Arrays, Damaged
from lars_train.data.source import Names
from lars_train.monitoring.say import first_process
from lars_train.text import printable

WORTH = 10_000
"""Images, by estimate, from which an index is kept; fewer are read as quickly."""

# A folder that changed less than this before it was read may change again without another mtime: the kernel's clock for
# them ticks in milliseconds, that of some network file systems in seconds.
_SETTLED_NS = 2_000_000_000
_THREADS = 8  # they wait for the file system


class Folder(NamedTuple):
    """A folder as it was when it was read. `path` is relative to the class folder, or to the split for that itself."""

    path: bytes
    changed_ns: int
    size: int

    @classmethod
    def at(cls, path: Path, name: bytes) -> Folder:
        """The state of the folder at `path`; -1 for one that cannot be looked at."""
        try:
            found = path.stat()
        except OSError:
            return cls(name, -1, -1)
        return cls(name, found.st_mtime_ns, found.st_size)


@dataclass(frozen=True)
class Found:
    """What lies in one class folder: images (path within it, bytes) in bytewise order, and the folders read for it."""

    images: list[tuple[bytes, int]]
    folders: list[Folder]


def listing_by_index(split: Path, classes: Sequence[bytes], read: Callable[[bytes], Found]) -> Listing:
    """The listing of the folder `split`, whose class folders are `classes`: from its index, which is made if need be.

    `read` gives what lies in a class folder. Of several processes, one makes the index and the others wait. An index
    that is damaged is told of on stderr and made anew; where none can be kept, that is told, and the folder read.
    """

    def use(meta: dict[str, Any], arrays: Arrays) -> Listing | None:
        listing = _listing(meta, arrays)
        return listing if list(listing.classes) == list(classes) and _unchanged(split, meta["folders"]) else None

    known = load(split, use)
    if known is not None:
        return known
    if _estimate(split, classes) < WORTH:
        return _read(split, classes, read)[0]
    with alone(split):
        known = load(split, use)
        if known is not None:
            return known
        began = time.time_ns()
        listing, sizes, folders = _read(split, classes, read)
        _keep(split, listing, sizes, folders, began)
        return listing


def _read(
    split: Path, classes: Sequence[bytes], read: Callable[[bytes], Found]
) -> tuple[Listing, list[int], list[Folder]]:
    from tqdm import tqdm

    folders = [Folder.at(split, b"")]
    found = []
    # disable=None: no bar where stderr is no terminal.
    bar = tqdm(
        total=len(classes), desc=f"reading {printable(split.name)}", unit="folder", leave=False, delay=1,
        disable=None if first_process() else True,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for name, part in zip(classes, pool.map(read, classes), strict=True):
            found.append(part)
            folders += [folder._replace(path=name + b"/" + folder.path) for folder in part.folders]
            bar.update()
    listing = listing_of(classes, [[path for path, _ in part.images] for part in found])
    sizes = [size for label in ranked(classes) for _, size in found[label].images]
    return listing, sizes, folders


def _estimate(split: Path, classes: Sequence[bytes]) -> int:
    """About how many images there are, by three of the folders."""
    most = 0
    for index in {0, len(classes) // 2, len(classes) - 1} if classes else ():
        with contextlib.suppress(OSError), os.scandir(split / os.fsdecode(classes[index])) as entries:
            most = max(most, sum(1 for _ in entries))
    return most * len(classes)


def _keep(split: Path, listing: Listing, sizes: Sequence[int], folders: Sequence[Folder], began: int) -> None:
    if max(folder.changed_ns for folder in folders) > began - _SETTLED_NS or any(f.changed_ns < 0 for f in folders):
        # It is still being filled, it seems.
        return
    blob, starts = listing.names.arrays
    meta: dict[str, Any] = {
        "kind": "folder",
        "split": os.fsencode(split).decode("latin-1"),
        "classes": [name.decode("latin-1") for name in listing.classes],
        "folders": [(folder.path.decode("latin-1"), folder.changed_ns, folder.size) for folder in folders],
    }
    arrays: Arrays = {"names": blob, "starts": starts, "labels": listing.labels, "sizes": np.array(sizes, np.int64)}
    keep(split, meta, arrays)


def _listing(meta: dict[str, Any], arrays: Arrays) -> Listing:
    classes = tuple(name.encode("latin-1") for name in meta["classes"])
    names, labels, sizes = Names.of(arrays["names"], arrays["starts"]), arrays["labels"], arrays["sizes"]
    if meta["kind"] != "folder" or not len(names) == len(labels) == len(sizes) or labels.dtype != np.int32:
        raise Damaged("its parts do not fit together")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise Damaged("a label has no class")
    return Listing(classes, names, labels)


def _unchanged(split: Path, folders: Sequence[Sequence[Any]]) -> bool:
    def same(folder: Sequence[Any]) -> bool:
        name, changed_ns, size = folder
        raw = name.encode("latin-1")
        return Folder.at(split / os.fsdecode(raw), raw) == (raw, changed_ns, size)

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(same, folders))
