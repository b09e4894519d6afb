"""Hugging Face's parquet files in a folder: where they lie, and of which split each is. None is opened here.

Nor are they trained on: to read one row, those before it in its row group are read and decoded, too, which takes longer
than the picture's own decoding. So they are made a store (lars_train.stores), and what opens `data.root` says so.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lars_train.data.tree import is_hidden, is_image
from lars_train.data.webdataset import split_word
from lars_train.errors import ConfigError

TRAIN, TEST = "train", "test"
VALIDATION = ("val", "validation", "valid", TEST)
_SUFFIX = ".parquet"
# The cache of huggingface_hub has the files in snapshots/REVISION/data. Where there are more folders, they are classes.
_DEPTH, _FOLDERS = 3, 32
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.parquet")


@dataclass(frozen=True)
class ParquetFolder:
    """The files of one data set below `path`, in bytewise order, by the word for their split ("": none)."""

    path: Path
    files: dict[str, tuple[Path, ...]]


class _HasPictures(Exception):
    """Pictures lie there as files, or in tars: parquet beside them is about them."""


def parquet_folders(root: Path) -> list[ParquetFolder]:
    """The data sets of parquet files in the folder `root` and up to three folders below it; often none.

    The files of one lie in a folder without visible folders, their splits told apart by words in their names, as
    ``train-00000-of-00294.parquet``, or in folders called ``train`` and the like.
    """
    try:
        return _search(root, _DEPTH)
    except (_HasPictures, OSError):
        return []


def the_one(root: Path, folders: Sequence[ParquetFolder]) -> ParquetFolder:
    """The only one of `folders`. Raises `ConfigError` for several, and where files are not there that should be."""
    if len(folders) > 1:
        shown = ", ".join(str(folder.path) for folder in folders)
        raise ConfigError(f"{root} holds several data sets of parquet files; give the folder of one: {shown}.")
    for files in folders[0].files.values():
        _check_complete(folders[0].path, files)
    return folders[0]


def refuse_parquet(path: Path) -> None:
    """Raise `ConfigError` where `path` is a parquet file or a folder of such; it has the command that helps."""
    if path.suffix.lower() == _SUFFIX and not path.is_dir():
        places = [path.parent]
    else:
        # Classes have folders: there is no need to look into those.
        places = [] if _has_folders(path / TRAIN) else [folder.path for folder in parquet_folders(path)]
    if not places:
        return
    commands = " or ".join(f"`lars-data pack {shlex.quote(str(place))} STORE`" for place in places)
    raise ConfigError(
        f"data.root={path} holds parquet, of which single rows are slow to read; make a store of it once, by "
        f"{commands}, and set data.root=STORE."
    )


def _has_folders(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.is_dir() for entry in entries)
    except OSError:
        return False


def _search(folder: Path, depth: int) -> list[ParquetFolder]:
    files, folders = _look(folder, pictures=depth == _DEPTH)
    if files and not folders:
        by_word: dict[str, list[Path]] = {}
        for file in files:
            by_word.setdefault(split_word(file.name, (TRAIN, *VALIDATION)), []).append(file)
        return [ParquetFolder(folder, {word: tuple(found) for word, found in by_word.items()})]
    splits = {name: _look(folder / name) for name in (TRAIN, *VALIDATION) if name in folders}
    by_folder = {name: tuple(inside) for name, (inside, below) in splits.items() if inside and not below}
    if TRAIN in by_folder:
        return [ParquetFolder(folder, by_folder)]
    if not depth or len(folders) > _FOLDERS:
        return []
    return [found for name in folders for found in _search(folder / name, depth - 1)]


def _look(folder: Path, pictures: bool = False) -> tuple[list[Path], list[str]]:
    """The parquet files in a folder, and its folders, not all where they are many. `pictures`: there may be some."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(os.fsencode(entry.name)):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(_SUFFIX):
                files.append(folder / entry.name)
            elif entry.name.endswith(".tar") or (not pictures and is_image(os.fsencode(entry.name))):
                raise _HasPictures
            if len(folders) > _FOLDERS:
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
