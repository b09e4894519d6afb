"""The splits of a tree of class folders: in which folders they lie, and the samples of each.

A tree is a directory, a zip or tar shards. Cuts off a validation set where there is none; what cannot be a data set is
refused, with what to do about it.
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
from lars_train.data.sources.split_files import decompressing, unpacking
from lars_train.data.sources.tree import Listing, Ranks, Tree, is_image, join, split_holdout
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
    refuse_case_twins,
    split_word,
)
from lars_train.errors import ConfigError
from lars_train.messages import counted, listed, printable

# The first two folders of a name in a list where each is followed by a NUL byte.
_TWO_FOLDERS = re.compile(rb"(?:\A|\0)([^/\0]+)/([^/\0]+)/")


class Folders(NamedTuple):
    """The folders of the splits below a root: both the same for a part that is held out; `val` None: there is none.

    Both are ``b""`` for class folders in the root, `train` alone where there is only a validation set.
    """

    train: bytes
    val: bytes | None
    unused: tuple[str, ...] = ()
    """Folders with the names of splits that are not read."""


@dataclass(frozen=True)
class Split:
    """The samples of one split: names relative to the folder `inside`, labels, and the class names."""

    inside: bytes
    names: Names
    labels: Labels
    classes: tuple[bytes, ...]
    ranks: Ranks | None = None
    """Their ranks in the tree's listing of `inside`; None: all, or none of it."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of the entries in `inside` that are no samples, by reason."""


def find_splits(tree: Tree, holdout: float | None, *, alone: bool = False) -> Folders:
    """Find the folders of training and validation; with `holdout`, both are the same.

    `alone`: one of the two may be missing, and the class folders may lie in the root.
    """
    if holdout is not None and not 0 < holdout < 1:
        raise ConfigError(f"data.holdout={holdout}: it must be between 0 and 1; try data.holdout=0.1.")
    found = tree.folders(b"")
    train, val, unused = choice = _chosen(tree)
    refuse_case_twins(f"data.root={tree.place}", choice if holdout is None else choice._replace(val=None))
    if train is None:
        if (holdout is not None or alone) and val is None and found and not _parts(found):
            return Folders(b"", b"" if holdout is not None else None)
        if alone and val is not None and all(is_split_name(os.fsdecode(name)) for name in found):
            return Folders(b"", os.fsencode(val), unused)
        raise ConfigError(f"data.root={tree.place} has no train/ folder; {_instead(tree, found)}")
    inside = os.fsencode(train)
    if holdout is not None:
        return Folders(inside, inside, (*([] if val is None else [val]), *unused))
    if val is None and not alone:
        remedy = "set data.holdout=0.1 to hold a tenth of the training images out."
        raise _without_validation(tree, unused, remedy)
    return Folders(inside, None if val is None else os.fsencode(val), unused)


def find_validation(tree: Tree) -> tuple[Folders, bytes]:
    """Find the splits, of which the training set may be missing, and the folder of the validation images."""
    train, val, unused = choice = _chosen(tree)
    refuse_case_twins(f"data.root={tree.place}", choice)
    if train is None:
        found = tree.folders(b"")
        if val is None and _parts(found):
            raise ConfigError(f"data.root={tree.place} has no validation set; {_instead(tree, found)}")
        inside = b"" if val is None else os.fsencode(val)
        return Folders(b"", inside, unused), inside
    inside = os.fsencode(val or train)
    # What is of no split is called train in a store.
    if val is None and not (isinstance(tree, ShardTree) and not tree.inventory.train):
        raise _without_validation(tree, unused, _training_images(tree, train))
    return Folders(os.fsencode(train), inside, unused), inside


def _without_validation(tree: Tree, unused: Sequence[str], remedy: str) -> ConfigError:
    wanted = ", ".join(f"{name}/" for name in VALIDATION[:-1])
    others = (*unused, *tree.inventory.unused)
    found = f"; {', '.join(map(printable, others))} cannot serve as one" if others else ""
    if alike := [name for name in tree.folders(b"") if _is_other_validation(name)]:
        remedy = f"{_listed(alike)} looks like one: rename {printable(alike[0])}/ to val/, or {remedy}"
    remedy = decompressing(others) or remedy
    return ConfigError(f"data.root={tree.place} has no validation set ({wanted} or {VALIDATION[-1]}/{found}); {remedy}")


