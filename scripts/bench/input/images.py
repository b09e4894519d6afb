"""The images of bench_input.py: a folder, a zip or tar shards, and copies as packed by `lars-data pack`.

They are read through lars-train's sources. Only gray or RGB JPEGs that Pillow decodes in full are used, so that every
contender has the same work.
"""

from __future__ import annotations

import io
import os
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lars_train.data.dataset import NamesBuilder, Source
from lars_train.data.sources.directory import DirectoryTree, FileSource
from lars_train.data.sources.folder import open_tree
from lars_train.data.sources.tree import Tree
from lars_train.data.sources.zips import ZipTree
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, SourceSubset, pack, silent

SUFFIXES = (".jpg", ".jpeg")


class Images(NamedTuple):
    """A source, the kind of its storage, and the name of its re-encoding, if any."""

    source: Source
    kind: str
    variant: str = ""


def open_images(path: Path, most: int) -> Images:
    """Return at most `most` of the JPEGs in `path`, evenly spread; a store gives its training split.

    Raises:
        ConfigError: `path` cannot be opened, or contains no JPEG.
    """
    tree = open_tree(str(path))
    if isinstance(tree, DirectoryTree):
        builder = NamesBuilder()
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        builder.extend(os.fsencode(file.relative_to(path)) for file in files)
        found = Images(FileSource(path, builder.build(), np.zeros(len(files), np.int32)), "files")
    else:
        kind = "entries of a zip" if isinstance(tree, ZipTree) else "members of tar shards"
        found = Images(training_split(tree), kind, tree.variant)
    named = [i for i in range(len(found.source)) if found.source.name(i).lower().endswith(SUFFIXES)]
    ids = [i for i in named[:: ceil(len(named) / most) or 1] if is_usable(found.source, i)]
    if not ids:
        raise ConfigError(f"{path}: contains no JPEG that Pillow decodes.")
    return found._replace(source=SourceSubset(found.source, np.array(ids, np.int64)))


def pack_copies(images: Source, folder: Path, encoding: Encoding) -> Source:
    """Return the images re-encoded into a new store in `folder`."""
    originals = folder / "originals"
    for sample in range(len(images)):
        # A store needs at least two classes.
        place = originals / ("a" if 2 * sample < len(images) else "b")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{sample:08d}.jpg").write_bytes(read(images, sample))
    pack(Request(str(originals), str(folder / "store"), encoding), silent)
    return training_split(open_tree(str(folder / "store")))


def training_split(tree: Tree) -> Source:
    """Return the training split of a tree, or all of it if it has none."""
    inside = b"train" if b"train" in tree.folders(b"") else b""
    listing = tree.listing(inside)
    return tree.source(inside, listing.names, listing.labels)


def read(images: Source, sample: int) -> bytes:
    """Return the bytes of an image."""
    data = images.read(sample)
    assert isinstance(data, bytes)
    return data


def is_usable(source: Source, sample: int) -> bool:
    """Return True if Pillow decodes the whole image, gray or RGB."""
    try:
        image = Image.open(io.BytesIO(read(source, sample)), formats=("JPEG",))
        image.load()
    except Exception:  # anything that Pillow raises
        return False
    return image.mode in ("L", "RGB")
