"""The files of a folder that hold many samples each, tars and parquet: where they lie, and of which split each is.

None is opened here. Tars are read by webdataset.py. Parquet is not trained on: to read one row, those before it in its
row group are read and decoded, too, which takes longer than the image's own decoding. So parquet files are made a store
(lars_train.pack), and what opens `data.root` says so.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lars_train.data.inventory import BESIDE, Inventory, merge_counts
from lars_train.data.sources.directory import count_beside_splits
from lars_train.data.sources.tree import count_skipped, is_hidden, is_image
from lars_train.data.splits import (
    TRAIN,
    VAL,
    choose_splits,
    has_split_word,
    is_split_name,
    looks_like_split,
    refuse_case_twins,
    refuse_unread_splits,
    split_word,
    unread_split_word,
)
from lars_train.errors import ConfigError
from lars_train.messages import printable

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_UNPACK = 'for t in *.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
# Fewer tars than these are classes only by the names of ImageNet's.
_FEWEST_CLASSES = 3
_WNID = re.compile(r"n\d{8}\.tar")
# Folders that look like splits, in a message.
_SHOWN = 6

OF_NO_SPLIT = "parquet files of no split"
_PARQUET = ".parquet"
# The cache of huggingface_hub has the files in snapshots/REVISION/data. Where there are more folders, they are classes.
_DEPTH, _MANY_FOLDERS = 3, 32
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.parquet")


class Shards(NamedTuple):
    """Tars by split (`TRAIN`, `VAL`), as paths in their folder; and what the splits are called there."""

    files: dict[str, list[str]]
    inventory: Inventory


def shard_files(root: Path) -> Shards | None:
    """The shards in the folder `root`; None where it is no folder of shards.

    They lie in folders that have the names of splits, or directly in `root` with the name of the split as a word in the
    name of each. Beside folders, tars are what images were unpacked from. Shards of no split count as `TRAIN`; without
    them and without a training set, there is `VAL` alone.
    """
    by_split: dict[str, list[str]] = {}
    skipped: dict[str, Counter[str]] = {}
    beside: Counter[str] = Counter()
    others: list[str] = []
    folders = _visible_folders(root)
    packed: dict[str, str] = {}
    if any(map(is_split_name, folders)):
        for name in filter(is_split_name, folders):
            by_split[name], _, skipped[name] = _tars_in(root, f"{name}/")
        beside = count_beside_splits(root, ".tar", "shards of no split")
        others = [name for name in sorted(folders) if looks_like_split(name) and not is_split_name(name)][:_SHOWN]
        beside[BESIDE] -= len(others)
    else:
        tars, compressed, beside = _tars_in(root, "")
        for name in tars:
            by_split.setdefault(split_word(name), []).append(name)
        packed = {word: name for name in reversed(compressed) if (word := split_word(name)) and word not in by_split}
    chosen = choose_splits(name for name, tars in by_split.items() if tars)
    # A training set without tars is class folders.
    if choose_splits(by_split).train != chosen.train or not any(by_split.values()):
        return None
    train = "" if chosen.train is None else chosen.train
    # Without tars, a folder that could be a split is one that is not read.
    empty = [name for name, tars in by_split.items() if name and not tars]
    unused = (*chosen.unused, *empty, *others, *packed.values())
    refuse_case_twins(f"data.root={root}", chosen)
    if not train:
        refuse_unread_splits(f"data.root={root}", by_split.get("", ()))
    else:
        words = [unread_split_word(name) for name in by_split.get("", ())]
        unused = (*unused, *sorted({word for word in words if word}))
        beside["shards of no split"] += words.count("")
    files = {TRAIN: by_split.get(train, []), VAL: by_split.get(chosen.val or "-", [])}
    files = {split: tars for split, tars in files.items() if tars}
    counts = merge_counts(+beside, *(skipped[name] for name in (train, chosen.val) if name in skipped))
    return Shards(files, Inventory(train, chosen.val or "", unused, counts))


def decompressing(names: Iterable[str]) -> str:
    """Return the advice for the first of `names` that is a compressed tar; empty without one."""
    first = next((name for name in names if name.lower().endswith(_COMPRESSED)), None)
    remedy = "is compressed, and cannot be read at random; make such shards plain .tar files (gzip -d)."
    return "" if first is None else f"{printable(first)} {remedy}"


def unpacking(root: Path, tars: Sequence[str]) -> str:
    """Return the advice for unlabeled `tars` in `root` that look like one for each class; empty where they do not.

    The command keeps the tars: beside folders, they are what images were unpacked from.
    """
    names = [Path(tar).name for tar in tars]
    wnids = all(map(_WNID.fullmatch, names))
    if any(has_split_word(name) or not name.rpartition(".")[0].strip("0123456789-_. ") for name in names):
        return ""
    if not names or (len(names) < _FEWEST_CLASSES and not wnids):
        return ""
    places = dict.fromkeys(shlex.quote(str(root / Path(tar).parent)) for tar in tars)
    commands = " && ".join(f"(cd {place} && {_UNPACK})" for place in places)
    return f"if each tar is one class, as in ImageNet's training archive, unpack them: {commands}"


def unpacking_twice(root: Path, split: str, tars: Sequence[str]) -> str:
    """Return the advice for a tar of tars, as ImageNet's training archive is."""
    if len(tars) > 1 or "/" in tars[0]:
        return "Unpack them, and the tars in them each into a folder of its name."
    place, tar = shlex.quote(str(root)), shlex.quote(tars[0])
    return (
        "It holds tars, as ImageNet's training archive does; unpack it and each of them: "
        f"(cd {place} && mkdir -p {split} && tar -xf {tar} -C {split} && cd {split} && {_UNPACK})"
    )


