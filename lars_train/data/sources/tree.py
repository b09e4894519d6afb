"""Define `Tree`, the interface of a directory, zip or store of shards, and `Listing`, the images of one split.

Also decides which files are images, the reason under which others are counted, and which images are held out. Opens no
files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels, Names, NamesBuilder, Source
from lars_train.data.inventory import UNSAFE, Inventory, suffix_reason

# Formats that every build of Pillow decodes. AVIF and JPEG 2000 depend on the build, and sample ids must not.
_SUFFIXES = (
    b".jpg",
    b".jpeg",
    b".jpe",
    b".jfif",
    b".png",
    b".bmp",
    b".webp",
    b".ppm",
    b".pgm",
    b".pbm",
    b".pnm",
    b".tif",
    b".tiff",
    b".gif",
)

# Folders that operating systems and their tools create, in lower case: macOS, Synology, Windows, ext4.
_FOLDERS = (b"__macosx", b"@eadir", b"#recycle", b"$recycle.bin", b"system volume information", b"lost+found")
# A quick check before the full one: a path that does not match has no hidden part.
_SUSPECT = re.compile(rb"\0|(?:^|/)(?:[./]|$|" + b"|".join(map(re.escape, _FOLDERS)) + rb")", re.IGNORECASE)
# Files and folders that systems create everywhere. They are skipped without being counted.
_UNCOUNTED = (b".ds_store", b"thumbs.db", b"desktop.ini", b"__macosx")

Rows = npt.NDArray[np.int64]


class Tree(Protocol):
    """Files in folders. Paths are bytes, relative to the tree's root, with ``/``; ``b""`` is the root.

    Hidden files and folders are left out, and a missing folder counts as empty.
    """

    place: str
    """The root, for messages."""

    path: Path
    """The directory or the zip file."""

    variant: str
    """Describes how the images were re-encoded; empty if they were not. See `fingerprint`."""

    inventory: Inventory
    """Additions to the listings: the original names of a store's splits, and counts of further skipped entries."""

    def folders(self, inside: bytes) -> list[bytes]:
        """Return the names of the folders directly in `inside`, in bytewise order."""
        ...

    def files(self, inside: bytes) -> list[bytes]:
        """Return the names of the files directly in `inside`, in bytewise order."""
        ...

    def hidden(self) -> Counter[str]:
        """Count the hidden entries directly in the root, by reason."""
        ...

    def listing(self, inside: bytes) -> Listing:
        """List all images in and below the folders in `inside`, which are the class folders."""
        ...

    def read(self, path: bytes) -> bytes:
        """Return the content of a small file. Raises OSError."""
        ...

    def source(self, inside: bytes, names: Names, labels: Labels, rows: Rows | None = None) -> Source:
        """Return a source of the samples `names` (paths relative to `inside`) with `labels`, int32 (N,).

        `rows`: the rows of these samples in ``listing(inside)``; None for all rows, or for samples that are not in it.
        """
        ...


def is_hidden(part: bytes) -> bool:
    """Return True if a file or folder of this name is skipped: dot files, and folders of operating systems."""
    return not part or part.startswith(b".") or part.lower() in _FOLDERS


def is_image(name: bytes) -> bool:
    """Return True if `name` has the suffix of an image format, ignoring case."""
    return name.lower().endswith(_SUFFIXES)


def count_skipped(skipped: Counter[str], name: bytes, *, folder: bool = False) -> None:
    """Count a skipped entry under the reason that its name gives. Ignores files that systems create everywhere."""
    if name.lower() in _UNCOUNTED:
        return
    if name.lower() in _FOLDERS:
        reason = f"{name.decode()} folders"
    elif name.startswith(b"."):
        reason = "hidden folders" if folder else "hidden files"
    else:
        reason = suffix_reason(name)
    skipped[reason] += 1


class HiddenFilter:
    """Recognizes hidden paths, and counts each hidden file or folder once in `skipped`."""

    def __init__(self, skipped: Counter[str]) -> None:
        self._skipped = skipped
        self._seen: set[bytes] = set()

    def hides(self, path: bytes) -> bool:
        """Return True if a part of `path` is hidden, or leads out of the tree."""
        if _SUSPECT.search(path) is None:
            return False
        parts = path.rstrip(b"/").split(b"/")
        for number, part in enumerate(parts):
            if b"\0" in part or part in (b"", b".", b".."):
                self._skipped[UNSAFE] += 1
                return True
            if is_hidden(part):
                hidden = b"/".join(parts[: number + 1])
                if hidden not in self._seen:
                    self._seen.add(hidden)
                    count_skipped(self._skipped, part, folder=number + 1 < len(parts) or path.endswith(b"/"))
                return True
        return False


def join(*parts: bytes) -> bytes:
    """Join the non-empty `parts` with slashes."""
    return b"/".join(part for part in parts if part)


# The key of the generator that chooses held-out images. A different key would change every held-out split.
_HOLDOUT_KEY = 20170813


@dataclass(frozen=True)
class Listing:
    """The images below a folder of class folders, in bytewise order of their paths. A row is an index into them."""

    classes: tuple[bytes, ...]
    """Names of all class folders in bytewise order, with or without images. A label is an index into them."""
    names: Names
    """Paths, including the class folder."""
    labels: Labels
    """Shape (N,)."""
    complete: bool = True
    """True if each class must have an image; False if a table or the samples themselves give the labels."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of skipped files and folders, by reason."""

    def counts(self) -> npt.NDArray[np.int64]:
        """Return the number of images of each class: int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)


def labels_by_path(classes: Sequence[bytes]) -> list[int]:
    """Return the labels, sorted by the paths of their samples.

    In a path, a slash follows the class, so ``a-b/`` comes before ``a/``.
    """
    return sorted(range(len(classes)), key=lambda label: classes[label] + b"/")


def make_listing(
    classes: Sequence[bytes], images: Sequence[Sequence[bytes]], skipped: Mapping[str, int] | None = None
) -> Listing:
    """Return the listing of class folders. `images`: for each class, paths within its folder in bytewise order."""
    builder = NamesBuilder()
    order = labels_by_path(classes)
    for label in order:
        builder.extend(join(classes[label], image) for image in images[label])
    counts = np.array([len(images[label]) for label in order], np.int64)
    labels = np.repeat(np.array(order, np.int32), counts)
    return Listing(tuple(classes), builder.build(), labels, skipped=dict(skipped or {}))


def split_holdout(labels: Labels, share: float) -> tuple[Rows, Rows]:
    """Return the rows to train on and the rows to hold out, both ascending. Each class needs at least two images.

    `labels`, (N,): the label of each row. Holds out `share` of each class, rounded to whole images, but at least one
    and not all. The choice depends only on the size of the class and on an image's position within the class.
    """
    held_out = np.zeros(len(labels), bool)
    # A stable sort by label keeps the rows of a class in order.
    by_class = np.argsort(labels, kind="stable")
    for rows in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        held_out[rows] = holdout_mask(len(rows), share)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def holdout_mask(count: int, share: float) -> npt.NDArray[np.bool_]:
    """Return which of the `count` images of a class are held out: bool (count,); `count` is at least 2."""
    size = min(max(math.floor(count * share + 0.5), 1), count - 1)
    draws = np.random.Philox(key=_HOLDOUT_KEY).random_raw(count)
    mask = np.zeros(count, bool)
    mask[np.argsort(draws, kind="stable")[:size]] = True
    return mask
