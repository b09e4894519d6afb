"""Where bench_input.py's pictures come from: a folder, a zip or tar shards, and copies packed as `lars-data pack` does.

They are read through the sources that a training reads through. Only JPEGs that Pillow decodes in full, grey or RGB,
are taken, so that every contender has the same work.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path

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

_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Pictures:
    """`kind`: what they lie in; `variant`: how they were encoded anew, empty where they are what they were."""

    source: Source
    kind: str
    variant: str = ""


def open_pictures(path: Path, most: int) -> Pictures:
    """At most so many of the JPEGs in `path`, evenly spread; of a store, of its training split.

    Raises `ConfigError` where there are none, or `path` cannot be opened.
    """
    tree = open_tree(str(path))
    if isinstance(tree, DirectoryTree):
        return Pictures(_chosen(_files_below(path), path, most), "files")
    kind = "entries of a zip" if isinstance(tree, ZipTree) else "members of tar shards"
    return Pictures(_chosen(_split_of(tree), path, most), kind, tree.variant)


def packed(pictures: Source, folder: Path, encoding: Encoding) -> Source:
    """A store of them, in `folder`, which is made."""
    originals = folder / "originals"
    # In halves: a store has two classes at least.
    for half in "ab":
        (originals / half).mkdir(parents=True)
    for sample in range(len(pictures)):
        data = pictures.read(sample)
        assert isinstance(data, bytes)
        (originals / "ab"[2 * sample >= len(pictures)] / f"{sample:08d}.jpg").write_bytes(data)
    store = folder / "store"
    pack(Request(str(originals), str(store), encoding), silent)
    return _split_of(open_tree(str(store)))


def mean_size(pictures: Source) -> float:
    """Bytes."""
    return float(np.mean([len(pictures.read(sample)) for sample in range(len(pictures))]))


def _files_below(path: Path) -> Source:
    builder = NamesBuilder()
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    builder.extend(os.fsencode(file.relative_to(path)) for file in files)
    return FileSource(path, builder.build(), np.zeros(len(files), np.int32))


def _split_of(tree: Tree) -> Source:
    inside = b"train" if b"train" in tree.folders(b"") else b""
    listing = tree.listing(inside)
    return tree.source(inside, listing.names, listing.labels)


def _chosen(source: Source, path: Path, most: int) -> Source:
    named = [i for i in range(len(source)) if source.name(i).lower().endswith(_SUFFIXES)]
    ids = [i for i in named[:: ceil(len(named) / most) or 1] if _is_whole(source, i)]
    if not ids:
        raise ConfigError(f"{path}: there is no JPEG in it that Pillow decodes.")
    return SourceSubset(source, np.array(ids, np.int64))


def _is_whole(source: Source, sample: int) -> bool:
    try:
        data = source.read(sample)
        assert isinstance(data, bytes)
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.load()
    except Exception:  # whatever Pillow raises
        return False
    return image.mode in ("L", "RGB")