def _visible_folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if not is_hidden(os.fsencode(entry.name)) and entry.is_dir()]
    except OSError:
        return []


def _tars_in(root: Path, inside: str) -> tuple[list[str], list[str], Counter[str]]:
    """The tars directly in a folder without visible folders, plain and compressed, and counts of what else lies there.

    Names are in bytewise order. Raises `ConfigError` where all tars are compressed.
    """
    tars, compressed = [], []
    skipped: Counter[str] = Counter()
    try:
        with os.scandir(root / inside) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                if is_hidden(name):
                    count_skipped(skipped, name, folder=entry.is_dir())
                elif entry.is_dir():
                    return [], [], Counter()
                elif entry.name.lower().endswith(".tar"):
                    tars.append(inside + entry.name)
                elif entry.name.lower().endswith(_COMPRESSED):
                    compressed.append(inside + entry.name)
                elif is_image(name):
                    skipped["images beside tar files"] += 1
                else:
                    count_skipped(skipped, name)
    except OSError:
        return [], [], Counter()
    tars.sort(key=os.fsencode)
    compressed.sort(key=os.fsencode)
    if compressed and not tars:
        raise ConfigError(f"data.root={root}: {decompressing(compressed)}")
    if compressed:
        skipped["compressed tar files"] = len(compressed)
    return tars, compressed, skipped


