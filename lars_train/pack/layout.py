"""Plan the content of a store: splits, shards, the order of samples in each, and the names of tar members.

The plan depends only on the original and the settings, so an interrupted run can be resumed.

WebDataset splits the last component of a tar member's name at its first dot into key and extension. Neighbors with
the same key form one sample (https://github.com/webdataset/webdataset, "WebDataset Format"). So each image gets its
own key, without a dot after its last slash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Source, fingerprint
from lars_train.data.inventory import Inventory
from lars_train.data.sources.folder import open_tree, take_inventory
from lars_train.data.sources.imagenet import both_splits, is_flat, only_validation
from lars_train.data.sources.split_files import parquet_folders, single_parquet_folder
from lars_train.data.sources.split_folders import Split, collect_split, find_splits
from lars_train.data.sources.tree import Tree
from lars_train.data.splits import TRAIN, VAL
from lars_train.errors import ConfigError
from lars_train.fsutil import user_path
from lars_train.pack.parquet import ParquetSource, open_parquet

IMAGES_PER_SHARD = 4000
"""Default number of images per shard: 440 MB of ImageNet's original files."""

_LABEL = b".cls"

# Seed of the random order of a split's images. Random, so that a reader of whole shards gets a mix of classes.
# Parquet rows of the same row group stay together.
_ORDER_KEY = 20170814


@dataclass(frozen=True)
class Original:
    """The data set to pack: `splits` by their names in the store, over the same classes."""

    classes: tuple[str, ...]
    splits: dict[str, Source]
    fingerprint: str
    """The fingerprint of the splits that exist."""
    inventory: Inventory
    """The names of the splits in the original, and counts of the files beside them, which are skipped."""
    skipped: Mapping[str, Mapping[str, int]]
    """Counts of the files skipped in each split, by reason."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its split, its file name, and the ids of its samples in their order in the file."""

    split: str
    name: str
    samples: npt.NDArray[np.int64]


def open_original(root: str, val_labels: str | None, image_key: str | None = None) -> Original:
    """Open the images below `root`: parquet, or any layout that ``data=folder`` or ``data=imagenet`` opens.

    One of ``train/`` and ``val/`` may be missing. Raises `ConfigError`.
    """
    path = user_path(root)
    skipped: dict[str, Mapping[str, int]] = {}
    if folders := parquet_folders(path):
        for flag, value, what in (("val-labels", val_labels, "labels"), ("image-key", image_key, "images")):
            if value is not None:
                raise ConfigError(f"--{flag}={value}: the {what} are in the parquet files; omit the flag.")
        splits, classes, read = open_parquet(single_parquet_folder(path, folders))
    else:
        tree = open_tree(root, image_key=image_key)
        if tree.variant:
            raise ConfigError(f"{root} holds re-encoded images; pack the original.")
        splits, classes, read, skipped = _splits(tree, val_labels)
    names = [[os.fsencode(source.name(i)) for i in range(len(source))] for source in splits.values()]
    contents = [
        ([b"".join(name + b"\0" for name in listed)], source.labels)
        for listed, source in zip(names, splits.values(), strict=True)
    ]
    return Original(classes, splits, fingerprint(classes, *contents), read, skipped)


def _splits(
    tree: Tree, val_labels: str | None
) -> tuple[dict[str, Source], tuple[str, ...], Inventory, dict[str, Mapping[str, int]]]:
    folders = find_splits(tree, None, allow_missing=True)
    if val_labels is not None and not is_flat(tree, folders):
        raise ConfigError(f"--val-labels={val_labels}: only a val/ without class folders needs labels; omit the flag.")
    parts: dict[str, Split] = {}
    if folders.val is None:
        parts[TRAIN] = collect_split(tree, folders.train)
    elif not folders.train:
        parts[VAL] = only_validation(tree, folders, folders.val, val_labels)
    else:
        parts[TRAIN], parts[VAL] = both_splits(tree, folders, val_labels)
    # Without the skipped files of the splits themselves, which are returned separately.
    beside = take_inventory(tree, folders, *(replace(part, skipped={}) for part in parts.values()))
    return (
        {split: tree.source(part.inside, part.names, part.labels) for split, part in parts.items()},
        tuple(map(os.fsdecode, next(iter(parts.values())).classes)),
        beside,
        {split: part.skipped for split, part in parts.items()},
    )


def shard_plans(original: Original, shards: int | None) -> list[ShardPlan]:
    """Return the plan of every shard. `shards`: number for the first split; the other gets a proportional number."""
    plans = []
    name, first = next((split, len(source)) for split, source in original.splits.items())
    if shards is not None and shards > first:
        raise ConfigError(f"--shards={shards}: {name}/ has {first:,} images, and a shard holds at least one.")
    for split, source in original.splits.items():
        count = -(-len(source) // IMAGES_PER_SHARD) if shards is None else round(shards * len(source) / first)
        count = min(max(1, count), len(source))
        draws = np.random.Philox(key=_ORDER_KEY)
        if isinstance(source, ParquetSource):
            order = source.shuffled_by_group(draws)
        else:
            order = np.argsort(draws.random_raw(len(source)), kind="stable")
        plans += [
            ShardPlan(split, f"{split}-{number:06d}.tar", samples)
            for number, samples in enumerate(np.array_split(order, count))
        ]
    return plans


def key_of(member: bytes) -> tuple[bytes, bytes]:
    """Return the WebDataset key of a tar member, and the extension without its first dot."""
    folder, slash, base = member.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension


def member_names(names: Iterable[bytes]) -> list[bytes]:
    """Return the names of the tar members for images at these paths. No path may be hidden.

    The name is the path, with percent signs and dots before the suffix replaced by ``%25`` and ``%2E``. Its key is
    distinct: of paths that differ only in the suffix, the second moves into a folder ``%2E/``, the third into
    ``%2E/%2E/``, and so on.
    """
    taken: set[bytes] = set()
    members = []
    for name in names:
        folder, slash, base = name.replace(b"%", b"%25").rpartition(b"/")
        stem, _, suffix = base.rpartition(b".")
        folder, plain = folder + slash, stem.replace(b".", b"%2E")
        while (key := folder + plain) in taken:
            folder += b"%2E/"
        taken.add(key)
        members.append(key + b"." + suffix)
    return members


def image_path(member: bytes) -> bytes:
    """Return the image path from which `member_names` made `member`."""
    return b"/".join(part for part in unquote_to_bytes(member).split(b"/") if part != b".")


def label_name(member: bytes) -> bytes:
    """Return the name of the member that holds the label of the image `member`."""
    return key_of(member)[0] + _LABEL
