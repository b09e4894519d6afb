"""What lies in parquet files as Hugging Face's hub has them: splits, classes, and a name for the picture of each row.

Labels and paths are read here, from the columns that parquet_schema.py finds; the pictures by parquet.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Inventory, NamesBuilder, Source, merged
from lars_train.data.sources.split_files import OF_NO_SPLIT, ParquetFolder
from lars_train.data.sources.tar_samples import Label, is_odd_number
from lars_train.data.sources.tree import is_hidden, is_image
from lars_train.data.sources.webdataset import classes_by_folder
from lars_train.data.splits import TEST, TRAIN, VAL, choose, no_classes
from lars_train.errors import ConfigError
from lars_train.messages import counted, first_process, printable
from lars_train.pack.parquet import ParquetSource, RowGroups, batches, one_line, open_file, pyarrow
from lars_train.pack.parquet_schema import Columns, NoLabels, columns_of, elsewhere

# Rows of which labels and paths are read at a time.
_ROWS = 1 << 16
# A synset's id at the end of a name, where the hub's ImageNet has it (n01440764_10026_n01440764.JPEG), or at its
# beginning, where ImageNet's own names have it.
_WNID = re.compile(rb".*_(n\d{8})|(n\d{8})_.*", re.DOTALL)
# Rows that are looked at to see whether there are pictures.
_LOOKED_AT = 16
_PNG = b"\x89PNG"


@dataclass(frozen=True)
class _Rows:
    """The rows of one split in the order of its files. A path is the last part of it, as bytes."""

    groups: RowGroups
    columns: Columns
    labels: list[Label]
    paths: list[bytes | None]


def open_parquet(folder: ParquetFolder) -> tuple[dict[str, Source], tuple[str, ...], Inventory]:
    """The splits in `folder` by the names that a store gives them, the class names, and what is read.

    Validation is the first of the names in splits.py that has rows; a test set without labels is none. One of the
    splits may be missing; files of no split count as training. Raises `ConfigError` for what cannot be used, and where
    pyarrow is not installed.
    """
    from tqdm import tqdm

    pyarrow()
    total = sum(map(len, folder.files.values()))
    quiet = None if first_process() else True
    with tqdm(total=total, desc="reading labels", unit="file", leave=False, delay=1, disable=quiet) as bar:
        left = dict(folder.files)
        name = choose(left).train or ""
        train = _rows(left.get(name, ()), bar)
        val, empty = None, []
        while (chosen := choose(left)).val is not None:
            val = _validation(left[chosen.val], chosen.val, bar)
            if val is not None:
                break
            empty.append(chosen.val)
            del left[chosen.val]
    found = {split: rows for split, rows in ((TRAIN, train), (VAL, val)) if rows is not None}
    if not found or (train is None and name in left):
        without = f"; {', '.join(empty)} has no labels or no rows" if empty else ""
        raise ConfigError(f"{folder.path} has no parquet files for training, or none with rows in them{without}.")
    for rows in found.values():
        _check_labels(rows)
        _check_pictures(rows)
    first = next(iter(found.values()))
    classes, numbers, by_wnid = _classes(folder.path, first, val)
    names = tuple(map(os.fsdecode, classes))
    # As of the folders in a split: files of no split may well have a class called train.
    if parts := no_classes(names, split=True):
        raise ConfigError(
            f"{folder.path}: its classes are parts of a data set and no classes ({printable(', '.join(parts))}); make "
            "the files of each part alone, with the names of its class folders as labels, or pack the folders."
        )
    sources = {split: _source(rows, classes, numbers, by_wnid) for split, rows in found.items()}
    counts = {
        OF_NO_SPLIT: len(left.get("", ())) if name else 0,
        "other columns of images or labels": first.columns.others,
    }
    skipped = merged(folder.skipped, {reason: count for reason, count in counts.items() if count})
    inventory = Inventory(name, chosen.val or "", (*empty, *chosen.unused), skipped)
    return sources, names, inventory


def _validation(files: Sequence[Path], word: str, bar: Any) -> _Rows | None:
    """The rows of `files`; but a test set may be without labels, and then is none: the hub has -1 for ImageNet's."""
    try:
        rows = _rows(files, bar)
    except NoLabels:
        if word.lower() == TEST:
            return None
        raise
    if rows is None or (word.lower() == TEST and all(label in (None, -1) for label in rows.labels)):
        return None
    return rows


