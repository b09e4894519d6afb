"""The embedded set, synthetic images, and the sets that are arrays in files: CIFAR-10 and Fashion-MNIST."""

from __future__ import annotations

import contextlib
import io
import shutil
import socket
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Dataset, Source, fingerprint, numbered_name, numbered_name_chunks
from lars_train.data.decode.pillow import whole_image
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.tree import split_holdout
from lars_train.data.splits import TRAIN, VAL
from lars_train.errors import ConfigError
from lars_train.fsutil import cache_folder, user_path

ARCHIVE = Path(__file__).parents[1] / "embedded" / "fashion_mnist_mini.zip"
SIDE = 28
"""Pixels."""


class _Decoded:
    """Another source's gray images of 28 x 28, each decoded on first use and kept: 8 MB in all.

    Decoding them in every epoch would keep one core busy while the others wait.
    """

    def __init__(self, source: Source) -> None:
        self.labels = source.labels
        self._source = source
        self._images = np.empty((len(source), SIDE, SIDE), np.uint8)
        self._there = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, sample: int) -> str:
        return self._source.name(sample)

    def location(self, sample: int) -> str:
        return self._source.location(sample)

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        image: npt.NDArray[np.uint8] = self._images[sample]
        if not self._there[sample]:
            data = self._source.read(sample)
            assert isinstance(data, bytes)
            image[:] = np.asarray(whole_image(data))
            self._there[sample] = True
        return image


def open_mini(holdout: float | None = None) -> Dataset:
    """10,000 training and 2,000 validation images of 10 classes: grayscale PNG, 28 x 28.

    `holdout`: see `open_folder`.
    """
    data = open_folder(str(ARCHIVE), holdout)
    return Dataset(_Decoded(data.train), _Decoded(data.val), data.classes, data.fingerprint)


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
        return numbered_name(self._prefix, sample)

    def location(self, sample: int) -> str:
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
    train = SyntheticSource(TRAIN, train_count, num_classes, image_size, salt=0)
    val = SyntheticSource(VAL, val_count, num_classes, image_size, salt=3 * _STARTS // 4)
    return Dataset(
        train,
        val,
        classes,
        fingerprint(
            classes,
            (numbered_name_chunks(TRAIN, train_count), train.labels),
            (numbered_name_chunks(VAL, val_count), val.labels),
        ),
    )


@lru_cache(maxsize=1)
def _pool(pixels: int) -> npt.NDArray[np.uint8]:
    """Noise to cut images from: made on first use in a process, so never pickled."""
    words = np.random.Philox(key=1).random_raw((_STARTS + pixels) // 8 + 1)
    return words.astype("<u8").view(np.uint8) % _LEVELS


# Seconds without an answer after which a download has failed.
_TIMEOUT = 60.0
# Name: torchvision's class, and how to put the files in place by hand.
_KINDS = {
    "cifar10": (
        "CIFAR10",
        "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in {folder}",
    ),
    "fashion_mnist": (
        "FashionMNIST",
        "unpack the four .gz files of https://github.com/zalandoresearch/fashion-mnist in {folder}/FashionMNIST/raw",
    ),
}


class ArraySource:
    """Decoded samples: `images` uint8 (N, H, W) or (N, H, W, 3), `labels` int32 (N,).

    `numbers`: the samples' places in the data set's own order, which they are named by; all of them by default.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        images: npt.NDArray[np.uint8],
        labels: Any,
        numbers: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.labels = np.asarray(labels, np.int32)
        self._dataset = dataset
        self._split = split
        self._images = np.ascontiguousarray(images)
        self._numbers = np.arange(len(self.labels)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        return numbered_name(self._split, int(self._numbers[sample]))

    def location(self, sample: int) -> str:
        return f"{self._dataset} {self.name(sample)}"

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        image: npt.NDArray[np.uint8] = self._images[sample]
        return image

    def names(self) -> Iterator[bytes]:
        """As `Names.runs`."""
        yield from (f"{self.name(sample)}\0".encode() for sample in range(len(self)))


def open_arrays(name: str, root: str | None, holdout: float | None = None) -> Dataset:
    """The data set `name`, ``cifar10`` or ``fashion_mnist``, downloaded into `root` where it is missing.

    `root` is by default ``$XDG_CACHE_HOME/lars_train/<name>`` (``~/.cache`` where that is not set). With
    `holdout`, that share of each class of the training images is the validation set, and the test images are left
    alone. Raises `ConfigError` when the files are neither there nor to be had.
    """
    from torchvision import datasets

    folder = user_path(root) if root else default_root(name)
    kind, by_hand = _KINDS[name]
    with _alone_in(folder) as writable:
        try:
            with _quietly():
                train, test = (
                    getattr(datasets, kind)(folder, train=split, download=writable) for split in (True, False)
                )
        # A broken file or download shows itself as almost any kind of error.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            if not writable:
                cause += "; the folder cannot be written to"
            raise ConfigError(
                f"data={name}: no usable copy in {folder} ({cause}). Delete what is damaged there, then "
                f"{by_hand.format(folder=folder)}, or set data.root to a folder that has the files."
            ) from error
    classes = tuple(train.classes)
    images, labels = np.asarray(train.data), np.asarray(train.targets)
    if holdout is None:
        training = ArraySource(name, TRAIN, images, labels)
        validation = ArraySource(name, VAL, np.asarray(test.data), test.targets)
    else:
        training, validation = (
            ArraySource(name, TRAIN, images[ranks], labels[ranks], ranks) for ranks in split_holdout(labels, holdout)
        )
    splits = ((source.names(), source.labels) for source in (training, validation))
    return Dataset(training, validation, classes, fingerprint(classes, *splits))


def default_root(name: str) -> Path:
    """The folder of a downloaded data set."""
    return cache_folder() / name


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock. Yields whether the folder can be written to; if not, there is none to hold."""
    from filelock import FileLock

    lock = FileLock(folder / ".lock")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield False
        return
    try:
        yield True
    except ConfigError:
        _remove_if_empty(folder, made)
        raise
    finally:
        lock.release()


def _remove_if_empty(folder: Path, made: list[Path]) -> None:
    """After a failed download: take away the folders that were made for it and hold no file but the lock."""
    if made and not any(path.is_file() and path != folder / ".lock" for path in folder.rglob("*")):
        shutil.rmtree(folder)
        for path in made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars, and no waiting for ever on a network that does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