def _training_images(tree: Tree, train: str) -> str:
    """Return the advice for an evaluation of the training images, where there are no others."""
    if isinstance(tree, DirectoryTree):
        return f"data.root={tree.place}/{printable(train)} evaluates the training images."
    return "data.holdout=S evaluates the share S that a run with data.holdout=S does not train on."


def _is_other_validation(name: bytes) -> bool:
    """Return True for a name that suggests a validation set, but that no split is read by."""
    return looks_like_validation(os.fsdecode(name)) and not is_split_name(os.fsdecode(name))


def _chosen(tree: Tree) -> Choice:
    found = tree.folders(b"")
    # Without class folders, test/ holds the unlabelled images of a competition: nothing to validate on.
    usable = {name for name in map(os.fsdecode, found) if name.lower() != TEST or tree.folders(os.fsencode(name))}
    return choose_splits(map(os.fsdecode, found), usable.__contains__)


def collect(tree: Tree, inside: bytes) -> Split:
    """All images of the class folders in `inside`, ranked by path."""
    listing = _listing(tree, inside)
    lacking = _with_fewer(listing, 1)
    if lacking and listing.complete:
        remedy = (not inside and _tars_beside(tree, listing.classes)) or "remove them, or put their images in."
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has class folders without images: {_listed(lacking)}"
            f"{_but(listing.skipped)}; {remedy}"
        )
    return Split(inside, listing.names, listing.labels, listing.classes, skipped=listing.skipped)


def hold_out(tree: Tree, inside: bytes, share: float) -> tuple[Split, Split]:
    """Training and validation samples from one tree of class folders.

    Which ones go to validation: see `split_holdout`.
    """
    listing = _listing(tree, inside)
    lacking = _with_fewer(listing, 2)
    if lacking:
        remedy = (not inside and _tars_beside(tree, listing.classes)) or (
            "each class needs one for training and one for validation: add images, or remove the folder."
        )
        raise ConfigError(
            f"data.holdout={share}: {_place(tree, inside)} has classes with one image or none: {_listed(lacking)}"
            f"{_but(listing.skipped)}; {remedy}"
        )
    train, val = (
        Split(inside, listing.names.take(ranks), listing.labels[ranks], listing.classes, ranks, listing.skipped)
        for ranks in split_holdout(listing.labels, share)
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


def _listing(tree: Tree, inside: bytes) -> Listing:
    listing = tree.listing(inside)
    if not listing.classes:
        loose = sum(map(is_image, tree.files(inside)))
        none = f"it holds no images{_but(listing.skipped)}"
        found = f"{counted(loose, 'image')} directly in it" if loose else none
        remedy = ""
        if isinstance(tree, DirectoryTree):
            names = [os.fsdecode(join(inside, name)) for name in tree.files(inside) if name.lower().endswith(b".tar")]
            remedy = unpacking(tree.path, names)
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has no class folders ({found}); "
            f"{remedy or 'put the images of each class in a folder of its own.'}"
        )
    shown = class_names(listing.classes)
    if twice := next((name for name, count in Counter(shown).items() if count > 1), None):
        raise ConfigError(
            f"data.root: {_place(tree, inside)} has two classes whose names are both shown as {twice}, for one is no "
            "UTF-8; rename one."
        )
    if not inside:
        _refuse_data_sets(tree, listing)
    parts = _parts(listing.classes, split=True) if inside else []
    if parts:
        raise ConfigError(
            f"data.root: {_place(tree, inside)} holds {_listed(parts)}, which are parts of the data and no classes; "
            f"give the folder above train/, or put the folders of the classes in {printable(inside)}/."
        )
    return listing


def _refuse_data_sets(tree: Tree, listing: Listing) -> None:
    """Raise `ConfigError` where the class folders in the root hold splits, whose images would become one class."""
    blob, _ = listing.names.arrays
    # One slash a name, as nearly always: no folders in the classes.
    if np.count_nonzero(blob == ord("/")) == len(listing.names):
        return
    folders: dict[str, set[str]] = {}
    for name, folder in {match.groups() for match in _TWO_FOLDERS.finditer(blob.data)}:
        folders.setdefault(os.fsdecode(name), set()).add(os.fsdecode(folder))
    if found := find_nested_splits(folders, len(listing.classes)):
        train = min(filter(looks_like_training, folders[found]))
        raise ConfigError(
            f"data.root={tree.place} has no class folders, for there are splits in them; "
            f"{_split_below(tree, os.fsencode(found), os.fsencode(train))}"
        )


