"""ImageNet (ILSVRC 2012) as it lies on disks: a folder per class, or all validation images in one folder.

The labels of a flat validation folder are found here, and read in imagenet_labels.py. Subsets are fine.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from lars_train.data.directory import DirectoryTree, is_file, user_path
from lars_train.data.folder import Split, collect, dataset, find_splits, hold_out, matched, open_tree
from lars_train.data.imagenet_labels import from_csv, from_devkit
from lars_train.data.remote import CacheSettings
from lars_train.data.source import Dataset, NamesBuilder
from lars_train.data.tree import Tree, is_image, join
from lars_train.errors import ConfigError
from lars_train.text import printable

_KAGGLE = b"LOC_val_solution.csv"
_DEVKIT = b"ILSVRC2012_devkit_t12/data"
_GROUND_TRUTH = b"ILSVRC2012_validation_ground_truth.txt"
_META = b"meta.mat"
# How many folders above the root are searched for Kaggle's CSV (its images lie in ILSVRC/Data/CLS-LOC).
_PARENTS = 3
# A table of labels: from image names to the wnid of each.
_Table = Callable[[list[bytes]], list[bytes]]


def open_imagenet(
    root: str | None, holdout: float | None, val_labels: str | None, cache: CacheSettings | None = None
) -> Dataset:
    """The data set below `root`: ``train/<wnid>/`` and ``val/<wnid>/``, or all images directly in ``val/``.

    For the latter, `val_labels` names a CSV of image and wnid, or the devkit; by default they are looked
    for in and above `root`. `holdout` and `cache`: see `open_folder`. Raises `ConfigError`.
    """
    tree = open_tree(root, cache)
    train, val = find_splits(tree, holdout, (b"val",))
    flat = holdout is None and not tree.folders(val) and any(map(is_image, tree.files(val)))
    if val_labels is not None and not flat:
        raise ConfigError(
            f"data.val_labels={val_labels}, but the images lie in class folders, which label them: "
            "drop data.val_labels."
        )
    if holdout is not None:
        return dataset(tree, *hold_out(tree, train, holdout))
    training = collect(tree, train)
    if not flat:
        return dataset(tree, *matched(tree, training, collect(tree, val)))
    table = _found(tree, val) if val_labels is None else _given(val_labels)
    return dataset(tree, training, _flat(tree, val, training.classes, table))


def _flat(tree: Tree, inside: bytes, classes: tuple[bytes, ...], table: _Table) -> Split:
    """The images directly in `inside`, labelled by `table`."""
    images = [name for name in tree.files(inside) if is_image(name)]
    wnids = table(images)
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for image, wnid in zip(images, wnids, strict=True):
        if wnid not in labels:
            raise ConfigError(
                f"data.val_labels: {printable(image)} is of class {printable(wnid)}, which has no folder in "
                f"{tree.place}/train; remove the image, or add the class."
            )
    builder = NamesBuilder()
    builder.extend(images)
    return Split(inside, builder.build(), np.array([labels[wnid] for wnid in wnids], np.int32), classes)


def _given(val_labels: str) -> _Table:
    """The table at the path `val_labels`: a CSV, the devkit's text file, or a folder that has it."""
    path = user_path(val_labels)
    for folder in (b"", b"data", _DEVKIT):
        if is_file(inside := path / os.fsdecode(join(folder, _GROUND_TRUTH))):
            path = inside
    if not is_file(path):
        raise ConfigError(
            f"data.val_labels={val_labels} is neither a file nor a folder with {printable(_GROUND_TRUTH)}; "
            "give a CSV of image and wnid, or the unpacked devkit."
        )
    return _table(DirectoryTree(path.parent), os.fsencode(path.name))


def _found(tree: Tree, val: bytes) -> _Table:
    """Kaggle's CSV in the tree or above it, else the devkit in the tree, else a lone CSV in it."""
    for folder in (b"", val):
        if _KAGGLE in tree.files(folder):
            return _table(tree, join(folder, _KAGGLE))
    for above in list(tree.path.resolve().parents)[:_PARENTS]:
        if is_file(above / os.fsdecode(_KAGGLE)):
            return _table(DirectoryTree(above), _KAGGLE)
    if _GROUND_TRUTH in tree.files(_DEVKIT):
        return _table(tree, join(_DEVKIT, _GROUND_TRUTH))
    for folder in (val, b""):
        tables = [name for name in tree.files(folder) if name.lower().endswith(b".csv")]
        if len(tables) == 1:
            return _table(tree, join(folder, tables[0]))
    raise ConfigError(
        f"data.root={tree.place}: the images in val/ lie in no class folders, and there is neither a "
        f"{printable(_KAGGLE)} nor a {printable(_DEVKIT)}/ to label them; set data.val_labels=PATH to a CSV "
        "of image and wnid, or to the unpacked devkit."
    )


def _table(tree: Tree, path: bytes) -> _Table:
    place = f"{tree.place}/{printable(path)}"
    try:
        content = tree.read(path)
        if path.lower().endswith(b".csv"):
            return lambda images: from_csv(place, content, images)
        meta = tree.read(join(path.rpartition(b"/")[0], _META))
    except OSError as error:
        raise ConfigError(
            f"data.val_labels: {place} cannot be used ({error}); a CSV wants the ending .csv, the devkit's "
            f"text file wants {printable(_META)} beside it."
        ) from error
    return lambda images: from_devkit(place, content, meta, images)
