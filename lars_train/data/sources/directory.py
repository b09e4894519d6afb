"""A directory on disk as a `Tree`, and its samples as a `Source`: one file per sample.

The listing of its class folders is kept in the cache directory, so that 1.28 million names are not read at each start.
Such an index holds paths, labels and sizes, and of every folder that was read the time of its last change (mtime) and
its own size. It is used while all of these are as they were. So files that come, go or are renamed are noticed; files
whose content alone changes are not, and need not be: content is read from the file itself. The data folder is only
read.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lars_train.data.dataset import Labels, NamedSource, Names, Source
from lars_train.data.inventory import BESIDE, LOOSE, Inventory, merge_counts, parse_counts
from lars_train.data.sources.index_files import Arrays, Damaged, Outdated, index_lock, keep_index, load_index
from lars_train.data.sources.tree import Listing, Ranks, count_skipped, is_hidden, is_image, join, listing_of, ranked
from lars_train.data.splits import is_split_name
from lars_train.errors import ConfigError
from lars_train.messages import is_rank0, printable

WORTH = 10_000
"""Images, by estimate, from which an index is kept; fewer are read as quickly."""

# 2: what is skipped is counted, and more suffixes are images. 3: more folders of systems.
_VERSION = 3

# A folder that changed less than this before it was read may change again without another mtime: the kernel's clock for
# them ticks in milliseconds, that of some network file systems in seconds.
_SETTLED_NS = 2_000_000_000
_THREADS = 8  # they wait for the file system


class FileSource(NamedSource):
    """Samples that are files below `root`."""

    def __init__(self, root: Path, names: Names, labels: Labels) -> None:
        super().__init__(names, labels)
        self._root = root

    def location(self, sample: int) -> str:
        return printable(os.fsencode(self._root / self.name(sample)))

    def read(self, sample: int) -> bytes:
        # Opened without waiting: a pipe among the images would hold the run for good.
        handle = os.open(self._root / self.name(sample), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("not a regular file")
            return file.read()


class DirectoryTree:
    """The folders and files below the directory `root`. Symbolic links are followed, but not in circles."""

    variant = ""
    inventory = Inventory()

    def __init__(self, root: Path) -> None:
        self.place = str(root)
        self.path = root

    def folders(self, inside: bytes) -> list[bytes]:
        return sorted(entry.name for entry in self._shown(inside) if _is_folder(entry))

    def files(self, inside: bytes) -> list[bytes]:
        return sorted(entry.name for entry in self._shown(inside) if not _is_folder(entry))

    def hidden(self) -> Counter[str]:
        skipped: Counter[str] = Counter()
        for entry in self._entries(b""):
            if is_hidden(entry.name):
                count_skipped(skipped, entry.name, folder=_is_folder(entry))
        return skipped

    def listing(self, inside: bytes) -> Listing:
        classes: list[bytes] = []
        skipped: Counter[str] = Counter()
        for entry in self._entries(inside):
            folder, hidden = _is_folder(entry), is_hidden(entry.name)
            if folder and not hidden:
                classes.append(entry.name)
            elif is_image(entry.name) and not hidden:
                skipped[LOOSE] += 1
            else:
                count_skipped(skipped, entry.name, folder=folder)
        above = (self.path.resolve(), self._path(inside).resolve())
        found = listing_by_index(
            self._path(inside), sorted(classes), lambda name: self._found(join(inside, name), above)
        )
        return replace(found, skipped=merge_counts(found.skipped, skipped))

    def read(self, path: bytes) -> bytes:
        return self._path(path).read_bytes()

    def source(self, inside: bytes, names: Names, labels: Labels, ranks: Ranks | None = None) -> Source:
        return FileSource(self._path(inside), names, labels)

    def _path(self, inside: bytes) -> Path:
        return self.path / os.fsdecode(inside)

    def _entries(self, inside: bytes) -> Iterator[os.DirEntry[bytes]]:
        folder = os.fsencode(self._path(inside))
        try:
            with os.scandir(folder) as entries:
                yield from entries
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ConfigError(
                f"data.root: cannot list {printable(folder)} ({error.strerror}); "
                "make it readable, or point data.root elsewhere."
            ) from error

    def _shown(self, inside: bytes) -> Iterator[os.DirEntry[bytes]]:
        return (entry for entry in self._entries(inside) if not is_hidden(entry.name))

    def _found(self, inside: bytes, above: tuple[Path, ...]) -> Found:
        found = Found([], [])
        self._walk(inside, b"", above, found)
        found.images.sort()
        return found

    def _walk(self, inside: bytes, below: bytes, above: tuple[Path, ...], found: Found) -> None:
        path = self._path(join(inside, below))
        here = path.resolve()
        if here in above:
            found.skipped["links to a folder around them"] += 1
            return
        # Before its entries are read: what comes in between is seen as a change.
        found.folders.append(FolderState.at(path, below))
        for entry in self._entries(join(inside, below)):
            if is_hidden(entry.name):
                count_skipped(found.skipped, entry.name, folder=_is_folder(entry))
            elif _is_folder(entry):
                self._walk(inside, join(below, entry.name), (*above, here), found)
            elif is_image(entry.name) and _is_special(entry):
                found.skipped["pipes, sockets and devices"] += 1
            elif is_image(entry.name):
                found.images.append((join(below, entry.name), _size(entry)))
            else:
                count_skipped(found.skipped, entry.name)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Return False also where that cannot be found out, as for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_special(entry: os.DirEntry[bytes]) -> bool:
    """Return True for what is neither a file nor a link: reading it could block forever."""
    return not entry.is_symlink() and not entry.is_file(follow_symlinks=False)


def _size(entry: os.DirEntry[bytes]) -> int:
    """Bytes of a file; -1 where they are unknown, as for a link that leads nowhere."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def is_file(path: Path) -> bool:
    """Return True if `path` is a visible file; no error where permissions forbid to look."""
    try:
        return path.is_file()
    except OSError:
        return False


