"""Import parquet data sets of the Hugging Face Hub: find splits and classes, name the images, and read them in order.

Reading images in the order of `ParquetSource.shuffled_by_group` decodes each row group once, a few rows at a time. Any
other order decodes about one row group per image. parquet_files.py reads the files.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.arrow_columns import NoLabels, only_paths, pyarrow
from lars_train.data.dataset import Labels, Names, NamesBuilder, Source
from lars_train.data.inventory import Inventory, merge_counts
from lars_train.data.sources.split_files import PARQUET_OUTSIDE, ParquetFolder
from lars_train.data.sources.tar_samples import Label, is_invalid_number
from lars_train.data.sources.tree import is_hidden, is_image
from lars_train.data.sources.webdataset import classes_by_folder
from lars_train.data.splits import TEST, TRAIN, VAL, choose_splits, find_non_classes
from lars_train.errors import ConfigError
from lars_train.messages import counted, is_rank0, printable
from lars_train.pack.parquet_files import RowGroups, Rows, image_batches, read_rows

# A WordNet id at the end of a name, as in the Hub's ImageNet (n01440764_10026_n01440764.JPEG), or at its beginning, as
# in ImageNet's own names.
_WNID = re.compile(rb".*_(n\d{8})|(n\d{8})_.*", re.DOTALL)
# Number of rows read to check that a data set contains images.
_CHECKED_ROWS = 16
_PNG = b"\x89PNG"


class ParquetSource:
    """A source whose samples are rows of parquet files. Not thread-safe.

    `column`: the leaf of the encoded images, such as ``image.bytes``; `rows`: the row of each sample, int64 (N,).
    """

    def __init__(
        self, groups: RowGroups, column: str, names: Names, labels: Labels, rows: npt.NDArray[np.int64]
    ) -> None:
        self.labels = labels
        self._groups = groups
        self._column = column
        self._names = names
        self._rows = rows
        self._stream: _RowGroupStream | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        """Return the path of a sample within the split: class folder and file name."""
        return os.fsdecode(self._names[sample])

    def location(self, sample: int) -> str:
        """Return the file, the row and the name of a sample, for a message."""
        path, row = self._groups.place(int(self._rows[sample]))
        return f"{printable(os.fsencode(path))}, row {row} ({printable(self._names[sample])})"

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises OSError if it is null or its part of the file is damaged."""
        row = int(self._rows[sample])
        group = int(self._groups.of_rows(self._rows[sample : sample + 1])[0])
        within = row - int(self._groups.first[group])
        if self._stream is None or not self._stream.can_reach(group, within):
            self._stream = _RowGroupStream(self._groups, group, self._column)
        return self._stream.image(within)

    def shuffled_by_group(self, draws: np.random.Philox) -> npt.NDArray[np.int64]:
        """Return all sample ids, int64 (N,): row groups in random order, the rows of each in file order."""
        turn = np.argsort(np.argsort(draws.random_raw(len(self._groups.number)), kind="stable"))
        return np.lexsort((self._rows, turn[self._groups.of_rows(self._rows)]))


class _RowGroupStream:
    """The images of one row group, read forward from its first row."""

    def __init__(self, groups: RowGroups, group: int, column: str) -> None:
        self._group = group
        self._batches = image_batches(groups.files[groups.file[group]], int(groups.number[group]), column)
        self._first = 0
        self._batch: Any = ()
        self._damage = ""

    def can_reach(self, group: int, within: int) -> bool:
        """Return True if row `within` of `group` is in memory or not read yet."""
        return group == self._group and within >= self._first

    def image(self, within: int) -> bytes:
        while within >= self._first + len(self._batch) and not self._damage:
            self._first += len(self._batch)
            self._batch = ()
            try:
                self._batch = next(self._batches)
            except StopIteration:
                self._damage = "the row is missing; was the file replaced?"
            except OSError as error:
                # No row after the damage can be read, so do not try again for each of them.
                self._damage = str(error)
        if self._damage:
            raise OSError(self._damage)
        image = self._batch[within - self._first].as_py()
        if image is None:
            raise OSError("the image is null")
        assert isinstance(image, bytes)
        return image


