"""Find files that hold many samples each, tars and parquet, and the split that each belongs to. Opens none of them.

webdataset.py reads tars. Training does not read parquet: reading one row means reading and decoding the rows before it
in its row group, which takes longer than decoding the image. lars_train.pack packs parquet files into a store; the
error of `reject_parquet` gives the command.
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
    any_split_word,
    choose_splits,
    has_split_word,
    is_split_name,
    looks_like_split,
    reject_case_duplicates,
    reject_unread_splits,
    split_word,
)
from lars_train.errors import ConfigError
from lars_train.messages import printable

_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_UNPACK = 'for t in *.tar; do mkdir -p "${t%.tar}" && tar -xf "$t" -C "${t%.tar}"; done'
# With fewer tars than this, each is assumed to be a class only if it is named like ImageNet's.
_FEWEST_CLASSES = 3
_WNID = re.compile(r"n\d{8}\.tar")
# An inventory lists at most this many folders that look like splits but are not read.
_SHOWN = 6

PARQUET_OUTSIDE, TARS_OUTSIDE = "parquet files outside any split", "shards outside any split"
_PARQUET = ".parquet"
# Levels of folders to search for parquet files: huggingface_hub's cache has them in snapshots/REVISION/data. More than
# _MANY_FOLDERS folders in a folder are assumed to be classes.
_DEPTH, _MANY_FOLDERS = 3, 32
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.parquet")


class Shards(NamedTuple):
    """Tars by split (`TRAIN`, `VAL`), as paths in the root; and the inventory, with the original split names."""

    files: dict[str, list[str]]
    inventory: Inventory


def find_shards(root: Path) -> Shards | None:
    """Return the tar shards in the folder `root`; None if it is not a folder of shards.

    Shards lie in folders named after splits, or directly in `root` with the split as a word in each name. Tars beside
    folders do not count: they are assumed to be archives that were unpacked into these folders. Without a training set,
    shards outside any split count as `TRAIN`; without such shards, the result has only `VAL`.
    """
    by_split: dict[str, list[str]] = {}
    skipped: dict[str, Counter[str]] = {}
    beside: Counter[str] = Counter()
    unread_splits: list[str] = []
    folders = _visible_folders(root)
    compressed_splits: dict[str, str] = {}
    if any(map(is_split_name, folders)):
        for name in filter(is_split_name, folders):
            by_split[name], _, skipped[name] = _list_tars(root, f"{name}/")
        beside = count_beside_splits(root, ".tar", TARS_OUTSIDE)
        unread_splits = [name for name in sorted(folders) if looks_like_split(name) and not is_split_name(name)]
        unread_splits = unread_splits[:_SHOWN]
        beside[BESIDE] -= len(unread_splits)
    else:
        tars, compressed, beside = _list_tars(root, "")
        for name in tars:
            by_split.setdefault(split_word(name), []).append(name)
        compressed_splits = {
            word: name for name in reversed(compressed) if (word := split_word(name)) and word not in by_split
        }
    chosen = choose_splits(name for name, tars in by_split.items() if tars)
    # A training set without tars consists of class folders.
    if choose_splits(by_split).train != chosen.train or not any(by_split.values()):
        return None
    train = "" if chosen.train is None else chosen.train
    # Split folders without tars are not read.
    empty = [name for name, tars in by_split.items() if name and not tars]
    unused = (*chosen.unused, *empty, *unread_splits, *compressed_splits.values())
    reject_case_duplicates(f"data.root={root}", chosen)
    if not train:
        reject_unread_splits(f"data.root={root}", by_split.get("", ()))
    else:
        words = [any_split_word(name) for name in by_split.get("", ())]
        unused = (*unused, *sorted({word for word in words if word}))
        beside[TARS_OUTSIDE] += words.count("")
    files = {TRAIN: by_split.get(train, []), VAL: by_split.get(chosen.val or "-", [])}
    files = {split: tars for split, tars in files.items() if tars}
    counts = merge_counts(+beside, *(skipped[name] for name in (train, chosen.val) if name in skipped))
    return Shards(files, Inventory(train, chosen.val or "", unused, counts))


def advise_decompressing(names: Iterable[str]) -> str:
    """Return the remedy for the first of `names` that is a compressed tar; empty if there is none."""
    first = next((name for name in names if name.lower().endswith(_COMPRESSED)), None)
    remedy = "is compressed, and so does not allow random access; decompress such shards to plain .tar files (gzip -d)."
    return "" if first is None else f"{printable(first)} {remedy}"


def advise_unpacking(root: Path, tars: Sequence[str]) -> str:
    """Return the remedy for unlabeled `tars` in `root` that look like one tar per class; empty if they do not.

    The command keeps the tars. Later starts ignore them, because they then lie beside folders.
    """
    names = [Path(tar).name for tar in tars]
    wnids = all(map(_WNID.fullmatch, names))
    if any(has_split_word(name) or not name.rpartition(".")[0].strip("0123456789-_. ") for name in names):
        return ""
    if not names or (len(names) < _FEWEST_CLASSES and not wnids):
        return ""
    folders = dict.fromkeys(shlex.quote(str(root / Path(tar).parent)) for tar in tars)
    commands = " && ".join(f"(cd {folder} && {_UNPACK})" for folder in folders)
    return f"if each tar is one class, as in ImageNet's training archive, unpack them: {commands}"


def advise_nested_tars(root: Path, split: str, tars: Sequence[str]) -> str:
    """Return the remedy for a tar of tars, such as ImageNet's training archive."""
    if len(tars) > 1 or "/" in tars[0]:
        return "Unpack the shards, and unpack each tar in them into a folder with the tar's name."
    folder, tar = shlex.quote(str(root)), shlex.quote(tars[0])
    return (
        f"{printable(tars[0])} holds tars, as ImageNet's training archive does; unpack it, and then each tar in it: "
        f"(cd {folder} && mkdir -p {split} && tar -xf {tar} -C {split} && cd {split} && {_UNPACK})"
    )


