"""Open a folder that ``save_to_disk`` of Hugging Face's datasets wrote, without that package.

The Arrow files hold the encoded images as they are. An index of their positions is built at the start, and ``pread``
reads each image, as from tar shards: safe for threads and after a fork, and without pyarrow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.arrow_columns import (
    Columns,
    NoLabels,
    columns_of,
    damage_as_config_error,
    field_of,
    labels_and_paths,
    only_paths,
    pyarrow,
)
from lars_train.data.dataset import Dataset, Labels, Names, NamesBuilder, fingerprint
from lars_train.data.inventory import Inventory
from lars_train.data.sources.shards import Places, Shard, ShardSource
from lars_train.data.sources.split_files import reject_parquet
from lars_train.data.sources.tar_samples import Label
from lars_train.data.sources.tree import split_holdout
from lars_train.data.splits import TEST, TRAIN, choose_splits
from lars_train.errors import ConfigError
from lars_train.fsutil import user_path
from lars_train.messages import counted, printable

_STATE = "state.json"
_UNLABELED = "rows without a label"


@dataclass(frozen=True)
class _Rows:
    """The rows of one split that have a label."""

    files: tuple[Shard, ...]
    columns: Columns
    labels: list[Label]
    names: Names
    places: Places
    unlabeled: int

    def source(self, numbers: dict[Label, int], rows: npt.NDArray[np.int64] | None = None) -> ShardSource:
        """Return the samples in `rows`, by default all. `numbers`: the class of each label."""
        labels: Labels = np.array([numbers[label] for label in self.labels], np.int32)
        rows = np.arange(len(labels)) if rows is None else rows
        return ShardSource(self.files, self.names.take(rows), labels[rows], self.places.take(rows))


def open_huggingface(root: str | None, holdout: float | None = None) -> Dataset:
    """Open the ``DatasetDict`` in the folder `root`; with `holdout`, the folder may hold a single ``Dataset`` instead.

    With `holdout`, that share of each training class becomes the validation set, even if there is another. Rows without
    a label are skipped and counted. Raises `ConfigError` for any other folder, and if pyarrow is not installed.
    """
    pyarrow()
    place = f"data.root={root}"
    folders = _split_folders(root)
    train_name = "" if "" in folders else choose_splits(folders).train
    if train_name is None:
        raise ConfigError(f"{place} has no split called {TRAIN}; it has {printable(', '.join(sorted(folders)))}.")
    train = _read(folders[train_name])
    if not train.labels:
        raise ConfigError(f"{folders[train_name]}: no row has a label.")
    val, val_name, left = None, None, dict(folders)
    while holdout is None and val is None and (val_name := choose_splits(left).val) is not None:
        val = _validation(left.pop(val_name), val_name)
    if holdout is None and val is None:
        raise ConfigError(f"{place} has no validation split with labels; set data.holdout=0.1 to hold out a tenth.")
    classes, numbers = _classes(place, train, val)
    if val is None:
        assert holdout is not None
        labels = np.array([numbers[label] for label in train.labels], np.int32)
        training, validation = (train.source(numbers, rows) for rows in split_holdout(labels, holdout))
    else:
        training, validation = train.source(numbers), val.source(numbers)
    counts = {
        _UNLABELED: train.unlabeled + (val.unlabeled if val else 0),
        "other columns of images or labels": train.columns.others,
    }
    return Dataset(
        training,
        validation,
        classes,
        fingerprint(classes, *((source.names.chunks(), source.labels) for source in (training, validation))),
        numbers=tuple(label for label in numbers if isinstance(label, int)) if train.columns.classes is None else (),
        inventory=Inventory(
            printable(train_name),
            printable(val_name or ""),
            tuple(printable(name) for name in folders if name not in (train_name, val_name)),
            {reason: count for reason, count in counts.items() if count},
            unvalidated=len(classes) - len(np.unique(validation.labels)),
        ),
    )


def _split_folders(root: str | None) -> dict[str, Path]:
    """Return the folders of the splits by name; a single data set has the name ""."""
    if not root:
        raise ConfigError("data.root is not set: give the folder that save_to_disk wrote, data.root=PATH.")
    path = user_path(root)
    try:
        if (path / _STATE).is_file():
            return {"": path}
        found = {folder.name: folder for folder in sorted(path.iterdir()) if (folder / _STATE).is_file()}
    except OSError as error:
        raise ConfigError(f"data.root={root} cannot be opened ({error.strerror}); give a folder.") from None
    if not found:
        reject_parquet(path)
        raise ConfigError(
            f"data.root={root}: the file {_STATE}, which save_to_disk of Hugging Face's datasets writes, is missing in "
            "this folder and in the folders in it; write the data set with load_dataset(NAME).save_to_disk(FOLDER)."
        )
    return found


def _validation(folder: Path, name: str) -> _Rows | None:
    """Read a validation split. Return None if it has no rows with labels."""
    try:
        rows = _read(folder)
    except NoLabels:
        if name.lower() == TEST:
            return None
        raise
    return rows if rows.labels else None


def _classes(place: str, train: _Rows, val: _Rows | None) -> tuple[tuple[str, ...], dict[Label, int]]:
    """Return the names of the classes, and the class of each label."""
    if val and val.columns.classes != train.columns.classes:
        raise ConfigError(f"{place}: the training and the validation split have different classes.")
    names = train.columns.classes
    known: set[Any] = set(range(len(names))) if names is not None else set(train.labels)
    others = (set(train.labels) | set(val.labels if val else ())) - known
    if others:
        raise ConfigError(
            f"{place}: {counted(len(others), 'label')} of its rows, such as {next(iter(others))!r}, "
            f"{'have no name in the ClassLabel' if names is not None else 'do not occur in the training split'}."
        )
    labels = sorted(known)
    if names is None:
        names = tuple(printable(label) if isinstance(label, bytes) else str(label) for label in labels)
    return names, {label: number for number, label in enumerate(labels)}


def _read(folder: Path) -> _Rows:
    """Read the labels, paths and positions of a split's images. Raises `ConfigError`, `NoLabels`."""
    arrow = pyarrow()
    columns: Columns | None = None
    files, labels, names, row = list[Shard](), list[Label](), NamesBuilder(), 0
    places = [(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    with damage_as_config_error(folder / _STATE, "save it again"):
        listed = [str(entry["filename"]) for entry in json.loads((folder / _STATE).read_text())["_data_files"]]
    for number, name in enumerate(listed):
        path = folder / name
        with damage_as_config_error(path, "save it again"):
            if path.parent != folder:
                raise ValueError("it is outside the folder")
            with arrow.memory_map(str(path)) as file:
                whole = file.read_buffer()
                with arrow.ipc.open_stream(whole) as batches:
                    own = columns_of(path, batches.schema)
                    if (columns := columns or own) != own:
                        raise ConfigError(f"{path} and {listed[0]} differ in columns or classes; save them again.")
                    for batch in batches:
                        found, paths = labels_and_paths(batch, columns)
                        offset, size = _positions(batch, columns.image, whole)
                        chosen = [i for i, label in enumerate(found) if label not in (None, -1)]
                        labels += [found[i] for i in chosen]
                        names.extend(_name(row + i, paths[i]) for i in chosen)
                        places.append((np.full(len(chosen), number, np.int32), offset[chosen], size[chosen]))
                        row += len(found)
                files.append(Shard(path, len(whole)))
    if columns is None:
        raise ConfigError(f"{folder} has no Arrow files.")
    images = Places(*(np.concatenate(part) for part in zip(*places, strict=True)))
    if labels and not np.any(images.size):
        raise only_paths(files[0].path, columns.image.removesuffix(".bytes"))
    return _Rows(tuple(files), columns, labels, names.build(), images, row - len(labels))


def _name(row: int, path: bytes | None) -> bytes:
    """Return a row's number and image file name as its name. The number comes first, so names sort in row order."""
    return b"%08d-%s" % (row, path.replace(b"\0", b"")) if path else b"%08d" % row


def _positions(batch: Any, leaf: str, whole: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first byte in the file and the size of each image of a batch, int64 (n,); null has the size 0."""
    plain = leaf in batch.schema.names
    images = batch.column(leaf) if plain else field_of(batch.column(leaf.removesuffix(".bytes")), "bytes")
    _, ends, data = images.buffers()
    if data is None or not len(images):
        return np.zeros(len(images), np.int64), np.zeros(len(images), np.int64)
    width = np.int64 if pyarrow().types.is_large_binary(images.type) else np.int32
    bounds = np.frombuffer(ends, width)[images.offset : images.offset + len(images) + 1].astype(np.int64)
    size = np.where(np.asarray(images.is_valid()), np.diff(bounds), 0)
    # Images of size 0 get position 0. Without this, their positions could be invalid: if all images are null, Arrow's
    # buffer `data` may lie outside the mapped file.
    first = np.where(size > 0, bounds[:-1] + (data.address - whole.address), 0)
    if np.any(size < 0) or np.any(first < 0) or np.any(first + size > len(whole)):
        raise ValueError("the images are compressed, or lie outside the file")
    return first, size
