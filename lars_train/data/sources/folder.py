"""Open a directory, zip or store of tar shards with one folder per class as a `Dataset`.

split_folders.py finds the splits and collects their samples, imagenet.py labels ImageNet's flat validation folder, and
tree.py decides which files are images.
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
from lars_train.data.sources.split_files import find_shards, reject_parquet
from lars_train.data.sources.split_folders import (
    Split,
    SplitFolders,
    check_same_classes,
    collect_split,
    find_splits,
    find_validation,
    hold_out,
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
    """Open the data set at `root`, a directory, a zip or a store of tar shards.

    `root` holds ``train/`` and a validation set with one of the names in splits.py. With `holdout`, that share of each
    training class becomes the validation set, even if `root` has one. The class folders may then also lie directly in
    `root`. `cache`, `image_key`: see `open_tree`. Raises `ConfigError` for any other layout.
    """
    tree = open_tree(root, cache, image_key, train_only=holdout is not None)
    folders = find_splits(tree, holdout)
    if holdout is not None:
        return make_dataset(tree, folders, *hold_out(tree, folders.train, holdout))
    assert folders.val is not None
    train, val = collect_split(tree, folders.train), collect_split(tree, folders.val)
    check_same_classes(tree, train, val)
    return make_dataset(tree, folders, train, val)


def open_folder_validation(
    root: str | None, cache: CacheSettings | None = None, image_key: str | None = None
) -> Dataset:
    """Open only the validation images at `root`, for a trained model. The training split is empty.

    The class folders lie in a folder with one of the names in splits.py. Without such a folder and without ``train/``,
    they lie directly in `root`. Tar shards outside any split count as validation images, too. `cache`, `image_key`: see
    `open_tree`. Raises `ConfigError` for any other layout.
    """
    tree = open_tree(root, cache, image_key)
    folders, inside = find_validation(tree)
    return validation_only(tree, folders, collect_split(tree, inside))


def validation_only(tree: Tree, folders: SplitFolders, val: Split) -> Dataset:
    """Return the `Dataset` of `val` and an empty training split."""
    none = np.zeros(0, np.int64)
    return make_dataset(tree, folders, Split(val.inside, val.names.take(none), val.labels[:0], val.classes, none), val)


def open_tree(
    root: str | None, cache: CacheSettings | None = None, image_key: str | None = None, *, train_only: bool = False
) -> Tree:
    """Open the directory, zip or store of tar shards at `root`, which may be a URL if `cache` is given.

    `image_key`, `train_only`: see `open_webdataset`.
    """
    tree = _open_tree(root, cache, image_key, train_only)
    if image_key is not None and not isinstance(tree, WebdatasetTree):
        raise ConfigError(
            f"data.image_key={image_key}: {tree.place} is not a folder of tars in webdataset's layout; drop "
            "data.image_key."
        )
    return tree


def _open_tree(root: str | None, cache: CacheSettings | None, image_key: str | None, train_only: bool) -> Tree:
    if not root:
        raise ConfigError("data.root is not set: give the folder or .zip with the images, data.root=PATH.")
    if is_url(root):
        if cache is None:
            raise ConfigError(f"{root}: only lars-train's data.root can be a URL; copy the data to a disk.")
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
        shards = find_shards(path)
        if shards is not None:
            return open_webdataset(path, shards, image_key, train_only)
        reject_parquet(path)
        return DirectoryTree(path)
    if path.suffix.lower() != ".zip":
        reject_parquet(path)
        raise ConfigError(f"data.root={root} is neither a folder nor a .zip; unpack it and give the folder.")
    return ZipTree(path)


def make_dataset(tree: Tree, folders: SplitFolders, train: Split, val: Split) -> Dataset:
    """Return the `Dataset` of two splits that share `train.classes`."""
    return Dataset(
        train=tree.source(train.inside, train.names, train.labels, train.rows),
        val=tree.source(val.inside, val.names, val.labels, val.rows),
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


def take_inventory(tree: Tree, folders: SplitFolders, *splits: Split) -> Inventory:
    """Return the inventory of a tree: the splits that are read, and the skipped entries, each folder counted once."""
    own, beside, unread_splits = tree.inventory, {}, list[str]()
    # A store names its splits train and val, and records their names in the original data set.
    original_names = {TRAIN.encode(): own.train, VAL.encode(): own.val} if isinstance(tree, ShardTree) else {}
    if folders.train or folders.val:
        # A devkit holds no images.
        others = [
            name for name in tree.folders(b"") if not is_split_name(os.fsdecode(name)) and not name.startswith(_DEVKIT)
        ]
        unread_splits = [name for name in map(os.fsdecode, others) if looks_like_split(name)][:_SHOWN]
        counts = {LOOSE: sum(map(is_image, tree.files(b""))), BESIDE: len(others) - len(unread_splits)}
        beside = merge_counts({reason: count for reason, count in counts.items() if count}, tree.hidden())
    held_out = folders.val == folders.train
    val = b"" if held_out or folders.val is None else folders.val
    unused = [original_names.get(os.fsencode(name), name) for name in folders.unused] + unread_splits
    lacking = 0 if len(splits) < 2 else len(splits[0].classes) - len(np.unique(splits[1].labels))
    skipped = {split.inside: split.skipped for split in splits}
    return Inventory(
        train=original_names.get(folders.train, printable(folders.train)),
        val=original_names.get(val, printable(val)),
        unused=(*unused, *own.unused),
        skipped=merge_counts(own.skipped, beside, *skipped.values()),
        unvalidated=lacking,
        lookalikes=find_lookalikes(class_names(splits[0].classes)),
        label_notes=own.label_notes,
    )
