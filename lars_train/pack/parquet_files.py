"""Read parquet files of images as the Hugging Face Hub stores them: columns, labels, paths and encoded images.

data/arrow_columns.py finds the columns. pyarrow (https://arrow.apache.org/docs/python/parquet.html) is imported on
first use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.arrow_columns import (
    Columns,
    columns_of,
    damage_as_config_error,
    labels_and_paths,
    one_line,
    pyarrow,
)
from lars_train.data.sources.tar_samples import Label
from lars_train.errors import ConfigError

# Bytes per read; rows per batch of images, and per batch of labels and paths.
_BUFFER = 1 << 20
_IMAGE_ROWS, _LABEL_ROWS = 16, 1 << 16


@dataclass(frozen=True)
class RowGroups:
    """The row groups of several files, in order. All arrays are int64."""

    files: tuple[Path, ...]
    file: npt.NDArray[np.int64]
    """Shape (G,): the index in `files` of each group's file, ascending."""
    number: npt.NDArray[np.int64]
    """Shape (G,): the number of each group in its file."""
    first: npt.NDArray[np.int64]
    """Shape (G + 1,): the number of rows before each group, over all files; the last entry counts all rows."""

    def of_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row group of each of `rows`."""
        return np.searchsorted(self.first, rows, "right") - 1

    def places(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the index in `files` of each row's file, and the row's number in that file, from 0."""
        files = self.file[self.of_rows(rows)]
        return files, rows - self.first[np.searchsorted(self.file, files)]

    def place(self, row: int) -> tuple[Path, int]:
        """Return the file of a row, and the row's number in that file, from 0."""
        files, numbers = self.places(np.array([row]))
        return self.files[files[0]], int(numbers[0])


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the order of its files."""

    groups: RowGroups
    columns: Columns
    labels: list[Label]
    """The label of each row; None where it is null."""
    paths: list[bytes | None]
    """The last component of each image's path; None without a path."""

    def images(self) -> Iterator[bytes | None]:
        """Yield the encoded images from the first row until the end, or until the first row that cannot be read."""
        with contextlib.suppress(OSError):
            for file, number in zip(self.groups.file, self.groups.number, strict=True):
                for images in image_batches(self.groups.files[file], int(number), self.columns.image):
                    yield from images.to_pylist()


def read_rows(files: Sequence[Path], file_done: Callable[[], object]) -> Rows | None:
    """Read the labels and paths of one split; return None if it has no rows. Call `file_done` after each file.

    Raises `ConfigError` for a damaged file and for files that differ in columns or classes, `NoLabels` if no column
    holds labels.
    """
    columns: Columns | None = None
    labels: list[Label] = []
    paths: list[bytes | None] = []
    groups: list[tuple[int, int, int]] = []
    for number, path in enumerate(files):
        with damage_as_config_error(path, "download it again"):
            opened = _open(path)
            own = columns_of(path, opened.schema_arrow)
            columns = columns or own
            if own != columns:
                raise ConfigError(
                    f"{path} and {files[0].name} differ in columns or classes; keep them in separate folders."
                )
            counts = [opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups)]
            before = len(paths)
            for more_labels, more_paths in _read(opened, columns):
                labels += more_labels
                paths += more_paths
            if len(paths) - before != sum(counts):
                raise ConfigError(f"{path} does not hold as many rows as its footer says; download it again.")
            groups += [(number, group, count) for group, count in enumerate(counts)]
        file_done()
    if columns is None or not paths:
        return None
    file, group, count = np.array(groups, np.int64).T
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    return Rows(RowGroups(tuple(files), file, group, first), columns, labels, paths)


def image_batches(path: Path, group: int, column: str) -> Iterator[Any]:
    """Yield the images of a row group as binary arrays of at most 16 rows. Raises OSError for damage."""
    arrow = pyarrow()
    try:
        opened = _open(path)
        for batch in opened.iter_batches(_IMAGE_ROWS, row_groups=[group], columns=[column], use_threads=False):
            images = batch.column(0)
            yield images.flatten()[0] if arrow.types.is_struct(images.type) else images
    except MemoryError:
        raise
    except (arrow.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
        raise OSError(f"cannot be read: {one_line(error)}") from error


def _open(path: Path) -> Any:
    """Return a ``pyarrow.parquet.ParquetFile``. Raises OSError and Arrow's exceptions."""
    pyarrow()
    from pyarrow.parquet import ParquetFile

    # pre_buffer would start threads, which are unsafe to fork. With a memory map, a file that is truncated during a
    # read would raise SIGBUS.
    return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def _read(opened: Any, columns: Columns) -> Iterator[tuple[list[Label], list[bytes | None]]]:
    """Yield the labels and paths of a file, 65,536 rows at a time."""
    leaves = [columns.label, *([".".join(columns.path)] if columns.path else [])]
    for batch in opened.iter_batches(_LABEL_ROWS, columns=leaves, use_threads=False):
        yield labels_and_paths(batch, columns)
