"""What goes into which shard, decided before anything is written, and the same whenever it is asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lars_train.data.directory import user_path
from lars_train.data.folder import TRAIN, VALIDATION, collect, find_splits, matched, open_tree
from lars_train.data.imagenet import open_imagenet
from lars_train.data.parquet_files import parquet_folders, the_one
from lars_train.data.shards import SPLITS
from lars_train.data.source import Source, fingerprint
from lars_train.data.tree import Tree, is_image
from lars_train.errors import ConfigError
from lars_train.stores.names import member_names
from lars_train.stores.parquet import ParquetSource
from lars_train.stores.parquet_index import open_parquet

PICTURES = 4000
"""Pictures of a shard where the number of shards is not given: 440 MB of ImageNet as it is."""

# The key of the generator that says in which order pictures lie in the shards of a split: mixed, so that who reads
# shards from end to end meets all classes. Rows of parquet stay beside those of their row group.
_ORDER_KEY = 20170814


@dataclass(frozen=True)
class Original:
    """What is packed: `splits` by the names that the store gives them, over the same classes."""

    classes: tuple[str, ...]
    splits: dict[str, Source]
    fingerprint: str
    """Of the splits that are there."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its split, its file name, and the ids of its samples in the order in which they lie there."""

    split: str
    name: str
    samples: npt.NDArray[np.int64]


def open_original(root: str, val_labels: str | None) -> Original:
    """The pictures below `root`, in parquet or any layout that ``data=folder`` or ``data=imagenet`` opens.

    There may be no ``val/``. Raises `ConfigError`.
    """
    path = user_path(root)
    if folders := parquet_folders(path):
        if val_labels is not None:
            raise ConfigError(f"--val-labels={val_labels}: the labels are in the parquet files; drop it.")
        splits, classes = open_parquet(the_one(path, folders))
    else:
        tree = open_tree(root)
        if tree.variant:
            raise ConfigError(f"{root}: its pictures were encoded anew already; pack the original.")
        splits, classes = _splits(tree, root, val_labels)
    names = [[os.fsencode(source.name(i)) for i in range(len(source))] for source in splits.values()]
    runs = [
        ([b"".join(name + b"\0" for name in listed)], source.labels)
        for listed, source in zip(names, splits.values(), strict=True)
    ]
    return Original(classes, splits, fingerprint(classes, *runs))


def _splits(tree: Tree, root: str, val_labels: str | None) -> tuple[dict[str, Source], tuple[str, ...]]:
    found = tree.folders(b"")
    val = next((name for name in VALIDATION if name in found and tree.folders(name)), None)
    if TRAIN in found and val is None and b"val" in found and any(map(is_image, tree.files(b"val"))):
        data = open_imagenet(root, None, val_labels)
        return dict(zip(SPLITS, (data.train, data.val), strict=True)), data.classes
    if val_labels is not None:
        raise ConfigError(f"--val-labels={val_labels}: there is no flat val/ to label; drop it.")
    if TRAIN in found and val is not None:
        inside, _ = find_splits(tree, None, VALIDATION)
        parts = list(matched(tree, collect(tree, inside), collect(tree, val)))
    else:
        inside, _ = find_splits(tree, 0.5, VALIDATION)
        parts = [collect(tree, inside)]
    classes = tuple(map(os.fsdecode, parts[0].classes))
    sources = (tree.source(part.inside, part.names, part.labels) for part in parts)
    return dict(zip(SPLITS, sources, strict=False)), classes


def shard_plans(original: Original, shards: int | None) -> list[ShardPlan]:
    """All shards; `shards`: of the training split, the validation split gets as many in proportion."""
    plans = []
    first = len(next(iter(original.splits.values())))
    if shards is not None and shards > first:
        raise ConfigError(f"--shards={shards}: there are {first:,} training pictures, and a shard has one at least.")
    for split, source in original.splits.items():
        count = -(-len(source) // PICTURES) if shards is None else round(shards * len(source) / first)
        count = min(max(1, count), len(source))
        draws = np.random.Philox(key=_ORDER_KEY)
        if isinstance(source, ParquetSource):
            order = source.mixed(draws)
        else:
            order = np.argsort(draws.random_raw(len(source)), kind="stable")
        plans += [
            ShardPlan(split, f"{split}-{number:06d}.tar", samples)
            for number, samples in enumerate(np.array_split(order, count))
        ]
    return plans


def members_of(source: Source) -> Sequence[bytes]:
    """The name in the tar of every sample of a split."""
    return member_names(os.fsencode(source.name(sample)) for sample in range(len(source)))
