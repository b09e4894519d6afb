"""Read map-style datasets: objects of torch.utils.data, torchvision, Hugging Face or the user, with a length and items.

An item is an image and a label. The code of such a dataset may hold the interpreter lock and need not be thread-safe,
so processes read it, never threads.
"""

from __future__ import annotations

import hashlib
import operator
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from lars_train.data.dataset import Dataset, Labels, check_classes, fingerprint, numbered_name
from lars_train.data.decode.pillow import BadImage, pixels_of
from lars_train.data.inventory import Inventory
from lars_train.data.splits import SPLITS
from lars_train.errors import ConfigError
from lars_train.messages import counted, first_line, printable, say
from lars_train.signals import handle_termination

CHECKED = 64
"""Samples of each split that are read twice before a run, and whose hashes are part of the data set's identity."""
# A larger label is a mistake, such as a mark for "no class". Each class takes memory for its name.
_MOST_CLASSES = 1_000_000
_UNTRANSFORMED = (
    "Pass the dataset without a transform (transform=None): lars-train converts, augments and normalizes images itself "
    "(data.image_size, data.augment, data.flip, data.mean, data.std, augment.auto)"
)


class ItemSource:
    """Samples of the dataset `items`. `columns`: the names of image and label in its items; None if they are pairs."""

    def __init__(self, items: Any, split: str, labels: Labels, columns: tuple[str, str] | None = None) -> None:
        self.labels = labels
        self._items, self._split, self._columns = items, split, columns

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample: int) -> str:
        """Return the split and the index: ``train/00000003``."""
        return numbered_name(self._split, sample)

    def location(self, sample: int) -> str:
        """Return the name for messages: ``train[3] of CIFAR10``."""
        return f"{self._split}[{sample}] of {_kind(self._items)}"

    def read(self, sample: int) -> bytes | npt.NDArray[np.uint8]:
        """Return the encoded image, or its pixels: uint8 (H, W) or (H, W, 3).

        Raises BadImage if reading the item fails, if it is not an image, or if its label differs from `labels`.
        """
        try:
            image, label = self.item(sample)
        except ConfigError as error:
            raise BadImage(str(error)) from None
        if label != self.labels[sample]:
            raise BadImage(
                f"its label is {label}, but the list of labels or an earlier read gives {self.labels[sample]}"
            )
        return image

    def item(self, sample: int) -> tuple[bytes | npt.NDArray[np.uint8], int]:
        """Return image and label of a sample. Raises BadImage, and `ConfigError` for an invalid label."""
        try:
            item = self._items[sample]
        except MemoryError:
            raise
        except Exception as error:  # the dataset's code may raise anything
            raise BadImage(_described(error)) from error
        if self._columns is not None and isinstance(item, Mapping):
            item = tuple(item.get(column) for column in self._columns)
        if not isinstance(item, tuple | list) or len(item) != 2:
            found = f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, tuple | list) else ''}"
            raise ConfigError(f"{self.location(sample)}: the item is a {found}. Return the pair (image, label).")
        return _image(item[0]), self._label(item[1], sample)

    def _label(self, value: Any, sample: int) -> int:
        try:
            label = operator.index(value)
        except TypeError:
            label = -1
        if not 0 <= label < 2**31:
            raise ConfigError(
                f"{self.location(sample)}: the label is {first_line(repr(value))}. A label is the index of a class: a "
                "whole number from 0, and below 2**31."
            )
        return label


def _image(image: Any) -> bytes | npt.NDArray[np.uint8]:
    """Return the encoded image or the pixels of an item's image. Raises BadImage."""
    if isinstance(image, Mapping):  # a column of Hugging Face that is not decoded
        image = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else None)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image):
        try:
            return pixels_of(image)
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # plugins of Pillow raise almost anything
            raise BadImage(_described(error)) from error
    if isinstance(image, torch.Tensor):
        if image.device.type != "cpu":
            raise BadImage(f"a tensor on {image.device}; keep the images in host memory")
        shape = "(channels, height, width)"
    elif isinstance(image, np.ndarray):
        shape = "(height, width, channels)"
    else:
        raise BadImage(
            f"the image is of type {type(image).__name__}; return a uint8 tensor or array, a PIL image, or the bytes "
            "of an image file"
        )
    if image.dtype not in (torch.uint8, np.uint8):
        raise BadImage(f"the image is a {type(image).__name__} of {image.dtype}, not of uint8")
    pixels = np.asarray(image)
    pixels = pixels.transpose(1, 2, 0) if isinstance(image, torch.Tensor) and pixels.ndim == 3 else pixels
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
        raise BadImage(
            f"the image is a {type(image).__name__} of the shape {tuple(image.shape)}; the shape must be "
            f"{shape} with 1 or 3 channels, or (height, width)"
        )
    return pixels[..., 0] if pixels.shape[2:] == (1,) else pixels


