"""Open the data set that the config group `data` describes, and reject settings that it does not support."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

from lars_train.data.dataset import Dataset, Sharded, check_classes, sample_shards
from lars_train.data.order import SHARDS
from lars_train.data.sources.remote import CacheSettings
from lars_train.errors import ConfigError
from lars_train.messages import counted, is_url

if TYPE_CHECKING:
    from lars_train.config import DataConfig

IMAGENET_CLASSES = 1_000
"""Classes of ILSVRC 2012, https://image-net.org/challenges/LSVRC/2012/."""
_TREES = ("folder", "imagenet")
_ROOTED = (*_TREES, "huggingface")
_COUNTS = ("train_count", "val_count", "num_classes")
# For each setting: the data sets that support it, and the remedy for other data sets.
_SUPPORTED_BY = {
    "root": ((*_ROOTED, "cifar10", "fashion_mnist"), "to read your own images, set data=folder"),
    "holdout": (
        (*_TREES, "huggingface", "mini", "cifar10", "fashion_mnist"),
        "choose data.train_count and data.val_count instead",
    ),
    "image_key": (_TREES, "only tars may have several images in a sample"),
    "val_labels": (("imagenet",), "only data=imagenet has validation images without class folders"),
    "target": (("custom",), "set data=custom"),
    "kwargs": (("custom",), "set data=custom"),
    **dict.fromkeys(_COUNTS, (("synthetic",), "only data=synthetic has adjustable counts")),
}


def open_dataset(data: DataConfig, given: Dataset | None = None) -> Dataset:
    """Open the data set `data.name`, or use the data set `given` with the settings in `data`.

    Raises `ConfigError` if it is missing or malformed, or does not support a setting in `data`.
    """
    dataset = _open(data, given)
    check_classes(_place(data), dataset.classes)
    if data.name == "imagenet" and len(dataset.classes) != IMAGENET_CLASSES:
        # Imported here because it imports the config package, which lars-data does without.
        from lars_train.run_plan import IMAGENET_TRAIN_IMAGES

        raise ConfigError(
            f"data=imagenet: {data.root} is not ImageNet: it has {len(dataset.classes):,} classes and "
            f"{len(dataset.train):,} training images, where ImageNet has {IMAGENET_CLASSES:,} and "
            f"{IMAGENET_TRAIN_IMAGES:,}; for another data set, set data=folder."
        )
    if data.order != SHARDS:
        return dataset
    _need_shards(data, dataset)
    layout = hashlib.sha256(sample_shards(dataset.train).astype("<i4").tobytes()).hexdigest()[:16]
    return dataclasses.replace(dataset, layout=layout)


def open_validation(data: DataConfig, given: Dataset | None = None) -> Dataset:
    """Open the data set for evaluation only. If the training split is empty, the validation split defines the classes.

    With `data.holdout`, the validation images are held out of the training set. Raises `ConfigError` for the same
    reasons as `open_dataset`.
    """
    if given is not None or data.name not in _TREES:
        return open_dataset(data, given)
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
    """Return the remedy if ``data.holdout`` failed because the training set is missing; empty for other errors."""
    try:
        alone = open_validation(dataclasses.replace(data, holdout=None))
    except ConfigError:
        return ""
    if alone.inventory.train:
        return ""
    return (
        f" To evaluate all {counted(len(alone.val), 'image')} of the data set, set data.holdout=null. "
        f"Its value {data.holdout:g} comes from the checkpoint unless you set it."
    )


def _need_shards(data: DataConfig, dataset: Dataset) -> None:
    if not (isinstance(dataset.train, Sharded) and isinstance(dataset.val, Sharded)):
        raise ConfigError(
            f"data.order={SHARDS}: {_place(data)} is not stored in tar shards; set data.order=global, or pack it "
            "into a store (lars-data pack)."
        )


def _place(data: DataConfig) -> str:
    return f"data={data.name}" if data.root is None else f"data.root={data.root}"


def _check_settings(data: DataConfig) -> None:
    for key, (names, remedy) in _SUPPORTED_BY.items():
        value = getattr(data, key)
        if value not in (None, {}) and data.name not in names:
            raise ConfigError(f"data.{key}={value} has no effect with data={data.name}; {remedy}.")
    if data.cache_dir is not None and not is_url(data.root):
        raise ConfigError(f"data.cache_dir={data.cache_dir} has no meaning unless data.root is a URL; omit it.")


def _open(data: DataConfig, given: Dataset | None) -> Dataset:
    _check_settings(data)
    if given is not None:
        return given
    if data.name == "mini":
        from lars_train.data.sources.builtin import open_mini

        return open_mini(data.holdout)
    if data.name == "folder":
        from lars_train.data.sources.folder import open_folder

        return open_folder(data.root, data.holdout, cache_settings(data), data.image_key)
    if data.name == "imagenet":
        from lars_train.data.sources.imagenet import open_imagenet

        return open_imagenet(data.root, data.holdout, data.val_labels, cache_settings(data), data.image_key)
    if data.name == "huggingface":
        from lars_train.data.sources.huggingface import open_huggingface

        return open_huggingface(data.root, data.holdout)
    if data.name == "synthetic":
        from lars_train.data.sources.builtin import open_synthetic

        if data.train_count is None or data.val_count is None or data.num_classes is None:
            raise ConfigError(
                f"data.name=synthetic needs data.{', data.'.join(_COUNTS)}; use data=synthetic, which sets them."
            )
        assert data.image_size is not None
        return open_synthetic(data.train_count, data.val_count, data.num_classes, data.image_size)
    if data.name in ("cifar10", "fashion_mnist"):
        from lars_train.data.sources.builtin import open_arrays

        return open_arrays(data.name, data.root, data.holdout)
    if data.name == "custom":
        return _open_target(data)
    raise ConfigError(f"data.name={data.name} does not exist; see the files in configs/data.")


def _open_target(data: DataConfig) -> Dataset:
    """Open the data sets that the function ``data.target`` returns."""
    from lars_train.data.sources.items import open_items
    from lars_train.targets import describe_failure, load_target

    if data.target is None:
        raise ConfigError("data=custom needs data.target=package.module:function.")
    where = f"data.target={data.target}"
    make = load_target(data.target, "data.target")
    try:
        made: Any = make(**data.kwargs)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in data.kwargs.items())
        raise ConfigError(f"{where}: the call with ({given}) fails{describe_failure(error)}") from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ConfigError(f"{where}: it returned a {type(made).__name__}, not a training and a validation set.")
    return open_items(made[0], made[1], place=where)


def cache_settings(data: DataConfig) -> CacheSettings:
    """Return the settings of the shard cache in the config."""
    return CacheSettings(data.cache_dir, round(data.cache_gb * 1e9))