def open_parquet(folder: ParquetFolder) -> tuple[dict[str, Source], tuple[str, ...], Inventory]:
    """Return the splits in `folder` by their names in a store, the class names, and the inventory.

    The validation set is the first split of `splits.VALIDATION` that has rows; a test set without labels is skipped.
    Either split may be missing. Without a training split, the files outside any split are the training set. Raises
    `ConfigError` for a data set that cannot be used, and if pyarrow is not installed.
    """
    from tqdm import tqdm

    pyarrow()
    total = sum(map(len, folder.files.values()))
    quiet = None if is_rank0() else True
    with tqdm(total=total, desc="reading labels", unit="file", leave=False, delay=1, disable=quiet) as bar:
        left = dict(folder.files)
        name = choose_splits(left).train or ""
        train = read_rows(left.get(name, ()), bar.update)
        val, empty = None, []
        while (chosen := choose_splits(left)).val is not None:
            val = _validation(left[chosen.val], chosen.val, bar.update)
            if val is not None:
                break
            empty.append(chosen.val)
            del left[chosen.val]
    found = {split: rows for split, rows in ((TRAIN, train), (VAL, val)) if rows is not None}
    if not found or (train is None and name in left):
        without = f"; {', '.join(empty)} has no labels or no rows" if empty else ""
        raise ConfigError(f"{folder.path} has no parquet files for training, or none with rows{without}.")
    for rows in found.values():
        _check_labels(rows)
        _check_images(rows)
    first = next(iter(found.values()))
    classes, numbers, by_wnid = _classes(folder.path, first, val)
    names = tuple(map(os.fsdecode, classes))
    # split=True allows a class called train, even if the files belong to no split.
    if parts := find_non_classes(names, split=True):
        raise ConfigError(
            f"{folder.path}: its classes ({printable(', '.join(parts))}) are parts of a data set. Write a parquet file "
            "per part, with the names of the class folders as labels, or pack the folders."
        )
    sources = {split: _source(rows, classes, numbers, by_wnid) for split, rows in found.items()}
    counts = {
        PARQUET_OUTSIDE: len(left.get("", ())) if name else 0,
        "other columns of images or labels": first.columns.others,
    }
    skipped = merge_counts(folder.skipped, {reason: count for reason, count in counts.items() if count})
    return sources, names, Inventory(name, chosen.val or "", (*empty, *chosen.unused), skipped)


def _validation(files: Sequence[Path], split: str, file_done: Callable[[], object]) -> Rows | None:
    """Read a validation set. Return None if it has no rows, or is a test set without labels (ImageNet's are -1)."""
    try:
        rows = read_rows(files, file_done)
    except NoLabels:
        if split.lower() == TEST:
            return None
        raise
    if rows is None or (split.lower() == TEST and all(label in (None, -1) for label in rows.labels)):
        return None
    return rows


def _check_labels(rows: Rows) -> None:
    """Raise `ConfigError` unless each label is a class of the metadata or, without metadata, a number or a name."""
    classes = rows.columns.classes
    for row, label in enumerate(rows.labels):
        if isinstance(label, int) and label >= 0 and (classes is None or label < len(classes)):
            continue
        if isinstance(label, bytes) and label and b"\0" not in label and not is_invalid_number(label):
            continue
        path, number = rows.groups.place(row)
        expected = "a class number or name" if classes is None else f"one of the {len(classes)} classes"
        shown = printable(label) if isinstance(label, bytes) else label
        raise ConfigError(f"{path}, row {number}: the label {shown} is not {expected}; download the data set again.")


def _check_images(rows: Rows) -> None:
    """Raise `ConfigError` if the first rows have no images. Damaged images are found later, when all are read."""
    found = list(itertools.islice(rows.images(), _CHECKED_ROWS))
    if found and all(image is None for image in found):
        raise only_paths(rows.groups.place(0)[0], rows.columns.image.partition(".")[0])


