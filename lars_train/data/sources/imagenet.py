"""Open ImageNet (ILSVRC 2012) with a folder per class, or with all validation images in one folder.

Finds and reads the labels of a flat validation folder. Subsets of ImageNet are supported.
"""

from __future__ import annotations

import csv
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lars_train.data.dataset import Dataset, NamesBuilder
from lars_train.data.inventory import LOOSE, suffix_reason
from lars_train.data.sources.directory import DirectoryTree, is_file
from lars_train.data.sources.folder import make_dataset, open_tree, validation_only
from lars_train.data.sources.remote import CacheSettings
from lars_train.data.sources.split_folders import (
    Split,
    SplitFolders,
    check_same_classes,
    collect_split,
    find_splits,
    find_validation,
    hold_out,
)
from lars_train.data.sources.tree import Tree, is_image, join
from lars_train.errors import ConfigError
from lars_train.fsutil import user_path
from lars_train.messages import counted, listed, printable

_KAGGLE = b"LOC_val_solution.csv"
_DEVKIT = b"ILSVRC2012_devkit_t12/data"
_GROUND_TRUTH = b"ILSVRC2012_validation_ground_truth.txt"
_META = b"meta.mat"
# How many folders above the root are searched for Kaggle's CSV (Kaggle's images lie in ILSVRC/Data/CLS-LOC).
_PARENTS = 3
# A table of labels: a function from image names to the wnid of each.
_Table = Callable[[list[bytes]], list[bytes]]


def open_imagenet(
    root: str | None,
    holdout: float | None,
    val_labels: str | None,
    cache: CacheSettings | None = None,
    image_key: str | None = None,
) -> Dataset:
    """Open the data set at `root`: ``train/<wnid>/`` and ``val/<wnid>/``, or all images directly in ``val/``.

    In the second case, `val_labels` is the path of a CSV of image and wnid, or of the devkit. By default, `root` is
    searched for both, and the folders above it for Kaggle's CSV. `holdout`, `cache` and `image_key`: see `open_folder`.
    Raises `ConfigError`.
    """
    tree = open_tree(root, cache, image_key, train_only=holdout is not None)
    folders = find_splits(tree, holdout)
    if holdout is not None:
        if val_labels is not None:
            raise _already_labeled(val_labels)
        return make_dataset(tree, folders, *hold_out(tree, folders.train, holdout))
    return make_dataset(tree, folders, *both_splits(tree, folders, val_labels))


def both_splits(tree: Tree, folders: SplitFolders, val_labels: str | None) -> tuple[Split, Split]:
    """Return both splits. The validation labels come from class folders or, if there are none, from a table."""
    assert folders.val is not None
    flat = is_flat(tree, folders)
    if val_labels is not None and not flat:
        raise _already_labeled(val_labels)
    training = collect_split(tree, folders.train)
    if not flat:
        validation = collect_split(tree, folders.val)
        check_same_classes(tree, training, validation)
        return training, validation
    table = _find_table(tree, folders.val) if val_labels is None else _table_at(val_labels)
    return training, _label_flat_folder(tree, folders.val, training.classes, table)


def is_flat(tree: Tree, folders: SplitFolders) -> bool:
    """Return True if the validation images do not lie in class folders."""
    inside = folders.val
    return inside is not None and not tree.folders(inside) and any(map(is_image, tree.files(inside)))


def _already_labeled(val_labels: str) -> ConfigError:
    return ConfigError(
        f"data.val_labels={val_labels}, but the images lie in class folders, which label them: drop data.val_labels."
    )


def open_imagenet_validation(
    root: str | None, val_labels: str | None, cache: CacheSettings | None = None, image_key: str | None = None
) -> Dataset:
    """Open only the validation images, as `open_folder_validation` does, even if all lie directly in ``val/``."""
    tree = open_tree(root, cache, image_key)
    folders, inside = find_validation(tree)
    return validation_only(tree, folders, only_validation(tree, folders, inside, val_labels))


def only_validation(tree: Tree, folders: SplitFolders, inside: bytes, val_labels: str | None) -> Split:
    """Return the validation set in `inside`, labeled as in `both_splits`, with only the classes of these images."""
    if is_flat(tree, folders):
        return _label_flat_folder(
            tree, inside, None, _find_table(tree, inside) if val_labels is None else _table_at(val_labels)
        )
    if val_labels is not None:
        raise _already_labeled(val_labels)
    return collect_split(tree, inside)


def _label_flat_folder(tree: Tree, inside: bytes, classes: tuple[bytes, ...] | None, table: _Table) -> Split:
    """Return the images directly in `inside`, labeled by `table`; `classes`: None for the classes of these images."""
    images = [name for name in tree.files(inside) if is_image(name)]
    # Count neither the images as loose nor a table of labels beside them as skipped.
    skipped = {
        why: count for why, count in tree.listing(inside).skipped.items() if why not in (LOOSE, suffix_reason(_KAGGLE))
    }
    wnids = table(images)
    if classes is None:
        classes = tuple(sorted(set(wnids)))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    for image, wnid in zip(images, wnids, strict=True):
        if wnid not in labels:
            raise ConfigError(
                f"data.val_labels: {printable(image)} is of class {printable(wnid)}, which has no folder in "
                f"{tree.place}/train; remove the image, or add the class."
            )
    builder = NamesBuilder()
    builder.extend(images)
    ids = np.array([labels[wnid] for wnid in wnids], np.int32)
    return Split(inside, builder.build(), ids, classes, skipped=skipped)