def _split_below(tree: Tree, name: bytes, train: bytes) -> str:
    """Return the advice for a training set in the folder `name` of the root."""
    inner, outer = printable(join(name, train)), printable(join(train, name))
    if tree.folders(join(name, train)):
        return f"{printable(name)}/ in it has one: make that data.root (or zip that folder)."
    return f"move the images of {inner}/ to {outer}/, and those of the other splits and classes alike."


def _place(tree: Tree, inside: bytes) -> str:
    return f"{tree.place}/{printable(inside)}" if inside else tree.place


def _with_fewer(listing: Listing, least: int) -> list[bytes]:
    """The classes that have fewer than `least` images."""
    return [name for name, count in zip(listing.classes, listing.counts().tolist(), strict=True) if count < least]


def _instead(tree: Tree, found: Sequence[bytes]) -> str:
    """Describe what lies in the root in place of ``train/``, with the advice for it."""
    if isinstance(tree, WebdatasetTree):
        train = [name for name in tree.inventory.unused if split_word(name) == TRAIN]
        return decompressing(train) or (
            f"its tars are of {printable(tree.inventory.val)} alone. Call those to train on train-*.tar; mode=evaluate "
            "needs none, and no data.holdout."
        )
    for name in found:
        inner = choose_splits(map(os.fsdecode, tree.folders(name))).train
        if inner is not None:
            return _split_below(tree, name, os.fsencode(inner))
    loose = sum(map(is_image, tree.files(b"")))
    if not found and loose:
        return (
            f"{counted(loose, 'image')} directly in it. Put the images of each class in a folder of its own, in train/."
        )
    packed = [name for name in map(os.fsdecode, tree.files(b"")) if name.lower().endswith(".zip")]
    if not found and packed:
        return (
            f"{printable(packed[0])} in it is not read; unzip it, or zip train/ and val/ together and give that file."
        )
    if not found:
        return f"it holds no folders at all{_but(tree.inventory.skipped)}. Give the folder above train/."
    # Splits by other names are no classes to hold a part of.
    parts = _parts(found)
    if parts and 2 * len(parts) < len(found):
        others = [name for name in found if name not in parts]
        return (
            f"{_listed(parts)} looks like a split beside class folders ({_listed(others)}). Move the class folders "
            f"into train/, or rename or move {printable(parts[0])}/."
        )
    if parts:
        alone = "" if _chosen(tree).val is None else "; mode=evaluate needs no train/"
        return f"found {_listed(parts)}. Call the folders of the splits train/ and val/ (rename or link them){alone}."
    if tars := _tars_beside(tree, found):
        return f"{tars} To train on class folders, move those into train/."
    return (
        f"found {_listed(found)}. Give the folder above train/; if these are the classes, "
        "set data.holdout=0.1 to train on nine tenths of them and validate on the rest."
    )


def _tars_beside(tree: Tree, folders: Sequence[bytes]) -> str:
    """Return the advice for tars in the root that none of the `folders` was unpacked from; empty without such tars."""
    files = tree.files(b"") if isinstance(tree, DirectoryTree) else []
    tars = [name for name in files if name.lower().endswith(b".tar") and name[:-4] not in folders]
    if not tars:
        return ""
    return (
        f"tars are not read beside folders ({listed(tars)} beside {_listed(folders)}): to read them, move the "
        "folders elsewhere."
    )


def _parts(found: Sequence[bytes], *, split: bool = False) -> list[bytes]:
    """The folders that are parts of the data set and no classes, see `find_non_classes`."""
    return [os.fsencode(name) for name in find_non_classes(list(map(os.fsdecode, found)), split=split)]


def _but(skipped: Mapping[str, int]) -> str:
    """Describe what lies there in place of images."""
    return f" (skipped: {format_counts(skipped)})" if skipped else ""


def _listed(folders: Sequence[bytes]) -> str:
    return listed(folders, "/")