def _rows(files: Sequence[Path], bar: Any) -> _Rows | None:
    """All rows of a split; None where there are none. Its files must be of one kind."""
    columns: Columns | None = None
    labels: list[Label] = []
    paths: list[bytes | None] = []
    groups: list[tuple[int, int, int]] = []
    for number, path in enumerate(files):
        with _told(path):
            opened = open_file(path)
            own = columns_of(path, opened.schema_arrow)
            columns = columns or own
            if own != columns:
                raise ConfigError(
                    f"{path} has other columns or classes than {files[0].name}; keep them in two folders."
                )
            counts = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
            before = len(paths)
            for more_labels, more_paths in _read(opened, columns):
                labels += more_labels
                paths += more_paths
            if len(paths) - before != sum(counts):
                raise ConfigError(f"{path} has not as many rows as it says; download it again.")
            groups += [(number, group, count) for group, count in enumerate(counts)]
        bar.update()
    if columns is None or not paths:
        return None
    file, group, count = np.array(groups, np.int64).T
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    return _Rows(RowGroups(tuple(files), file, group, first), columns, labels, paths)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    arrow = pyarrow()
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except (arrow.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{path} cannot be used ({one_line(error)}); get it again.") from error


def _read(opened: Any, columns: Columns) -> Iterator[tuple[list[Label], list[bytes | None]]]:
    """Labels (None where there is none) and paths of a file's rows, `_ROWS` at a time."""
    arrow = pyarrow()
    wanted = [columns.label, *([".".join(columns.path)] if columns.path else [])]
    for batch in opened.iter_batches(_ROWS, columns=wanted, use_threads=False):
        found = batch.column(columns.label)
        labels = (found if arrow.types.is_integer(found.type) else _undecoded(found)).to_pylist()
        paths: list[bytes | None] = [None] * len(batch)
        if columns.path is not None:
            found = _undecoded(batch.column(columns.path[0]).flatten()[0]).to_pylist()
            paths = [None if path is None else path.replace(b"\\", b"/").rpartition(b"/")[2] for path in found]
        yield labels, paths


def _undecoded(text: Any) -> Any:
    """An array of strings as the bytes that they are: they may be no UTF-8."""
    arrow = pyarrow()
    if arrow.types.is_dictionary(text.type):
        text = text.dictionary_decode()
    return text.cast(arrow.binary() if arrow.types.is_string(text.type) else arrow.large_binary())


def _check_labels(rows: _Rows) -> None:
    """Raise `ConfigError` unless each label is one of the metadata's classes; without them, a number or a name."""
    columns = rows.columns
    most = None if columns.classes is None else len(columns.classes)
    for row, label in enumerate(rows.labels):
        if isinstance(label, int) and label >= 0 and (most is None or label < most):
            continue
        if isinstance(label, bytes) and label and b"\0" not in label and not is_odd_number(label):
            continue
        path, number = rows.groups.place(row)
        known = "" if most is None else f", of its {most} classes"
        shown = printable(label) if isinstance(label, bytes) else label
        raise ConfigError(f"{path}: row {number} has the label {shown}, which is none{known}; get a whole data set.")


def _classes(place: Path, train: _Rows, val: _Rows | None) -> tuple[list[bytes], dict[Label, int], bool]:
    """Class names in the order of the labels of the training set, the index of each label; whether they are wnids.

    `train`: the same as `val` where there is no training set.
    """
    known: set[Any] = set(train.labels)
    others: set[Any] = set(val.labels) if val else set()
    if val and val.columns.classes != train.columns.classes:
        raise ConfigError(f"{place}: its training and validation set have different classes in their metadata.")
    if len({type(label) for label in known | others}) > 1:
        raise ConfigError(f"{place}: some labels are numbers and others are names.")
    if others - known:
        raise ConfigError(
            f"{place}: the validation set has {counted(len(others - known), 'class', 'classes')} that the training "
            f"set has not, such as {min(others - known)!r}; get a whole data set."
        )
    labels = sorted(known)
    numbers: dict[Label, int] = {label: index for index, label in enumerate(labels)}
    pairs = {(label, _wnid(path)) for label, path in zip(train.labels, train.paths, strict=True)}
    wnids = classes_by_folder(pairs, labels)
    if wnids:
        return wnids, numbers, True
    return _named(labels, train.columns.classes), numbers, False


def _named(labels: Sequence[Any], names: Sequence[str] | None) -> list[bytes]:
    """What the classes are called in the metadata, or by labels that are names; else the numbers."""
    if isinstance(labels[0], bytes):
        told = [_clean(label.decode("utf-8", "replace")) for label in labels]
    else:
        told = [_clean(names[label]) for label in labels] if names is not None else []
    if all(told) and len(set(told)) == len(labels):
        return told
    return [b"%d" % (index if isinstance(label, bytes) else label) for index, label in enumerate(labels)]


def _wnid(path: bytes | None) -> bytes | None:
    match = _WNID.fullmatch((path or b"").rpartition(b".")[0])
    return match and (match[1] or match[2])


def _clean(name: str) -> bytes:
    """A class's name as that of a folder: without slashes and what cannot be seen, and not hidden."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).strip().encode()
    return b"_" + shown if shown and is_hidden(shown) else shown


def _source(rows: _Rows, classes: Sequence[bytes], numbers: dict[Label, int], by_wnid: bool) -> Source:
    labels = np.array([numbers[label] for label in rows.labels], np.int32)
    names = _by_path(rows, labels, classes, by_wnid) or _by_row(rows, labels, classes)
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    builder = NamesBuilder()
    builder.extend(names[row] for row in order.tolist())
    return ParquetSource(rows.groups, rows.columns.picture, builder.build(), labels[order], order)


def _by_path(rows: _Rows, labels: npt.NDArray[np.int32], classes: Sequence[bytes], by_wnid: bool) -> list[bytes] | None:
    """For each row a name by its path; None where one has no path that can be used, or two have the same."""
    names = []
    for path, label in zip(rows.paths, labels.tolist(), strict=True):
        if path is None or b"\0" in path or is_hidden(path) or not is_image(path):
            return None
        if by_wnid:
            # What the hub has put there: n01440764_10026_n01440764.JPEG is n01440764_10026.JPEG.
            stem, dot, suffix = path.rpartition(b".")
            path = (stem.removesuffix(b"_" + classes[label]) or stem) + dot + suffix
        names.append(classes[label] + b"/" + path)
    return names if len(set(names)) == len(names) else None


def _by_row(rows: _Rows, labels: npt.NDArray[np.int32], classes: Sequence[bytes]) -> list[bytes]:
    """For each row a name by its file and its number in it."""
    suffix = _suffix(rows)
    names = []
    groups = rows.groups
    begin = groups.first[np.searchsorted(groups.file, np.arange(len(groups.files) + 1))].tolist()
    for path, first, end in zip(groups.files, begin, begin[1:], strict=False):
        for row in range(first, end):
            folder = classes[labels[row]]
            names.append(b"%s/%s_%07d%s" % (folder, os.fsencode(path.stem), row - first, suffix))
    return names


def _suffix(rows: _Rows) -> bytes:
    """The suffix for pictures without a name, by the first one: most are JPEGs."""
    first = next((picture for picture in _pictures(rows) if picture), b"")
    return b".png" if first.startswith(_PNG) else b".jpg"


def _check_pictures(rows: _Rows) -> None:
    """Raise `ConfigError` where there are none, by the first rows; damage is found when all are read."""
    found = list(itertools.islice(_pictures(rows), _LOOKED_AT))
    if found and all(picture is None for picture in found):
        raise elsewhere(rows.groups.place(0)[0], rows.columns.picture.partition(".")[0])


def _pictures(rows: _Rows) -> Iterator[bytes | None]:
    """The pictures of a split as far as they can be read, from the first row on."""
    with contextlib.suppress(OSError):
        for file, number in zip(rows.groups.file, rows.groups.number, strict=True):
            for pictures in batches(rows.groups.files[file], int(number), rows.columns.picture):
                yield from pictures.to_pylist()
