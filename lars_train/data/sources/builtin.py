"""Open the embedded data set, synthetic images, and downloaded CIFAR-10 and Fashion-MNIST."""

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
"""Width and height of the images in `ARCHIVE`, in pixels."""


class _Decoded:
    """The 28 x 28 grayscale images of another source, each decoded on first use and kept: 8 MB in total.

    Otherwise, a loader without workers would decode every image again in each epoch, on one core.
    """

    def __init__(self, source: Source) -> None:
        self.labels = source.labels
        self._source = source
        self._images = np.empty((len(source), SIDE, SIDE), np.uint8)
        self._is_decoded = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, sample: int) -> str:
        return self._source.name(sample)

    def location(self, sample: int) -> str:
        return self._source.location(sample)

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        image: npt.NDArray[np.uint8] = self._images[sample]
        if not self._is_decoded[sample]:
            data = self._source.read(sample)
            assert isinstance(data, bytes)
            image[:] = np.asarray(whole_image(data))
            self._is_decoded[sample] = True
        return image


def open_mini(holdout: float | None = None) -> Dataset:
    """Open the embedded set: 10,000 training and 2,000 validation images of 10 classes, grayscale PNG, 28 x 28.

    `holdout`: see `open_folder`.
    """
    data = open_folder(str(ARCHIVE), holdout)
    return Dataset(_Decoded(data.train), _Decoded(data.val), data.classes, data.fingerprint)


# The noise of an image starts at one of this many offsets in the pool.
_OFFSETS = 1 << 21
# Any odd number maps images to offsets one-to-one; this one (2^32 / golden ratio) puts consecutive images far apart.
_STRIDE = 0x9E3779B1
# Noise and color are each below this, so that their sum fits in a byte.
_LEVELS = 128


class SyntheticSource:
    """`count` images of `size` x `size` pixels. Image i has label i mod `num_classes` and depends only on i and `salt`.

    `salt`: a different number for each split, so that their images differ.
    """

    def __init__(self, prefix: str, count: int, num_classes: int, size: int, salt: int) -> None:
        self.labels = (np.arange(count) % num_classes).astype(np.int32)
        self._prefix = prefix
        self._size = size
        self._salt = salt
        self._colors = class_colors(num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        """Return the split and the sample id: ``train/00000003``."""
        return numbered_name(self._prefix, sample)

    def location(self, sample: int) -> str:
        """Return the name for messages: ``synthetic train/00000003``."""
        return f"synthetic {self.name(sample)}"

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        """Return the pixels: uint8 (size, size, 3)."""
        pixels = self._size * self._size * 3
        start = (sample + self._salt) * _STRIDE % _OFFSETS
        noise = _noise_pool(pixels)[start : start + pixels].reshape(self._size, self._size, 3)
        image: npt.NDArray[np.uint8] = noise + self._colors[self.labels[sample]]
        return image


def class_colors(num_classes: int) -> npt.NDArray[np.uint8]:
    """Return a different color for each class, uint8 (num_classes, 3): points of a grid in the color cube."""
    side = 1
    while side**3 < num_classes:
        side += 1
    digits = np.arange(num_classes)[:, None] // np.array([1, side, side * side]) % side
    return np.asarray(digits * (_LEVELS - 1) // max(side - 1, 1), np.uint8)


def open_synthetic(train_count: int, val_count: int, num_classes: int, image_size: int) -> Dataset:
    """Open two splits of synthetic images. The time to read an image does not depend on the counts."""
    width = len(str(num_classes - 1))
    classes = tuple(f"class-{label:0{width}d}" for label in range(num_classes))
    train = SyntheticSource(TRAIN, train_count, num_classes, image_size, salt=0)
    val = SyntheticSource(VAL, val_count, num_classes, image_size, salt=3 * _OFFSETS // 4)
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
def _noise_pool(pixels: int) -> npt.NDArray[np.uint8]:
    """Return the noise from which images are cut. Each process computes it on first use, so it is never pickled."""
    words = np.random.Philox(key=1).random_raw((_OFFSETS + pixels) // 8 + 1)
    return words.astype("<u8").view(np.uint8) % _LEVELS


# Seconds without a response after which a download fails.
_TIMEOUT_S = 60.0
# For each name: torchvision's class, and how to install the files manually.
_DOWNLOADS = {
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
    """Decoded samples: `images`, uint8 (N, H, W) or (N, H, W, 3), and `labels`, int32 (N,).

    `numbers`: the positions of the samples in the data set, which become their names; 0 to N - 1 by default.
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
        """Return the split and the position in the data set: ``val/00000003``."""
        return numbered_name(self._split, int(self._numbers[sample]))

    def location(self, sample: int) -> str:
        """Return the name for messages: ``cifar10 val/00000003``."""
        return f"{self._dataset} {self.name(sample)}"

    def read(self, sample: int) -> npt.NDArray[np.uint8]:
        """Return the pixels: uint8 (H, W) or (H, W, 3)."""
        image: npt.NDArray[np.uint8] = self._images[sample]
        return image

    def name_chunks(self) -> Iterator[bytes]:
        """Yield all names, as `Names.chunks` does."""
        yield from (f"{self.name(sample)}\0".encode() for sample in range(len(self)))


def open_arrays(name: str, root: str | None, holdout: float | None = None) -> Dataset:
    """Open the data set `name`, ``cifar10`` or ``fashion_mnist``, after downloading it into `root` if it is missing.

    `root` is ``$XDG_CACHE_HOME/lars_train/<name>`` by default (``~/.cache/lars_train/<name>`` without that variable).
    With `holdout`, that share of each training class becomes the validation set, and the test images are not used.
    Raises `ConfigError` if the files are missing and cannot be downloaded.
    """
    from torchvision import datasets

    folder = user_path(root) if root else default_root(name)
    kind, by_hand = _DOWNLOADS[name]
    with _locked_folder(folder) as writable:
        try:
            with _silent_download():
                train, test = (
                    getattr(datasets, kind)(folder, train=split, download=writable) for split in (True, False)
                )
        # A damaged file or download can raise almost any exception.
        except Exception as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            if not writable:
                cause += "; the folder is not writable"
            raise ConfigError(
                f"data={name}: no usable copy in {folder} ({cause}). Delete damaged files there, then "
                f"{by_hand.format(folder=folder)}, or set data.root to a folder that has the files."
            ) from error
    classes = tuple(train.classes)
    images, labels = np.asarray(train.data), np.asarray(train.targets)
    if holdout is None:
        training = ArraySource(name, TRAIN, images, labels)
        validation = ArraySource(name, VAL, np.asarray(test.data), test.targets)
    else:
        training, validation = (
            ArraySource(name, TRAIN, images[rows], labels[rows], rows) for rows in split_holdout(labels, holdout)
        )
    splits = ((source.name_chunks(), source.labels) for source in (training, validation))
    return Dataset(training, validation, classes, fingerprint(classes, *splits))


def default_root(name: str) -> Path:
    """Return the default folder of a downloaded data set."""
    return cache_folder() / name


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder` and yield True; yield False without a lock if the folder is not writable."""
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
    """Remove the folders `made` for a failed download, unless they hold files other than the lock."""
    if made and not any(path.is_file() and path != folder / ".lock" for path in folder.rglob("*")):
        shutil.rmtree(folder)
        for path in made[1:]:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _silent_download() -> Iterator[None]:
    """Suppress progress bars, and set a timeout for a network that does not respond."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
