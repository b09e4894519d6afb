"""What the layouts (folder, imagenet) need of a place that holds files in folders: directory or zip.

It says which files count as images and which are passed over. It opens nothing itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from lars_train.data.source import Labels, Names, Source

if TYPE_CHECKING:
    from lars_train.data.listing import Listing

_SUFFIXES = (
    b".jpg",
    b".jpeg",
    b".png",
    b".bmp",
    b".webp",
    b".ppm",
    b".pgm",
    b".tif",
    b".tiff",
    b".gif",
)


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
    """How its pictures were encoded anew, see `fingerprint`; empty where they are what they were."""

    def folders(self, inside: bytes) -> list[bytes]:
        """Names of the folders directly in `inside`, in bytewise order."""
        ...

    def files(self, inside: bytes) -> list[bytes]:
        """Names of the files directly in `inside`, in bytewise order."""
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
    """Whether a file or folder name is passed over: dot files, and what macOS adds to zips."""
    return not part or part.startswith(b".") or part == b"__MACOSX"


def is_image(name: bytes) -> bool:
    """Whether the name has the suffix of an image format, in any case."""
    return name.lower().endswith(_SUFFIXES)


def join(*parts: bytes) -> bytes:
    """The path made of `parts`, of which any may be empty."""
    return b"/".join(part for part in parts if part)
