"""Read a directory as a `Tree`, and its samples as a `Source`: one file per sample.

An index caches the listing of the class folders, so that a start does not read 1.28 million names. The index holds
paths, labels and file sizes, and the modification time (mtime) and size of every folder. It is valid until a folder
changes, which happens when files are added, removed or renamed. New content in a file does not matter, because content
is read from the file itself. Nothing is written to the data folder.
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
from lars_train.data.sources.index_files import Arrays, Damaged, Outdated, index_lock, load_index, save_index
from lars_train.data.sources.tree import (
    Listing,
    Rows,
    count_skipped,
    is_hidden,
    is_image,
    join,
    labels_by_path,
    make_listing,
)
from lars_train.data.splits import is_split_name
from lars_train.errors import ConfigError
from lars_train.messages import is_rank0, printable

MIN_INDEXED = 10_000
"""The smallest estimated number of images for which an index is saved. With fewer, an index saves no time."""

# Changes that made older indexes invalid:
# 2: skipped files are counted, and more suffixes denote images.
# 3: more folders of operating systems are hidden.
_VERSION = 3

# A folder that was read within this time after a change may change again without a new mtime. The clocks of mtimes are
# coarse: they tick in milliseconds in the kernel, and in seconds on some network file systems.
_SETTLED_NS = 2_000_000_000
_THREADS = 8  # more than cores, because they wait for the file system


class FileSource(NamedSource):
    """Samples that are files below `root`."""

    def __init__(self, root: Path, names: Names, labels: Labels) -> None:
        super().__init__(names, labels)
        self._root = root

    def location(self, sample: int) -> str:
        """Return the path of the file, for messages."""
        return printable(os.fsencode(self._root / self.name(sample)))

    def read(self, sample: int) -> bytes:
        """Return the content of the file. Raises OSError."""
        # O_NONBLOCK: opening a pipe among the images would block forever.
        handle = os.open(self._root / self.name(sample), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("not a regular file")
            return file.read()


class DirectoryTree:
    """The folders and files below the directory `root`. Follows symbolic links, but not cycles."""

    variant = ""
    inventory = Inventory()

    def __init__(self, root: Path) -> None:
        self.place = str(root)
        self.path = root

    def folders(self, inside: bytes) -> list[bytes]:
        """Return the names of the visible folders directly in `inside`, in bytewise order."""
        return sorted(entry.name for entry in self._visible_entries(inside) if _is_folder(entry))

    def files(self, inside: bytes) -> list[bytes]:
        """Return the names of the visible files directly in `inside`, in bytewise order."""
        return sorted(entry.name for entry in self._visible_entries(inside) if not _is_folder(entry))

    def hidden(self) -> Counter[str]:
        """Count the hidden entries directly in the root, by reason."""
        skipped: Counter[str] = Counter()
        for entry in self._entries(b""):
            if is_hidden(entry.name):
                count_skipped(skipped, entry.name, folder=_is_folder(entry))
        return skipped

    def listing(self, inside: bytes) -> Listing:
        """List the images of the class folders in `inside`, from the index if it is valid."""
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
        ancestors = (self.path.resolve(), self._path(inside).resolve())
        listing = indexed_listing(
            self._path(inside), sorted(classes), lambda name: self._read_class(join(inside, name), ancestors)
        )
        return replace(listing, skipped=merge_counts(listing.skipped, skipped))

    def read(self, path: bytes) -> bytes:
        """Return the content of the file `path`. Raises OSError."""
        return self._path(path).read_bytes()

    def source(self, inside: bytes, names: Names, labels: Labels, rows: Rows | None = None) -> Source:
        """Return a source of the files `names`, which lie below `inside`."""
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

    def _visible_entries(self, inside: bytes) -> Iterator[os.DirEntry[bytes]]:
        return (entry for entry in self._entries(inside) if not is_hidden(entry.name))

    def _read_class(self, inside: bytes, ancestors: tuple[Path, ...]) -> FolderContent:
        content = FolderContent([], [])
        self._walk(inside, b"", ancestors, content)
        content.images.sort()
        return content

    def _walk(self, inside: bytes, below: bytes, ancestors: tuple[Path, ...], content: FolderContent) -> None:
        path = self._path(join(inside, below))
        resolved = path.resolve()
        if resolved in ancestors:
            content.skipped["links to an enclosing folder"] += 1
            return
        # Record the state before reading the entries, so that a change in between invalidates the index.
        content.folders.append(FolderState.at(path, below))
        for entry in self._entries(join(inside, below)):
            if is_hidden(entry.name):
                count_skipped(content.skipped, entry.name, folder=_is_folder(entry))
            elif _is_folder(entry):
                self._walk(inside, join(below, entry.name), (*ancestors, resolved), content)
            elif is_image(entry.name) and _is_special(entry):
                content.skipped["pipes, sockets and devices"] += 1
            elif is_image(entry.name):
                content.images.append((join(below, entry.name), _size(entry)))
            else:
                count_skipped(content.skipped, entry.name)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Return True if `entry` is a folder; False if that cannot be determined, as for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_special(entry: os.DirEntry[bytes]) -> bool:
    """Return True if `entry` is neither a file nor a link: reading it could block forever."""
    return not entry.is_symlink() and not entry.is_file(follow_symlinks=False)


def _size(entry: os.DirEntry[bytes]) -> int:
    """Return the size of a file in bytes; -1 if it is unknown, as for a broken link."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def is_file(path: Path) -> bool:
    """Return True if `path` is a file; False if that cannot be determined."""
    try:
        return path.is_file()
    except OSError:
        return False


