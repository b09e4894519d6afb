"""Made-up images, as many as asked for and none of them stored: for rehearsals and measurements.

The classes can be learnt (each has a colour), but nothing about real pictures can be concluded from them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lars_train.data.source import Dataset, fingerprint, numbered, numbered_runs

# The noise under an image begins at one of this many places of the pool.
_STARTS = 1 << 21
# Any odd number makes image to place one-to-one; this one (2^32 / golden ratio) puts neighbours far apart.
_STRIDE = 0x9E3779B1
# Noise and colour stay below this each, so that their sum fits a byte.
_LEVELS = 128


class SyntheticSource:
    """`count` images of `size` x `size`; image i has label i mod `num_classes` and depends on i alone.

    `salt` tells splits apart: the same id under another salt is another image.
    """

    def __init__(self, prefix: str, count: int, num_classes: int, size: int, salt: int) -> None:
        self.labels = (np.arange(count) % num_classes).astype(np.int32)
        self._prefix = prefix
        self._size = size
        self._salt = salt
        self._colours = class_colours(num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        return numbered(self._prefix, sample)

    def where(self, sample: int) -> str:
        return f"synthetic {self.name(sample)}"

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        pixels = self._size * self._size * 3
        start = (sample + self._salt) * _STRIDE % _STARTS
        noise = _pool(pixels)[start : start + pixels].reshape(self._size, self._size, 3)
        image: npt.NDArray[np.uint8] = noise + self._colours[self.labels[sample]]
        return image


def class_colours(num_classes: int) -> npt.NDArray[np.uint8]:
    """One colour per class, uint8 (num_classes, 3), all different: the points of a grid over the cube."""
    side = 1
    while side**3 < num_classes:
        side += 1
    digits = np.arange(num_classes)[:, None] // np.array([1, side, side * side]) % side
    return np.asarray(digits * (_LEVELS - 1) // max(side - 1, 1), np.uint8)


def open_synthetic(train_count: int, val_count: int, num_classes: int, image_size: int) -> Dataset:
    """Two splits of made-up images; opening and every image cost the same, however many there are."""
    width = len(str(num_classes - 1))
    classes = tuple(f"class-{label:0{width}d}" for label in range(num_classes))
    train = SyntheticSource("train", train_count, num_classes, image_size, salt=0)
    val = SyntheticSource("val", val_count, num_classes, image_size, salt=3 * _STARTS // 4)
    return Dataset(
        train,
        val,
        classes,
        fingerprint(
            classes,
            (numbered_runs("train", train_count), train.labels),
            (numbered_runs("val", val_count), val.labels),
        ),
    )


@lru_cache(maxsize=1)
def _pool(pixels: int) -> npt.NDArray[np.uint8]:
    """Noise to cut images from: made on first use in a process, so never pickled."""
    words = np.random.Philox(key=1).random_raw((_STARTS + pixels) // 8 + 1)
    return words.astype("<u8").view(np.uint8) % _LEVELS