def _visible_folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if not is_hidden(os.fsencode(entry.name)) and entry.is_dir()]
    except OSError:
        return []


def _list_tars(root: Path, inside: str) -> tuple[list[str], list[str], Counter[str]]:
    """Return the plain and the compressed tars in a folder without visible folders, and counts of its other entries.

    Names are in bytewise order. Raises `ConfigError` if all tars are compressed.
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
        raise ConfigError(f"data.root={root}: {advise_decompressing(compressed)}")
    if compressed:
        skipped["compressed tar files"] = len(compressed)
    return tars, compressed, skipped


@dataclass(frozen=True)
class ParquetFolder:
    """The parquet files of one data set below `path`, in bytewise order, by split; the split "" holds the others."""

    path: Path
    files: dict[str, tuple[Path, ...]]
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Counts of the other entries of the folder, by reason. None of them is read."""


class _HasImages(Exception):
    """The folder holds images as files or in tars, so parquet files beside them are only metadata."""


def parquet_folders(root: Path) -> list[ParquetFolder]:
    """Find the data sets of parquet files in the folder `root` and up to three levels below it.

    The files of a data set lie in folders named after splits, or together in a folder without visible folders. In the
    second case, each name contains the split as a word: ``train-00000-of-00294.parquet``.
    """
    try:
        return _search_parquet(root, _DEPTH)
    except (_HasImages, OSError):
        return []


def single_parquet_folder(root: Path, folders: Sequence[ParquetFolder]) -> ParquetFolder:
    """Return the only folder in `folders`. Raises `ConfigError` if there are several, or if files are missing in it."""
    if len(folders) > 1:
        shown = ", ".join(str(folder.path) for folder in folders)
        raise ConfigError(f"{root} holds several data sets of parquet files; give the folder of one: {shown}.")
    if choose_splits(folders[0].files).train is None:
        reject_unread_splits(str(folders[0].path), (file.name for file in folders[0].files.get("", ())))
    for files in folders[0].files.values():
        _check_complete(folders[0].path, files)
    return folders[0]


def reject_parquet(path: Path) -> None:
    """Raise `ConfigError` with the command to pack the data if `path` is a parquet file or a folder of such files."""
    if path.suffix.lower() == _PARQUET and not path.is_dir():
        folders = [path.parent]
    else:
        # Do not search class folders, of which there may be many.
        folders = [] if _has_class_folders(path) else [folder.path for folder in parquet_folders(path)]
    if not folders:
        return
    commands = " or ".join(f"`lars-data pack {shlex.quote(str(folder))} STORE`" for folder in folders)
    raise ConfigError(
        f"data.root={path} holds parquet, which is slow to read by single rows; pack it into a store once, with "
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
    files, folders = _list_parquet(folder, allow_images=depth == _DEPTH)
    if files and not folders:
        by_word: dict[str, list[Path]] = {}
        for file in files:
            by_word.setdefault(split_word(file.name), []).append(file)
        by_split = {word: tuple(found) for word, found in by_word.items()}
        return [ParquetFolder(folder, by_split, _beside_parquet(folder))]
    splits = {name: _list_parquet(folder / name) for name in filter(is_split_name, folders)}
    by_folder = {name: tuple(inside) for name, (inside, below) in splits.items() if inside and not below}
    # If no split here is the training set, search the other folders for it. Without other folders, use these splits.
    if choose_splits(by_folder).train is not None or (by_folder and len(by_folder) == len(folders)):
        return [ParquetFolder(folder, by_folder, count_beside_splits(folder, _PARQUET, PARQUET_OUTSIDE))]
    if not depth or len(folders) > _MANY_FOLDERS:
        return []
    return [found for name in folders for found in _search_parquet(folder / name, depth - 1)]


def _beside_parquet(folder: Path) -> Counter[str]:
    """Count the other entries of a folder of parquet files, which has no visible folders."""
    skipped: Counter[str] = Counter()
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if is_hidden(entry.name) or not (entry.name.lower().endswith(_PARQUET.encode()) or is_image(entry.name)):
                count_skipped(skipped, entry.name, folder=entry.is_dir())
            elif is_image(entry.name):
                skipped["images beside parquet files"] += 1
    return skipped


def _list_parquet(folder: Path, allow_images: bool = False) -> tuple[list[Path], list[str]]:
    """Return the parquet files and the folders in `folder`, stopping early if there are many folders.

    Raises `_HasImages` for tars, and for images unless `allow_images`.
    """
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(os.fsencode(entry.name)):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(_PARQUET):
                files.append(folder / entry.name)
            elif entry.name.endswith(".tar") or (not allow_images and is_image(os.fsencode(entry.name))):
                raise _HasImages
            if len(folders) > _MANY_FOLDERS:
                break
    return sorted(files, key=os.fsencode), sorted(folders, key=os.fsencode)


def _check_complete(place: Path, files: Sequence[Path]) -> None:
    """Raise `ConfigError` if one of ``NAME-00000-of-00294.parquet`` and so on is missing."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, count), numbers in found.items():
        if len(numbers) < count:
            missing = next(number for number in range(count) if number not in numbers)
            raise ConfigError(
                f"{place} has {len(numbers)} of {count} files {name}-...; "
                f"{name}-{missing:05d}-of-{count:05d}.parquet is missing: download the missing files. To use only "
                "the files that exist, make a folder with links to them under other names, and give that folder."
            )
