"""From the config group `data` to a `Dataset`: which opener, and which settings it does not know."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

from lars_train.data.remote import CacheSettings
from lars_train.data.source import Dataset, Sharded
from lars_train.errors import ConfigError
from lars_train.text import is_url

if TYPE_CHECKING:
    from lars_train.config import DataConfig

GLOBAL, SHARDS = "global", "shards"
"""The orders of an epoch, see order.py: of all samples, or shards in windows."""

_TREES = ("folder", "imagenet")
_COUNTS = ("train_count", "val_count", "num_classes")
# Setting: the data sets that know it, and what to do with one that does not.
_KNOWN_BY = {
    "root": ((*_TREES, "cifar10", "fashion_mnist"), "for images of your own, set data=folder"),
    "holdout": ((*_TREES, "mini", "cifar10", "fashion_mnist"), "choose data.train_count and data.val_count instead"),
    "val_labels": (("imagenet",), "only data=imagenet has validation images without class folders"),
    **dict.fromkeys(_COUNTS, (("synthetic",), "only data=synthetic is made to measure")),
}


def open_dataset(data: DataConfig) -> Dataset:
    """The data set that `data.name` asks for.

    Raises `ConfigError` when it is not there or not as it should be, or has no use for a setting in `data`.
    """
    dataset = _open(data)
    if data.order != SHARDS:
        return dataset
    if not (isinstance(dataset.train, Sharded) and isinstance(dataset.val, Sharded)):
        where = f"data={data.name}" if data.root is None else f"data.root={data.root}"
        raise ConfigError(
            f"data.order={SHARDS}: {where} does not lie in tar shards; choose data.order=global, or make a store of it "
            "(lars-data pack)."
        )
    layout = hashlib.sha256(dataset.train.shard.astype("<i4").tobytes()).hexdigest()[:16]
    return dataclasses.replace(dataset, layout=layout)


def _open(data: DataConfig) -> Dataset:
    for key, (known_by, remedy) in _KNOWN_BY.items():
        value = getattr(data, key)
        if value is not None and data.name not in known_by:
            raise ConfigError(f"data.{key}={value} has no meaning with data={data.name}; {remedy}.")
    if data.cache_dir is not None and not is_url(data.root):
        raise ConfigError(f"data.cache_dir={data.cache_dir} has no meaning but for a data.root that is a URL; drop it.")
    # Imported one by one: arrays brings torchvision in.
    if data.name == "mini":
        from lars_train.data.mini import open_mini

        return open_mini(data.holdout)
    if data.name == "folder":
        from lars_train.data.folder import open_folder

        return open_folder(data.root, data.holdout, cache_settings(data))
    if data.name == "imagenet":
        from lars_train.data.imagenet import open_imagenet

        return open_imagenet(data.root, data.holdout, data.val_labels, cache_settings(data))
    if data.name == "synthetic":
        from lars_train.data.synthetic import open_synthetic

        if data.train_count is None or data.val_count is None or data.num_classes is None:
            raise ConfigError(f"data.name=synthetic wants data.{', data.'.join(_COUNTS)}: data=synthetic has them.")
        return open_synthetic(data.train_count, data.val_count, data.num_classes, data.image_size)
    if data.name in ("cifar10", "fashion_mnist"):
        from lars_train.data.arrays import open_arrays

        return open_arrays(data.name, data.root, data.holdout)
    raise ConfigError(f"data.name={data.name} is no data set; see the files in configs/data.")


def cache_settings(data: DataConfig) -> CacheSettings:
    """The cache of shards as the config has it."""
    return CacheSettings(data.cache_dir, round(data.cache_gb * 1e9))
