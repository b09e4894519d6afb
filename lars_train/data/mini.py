"""The embedded set: 12,000 small pictures of clothes from Fashion-MNIST, shipped inside the package.

It needs no download and no path. scripts/make_mini.py says how the file was made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lars_train.data.folder import open_folder
from lars_train.data.source import Dataset, Source

ARCHIVE = Path(__file__).parent / "embedded" / "fashion_mnist_mini.zip"


class MemorySource:
    """Another source's encoded samples, read once and kept in a single array."""

    def __init__(self, source: Source) -> None:
        self.labels = source.labels
        self._source = source
        pieces = [np.frombuffer(source.read(sample), np.uint8) for sample in range(len(source))]
        self._starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        self._bytes = np.concatenate(pieces)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, sample: int) -> str:
        return self._source.name(sample)

    def where(self, sample: int) -> str:
        return self._source.where(sample)

    def read(self, sample: int) -> bytes:
        return self._bytes[self._starts[sample] : self._starts[sample + 1]].tobytes()


def open_mini(holdout: float | None = None) -> Dataset:
    """10,000 training and 2,000 validation images of 10 classes: grayscale PNG, 28 x 28.

    `holdout`: see `open_folder`.
    """
    data = open_folder(str(ARCHIVE), holdout)
    return Dataset(MemorySource(data.train), MemorySource(data.val), data.classes, data.fingerprint)
