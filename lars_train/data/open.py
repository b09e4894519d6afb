"""From the config group `data` to a `Dataset`: which opener, and which settings it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lars_train.data.source import Dataset
from lars_train.errors import ConfigError

if TYPE_CHECKING:
    from lars_train.config import DataConfig

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
    for key, (known_by, remedy) in _KNOWN_BY.items():
        value = getattr(data, key)
        if value is not None and data.name not in known_by:
            raise ConfigError(f"data.{key}={value} has no meaning with data={data.name}; {remedy}.")
    # Imported one by one: arrays brings torchvision in.
    if data.name == "mini":
        from lars_train.data.mini import open_mini

        return open_mini(data.holdout)
    if data.name == "folder":
        from lars_train.data.folder import open_folder

        return open_folder(data.root, data.holdout)
    if data.name == "imagenet":
        from lars_train.data.imagenet import open_imagenet

        return open_imagenet(data.root, data.holdout, data.val_labels)
    if data.name == "synthetic":
        from lars_train.data.synthetic import open_synthetic

        if data.train_count is None or data.val_count is None or data.num_classes is None:
            raise ConfigError(f"data.name=synthetic wants data.{', data.'.join(_COUNTS)}: data=synthetic has them.")
        return open_synthetic(data.train_count, data.val_count, data.num_classes, data.image_size)
    if data.name in ("cifar10", "fashion_mnist"):
        from lars_train.data.arrays import open_arrays

        return open_arrays(data.name, data.root, data.holdout)
    raise ConfigError(f"data.name={data.name} is no data set; see the files in configs/data.")
