"""Find the splits in a tree of class folders (a directory, a zip or tar shards), and collect the samples of each.

Can hold out a validation set from the training images. Raises `ConfigError` with a remedy for layouts that cannot be a
data set.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lars_train.data.dataset import Labels, Names, class_names
from lars_train.data.inventory import format_counts
from lars_train.data.sources.directory import DirectoryTree
from lars_train.data.sources.shards import ShardTree
from lars_train.data.sources.split_files import advise_decompressing, advise_unpacking
from lars_train.data.sources.tree import Listing, Rows, Tree, is_image, join, split_holdout
from lars_train.data.sources.webdataset import WebdatasetTree
from lars_train.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Choice,
    choose_splits,
    find_nested_splits,
    find_non_classes,
    is_split_name,
    looks_like_training,
    looks_like_validation,
    reject_case_duplicates,
    split_word,
)
from lars_train.errors import ConfigError
from lars_train.messages import counted, listed, printable

# Matches the first two folders of each name in a text of NUL-terminated names.
_TWO_FOLDERS = re.compile(rb"(?:\A|\0)([^/\0]+)/([^/\0]+)/")


class SplitFolders(NamedTuple):
    """The folders of the splits below a root. They are equal if the validation images are held out of `train`.

    A split is ``b""`` if its class folders lie in the root. Without a training set, `train` is ``b""``, too. Without a
    validation set, `val` is None.
    """

    train: bytes
    val: bytes | None
    unused: tuple[str, ...] = ()
    """Further folders with the names of splits, which are not read."""


@dataclass(frozen=True)
class Split:
    """The samples of one split: names relative to the folder `inside`, labels, and class names."""

    inside: bytes
    names: Names
    labels: Labels
    classes: tuple[bytes, ...]
    rows: Rows | None = None
    """The samples' rows in the tree's listing of `inside`; None for all rows, or for samples that are not in it."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of the entries in `inside` that are not samples, by reason."""


def find_splits(tree: Tree, holdout: float | None, *, allow_missing: bool = False) -> SplitFolders:
    """Find the folders of the training and the validation set; with `holdout`, both are the same.

    `allow_missing`: one of the two may be missing, and the class folders may lie in the root.
    """
    if holdout is not None and not 0 < holdout < 1:
        raise ConfigError(f"data.holdout={holdout} must be between 0 and 1; try data.holdout=0.1.")
    found = tree.folders(b"")
    train, val, unused = choice = _choose(tree)
    reject_case_duplicates(f"data.root={tree.place}", choice if holdout is None else choice._replace(val=None))
    if train is None:
        if (holdout is not None or allow_missing) and val is None and found and not _non_classes(found):
            return SplitFolders(b"", b"" if holdout is not None else None)
        if allow_missing and val is not None and all(is_split_name(os.fsdecode(name)) for name in found):
            return SplitFolders(b"", os.fsencode(val), unused)
        raise ConfigError(f"data.root={tree.place} has no train/ folder; {_describe_root(tree, found)}")
    inside = os.fsencode(train)
    if holdout is not None:
        return SplitFolders(inside, inside, (*([] if val is None else [val]), *unused))
    if val is None and not allow_missing:
        remedy = "set data.holdout=0.1 to hold out a tenth of the training images."
        raise _without_validation(tree, unused, remedy)
    return SplitFolders(inside, None if val is None else os.fsencode(val), unused)


def find_validation(tree: Tree) -> tuple[SplitFolders, bytes]:
    """Find the splits, and the folder of the validation images. The training set may be missing."""
    train, val, unused = choice = _choose(tree)
    reject_case_duplicates(f"data.root={tree.place}", choice)
    if train is None:
        found = tree.folders(b"")
        if val is None and _non_classes(found):
            raise ConfigError(f"data.root={tree.place} has no validation set; {_describe_root(tree, found)}")
        inside = b"" if val is None else os.fsencode(val)
        return SplitFolders(b"", inside, unused), inside
    inside = os.fsencode(val or train)
    # A store that was packed from images outside any split has these images in train.
    if val is None and not (isinstance(tree, ShardTree) and not tree.inventory.train):
        raise _without_validation(tree, unused, _training_images(tree, train))
    return SplitFolders(os.fsencode(train), inside, unused), inside


def _without_validation(tree: Tree, unused: Sequence[str], remedy: str) -> ConfigError:
    names = ", ".join(f"{name}/" for name in VALIDATION[:-1])
    others = (*unused, *tree.inventory.unused)
    unusable = f"; {', '.join(map(printable, others))} cannot serve as one" if others else ""
    if similar := [name for name in tree.folders(b"") if _is_other_validation(name)]:
        remedy = f"{_listed(similar)} looks like one: rename {printable(similar[0])}/ to val/, or {remedy}"
    remedy = advise_decompressing(others) or remedy
    return ConfigError(
        f"data.root={tree.place} has no validation set ({names} or {VALIDATION[-1]}/{unusable}); {remedy}"
    )