def count_beside_splits(root: Path, suffix: str, reason: str) -> Counter[str]:
    """Count the entries of `root` other than split folders, by reason. Files with `suffix` count as `reason`."""
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
    """The mtime and size of a folder when it was read.

    In a `FolderContent`, `path` is relative to the class folder; in an index, it is relative to the split.
    """

    path: bytes
    changed_ns: int
    size: int

    @classmethod
    def at(cls, path: Path, name: bytes) -> FolderState:
        """Return the state of the folder at `path`; -1 for both numbers if it cannot be read."""
        try:
            status = path.stat()
        except OSError:
            return cls(name, -1, -1)
        return cls(name, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class FolderContent:
    """The content of a class folder: images (path, size in bytes) in bytewise order, and the states of its folders."""

    images: list[tuple[bytes, int]]
    folders: list[FolderState]
    skipped: Counter[str] = field(default_factory=Counter)
    """Counts of skipped files and folders, by reason."""


def indexed_listing(split: Path, classes: Sequence[bytes], read: Callable[[bytes], FolderContent]) -> Listing:
    """Return the listing of the folder `split` with the class folders `classes`, from its index if that is valid.

    Otherwise `read` is called for each class folder, and the index is rebuilt: one process rebuilds it, and the others
    wait. Damaged indexes, and failures to save one, are reported on stderr.
    """

    def use(meta: dict[str, Any], arrays: Arrays) -> Listing | None:
        listing = _parse_listing(meta, arrays)
        return listing if list(listing.classes) == list(classes) and _unchanged(split, meta["folders"]) else None

    cached = load_index(split, use)
    if cached is not None:
        return cached
    if _estimate(split, classes) < MIN_INDEXED:
        return _read(split, classes, read)[0]
    with index_lock(split):
        cached = load_index(split, use)
        if cached is not None:
            return cached
        started = time.time_ns()
        listing, sizes, folders = _read(split, classes, read)
        _save(split, listing, sizes, folders, started)
        return listing


def _read(
    split: Path, classes: Sequence[bytes], read: Callable[[bytes], FolderContent]
) -> tuple[Listing, list[int], list[FolderState]]:
    from tqdm import tqdm

    folders = [FolderState.at(split, b"")]
    contents = []
    # disable=None shows no bar if stderr is not a terminal.
    bar = tqdm(
        total=len(classes), desc=f"reading {printable(split.name)}", unit="folder", leave=False, delay=1,
        disable=None if is_rank0() else True,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for name, content in zip(classes, pool.map(read, classes), strict=True):
            contents.append(content)
            folders += [folder._replace(path=name + b"/" + folder.path) for folder in content.folders]
            bar.update()
    skipped = merge_counts(*(content.skipped for content in contents))
    listing = make_listing(classes, [[path for path, _ in content.images] for content in contents], skipped)
    sizes = [size for label in labels_by_path(classes) for _, size in contents[label].images]
    return listing, sizes, folders


def _estimate(split: Path, classes: Sequence[bytes]) -> int:
    """Estimate the number of images from three of the class folders."""
    most = 0
    for index in {0, len(classes) // 2, len(classes) - 1} if classes else ():
        with contextlib.suppress(OSError), os.scandir(split / os.fsdecode(classes[index])) as entries:
            most = max(most, sum(1 for _ in entries))
    return most * len(classes)


def _save(split: Path, listing: Listing, sizes: Sequence[int], folders: Sequence[FolderState], started: int) -> None:
    if max(folder.changed_ns for folder in folders) > started - _SETTLED_NS or any(f.changed_ns < 0 for f in folders):
        # The folder may still be changing.
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
    save_index(split, meta, arrays)


def _parse_listing(meta: dict[str, Any], arrays: Arrays) -> Listing:
    if meta.get("version", 1) != _VERSION:
        raise Outdated
    classes = tuple(name.encode("latin-1") for name in meta["classes"])
    names, labels, sizes = Names.from_arrays(arrays["names"], arrays["starts"]), arrays["labels"], arrays["sizes"]
    if meta["kind"] != "folder" or not len(names) == len(labels) == len(sizes) or labels.dtype != np.int32:
        raise Damaged("its arrays do not match")
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
