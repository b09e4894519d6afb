"""Decode views of JPEGs with the C decoder (jpeg.c), if it was built.

The C decoder is several times as fast as pillow.py, produces the same pixels to within 1 level, and releases the GIL.
It is optional, and never the reason to reject a file: Pillow tries every file that the C decoder cannot decode.
"""

from __future__ import annotations

import ctypes
import functools
import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from lars_train.data.dataset import Source
from lars_train.data.transforms import Geometry
from lars_train.extensions import load_extension

if TYPE_CHECKING:
    from lars_train.data.decode import jpeg
else:
    # None if a compiler or libjpeg was missing at installation, or libjpeg has been removed since.
    jpeg = load_extension("lars_train.data.decode.jpeg")

# `has_jpegs` checks about this many names.
_CHECKED_NAMES = 100

REMEDY = (
    "Install a Linux wheel of lars-train, which contains the decoder. Or install a C compiler and libjpeg-turbo 2.1 or "
    "newer with its headers (Debian, Ubuntu: apt-get install gcc libjpeg-dev; Fedora, RHEL: dnf install gcc "
    "libjpeg-turbo-devel), then reinstall lars-train from the same path or index: pip install --force-reinstall "
    "--no-deps --no-cache-dir lars-train (or its path)."
)
"""The remedy if `is_available` returns False, in one line."""


@functools.cache
def is_available() -> bool:
    """Return True if this process can use the decoder: it was built, and works with the libjpeg found at run time."""
    return jpeg is not None and _decodes()


def _decodes() -> bool:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 50)).save(file, "JPEG")
    out = np.zeros((8, 8, 3), np.uint8)
    whole = Geometry((0, 0, 8, 8), (8, 8), 0, (0, 0), False)
    return decode_jpeg(file.getvalue(), (8, 8), whole, out) and np.array_equal(out, np.asarray(Image.open(file)))


def has_jpegs(split: Source) -> bool:
    """Return True if any of about 100 evenly spaced names in a split has the suffix of a JPEG."""
    step = max(1, len(split) // _CHECKED_NAMES)
    return any(split.name(i).lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")) for i in range(0, len(split), step))


def size_of(data: bytes) -> tuple[int, int] | None:
    """Return width and height from the header of a JPEG that this decoder may decode; None for anything else."""
    return jpeg.size(data, len(data)) if jpeg is not None else None


def decode_jpeg(data: bytes, size: tuple[int, int], view: Geometry, out: npt.NDArray[np.uint8]) -> bool:
    """Decode the view of the JPEG in `data` to `out`, and return True on success. `size`: the result of `size_of`.

    `out`: uint8 (S, S, 3), contiguous, RGB; zeros after a failure. Decoding fails for a file that libjpeg warns about,
    that is truncated, or that is not 8-bit gray, YCbCr or RGB.
    """
    if not (out.flags.c_contiguous and out.flags.writeable and out.dtype == np.uint8 and out.ndim == 3):
        raise ValueError("out must be contiguous, writeable uint8 (S, S, 3)")
    side = out.shape[0]
    if out.shape != (side, side, 3):
        raise ValueError(f"out has the shape {out.shape}, not (S, S, 3)")
    x, y = view.crop[0] - view.pad, view.crop[1] - view.pad
    # Three times as fast as `out.ctypes.data`. mypy accepts an array as a buffer only from Python 3.12 on.
    address = ctypes.addressof(ctypes.c_char.from_buffer(out))  # type: ignore[arg-type]
    return jpeg.decode(data, len(data), address, *size, *view.box, *view.size, x, y, view.flip, side) == 0