def _training_images(tree: Tree, train: str) -> str:
    """Return how to evaluate a data set that has only training images, for a message."""
    if isinstance(tree, DirectoryTree):
        return f"to evaluate the training images, set data.root={tree.place}/{printable(train)}."
    return "to evaluate the images that a run with data.holdout=S held out, set data.holdout=S here, too."


def _is_other_validation(name: bytes) -> bool:
    """Return True if a name suggests a validation set, but is not a supported name of one."""
    return looks_like_validation(os.fsdecode(name)) and not is_split_name(os.fsdecode(name))


def _choose(tree: Tree) -> Choice:
    found = tree.folders(b"")
    # A test/ without class folders holds the unlabeled images of a competition, which cannot serve as validation.
    usable = {name for name in map(os.fsdecode, found) if name.lower() != TEST or tree.folders(os.fsencode(name))}
    return choose_splits(map(os.fsdecode, found), usable.__contains__)


def collect_split(tree: Tree, inside: bytes) -> Split:
    """Return all images of the class folders in `inside`, ordered by path."""
    listing = _list_classes(tree, inside)
    empty = _classes_with_fewer(listing, 1)
    if empty and listing.complete:
        remedy = (not inside and _tars_beside(tree, listing.classes)) or "remove them, or add their images."
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has class folders without images: {_listed(empty)}"
            f"{_describe_skipped(listing.skipped)}; {remedy}"
        )
    return Split(inside, listing.names, listing.labels, listing.classes, skipped=listing.skipped)


def hold_out(tree: Tree, inside: bytes, share: float) -> tuple[Split, Split]:
    """Split the images of the class folders in `inside` into training and validation samples by `split_holdout`."""
    listing = _list_classes(tree, inside)
    small = _classes_with_fewer(listing, 2)
    if small:
        remedy = (not inside and _tars_beside(tree, listing.classes)) or (
            "each class needs one for training and one for validation: add images, or remove the folder."
        )
        raise ConfigError(
            f"data.holdout={share}: {_place(tree, inside)} has classes with one image or none: {_listed(small)}"
            f"{_describe_skipped(listing.skipped)}; {remedy}"
        )
    train, val = (
        Split(inside, listing.names.take(rows), listing.labels[rows], listing.classes, rows, listing.skipped)
        for rows in split_holdout(listing.labels, share)
    )
    return train, val


def check_same_classes(tree: Tree, train: Split, val: Split) -> None:
    """Raise `ConfigError` unless both splits have the same classes."""
    sides = []
    for one, other in ((train, val), (val, train)):
        only_here = sorted(set(one.classes) - set(other.classes))
        if only_here:
            sides.append(f"{_listed(only_here)} only in {printable(one.inside)}/")
    if sides:
        raise ConfigError(
            f"data.root={tree.place}: {printable(train.inside)}/ and {printable(val.inside)}/ have different "
            f"classes: {'; '.join(sides)}. Each class needs a folder of the same name in both."
        )


def _list_classes(tree: Tree, inside: bytes) -> Listing:
    """List the class folders in `inside`. Raises `ConfigError` if they cannot be the classes of a split."""
    listing = tree.listing(inside)
    if not listing.classes:
        loose = sum(map(is_image, tree.files(inside)))
        none = f"it holds no images{_describe_skipped(listing.skipped)}"
        found = f"{counted(loose, 'image')} directly in it" if loose else none
        remedy = ""
        if isinstance(tree, DirectoryTree):
            names = [os.fsdecode(join(inside, name)) for name in tree.files(inside) if name.lower().endswith(b".tar")]
            remedy = advise_unpacking(tree.path, names)
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has no class folders ({found}); "
            f"{remedy or 'put the images of each class in a separate folder.'}"
        )
    shown = class_names(listing.classes)
    if twice := next((name for name, count in Counter(shown).items() if count > 1), None):
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has two classes whose names both decode to {twice}, because one is not "
            "UTF-8; rename one."
        )
    if not inside:
        _reject_data_sets(tree, listing)
    parts = _non_classes(listing.classes, split=True) if inside else []
    if parts:
        raise ConfigError(
            f"data.root: {_place(tree, inside)} holds {_listed(parts)}, which are parts of the data, not classes; "
            f"set data.root to the folder that contains train/, or put the class folders in {printable(inside)}/."
        )
    return listing


