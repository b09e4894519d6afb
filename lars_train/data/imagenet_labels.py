"""Reads the tables that label a flat ImageNet validation folder: a CSV, or the devkit's two files.

Each function takes the content of a table and the image names, and gives one wnid per image.
"""

from __future__ import annotations

import csv
import io
import os

from lars_train.data.tree import is_image
from lars_train.errors import ConfigError
from lars_train.text import printable

_SHOWN = 5


def from_csv(place: str, content: bytes, images: list[bytes]) -> list[bytes]:
    """Labels from rows ``image,wnid``; header, suffix and folder of the image are optional.

    What follows the wnid after a blank is passed over: Kaggle's ``LOC_val_solution.csv`` has the bounding
    boxes there (https://www.kaggle.com/c/imagenet-object-localization-challenge/data). Rows for images that
    are not there are fine. Raises `ConfigError` when an image has no row, or two that differ.
    """
    wnids: dict[bytes, bytes] = {}
    text = content.decode("utf-8-sig", "surrogateescape")
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ConfigError(f"data.val_labels: {place} is no table of image and wnid ({error}); give another.") from None
    for row in rows:
        words = row[1].split() if len(row) > 1 else []
        if not words:
            continue
        image, wnid = _stem(os.fsencode(row[0].strip())), os.fsencode(words[0])
        if wnids.setdefault(image, wnid) != wnid:
            raise ConfigError(
                f"data.val_labels: {place} gives {printable(image)} two classes, "
                f"{printable(wnids[image])} and {printable(wnid)}; delete one of the two rows."
            )
    missing = [image for image in images if _stem(image) not in wnids]
    if missing:
        shown = ", ".join(printable(image) for image in missing[:_SHOWN])
        raise ConfigError(
            f"data.val_labels: {place} has no row for {len(missing)} of {len(images)} images, such as "
            f"{shown}; set data.val_labels to the table that belongs to these images (rows of image,wnid)."
        )
    return [wnids[_stem(image)] for image in images]


def from_devkit(place: str, content: bytes, meta: bytes, images: list[bytes]) -> list[bytes]:
    """Labels from ``ILSVRC2012_validation_ground_truth.txt`` and the content of ``meta.mat``.

    Line k of the text is the ILSVRC2012_ID of the k-th image by name; `meta` says which wnid that is
    (readme.txt of the devkit, section 2.2). Raises `ConfigError` when lines and images differ in number.
    """
    lines = content.split()
    if len(lines) != len(images):
        raise ConfigError(
            f"data.val_labels: {place} has {len(lines)} lines, but there are {len(images)} images in val/; "
            "they go together by position, so complete val/, or give a CSV of image and wnid."
        )
    wnids = _wnids(place, meta)
    unknown = sorted({line for line in lines if line not in wnids})
    if unknown:
        raise ConfigError(
            f"data.val_labels: {place} has the ID {printable(unknown[0])}, which meta.mat beside it does not "
            "know; take both files from the same devkit (ILSVRC2012_devkit_t12)."
        )
    return [wnids[line] for line in lines]


def _wnids(place: str, meta: bytes) -> dict[bytes, bytes]:
    """ILSVRC2012_ID, as decimal digits: wnid."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ConfigError(
            f"data.val_labels: the meta.mat beside {place} is read with scipy, which is not installed; "
            "`pip install scipy`, or set data.val_labels to a CSV of image and wnid."
        ) from error
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(s["ILSVRC2012_ID"])).encode(): str(s["WNID"]).encode() for s in synsets}
    # A damaged file shows itself as almost any kind of error.
    except Exception as error:
        raise ConfigError(
            f"data.val_labels: the meta.mat beside {place} is damaged ({error}); unpack the devkit again."
        ) from error


def _stem(image: bytes) -> bytes:
    name = image.rpartition(b"/")[2]
    return name.rpartition(b".")[0] if is_image(name) else name