def _table_at(val_labels: str) -> _Table:
    """Return the table at the path `val_labels`: a CSV, the devkit's text file, or a folder that contains it."""
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


def _find_table(tree: Tree, val: bytes) -> _Table:
    """Return Kaggle's CSV in the tree or above it, else the devkit in the tree, else the only CSV in it."""
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
        f"data.root={tree.place}: the images in {printable(val)}/ do not lie in class folders, and neither "
        f"{printable(_KAGGLE)} nor {printable(_DEVKIT)}/ exists to label them; set data.val_labels=PATH to a CSV "
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
            f"data.val_labels: {place} cannot be used ({error}); a CSV needs the suffix .csv, and the devkit's "
            f"text file needs {printable(_META)} beside it."
        ) from error
    return lambda images: from_devkit(place, content, meta, images)


@functools.cache
def wnids() -> tuple[str, ...]:
    """Return the 1,000 wnids of ILSVRC 2012 (https://image-net.org/challenges/LSVRC/2012/) in bytewise order.

    The outputs of torchvision's and timm's ImageNet networks have this order.
    """
    return tuple((Path(__file__).parents[1] / "embedded" / "imagenet_wnids.txt").read_text().split())


def from_csv(place: str, content: bytes, images: list[bytes]) -> list[bytes]:
    """Return the wnids of `images` from rows ``image,wnid``; header, suffix and folder of the image are optional.

    Text after the wnid and a space is ignored: Kaggle's ``LOC_val_solution.csv`` has bounding boxes there
    (https://www.kaggle.com/c/imagenet-object-localization-challenge/data). Rows for other images are ignored. Raises
    `ConfigError` if an image has no row, or two different ones.
    """
    wnids: dict[bytes, bytes] = {}
    text = content.decode("utf-8-sig", "surrogateescape")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ConfigError(
            f"data.val_labels: {place} is not a table of image and wnid ({error}); give another."
        ) from None
    for row in rows:
        words = row[1].split() if len(row) > 1 else []
        if not words:
            continue
        image, wnid = _stem(os.fsencode(row[0].strip())), os.fsencode(words[0])
        if wnids.setdefault(image, wnid) != wnid:
            raise ConfigError(
                f"data.val_labels: {place} gives {printable(image)} two classes, "
                f"{printable(wnids[image])} and {printable(wnid)}; delete one of the two rows."
            )
    missing = [image for image in images if _stem(image) not in wnids]
    if missing:
        raise ConfigError(
            f"data.val_labels: {place} has no row for {len(missing)} of {len(images)} images, such as "
            f"{listed(missing)}; set data.val_labels to the table for these images (rows of image,wnid)."
        )
    return [wnids[_stem(image)] for image in images]


def from_devkit(place: str, content: bytes, meta: bytes, images: list[bytes]) -> list[bytes]:
    """Return the wnids of `images` from ``ILSVRC2012_validation_ground_truth.txt`` and the content of ``meta.mat``.

    Line k of the text is the ILSVRC2012_ID of the k-th image by name; `meta` maps the ID to a wnid (readme.txt of the
    devkit, section 2.2). Raises `ConfigError` if the numbers of lines and images differ.
    """
    lines = content.split()
    if len(lines) != len(images):
        raise ConfigError(
            f"data.val_labels: {place} has {counted(len(lines), 'line')}, and val/ {counted(len(images), 'image')}; "
            "they are matched by position: add the missing images to val/, or give a CSV of image and wnid."
        )
    wnids = _wnids(place, meta)
    unknown = sorted({line for line in lines if line not in wnids})
    if unknown:
        raise ConfigError(
            f"data.val_labels: {place} has the ID {printable(unknown[0])}, which meta.mat beside it does not "
            "contain; take both files from the same devkit (ILSVRC2012_devkit_t12)."
        )
    return [wnids[line] for line in lines]


def _wnids(place: str, meta: bytes) -> dict[bytes, bytes]:
    """Return the wnid of each ILSVRC2012_ID, given as decimal digits."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(
            f"data.val_labels: reading the meta.mat beside {place} requires scipy, which is not installed; "
            "`pip install scipy`, or set data.val_labels to a CSV of image and wnid."
        ) from error
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(s["ILSVRC2012_ID"])).encode(): str(s["WNID"]).encode() for s in synsets}
    # A damaged file can raise almost any exception.
    except Exception as error:
        raise ConfigError(
            f"data.val_labels: the meta.mat beside {place} is damaged ({error}); unpack the devkit again."
        ) from error


def _stem(image: bytes) -> bytes:
    name = image.rpartition(b"/")[2]
    return name.rpartition(b".")[0] if is_image(name) else name