def beside_splits(root: Path, suffix: str, reason: str) -> Counter[str]:
    """Count what lies beside the folders of splits in `root` and is not read: `reason` counts files with `suffix`."""
    skipped: Counter[str] = Counter()
    with os.scandir(os.fsencode(root)) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                count_skipped(skipped, entry.name, folder=_is_folder(entry))
            elif _is_folder(entry):
                skipped[BESIDE] += not is_split_name(os.fsdecode(entry.name))
            elif entry.name.lower().endswith(suffix.encode()):
                skipped[reason] += 1
            elif is_image(entry.name):
                skipped[LOOSE] += 1
    return +skipped


class FolderState(NamedTuple):
    """A folder as it was when it was read. `path` is relative to the class folder, or to the split for that itself."""

    path: bytes
    changed_ns: int
    size: int

    @classmethod
    def at(cls, path: Path, name: bytes) -> FolderState:
        """The state of the folder at `path`; -1 for one that cannot be looked at."""
        try:
            found = path.stat()
        except OSError:
            return cls(name, -1, -1)
        return cls(name, found.st_mtime_ns, found.st_size)


@dataclass(frozen=True)
class Found:
    """The content of a class folder: images (path within it, bytes) in bytewise order, and the folders read for it."""

    images: list[tuple[bytes, int]]
    folders: list[FolderState]
    skipped: Counter[str] = field(default_factory=Counter)
    """Files and folders that were skipped, by reason."""