def _classes(place: Path, train: Rows, val: Rows | None) -> tuple[list[bytes], dict[Label, int], bool]:
    """Return class names in the order of the training labels, each label's class, and True if they are WordNet ids.

    Without a training set, `train` and `val` are the same rows.
    """
    known: set[Any] = set(train.labels)
    others: set[Any] = set(val.labels) if val else set()
    if val and val.columns.classes != train.columns.classes:
        raise ConfigError(f"{place}: the training and the validation set have different classes in their metadata.")
    if len({type(label) for label in known | others}) > 1:
        raise ConfigError(f"{place}: some labels are numbers and others are names.")
    if others - known:
        raise ConfigError(
            f"{place}: the training set lacks {counted(len(others - known), 'class', 'classes')} of the validation "
            f"set, such as {min(others - known)!r}; download the data set again."
        )
    labels = sorted(known)
    numbers: dict[Label, int] = {label: index for index, label in enumerate(labels)}
    pairs = {(label, _wnid(path)) for label, path in zip(train.labels, train.paths, strict=True)}
    wnids = classes_by_folder(pairs, labels)
    if wnids:
        return wnids, numbers, True
    return _class_names(labels, train.columns.classes), numbers, False


def _class_names(labels: Sequence[Any], names: Sequence[str] | None) -> list[bytes]:
    """Return class names from the metadata or the labels if they are distinct and not empty, else numbers."""
    if isinstance(labels[0], bytes):
        found = [_folder_name(label.decode("utf-8", "replace")) for label in labels]
    else:
        found = [_folder_name(names[label]) for label in labels] if names is not None else []
    if all(found) and len(set(found)) == len(labels):
        return found
    return [b"%d" % (index if isinstance(label, bytes) else label) for index, label in enumerate(labels)]


def _wnid(path: bytes | None) -> bytes | None:
    match = _WNID.fullmatch((path or b"").rpartition(b".")[0])
    return match and (match[1] or match[2])


def _folder_name(name: str) -> bytes:
    """Return `name` as a valid folder name: without slashes or invisible characters, and not hidden."""
    shown = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).strip().encode()
    return b"_" + shown if shown and is_hidden(shown) else shown


def _source(rows: Rows, classes: Sequence[bytes], numbers: dict[Label, int], by_wnid: bool) -> Source:
    labels = np.array([numbers[label] for label in rows.labels], np.int32)
    names = _names_by_path(rows, labels, classes, by_wnid) or _names_by_row(rows, labels, classes)
    order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
    builder = NamesBuilder()
    builder.extend(names[row] for row in order.tolist())
    return ParquetSource(rows.groups, rows.columns.image, builder.build(), labels[order], order)


def _names_by_path(
    rows: Rows, labels: npt.NDArray[np.int32], classes: Sequence[bytes], by_wnid: bool
) -> list[bytes] | None:
    """Name each row after its path; return None if a path cannot be used or two names are the same."""
    names = []
    for path, label in zip(rows.paths, labels.tolist(), strict=True):
        if path is None or b"\0" in path or is_hidden(path) or not is_image(path):
            return None
        if by_wnid:
            # Remove what the Hub appended: n01440764_10026_n01440764.JPEG is n01440764_10026.JPEG.
            stem, dot, suffix = path.rpartition(b".")
            path = (stem.removesuffix(b"_" + classes[label]) or stem) + dot + suffix
        names.append(classes[label] + b"/" + path)
    return names if len(set(names)) == len(names) else None


def _names_by_row(rows: Rows, labels: npt.NDArray[np.int32], classes: Sequence[bytes]) -> list[bytes]:
    """Name each row after its file and its number in the file."""
    # Every name gets the suffix that fits the first image. Most images are JPEGs.
    first = next((image for image in rows.images() if image), b"")
    suffix = b".png" if first.startswith(_PNG) else b".jpg"
    stems = [os.fsencode(path.stem) for path in rows.groups.files]
    files, numbers = rows.groups.places(np.arange(len(labels)))
    return [
        b"%s/%s_%07d%s" % (classes[label], stems[file], number, suffix)
        for label, file, number in zip(labels.tolist(), files.tolist(), numbers.tolist(), strict=True)
    ]