def open_items(train: Any, val: Any, place: str) -> Dataset:
    """Open two dataset objects as training and validation set. `place`: begins messages, such as ``data``.

    The labels come from the attribute ``targets`` or ``labels`` or a column of Hugging Face if the items agree with it,
    otherwise from reading all items. The class names are those of ``classes`` or of the column, otherwise numbers.

    Raises `ConfigError` for objects that are not datasets of images with labels, and if two reads of a sample differ.
    """
    try:
        splits = [_open_split(items, split) for items, split in zip((train, val), SPLITS, strict=True)]
        names = [_class_names(items) for items in (train, val)]
        known = names[0] or names[1]
        if None not in names and names[0] != names[1]:
            few = [", ".join(each[:3]) for each in names if each]
            raise ConfigError(
                f"the classes of the training set ({few[0]}, ...) are not those of the validation set ({few[1]}, ...). "
                "Give both the same classes in the same order."
            )
        source, sample = max(((s, int(s.labels.argmax())) for s, _ in splits), key=lambda at: at[0].labels[at[1]])
        count = int(source.labels[sample]) + 1
        if known is None and count > _MOST_CLASSES:
            raise ConfigError(
                f"{source.location(sample)}: the label is {count - 1}. A label is the index of a class. If it marks "
                "samples without a class, leave them out."
            )
        classes = known or tuple(map(str, range(count)))
        notes = () if known else _missing_classes([source.labels for source, _ in splits], count)
        if count > len(classes):
            raise ConfigError(f"there is a label {count - 1}, but only {counted(len(classes), 'class', 'classes')}.")
        check_classes("the labels", classes)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    (training, train_hashes), (validation, val_hashes) = splits
    return Dataset(
        training,
        validation,
        classes,
        fingerprint(classes, ([train_hashes], training.labels), ([val_hashes], validation.labels)),
        inventory=Inventory(label_notes=notes if sys.platform == "linux" else (*notes, _NO_WORKERS)),
    )


def _missing_classes(labels: Sequence[Labels], count: int) -> tuple[str, ...]:
    """Return a note if some of `count` classes have no samples."""
    found = len(np.unique(np.concatenate(labels)))
    return () if found == count else (f"the labels go up to {count - 1:,}, but only {found:,} of them have samples",)


_NO_WORKERS = "dataset objects are read without workers (data.workers=0), because this system has no safe fork"


def _open_split(items: Any, split: str) -> tuple[ItemSource, bytes]:
    """Return the source of a split, and the hashes of samples of it."""
    if isinstance(items, IterableDataset) or not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        instead = "Pass its dataset" if hasattr(items, "dataset") else "Give it __len__ and __getitem__"
        raise ConfigError(
            f"{split} is of type {_kind(items)}, which has no items in a fixed order. {instead}: a run reads samples "
            "by their index, in its own order."
        )
    if not len(items):
        raise ConfigError(f"{split} ({_kind(items)}) is empty.")
    columns, labels = _columns(items), _listed_labels(items)
    if labels is None or len(labels) != len(items):
        labels = np.full(len(items), -1, np.int32)
    source = ItemSource(items, split, labels, columns)
    checked = _in_fork(_check_samples, source)
    if not checked.agree:
        say(f"data           reading all {counted(len(items), 'item')} of {split} ({_kind(items)}) for their labels")
        source = ItemSource(items, split, _in_fork(_read_labels, source), columns)
    negative = np.flatnonzero(source.labels < 0)
    if len(negative):
        sample = int(negative[0])
        raise ConfigError(f"{source.location(sample)}: the label is {source.labels[sample]}. Labels count from 0.")
    return source, checked.hashes


class _Checked(NamedTuple):
    """Hashes of some samples, and True if their labels are those of the source."""

    hashes: bytes
    agree: bool


def _check_samples(source: ItemSource) -> _Checked:
    """Read `CHECKED` samples of a split twice. Raises `ConfigError` if a sample differs, or if none can be read."""
    samples = np.unique(np.linspace(0, len(source) - 1, CHECKED).round().astype(int)).tolist()
    first, second = ([_digest(source, sample) for sample in samples] for _ in range(2))
    if not any(label is not None for _, label in first):
        remedy = f". {_UNTRANSFORMED}" if _transform(source._items) else ""
        raise ConfigError(f"{source.location(0)}: {first[0][0].rstrip('.')}{_transform(source._items)}{remedy}.")
    for sample, one, other in zip(samples, first, second, strict=True):
        if one != other and None not in (one[1], other[1]):
            raise ConfigError(
                f"{source.location(sample)}: two reads of this sample differ{_transform(source._items)}. Leave "
                f"random transforms to lars-train, which can repeat them after a restart. {_UNTRANSFORMED}."
            )
    agree = all(label in (None, source.labels[sample]) for sample, (_, label) in zip(samples, first, strict=True))
    return _Checked("".join(text if label is not None else "bad" for text, label in first).encode(), agree)