def listing_by_index(split: Path, classes: Sequence[bytes], read: Callable[[bytes], Found]) -> Listing:
    """The listing of the folder `split`, whose class folders are `classes`: from its index, which is made if need be.

    `read` gives what lies in a class folder. Of several processes, one makes the index and the others wait. A damaged
    index is reported on stderr and made again; where none can be kept, that is reported, and the folder read.
    """

    def use(meta: dict[str, Any], arrays: Arrays) -> Listing | None:
        listing = _listing(meta, arrays)
        return listing if list(listing.classes) == list(classes) and _unchanged(split, meta["folders"]) else None

    known = load_index(split, use)
    if known is not None:
        return known
    if _estimate(split, classes) < WORTH:
        return _read(split, classes, read)[0]
    with index_lock(split):
        known = load_index(split, use)
        if known is not None:
            return known
        began = time.time_ns()
        listing, sizes, folders = _read(split, classes, read)
        _keep(split, listing, sizes, folders, began)
        return listing


def _read(
    split: Path, classes: Sequence[bytes], read: Callable[[bytes], Found]
) -> tuple[Listing, list[int], list[FolderState]]:
    from tqdm import tqdm

    folders = [FolderState.at(split, b"")]
    found = []
    # disable=None: no bar where stderr is no terminal.
    bar = tqdm(
        total=len(classes), desc=f"reading {printable(split.name)}", unit="folder", leave=False, delay=1,
        disable=None if is_rank0() else True,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for name, part in zip(classes, pool.map(read, classes), strict=True):
            found.append(part)
            folders += [folder._replace(path=name + b"/" + folder.path) for folder in part.folders]
            bar.update()
    skipped = merge_counts(*(part.skipped for part in found))
    listing = listing_of(classes, [[path for path, _ in part.images] for part in found], skipped)
    sizes = [size for label in ranked(classes) for _, size in found[label].images]
    return listing, sizes, folders


def _estimate(split: Path, classes: Sequence[bytes]) -> int:
    """Estimate the number of images from three of the folders."""
    most = 0
    for index in {0, len(classes) // 2, len(classes) - 1} if classes else ():
        with contextlib.suppress(OSError), os.scandir(split / os.fsdecode(classes[index])) as entries:
            most = max(most, sum(1 for _ in entries))
    return most * len(classes)


def _keep(split: Path, listing: Listing, sizes: Sequence[int], folders: Sequence[FolderState], began: int) -> None:
    if max(folder.changed_ns for folder in folders) > began - _SETTLED_NS or any(f.changed_ns < 0 for f in folders):
        # It is still being filled, it seems.
        return
    blob, starts = listing.names.arrays
    meta: dict[str, Any] = {
        "kind": "folder",
        "version": _VERSION,
        "split": os.fsencode(split).decode("latin-1"),
        "classes": [name.decode("latin-1") for name in listing.classes],
        "skipped": dict(listing.skipped),
        "folders": [(folder.path.decode("latin-1"), folder.changed_ns, folder.size) for folder in folders],
    }
    arrays: Arrays = {"names": blob, "starts": starts, "labels": listing.labels, "sizes": np.array(sizes, np.int64)}
    keep_index(split, meta, arrays)


def _listing(meta: dict[str, Any], arrays: Arrays) -> Listing:
    if meta.get("version", 1) != _VERSION:
        raise Outdated
    classes = tuple(name.encode("latin-1") for name in meta["classes"])
    names, labels, sizes = Names.from_arrays(arrays["names"], arrays["starts"]), arrays["labels"], arrays["sizes"]
    if meta["kind"] != "folder" or not len(names) == len(labels) == len(sizes) or labels.dtype != np.int32:
        raise Damaged("its parts do not fit together")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise Damaged("a label has no class")
    return Listing(classes, names, labels, skipped=parse_counts(meta["skipped"]))


def _unchanged(split: Path, folders: Sequence[Sequence[Any]]) -> bool:
    def same(folder: Sequence[Any]) -> bool:
        name, changed_ns, size = folder
        raw = name.encode("latin-1")
        return FolderState.at(split / os.fsdecode(raw), raw) == (raw, changed_ns, size)

    with ThreadPoolExecutor(_THREADS) as pool:
        return all(pool.map(same, folders))
