"""What goes into which shard, decided before anything is written, and the same whenever it is asked."""

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
from lars_train.data.sources.split_files import parquet_folders, the_one
from lars_train.data.sources.split_folders import Split, collect, find_splits
from lars_train.data.sources.tree import Tree
from lars_train.data.splits import TRAIN, VAL
from lars_train.errors import ConfigError
from lars_train.fsutil import user_path
from lars_train.pack.parquet import ParquetSource, open_parquet

PICTURES = 4000
"""Pictures of a shard where the number of shards is not given: 440 MB of ImageNet as it is."""

_LABEL = b".cls"

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
    inventory: Inventory
    """What their original calls the splits, and what lies beside them and is skipped."""
    skipped: Mapping[str, Mapping[str, int]]
    """What is skipped in each split, by reason."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard: its split, its file name, and the ids of its samples in the order in which they lie there."""

    split: str
    name: str
    samples: npt.NDArray[np.int64]


def open_original(root: str, val_labels: str | None, image_key: str | None = None) -> Original:
    """The pictures below `root`, in parquet or any layout that ``data=folder`` or ``data=imagenet`` opens.

    One of ``train/`` and ``val/`` may be missing. Raises `ConfigError`.
    """
    path = user_path(root)
    skipped: dict[str, Mapping[str, int]] = {}
    if folders := parquet_folders(path):
        for flag, value, where in (("val-labels", val_labels, "labels"), ("image-key", image_key, "images")):
            if value is not None:
                raise ConfigError(f"--{flag}={value}: the {where} are in the parquet files; drop it.")
        splits, classes, read = open_parquet(the_one(path, folders))
    else:
        tree = open_tree(root, image_key=image_key)
        if tree.variant:
            raise ConfigError(f"{root}: its pictures were encoded anew already; pack the original.")
        splits, classes, read, skipped = _splits(tree, val_labels)
    names = [[os.fsencode(source.name(i)) for i in range(len(source))] for source in splits.values()]
    runs = [
        ([b"".join(name + b"\0" for name in listed)], source.labels)
        for listed, source in zip(names, splits.values(), strict=True)
    ]
    return Original(classes, splits, fingerprint(classes, *runs), read, skipped)


def _splits(
    tree: Tree, val_labels: str | None
) -> tuple[dict[str, Source], tuple[str, ...], Inventory, dict[str, Mapping[str, int]]]:
    folders = find_splits(tree, None, alone=True)
    if val_labels is not None and not is_flat(tree, folders):
        raise ConfigError(f"--val-labels={val_labels}: there is no flat val/ to label; drop it.")
    parts: dict[str, Split] = {}
    if folders.val is None:
        parts[TRAIN] = collect(tree, folders.train)
    elif not folders.train:
        parts[VAL] = only_validation(tree, folders, folders.val, val_labels)
    else:
        parts[TRAIN], parts[VAL] = both_splits(tree, folders, val_labels)
    # Each split counts its own.
    beside = take_inventory(tree, folders, *(replace(part, skipped={}) for part in parts.values()))
    return (
        {split: tree.source(part.inside, part.names, part.labels) for split, part in parts.items()},
        tuple(map(os.fsdecode, next(iter(parts.values())).classes)),
        beside,
        {split: part.skipped for split, part in parts.items()},
    )


def shard_plans(original: Original, shards: int | None) -> list[ShardPlan]:
    """All shards; `shards`: of the first split, the validation split after it gets as many in proportion."""
    plans = []
    name, first = next((split, len(source)) for split, source in original.splits.items())
    if shards is not None and shards > first:
        raise ConfigError(f"--shards={shards}: {name}/ has {first:,} images, and a shard has one at least.")
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


def key_of(member: bytes) -> tuple[bytes, bytes]:
    """webdataset's key of a member, and its extension without the first dot."""
    folder, slash, base = member.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    return folder + slash + stem, extension


def member_names(names: Iterable[bytes]) -> list[bytes]:
    """The names in the tar of pictures at these paths, none of which may be hidden: each with a key of its own.

    A path stands for itself but for percent signs, and dots before that of the suffix, which become ``%25`` and
    ``%2E``. Where some differ in the suffix alone, the later ones lie in ``%2E/``, ``%2E/%2E/`` and so on.
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
    """The path of the picture that a name of `member_names` stands for."""
    return b"/".join(part for part in unquote_to_bytes(member).split(b"/") if part != b".")


def label_name(member: bytes) -> bytes:
    """The name of the member beside it that has its label."""
    return key_of(member)[0] + _LABEL