def _reject_data_sets(tree: Tree, listing: Listing) -> None:
    """Raise `ConfigError` if folders in the root hold splits: each such folder would become one class."""
    blob, _ = listing.names.arrays
    # The usual case: there is one slash per name, so the classes have no subfolders.
    if np.count_nonzero(blob == ord("/")) == len(listing.names):
        return
    folders: dict[str, set[str]] = {}
    for name, folder in {match.groups() for match in _TWO_FOLDERS.finditer(blob.data)}:
        folders.setdefault(os.fsdecode(name), set()).add(os.fsdecode(folder))
    if found := find_nested_splits(folders, len(listing.classes)):
        train = min(filter(looks_like_training, folders[found]))
        raise ConfigError(
            f"data.root={tree.place} has no class folders, because its folders hold splits; "
            f"{_split_below(tree, os.fsencode(found), os.fsencode(train))}"
        )


def _split_below(tree: Tree, name: bytes, train: bytes) -> str:
    """Return the remedy for a training set in the folder `name` of the root."""
    inner, outer = printable(join(name, train)), printable(join(train, name))
    if tree.folders(join(name, train)):
        folder = printable(name)
        return f"{folder}/ in it holds {printable(train)}/: give {folder}/ as data.root, or a zip of it."
    return f"move the images of {inner}/ to {outer}/, and do the same for the other splits and classes."


def _place(tree: Tree, inside: bytes) -> str:
    return f"{tree.place}/{printable(inside)}" if inside else tree.place


def _classes_with_fewer(listing: Listing, least: int) -> list[bytes]:
    """Return the classes with fewer than `least` images."""
    return [name for name, count in zip(listing.classes, listing.counts().tolist(), strict=True) if count < least]


def _describe_root(tree: Tree, found: Sequence[bytes]) -> str:
    """Describe the content of a root without ``train/``, with a remedy."""
    if isinstance(tree, WebdatasetTree):
        train = [name for name in tree.inventory.unused if split_word(name) == TRAIN]
        return advise_decompressing(train) or (
            f"all its tars belong to {printable(tree.inventory.val)}. Name the training shards train-*.tar; "
            "mode=evaluate needs no training shards and no data.holdout."
        )
    for name in found:
        inner = choose_splits(map(os.fsdecode, tree.folders(name))).train
        if inner is not None:
            return _split_below(tree, name, os.fsencode(inner))
    loose = sum(map(is_image, tree.files(b"")))
    if not found and loose:
        return (
            f"it holds {counted(loose, 'image')} outside class folders. Put the images of each class in a separate "
            "folder in train/."
        )
    packed = [name for name in map(os.fsdecode, tree.files(b"")) if name.lower().endswith(".zip")]
    if not found and packed:
        return (
            f"{printable(packed[0])} in it is not read; unzip it, or zip train/ and val/ together and give that file."
        )
    if not found:
        skipped = _describe_skipped(tree.inventory.skipped)
        return f"it holds no folders at all{skipped}. Set data.root to the folder that contains train/."
    # Folders named like splits are not classes, so data.holdout is no remedy.
    parts = _non_classes(found)
    if parts and 2 * len(parts) < len(found):
        others = [name for name in found if name not in parts]
        return (
            f"{_listed(parts)} looks like a split beside class folders ({_listed(others)}). Move the class folders "
            f"into train/, or rename or move {printable(parts[0])}/."
        )
    if parts:
        evaluate = "" if _choose(tree).val is None else "; mode=evaluate needs no train/"
        return f"found {_listed(parts)}. Name the split folders train/ and val/ (rename or link them){evaluate}."
    if tars := _tars_beside(tree, found):
        return f"{tars} To train on the class folders, move them into train/."
    return (
        f"found {_listed(found)}. Set data.root to the folder that contains train/; if these are the classes, "
        "set data.holdout=0.1 to train on nine tenths of them and validate on the rest."
    )


def _tars_beside(tree: Tree, folders: Sequence[bytes]) -> str:
    """Return the remedy for tars in the root that were not unpacked into one of `folders`; empty if there are none."""
    files = tree.files(b"") if isinstance(tree, DirectoryTree) else []
    tars = [name for name in files if name.lower().endswith(b".tar") and name[:-4] not in folders]
    if not tars:
        return ""
    return (
        f"tars that lie beside folders are not read ({listed(tars)} beside {_listed(folders)}): to read them, move the "
        "folders elsewhere."
    )


def _non_classes(found: Sequence[bytes], *, split: bool = False) -> list[bytes]:
    """Return the folders that are parts of the data set instead of classes, see `find_non_classes`."""
    return [os.fsencode(name) for name in find_non_classes(list(map(os.fsdecode, found)), split=split)]


def _describe_skipped(skipped: Mapping[str, int]) -> str:
    return f" (skipped: {format_counts(skipped)})" if skipped else ""


def _listed(folders: Sequence[bytes]) -> str:
    return listed(folders, "/")
