"""The interface of a place that holds files in folders (directory, zip or shards), and the listing of one split.

It says which files count as images, and under which reason the others are counted; a listing has every image by its
rank, with its label, and which to hold out. It opens no file itself.
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

# What Pillow decodes wherever it is installed: AVIF and JPEG 2000 depend on how it was built, and sample ids must not.
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

# Folders of systems and their tools, in lower case: macOS, Synology, Windows, ext4.
_FOLDERS = (b"__macosx", b"@eadir", b"#recycle", b"$recycle.bin", b"system volume information", b"lost+found")
# A path without it has no hidden part.
_SUSPECT = re.compile(rb"\0|(?:^|/)(?:[./]|$|" + b"|".join(map(re.escape, _FOLDERS)) + rb")", re.IGNORECASE)
# What systems strew into every folder: not worth a number.
_UNCOUNTED = (b".ds_store", b"thumbs.db", b"desktop.ini", b"__macosx")

Ranks = npt.NDArray[np.int64]


class Tree(Protocol):
    """Files in folders. Paths are bytes, relative to the tree's root, with ``/``; ``b""`` is the root.

    Hidden files and folders are not shown, and a folder that is not there is empty.
    """

    place: str
    """The root, for messages."""

    path: Path
    """The directory or the zip itself."""

    variant: str
    """How its images were re-encoded, see `fingerprint`; empty where they were not."""

    inventory: Inventory
    """What no listing has: the original names of a store's splits, and counts of skipped entries."""

    def folders(self, inside: bytes) -> list[bytes]:
        """Names of the folders directly in `inside`, in bytewise order."""
        ...

    def files(self, inside: bytes) -> list[bytes]:
        """Names of the files directly in `inside`, in bytewise order."""
        ...

    def hidden(self) -> Counter[str]:
        """Counts of hidden entries directly in the root, by reason."""
        ...

    def listing(self, inside: bytes) -> Listing:
        """All images in and below the folders of `inside`, its class folders."""
        ...

    def read(self, path: bytes) -> bytes:
        """The content of one small file. Raises OSError."""
        ...

    def source(self, inside: bytes, names: Names, labels: Labels, ranks: Ranks | None = None) -> Source:
        """The samples `names` (paths relative to `inside`) with `labels`, int32 (N,).

        `ranks`: which of ``listing(inside)`` they are, where they are not all of it.
        """
        ...


def is_hidden(part: bytes) -> bool:
    """Return True for a file or folder name that is skipped: dot files, and folders of systems and their tools."""
    return not part or part.startswith(b".") or part.lower() in _FOLDERS


def is_image(name: bytes) -> bool:
    """Return True for a name with the suffix of an image format, in any case."""
    return name.lower().endswith(_SUFFIXES)


def count_skipped(skipped: Counter[str], name: bytes, *, folder: bool = False) -> None:
    """Count a file or folder that is skipped by the reason in its name; nothing for what is not worth a number."""
    if name.lower() in _UNCOUNTED:
        return
    if name.lower() in _FOLDERS:
        reason = f"{name.decode()} folders"
    elif name.startswith(b"."):
        reason = "hidden folders" if folder else "hidden files"
    else:
        reason = suffix_reason(name)
    skipped[reason] += 1


class HiddenPaths:
    """Finds the paths that are hidden, in a list of files without folders, and counts each hidden thing once."""

    def __init__(self, skipped: Counter[str]) -> None:
        self._skipped = skipped
        self._seen: set[bytes] = set()

    def hides(self, path: bytes) -> bool:
        """Return True where a part of `path` is hidden, or leads out of the tree."""
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
    """The path made of `parts`, of which any may be empty."""
    return b"/".join(part for part in parts if part)


# The one key of the generator that says which images are held out: the split must never change.
_HOLDOUT_KEY = 20170813


@dataclass(frozen=True)
class Listing:
    """The images below a folder of class folders, in bytewise order of their paths (rank = sample id)."""

    classes: tuple[bytes, ...]
    """Names of the class folders in bytewise order (label = index), those without images among them."""
    names: Names
    """Paths, class folder included."""
    labels: Labels
    """Shape (N,)."""
    complete: bool = True
    """True if each class must have an image; False where a table or the samples themselves give the labels."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of skipped files and folders, by reason."""

    def counts(self) -> npt.NDArray[np.int64]:
        """Images of each class: int64 (classes,)."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)


def ranked(classes: Sequence[bytes]) -> list[int]:
    """The labels in the order of their samples.

    Samples are ranked by their whole path, in which a slash follows the class: ``a-b/`` comes before ``a/``.
    """
    return sorted(range(len(classes)), key=lambda label: classes[label] + b"/")


def listing_of(
    classes: Sequence[bytes], images: Sequence[Sequence[bytes]], skipped: Mapping[str, int] | None = None
) -> Listing:
    """The listing of class folders that hold `images`: for each class, paths within its folder in bytewise order."""
    builder = NamesBuilder()
    order = ranked(classes)
    for label in order:
        builder.extend(join(classes[label], image) for image in images[label])
    counts = np.array([len(images[label]) for label in order], np.int64)
    labels = np.repeat(np.array(order, np.int32), counts)
    return Listing(tuple(classes), builder.build(), labels, skipped=dict(skipped or {}))


def split_holdout(labels: Labels, share: float) -> tuple[Ranks, Ranks]:
    """Return the ranks to train on and the ranks to hold out, both ascending. Each class must have two images.

    `labels`, (N,): the label of each rank. Of each class, the nearest whole number to `share` of its images is held
    out, but at least one and not all. Which ones depends only on their rank within the class and the size of the class.
    """
    held_out = np.zeros(len(labels), bool)
    # A stable sort by label keeps the ranks of a class in order.
    by_class = np.argsort(labels, kind="stable")
    for ranks in np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1):
        held_out[ranks] = holdout_mask(len(ranks), share)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def holdout_mask(count: int, share: float) -> npt.NDArray[np.bool_]:
    """Return which of the `count` images of a class are held out: bool (count,); `count` is at least 2."""
    size = min(max(math.floor(count * share + 0.5), 1), count - 1)
    draws = np.random.Philox(key=_HOLDOUT_KEY).random_raw(count)
    mask = np.zeros(count, bool)
    mask[np.argsort(draws, kind="stable")[:size]] = True
    return mask
