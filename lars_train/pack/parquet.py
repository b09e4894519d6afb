"""The pictures in parquet files as a `Source`: row group by row group, a few rows in memory at a time.

What is asked for in the order of `mixed` is decoded once; any other order costs a row group's worth of decoding for
about each picture. Names and labels of the rows are found in parquet_index.py. The library that reads the format
(pyarrow, https://arrow.apache.org/docs/python/parquet.html) is loaded when it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels, Names
from lars_train.errors import ConfigError
from lars_train.messages import first_line, printable

# Rows that are decoded at a time, and bytes that are read at a time.
_ROWS, _BUFFER = 16, 1 << 20


@dataclass(frozen=True)
class RowGroups:
    """The row groups of several files, one after the other. Each array int64."""

    files: tuple[Path, ...]
    file: npt.NDArray[np.int64]
    """Shape (G,): the file of each."""
    number: npt.NDArray[np.int64]
    """Shape (G,): its number in that file."""
    first: npt.NDArray[np.int64]
    """Shape (G + 1,): the rows before it, those of earlier files included; and all rows."""

    def of_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row group that each of `rows` lies in."""
        return np.searchsorted(self.first, rows, "right") - 1

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number in that file, from 0."""
        group = int(self.of_rows(np.array([row]))[0])
        begin = int(np.searchsorted(self.file, self.file[group]))
        return self.files[self.file[group]], row - int(self.first[begin])


class ParquetSource:
    """Samples that are rows of parquet files, to be read by one thread at a time.

    `column`: the leaf with the encoded pictures, such as ``image.bytes``; `rows`: that of each sample, int64 (N,).
    """

    def __init__(
        self, groups: RowGroups, column: str, names: Names, labels: Labels, rows: npt.NDArray[np.int64]
    ) -> None:
        self.labels = labels
        self._groups = groups
        self._column = column
        self._names = names
        self._rows = rows
        self._stream: _Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        return os.fsdecode(self._names[sample])

    def where(self, sample: int) -> str:
        path, row = self._groups.place(int(self._rows[sample]))
        return f"{printable(os.fsencode(path))}, row {row} ({printable(self._names[sample])})"

    def read(self, sample: int) -> bytes:
        """The picture, byte for byte. Raises OSError where it is null, or its part of the file is damaged."""
        row = int(self._rows[sample])
        group = int(self._groups.of_rows(self._rows[sample : sample + 1])[0])
        within = row - int(self._groups.first[group])
        if self._stream is None or not self._stream.leads_to(group, within):
            self._stream = _Stream(self._groups, group, self._column)
        return self._stream.row(within)

    def mixed(self, draws: np.random.Philox) -> npt.NDArray[np.int64]:
        """All samples, int64 (N,): row groups in an order that `draws` says, the rows of each one after the other."""
        turn = np.argsort(np.argsort(draws.random_raw(len(self._groups.number)), kind="stable"))
        return np.lexsort((self._rows, turn[self._groups.of_rows(self._rows)]))


class _Stream:
    """The pictures of one row group, from its first row on."""

    def __init__(self, groups: RowGroups, group: int, column: str) -> None:
        self._group = group
        self._batches = batches(groups.files[groups.file[group]], int(groups.number[group]), column)
        self._first = 0
        self._batch: Any = ()
        self._damage = ""

    def leads_to(self, group: int, within: int) -> bool:
        """Whether this row is still to come, or in memory."""
        return group == self._group and within >= self._first

    def row(self, within: int) -> bytes:
        while within >= self._first + len(self._batch) and not self._damage:
            self._first += len(self._batch)
            self._batch = ()
            try:
                self._batch = next(self._batches)
            except StopIteration:
                self._damage = "it is not there any more; was the file replaced?"
            except OSError as error:
                # What follows damage cannot be found: a batch that failed is not tried again for each row in it.
                self._damage = str(error)
        if self._damage:
            raise OSError(self._damage)
        picture = self._batch[within - self._first].as_py()
        if picture is None:
            raise OSError("it has no bytes (null)")
        assert isinstance(picture, bytes)
        return picture


def batches(path: Path, group: int, column: str) -> Iterator[Any]:
    """The pictures of a row group as binary arrays. Raises OSError for damage."""
    arrow = pyarrow()
    try:
        opened = open_file(path)
        for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False):
            pictures = batch.column(0)
            yield pictures.flatten()[0] if arrow.types.is_struct(pictures.type) else pictures
    except MemoryError:
        raise
    except (arrow.ArrowException, OSError, ValueError, IndexError, KeyError) as error:
        raise OSError(f"cannot be read: {one_line(error)}") from error


def open_file(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. Raises OSError and Arrow's exceptions."""
    pyarrow()
    from pyarrow.parquet import ParquetFile

    # No thread but this one: processes are forked. Not mapped: a file cut short meanwhile would be a SIGBUS.
    return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)


def pyarrow() -> Any:
    """The module. Raises `ConfigError` where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            "parquet is read with pyarrow, which is not installed; `pip install 'lars-train[parquet]'` or pyarrow."
        ) from error
    return pyarrow


def one_line(error: BaseException) -> str:
    """What a library says of an error, fit for a message."""
    return printable(first_line(str(error).strip() or type(error).__name__))