@dataclass(frozen=True)
class ParquetFolder:
    """The files of one data set below `path`, in bytewise order, by the name of their split ("": none)."""

    path: Path
    files: dict[str, tuple[Path, ...]]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of what lies beside the files or the folders of splits and is not read, by reason."""


class _HasImages(Exception):
    """Images lie there as files, or in tars: parquet beside them is about them."""


def parquet_folders(root: Path) -> list[ParquetFolder]:
    """The data sets of parquet files in the folder `root` and up to three folders below it; often none.

    The files of a data set lie in a folder without visible folders, with the split as a word in each name, as in
    ``train-00000-of-00294.parquet``, or in folders called ``train`` and the like.
    """
    try:
        return _search_parquet(root, _DEPTH)
    except (_HasImages, OSError):
        return []


def the_one(root: Path, folders: Sequence[ParquetFolder]) -> ParquetFolder:
    """The only one of `folders`. Raises `ConfigError` for several, and where files are not there that should be."""
    if len(folders) > 1:
        shown = ", ".join(str(folder.path) for folder in folders)
        raise ConfigError(f"{root} holds several data sets of parquet files; give the folder of one: {shown}.")
    if choose_splits(folders[0].files).train is None:
        refuse_unread_splits(str(folders[0].path), (file.name for file in folders[0].files.get("", ())))
    for files in folders[0].files.values():
        _check_complete(folders[0].path, files)
    return folders[0]


def refuse_parquet(path: Path) -> None:
    """Raise `ConfigError` where `path` is a parquet file or a folder of such; it has the command that helps."""
    if path.suffix.lower() == _PARQUET and not path.is_dir():
        places = [path.parent]
    else:
        # Classes have folders: there is no need to look into those.
        places = [] if _has_class_folders(path) else [folder.path for folder in parquet_folders(path)]
    if not places:
        return
    commands = " or ".join(f"`lars-data pack {shlex.quote(str(place))} STORE`" for place in places)
    raise ConfigError(
        f"data.root={path} holds parquet, of which single rows are slow to read; make a store of it once, by "
        f"{commands}, and set data.root=STORE."
    )


def _has_class_folders(root: Path) -> bool:
    train = choose_splits(_folders_in(root)).train
    return train is not None and bool(_folders_in(root / train))


def _folders_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _search_parquet(folder: Path, depth: int) -> list[ParquetFolder]:
    files, folders = _parquet_in(folder, images=depth == _DEPTH)
    if files and not folders:
        by_word: dict[str, list[Path]] = {}
        for file in files:
            by_word.setdefault(split_word(file.name), []).append(file)
        by_split = {word: tuple(found) for word, found in by_word.items()}
        return [ParquetFolder(folder, by_split, _beside_parquet(folder))]
    splits = {name: _parquet_in(folder / name) for name in filter(is_split_name, folders)}
    by_folder = {name: tuple(inside) for name, (inside, below) in splits.items() if inside and not below}
    # Other folders may hold the training set.
    if choose_splits(by_folder).train is not None or (by_folder and len(by_folder) == len(folders)):
        return [ParquetFolder(folder, by_folder, count_beside_splits(folder, _PARQUET, OF_NO_SPLIT))]
    if not depth or len(folders) > _MANY_FOLDERS:
        return []
    return [found for name in folders for found in _search_parquet(folder / name, depth - 1)]


def _beside_parquet(folder: Path) -> Counter[str]:
    """Count what lies beside the parquet files in a folder without visible folders."""
    skipped: Counter[str] = Counter()
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if is_hidden(entry.name) or not (entry.name.lower().endswith(_PARQUET.encode()) or is_image(entry.name)):
                count_skipped(skipped, entry.name, folder=entry.is_dir())
            elif is_image(entry.name):
                skipped["images beside parquet files"] += 1
    return skipped


def _parquet_in(folder: Path, images: bool = False) -> tuple[list[Path], list[str]]:
    """The parquet files in a folder, and its folders, not all where they are many. `images`: there may be some."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(os.fsencode(entry.name)):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(_PARQUET):
                files.append(folder / entry.name)
            elif entry.name.endswith(".tar") or (not images and is_image(os.fsencode(entry.name))):
                raise _HasImages
            if len(folders) > _MANY_FOLDERS:
                break
    return sorted(files, key=os.fsencode), sorted(folders, key=os.fsencode)


def _check_complete(place: Path, files: Sequence[Path]) -> None:
    """Raise `ConfigError` where one of ``NAME-00000-of-00294.parquet`` and so on is not there."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), numbers in found.items():
        if len(numbers) < count:
            lacking = next(number for number in range(count) if number not in numbers)
            raise ConfigError(
                f"{place} has {len(numbers)} of {count} files {name}-...; "
                f"{name}-{lacking:05d}-of-{count:05d}.parquet is not there: download what is missing, or, "
                "to do without, give a folder of links by other names to these."
            )
