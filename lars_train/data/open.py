"""From the config group `data` to a `Dataset`: which opener, and which settings it does not know."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

from lars_train.data.dataset import Dataset, Sharded, check_classes, shards_of
from lars_train.data.order import SHARDS
from lars_train.data.sources.remote import CacheSettings
from lars_train.errors import ConfigError
from lars_train.messages import counted, is_url

if TYPE_CHECKING:
    from lars_train.config import DataConfig

IMAGENET_CLASSES = 1_000
"""Of ILSVRC 2012, https://image-net.org/challenges/LSVRC/2012/."""

_TREES = ("folder", "imagenet")
_COUNTS = ("train_count", "val_count", "num_classes")
# Setting: the data sets that know it, and what to do with one that does not.
_KNOWN_BY = {
    "root": ((*_TREES, "cifar10", "fashion_mnist"), "for images of your own, set data=folder"),
    "holdout": ((*_TREES, "mini", "cifar10", "fashion_mnist"), "choose data.train_count and data.val_count instead"),
    "image_key": (_TREES, "only tars may have several images in a sample"),
    "val_labels": (("imagenet",), "only data=imagenet has validation images without class folders"),
    **dict.fromkeys(_COUNTS, (("synthetic",), "only data=synthetic is made to measure")),
}


def open_dataset(data: DataConfig) -> Dataset:
    """The data set that `data.name` asks for.

    Raises `ConfigError` when it is not there or not as it should be, or has no use for a setting in `data`.
    """
    dataset = _open(data)
    check_classes(_place(data), dataset.classes)
    if data.name == "imagenet" and len(dataset.classes) != IMAGENET_CLASSES:
        # Imported here: it brings torch in.
        from lars_train.plan import IMAGENET_TRAIN_IMAGES

        raise ConfigError(
            f"data=imagenet: {data.root} is not ImageNet: it has {len(dataset.classes):,} classes and "
            f"{len(dataset.train):,} training images, where ImageNet has {IMAGENET_CLASSES:,} and "
            f"{IMAGENET_TRAIN_IMAGES:,}; for a data set of your own set data=folder."
        )
    if data.order != SHARDS:
        return dataset
    _need_shards(data, dataset)
    layout = hashlib.sha256(shards_of(dataset.train).astype("<i4").tobytes()).hexdigest()[:16]
    return dataclasses.replace(dataset, layout=layout)


def open_validation(data: DataConfig) -> Dataset:
    """The data set for an evaluation alone: the training split may be empty, and the classes those of validation.

    With `data.holdout` they are what is held out of the training set. Raises `ConfigError`, as `open_dataset` does.
    """
    if data.name not in _TREES:
        return open_dataset(data)
    if data.holdout is not None:
        try:
            return open_dataset(data)
        except ConfigError as error:
            raise ConfigError(f"{error}{_without_holdout(data)}") from None
    _check_settings(data)
    from lars_train.data.sources import folder, imagenet

    if data.name == "folder":
        dataset = folder.open_folder_validation(data.root, cache_settings(data), data.image_key)
    else:
        dataset = imagenet.open_imagenet_validation(data.root, data.val_labels, cache_settings(data), data.image_key)
    check_classes(_place(data), dataset.classes)
    if data.order == SHARDS:
        _need_shards(data, dataset)
    return dataset


def _without_holdout(data: DataConfig) -> str:
    """Return the advice for a ``data.holdout`` without a training set to hold it out of; empty for other faults."""
    try:
        alone = open_validation(dataclasses.replace(data, holdout=None))
    except ConfigError:
        return ""
    if alone.inventory.train:
        return ""
    return (
        f" To evaluate all {counted(len(alone.val), 'image')} in it, set data.holdout=null (it is {data.holdout:g}, "
        "the checkpoint's unless given)."
    )


def _need_shards(data: DataConfig, dataset: Dataset) -> None:
    if not (isinstance(dataset.train, Sharded) and isinstance(dataset.val, Sharded)):
        raise ConfigError(
            f"data.order={SHARDS}: {_place(data)} does not lie in tar shards; choose data.order=global, or make a "
            "store of it (lars-data pack)."
        )


def _place(data: DataConfig) -> str:
    return f"data={data.name}" if data.root is None else f"data.root={data.root}"


def _check_settings(data: DataConfig) -> None:
    for key, (known_by, remedy) in _KNOWN_BY.items():
        value = getattr(data, key)
        if value is not None and data.name not in known_by:
            raise ConfigError(f"data.{key}={value} has no meaning with data={data.name}; {remedy}.")
    if data.cache_dir is not None and not is_url(data.root):
        raise ConfigError(f"data.cache_dir={data.cache_dir} has no meaning but for a data.root that is a URL; drop it.")


def _open(data: DataConfig) -> Dataset:
    _check_settings(data)
    if data.name == "mini":
        from lars_train.data.sources.builtin import open_mini

        return open_mini(data.holdout)
    if data.name == "folder":
        from lars_train.data.sources.folder import open_folder

        return open_folder(data.root, data.holdout, cache_settings(data), data.image_key)
    if data.name == "imagenet":
        from lars_train.data.sources.imagenet import open_imagenet

        return open_imagenet(data.root, data.holdout, data.val_labels, cache_settings(data), data.image_key)
    if data.name == "synthetic":
        from lars_train.data.sources.builtin import open_synthetic

        if data.train_count is None or data.val_count is None or data.num_classes is None:
            raise ConfigError(f"data.name=synthetic wants data.{', data.'.join(_COUNTS)}: data=synthetic has them.")
        return open_synthetic(data.train_count, data.val_count, data.num_classes, data.image_size)
    if data.name in ("cifar10", "fashion_mnist"):
        from lars_train.data.sources.builtin import open_arrays

        return open_arrays(data.name, data.root, data.holdout)
    raise ConfigError(f"data.name={data.name} is no data set; see the files in configs/data.")


def cache_settings(data: DataConfig) -> CacheSettings:
    """The cache of shards as the config has it."""
    return CacheSettings(data.cache_dir, round(data.cache_gb * 1e9))