def _digest(source: ItemSource, sample: int) -> tuple[str, int | None]:
    """Return the SHA-256 of an image, and its label; for a bad image, the reason and None."""
    try:
        image, label = source.item(sample)
    except BadImage as error:
        return str(error), None
    shape = image.shape if isinstance(image, np.ndarray) else ()
    content = np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image
    return hashlib.sha256(repr(shape).encode() + bytes(content)).hexdigest(), label


def _read_labels(source: ItemSource) -> Labels:
    """Return the label of every sample; 0 for a bad one, which a run replaces or counts as wrong."""
    labels = np.zeros(len(source), np.int32)
    for sample in range(len(source)):
        try:
            labels[sample] = source.item(sample)[1]
        except BadImage:
            continue
    return labels


def _listed_labels(items: Any) -> Labels | None:
    """Return the labels that a dataset lists, int32 (N,), or None."""
    if isinstance(items, Subset):
        inner = _listed_labels(items.dataset)
        return None if inner is None else inner[np.asarray(items.indices, np.int64)]
    if isinstance(items, ConcatDataset):
        parts = [_listed_labels(part) for part in items.datasets]
        return None if any(part is None for part in parts) else np.concatenate([p for p in parts if p is not None])
    columns = _columns(items)
    found = getattr(items, "targets", getattr(items, "labels", None)) if columns is None else items[columns[1]][:]
    try:
        labels = np.asarray(found)
    except (TypeError, ValueError):
        return None
    return labels.astype(np.int32) if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else None


def _class_names(items: Any) -> tuple[str, ...] | None:
    """Return the class names of a dataset, or None. Raises `ConfigError` if the parts of it have different ones."""
    if isinstance(items, Subset):
        return _class_names(items.dataset)
    if isinstance(items, ConcatDataset):
        names = {_class_names(part) for part in items.datasets}
        if len(names) > 1:
            raise ConfigError("the parts of a ConcatDataset have different classes. Give them the same classes.")
        return names.pop()
    columns = _columns(items)
    found = getattr(items, "classes", None) if columns is None else getattr(items.features[columns[1]], "names", None)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        return None
    # torchvision's ImageNet has a tuple of synonyms for each class.
    return tuple(each if isinstance(each, str) else ", ".join(map(str, each)) for each in found)


def _columns(items: Any) -> tuple[str, str] | None:
    """Return the names of the image and label columns of a dataset of Hugging Face; None for other datasets."""
    if isinstance(items, Subset):
        return _columns(items.dataset)
    if isinstance(items, ConcatDataset):
        return _columns(items.datasets[0])
    features = getattr(items, "features", None)
    if not isinstance(features, Mapping):
        return None
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    labels = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    labels = labels or [name for name in ("label", "labels") if "int" in getattr(features.get(name), "dtype", "")]
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"of the columns {', '.join(features)}, {len(images)} hold images and {len(labels)} hold labels "
            f"({', '.join(images + labels) or 'none'}); keep one of each (remove_columns)."
        )
    return images[0], labels[0]


def _transform(items: Any) -> str:
    """Return ``, with the transform ...`` if a dataset has a transform, else an empty string."""
    while isinstance(items, Subset):
        items = items.dataset
    found = getattr(items, "transform", None) or getattr(items, "transforms", None)
    return "" if found is None else f", with the transform {printable(' '.join(str(found).split()))}"


def _kind(items: Any) -> str:
    """Return the name of a dataset's class, for messages: ``CIFAR10``, ``Subset of CIFAR10``."""
    name = type(items).__name__
    return f"{name} of {_kind(items.dataset)}" if isinstance(items, Subset) else name


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _in_fork(work: Callable[[ItemSource], Any], source: ItemSource) -> Any:
    """Return ``work(source)``, called in a fork of this process (on Linux).

    The dataset may open a file on its first read. Because a fork reads, the file stays closed in this process.
    Otherwise the loader's workers, which are forks too, would share its position.
    """
    if sys.platform != "linux":
        return work(source)
    read, write = os.pipe()
    with warnings.catch_warnings():
        # The fork uses none of this process's threads.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _answer(work, source, write)
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise ConfigError(f"{_kind(source._items)}: the process that read it died; see the messages above.")
    found = pickle.loads(answer)
    if isinstance(found, Exception):
        raise found
    return found


def _answer(work: Callable[[ItemSource], Any], source: ItemSource, write: int) -> None:
    """Send the result or the error of `work`, and end this process."""
    try:
        handle_termination(signal.SIG_IGN)
        torch.set_num_threads(1)  # torch's threads do not exist after a fork
        try:
            found = work(source)
        except ConfigError as error:
            found = error
        except BaseException:
            found = RuntimeError(f"reading {_kind(source._items)} failed:\n{traceback.format_exc()}")
        with os.fdopen(write, "wb") as pipe:
            pipe.write(pickle.dumps(found))
    finally:
        os._exit(0)
