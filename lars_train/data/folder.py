"""A tree of images with one folder per class, in a directory, a zip or tar shards, as a `Dataset`.

Finds the splits, gives classes their labels and cuts off a validation set where there is none. How
ImageNet's flat validation folder gets its labels is in imagenet.py; what a file is, in tree.py.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from lars_train.data.directory import DirectoryTree, user_path
from lars_train.data.listing import Listing, divide
from lars_train.data.parquet_files import refuse_parquet
from lars_train.data.remote import CacheSettings, open_remote
from lars_train.data.shards import is_store, open_store
from lars_train.data.source import Dataset, Labels, Names, fingerprint
from lars_train.data.tree import Ranks, Tree, is_image
from lars_train.data.webdataset import open_webdataset, shard_files
from lars_train.data.zips import ZipTree
from lars_train.errors import ConfigError
from lars_train.text import is_url, printable

TRAIN = b"train"
TEST = b"test"
VALIDATION = (b"val", b"validation", TEST)
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """The samples of one split: names relative to the folder `inside`, labels, and the class names."""

    inside: bytes
    names: Names
    labels: Labels
    classes: tuple[bytes, ...]
    ranks: Ranks | None = None
    """Which of the tree's listing of `inside` they are; None: all, or none of it."""


def open_folder(root: str | None, holdout: float | None, cache: CacheSettings | None = None) -> Dataset:
    """The data set below `root`, a directory, a zip or a store of tar shards.

    `root` holds ``train/`` and one of ``val/``, ``validation/``, ``test/`` (the first that is there). With
    `holdout`, that share of each class of the training images is the validation set instead, whatever lies
    beside ``train/``; then the class folders may also lie directly in `root`. `cache`: see `open_tree`. Raises
    `ConfigError` for every other layout.
    """
    tree = open_tree(root, cache)
    train, val = find_splits(tree, holdout, VALIDATION)
    if holdout is not None:
        return dataset(tree, *hold_out(tree, train, holdout))
    return dataset(tree, *matched(tree, collect(tree, train), collect(tree, val)))


def open_tree(root: str | None, cache: CacheSettings | None = None) -> Tree:
    """The directory, zip or store of tar shards that `data.root` names; by a URL, if there is a `cache`."""
    if not root:
        raise ConfigError("data.root is not set: give the folder or .zip with the images, data.root=PATH.")
    if is_url(root):
        if cache is None:
            raise ConfigError(f"{root}: only lars-train reads from URLs, as data.root; copy it to a disk.")
        return open_remote(root, cache)
    path = user_path(root)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"data.root={root} cannot be opened ({error.strerror}); give the folder or .zip with the images."
        ) from error
    if is_folder:
        if is_store(path):
            return open_store(path)
        shards = shard_files(path)
        if shards:
            return open_webdataset(path, shards)
        refuse_parquet(path)
        return DirectoryTree(path)
    if path.suffix.lower() != ".zip":
        refuse_parquet(path)
        raise ConfigError(f"data.root={root} is neither a folder nor a .zip; unpack it and give the folder.")
    return ZipTree(path)


def find_splits(tree: Tree, holdout: float | None, validation: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The folders of training and validation: the first of `validation`; with `holdout`, twice the same."""
    if holdout is not None and not 0 < holdout < 1:
        raise ConfigError(f"data.holdout={holdout}: it must be between 0 and 1; try data.holdout=0.1.")
    found = tree.folders(b"")
    # Without class folders, test/ holds the unlabelled images of a competition: nothing to validate on.
    val = next((name for name in validation if name in found and (name != TEST or tree.folders(name))), None)
    if TRAIN not in found:
        if holdout is not None and found and val is None:
            return b"", b""
        raise ConfigError(f"data.root={tree.place} has no train/ folder; {_instead(tree, found)}")
    if holdout is not None:
        return TRAIN, TRAIN
    if val is None:
        wanted = " or ".join(f"{printable(name)}/" for name in validation)
        raise ConfigError(
            f"data.root={tree.place} has no validation set ({wanted}); "
            "set data.holdout=0.1 to hold a tenth of the training images out."
        )
    return TRAIN, val


def collect(tree: Tree, inside: bytes) -> Split:
    """All images of the class folders in `inside`, ranked by path."""
    listing = _listing(tree, inside)
    lacking = _with_fewer(listing, 1)
    if lacking and listing.complete:
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has class folders without images: {_listed(lacking)}; "
            "remove them, or put their images in."
        )
    return Split(inside, listing.names, listing.labels, listing.classes)


def hold_out(tree: Tree, inside: bytes, share: float) -> tuple[Split, Split]:
    """Training and validation samples from one tree of class folders.

    Which ones go to validation: see `divide`.
    """
    listing = _listing(tree, inside)
    lacking = _with_fewer(listing, 2)
    if lacking:
        raise ConfigError(
            f"data.holdout={share}: {_place(tree, inside)} has classes with one image or none: {_listed(lacking)}; "
            "each class needs one for training and one for validation: add images, or remove the folder."
        )
    train, val = (
        Split(inside, listing.names.take(ranks), listing.labels[ranks], listing.classes, ranks)
        for ranks in divide(listing, share)
    )
    return train, val


def matched(tree: Tree, train: Split, val: Split) -> tuple[Split, Split]:
    """Both splits, once their classes are the same."""
    sides = []
    for one, other in ((train, val), (val, train)):
        lacking = sorted(set(one.classes) - set(other.classes))
        if lacking:
            sides.append(f"{_listed(lacking)} only in {printable(one.inside)}/")
    if sides:
        raise ConfigError(
            f"data.root={tree.place}: {printable(train.inside)}/ and {printable(val.inside)}/ have different "
            f"classes: {'; '.join(sides)}. Give both a folder of the same name for each class."
        )
    return train, val


def dataset(tree: Tree, train: Split, val: Split) -> Dataset:
    """The `Dataset` of two splits that share `train.classes`."""
    classes = tuple(os.fsdecode(name) for name in train.classes)
    return Dataset(
        train=tree.source(train.inside, train.names, train.labels, train.ranks),
        val=tree.source(val.inside, val.names, val.labels, val.ranks),
        classes=classes,
        fingerprint=fingerprint(
            classes, (train.names.runs(), train.labels), (val.names.runs(), val.labels), variant=tree.variant
        ),
    )


def _listing(tree: Tree, inside: bytes) -> Listing:
    listing = tree.listing(inside)
    if not listing.classes:
        loose = sum(map(is_image, tree.files(inside)))
        found = f"{loose} images lie directly in it" if loose else "it holds no images"
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has no class folders ({found}); "
            "put the images of each class in a folder of its own."
        )
    return listing


def _place(tree: Tree, inside: bytes) -> str:
    return f"{tree.place}/{printable(inside)}" if inside else tree.place


def _with_fewer(listing: Listing, least: int) -> list[bytes]:
    """The classes that have fewer than `least` images."""
    return [name for name, count in zip(listing.classes, listing.counts().tolist(), strict=True) if count < least]


def _instead(tree: Tree, found: Sequence[bytes]) -> str:
    """What lies in the root in place of ``train/``, and what to do about it."""
    for name in found:
        if TRAIN in tree.folders(name):
            return f"{printable(name)}/ in it has one: make that data.root (or zip that folder)."
    if not found:
        return "it holds no folders at all. Give the folder above train/."
    return (
        f"found {_listed(found)}. Give the folder above train/; if these are the classes, "
        "set data.holdout=0.1 to train on nine tenths of them and validate on the rest."
    )


def _listed(names: Sequence[bytes]) -> str:
    shown = ", ".join(f"{printable(name)}/" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
