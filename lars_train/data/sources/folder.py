"""A tree of images with one folder per class, in a directory, a zip or tar shards, as a `Dataset`.

Where its splits lie, and the samples of each, is in split_folders.py. How ImageNet's flat validation folder gets its
labels is in imagenet.py; what a file is, in tree.py.
"""

from __future__ import annotations

import os
import stat

import numpy as np

from lars_train.data.dataset import Dataset, class_names, fingerprint
from lars_train.data.inventory import BESIDE, LOOSE, Inventory, find_lookalikes, merge_counts
from lars_train.data.sources.directory import DirectoryTree
from lars_train.data.sources.remote import CacheSettings, open_remote
from lars_train.data.sources.shards import ShardTree, is_store, open_shard_store
from lars_train.data.sources.split_files import refuse_parquet, shard_files
from lars_train.data.sources.split_folders import (
    Folders,
    Split,
    collect,
    find_splits,
    find_validation,
    hold_out,
    matched,
)
from lars_train.data.sources.tree import Tree, is_image
from lars_train.data.sources.webdataset import WebdatasetTree, open_webdataset
from lars_train.data.sources.zips import ZipTree
from lars_train.data.splits import TRAIN, VAL, is_split_name, looks_like_split
from lars_train.errors import ConfigError
from lars_train.fsutil import user_path
from lars_train.messages import is_url, printable

_SHOWN = 5
_DEVKIT = b"ILSVRC2012_devkit"


def open_folder(
    root: str | None, holdout: float | None, cache: CacheSettings | None = None, image_key: str | None = None
) -> Dataset:
    """The data set below `root`, a directory, a zip or a store of tar shards.

    `root` holds ``train/`` and a validation set by one of the names in splits.py. With
    `holdout`, that share of each class of the training images is the validation set instead, whatever lies
    beside ``train/``; then the class folders may also lie directly in `root`. `cache`, `image_key`: see `open_tree`.
    Raises `ConfigError` for every other layout.
    """
    tree = open_tree(root, cache, image_key, train_alone=holdout is not None)
    folders = find_splits(tree, holdout)
    if holdout is not None:
        return make_dataset(tree, folders, *hold_out(tree, folders.train, holdout))
    assert folders.val is not None
    return make_dataset(tree, folders, *matched(tree, collect(tree, folders.train), collect(tree, folders.val)))


def open_folder_validation(
    root: str | None, cache: CacheSettings | None = None, image_key: str | None = None
) -> Dataset:
    """The validation images below `root` alone, for a model that has its classes already; the training split is empty.

    Their class folders lie in a folder with one of the names in splits.py or, without one and without ``train/``,
    directly in `root`; tar shards of no split are validation images, too. `cache`, `image_key`: see `open_tree`.
    Raises `ConfigError` for every other layout.
    """
    tree = open_tree(root, cache, image_key)
    folders, inside = find_validation(tree)
    return validation_alone(tree, folders, collect(tree, inside))


def validation_alone(tree: Tree, folders: Folders, val: Split) -> Dataset:
    """The `Dataset` of `val` and an empty training split."""
    none = np.zeros(0, np.int64)
    return make_dataset(tree, folders, Split(val.inside, val.names.take(none), val.labels[:0], val.classes, none), val)


def open_tree(
    root: str | None, cache: CacheSettings | None = None, image_key: str | None = None, *, train_alone: bool = False
) -> Tree:
    """The directory, zip or store of tar shards that `data.root` names; by a URL, if there is a `cache`.

    `image_key`, `train_alone`: see `open_webdataset`.
    """
    tree = _open_tree(root, cache, image_key, train_alone)
    if image_key is not None and not isinstance(tree, WebdatasetTree):
        raise ConfigError(f"data.image_key={image_key}: {tree.place} is no folder of tars that others made; drop it.")
    return tree


def _open_tree(root: str | None, cache: CacheSettings | None, image_key: str | None, train_alone: bool) -> Tree:
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
            return open_shard_store(path)
        shards = shard_files(path)
        if shards is not None:
            return open_webdataset(path, shards, image_key, train_alone)
        refuse_parquet(path)
        return DirectoryTree(path)
    if path.suffix.lower() != ".zip":
        refuse_parquet(path)
        raise ConfigError(f"data.root={root} is neither a folder nor a .zip; unpack it and give the folder.")
    return ZipTree(path)


def make_dataset(tree: Tree, folders: Folders, train: Split, val: Split) -> Dataset:
    """The `Dataset` of two splits that share `train.classes`."""
    return Dataset(
        train=tree.source(train.inside, train.names, train.labels, train.ranks),
        val=tree.source(val.inside, val.names, val.labels, val.ranks),
        classes=class_names(train.classes),
        fingerprint=fingerprint(
            map(os.fsdecode, train.classes),
            (train.names.chunks(), train.labels),
            (val.names.chunks(), val.labels),
            variant=tree.variant,
        ),
        numbers=tree.numbers if isinstance(tree, WebdatasetTree) else (),
        inventory=take_inventory(tree, folders, train, val),
    )


def take_inventory(tree: Tree, folders: Folders, *splits: Split) -> Inventory:
    """Return what is read of the tree and what is skipped, each folder counted once."""
    own, beside, alike_splits = tree.inventory, {}, list[str]()
    # A store calls its splits train and val, and knows what they were called in its original.
    called = {TRAIN.encode(): own.train, VAL.encode(): own.val} if isinstance(tree, ShardTree) else {}
    if folders.train or folders.val:
        # A devkit is not for reading images.
        others = [
            name for name in tree.folders(b"") if not is_split_name(os.fsdecode(name)) and not name.startswith(_DEVKIT)
        ]
        alike_splits = [name for name in map(os.fsdecode, others) if looks_like_split(name)][:_SHOWN]
        counts = {LOOSE: sum(map(is_image, tree.files(b""))), BESIDE: len(others) - len(alike_splits)}
        beside = merge_counts({reason: count for reason, count in counts.items() if count}, tree.hidden())
    held_out = folders.val == folders.train
    val = b"" if held_out or folders.val is None else folders.val
    unused = [called.get(os.fsencode(name), name) for name in folders.unused] + alike_splits
    lacking = 0 if len(splits) < 2 else len(splits[0].classes) - len(np.unique(splits[1].labels))
    skipped = {split.inside: split.skipped for split in splits}
    return Inventory(
        train=called.get(folders.train, printable(folders.train)),
        val=called.get(val, printable(val)),
        unused=(*unused, *own.unused),
        skipped=merge_counts(own.skipped, beside, *skipped.values()),
        unvalidated=lacking,
        lookalikes=find_lookalikes(class_names(splits[0].classes)),
        label_notes=own.label_notes,
    )
