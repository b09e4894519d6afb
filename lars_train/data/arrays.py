"""CIFAR-10 and Fashion-MNIST through torchvision's own downloaders, as arrays in memory.

Only one process at a time downloads into a folder; the others wait and then find the files.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.data.directory import user_path
from lars_train.data.listing import held_out
from lars_train.data.source import Dataset, fingerprint, numbered
from lars_train.errors import ConfigError

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
        return numbered(self._split, int(self._numbers[sample]))

    def where(self, sample: int) -> str:
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
        training = ArraySource(name, "train", images, labels)
        validation = ArraySource(name, "val", np.asarray(test.data), test.targets)
    else:
        out = np.zeros(len(labels), bool)
        for label in range(len(classes)):
            of_class = np.flatnonzero(labels == label)
            out[of_class] = held_out(len(of_class), holdout)
        training, validation = (
            ArraySource(name, "train", images[chosen], labels[chosen], chosen)
            for chosen in (np.flatnonzero(~out), np.flatnonzero(out))
        )
    splits = ((source.names(), source.labels) for source in (training, validation))
    return Dataset(training, validation, classes, fingerprint(classes, *splits))


def default_root(name: str) -> Path:
    """Where a downloaded data set is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lars_train" / name


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
