"""JPEGs by nvImageCodec on the CPU, where it is installed: whether it is there, and one view of one JPEG by it.

https://docs.nvidia.com/cuda/nvimagecodec is an optional package that pip alone installs: no compiler and no GPU is
needed. It decodes the part of a picture that a view needs, by libjpeg-turbo, and lets other threads run meanwhile;
numba, which pip alone installs too, does the rest (fixed_point.py). As native.py it is never needed and judges no file:
what it does not decode is Pillow's.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lars_train.data.augment import Geometry
from lars_train.data.jpeg_file import Frame, frame_of, is_whole
from lars_train.data.window import window

REMEDY = (
    "pip install 'lars-train[decode]', or nvidia-nvimgcodec-cu13 (0.9 or newer) and numba: no compiler is needed. "
    "NUMBA_DISABLE_JIT must not be set."
)
"""What to do where `is_there` says no, in one line."""

Box = tuple[int, int, int, int]

_BESIDE = 16

_own = threading.local()
_not_ours: list[Any] = []


@functools.cache
def nvimgcodec() -> Any:
    """The package; None where it is not installed or cannot be loaded."""
    # It reports each picture that it cannot decode, all of which Pillow is asked about.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        with _stderr_closed():
            from nvidia import nvimgcodec as package
    except (ImportError, OSError):
        return None
    return package


@functools.cache
def is_there() -> bool:
    """Whether this process can decode with it."""
    if nvimgcodec() is None:
        return False
    try:
        return _decodes()
    except Exception:  # a version with another interface, or one that does not run on this machine
        return False


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG of a kind that may be decoded here, by its header alone; None for all else."""
    frame = _frame_of(data)
    return None if frame is None else (frame.width, frame.height)


def decode(data: bytes, size: tuple[int, int], view: Geometry, out: npt.NDArray[np.uint8]) -> bool:
    """Write the view of the JPEG in `data`, whose `size_of` is given, to `out`; whether that could be done.

    `out`: uint8 (S, S, 3), contiguous, RGB; it may hold anything where it could not.
    """
    frame = _frame_of(data)
    if frame is None or (frame.width, frame.height) != size or not is_whole(data, frame):
        return False
    wanted = needed(view, len(out))
    if wanted is None:
        return False
    left, top, right, bottom = wanted
    # libjpeg-turbo passes over rows in pairs; single ones have been wrong in some versions. So is the chroma of what is
    # a few columns wide.
    beside = _BESIDE if right - left < _BESIDE else 0
    begin, end = max(left - beside, 0), min(right + beside, frame.width)
    pixels = _region(data, (begin, top - top % 2, end, bottom))
    if pixels is None:
        return False
    x0, y0, x1, y1 = view.box
    if view.size == (x1 - x0, y1 - y0):
        shift = (view.crop[0] + x0 - left, view.crop[1] + y0 - top)
        shown = pixels[top % 2 :, left - begin : right - begin]
        window(shown, Geometry(view.box, view.size, view.pad, shift, view.flip), out)
        return True
    from lars_train.data import fixed_point

    return fixed_point.show(pixels, (begin, top - top % 2), view, out)


def needed(view: Geometry, side: int) -> Box | None:
    """The source pixels that have a share in the window of a view: left, top, right, bottom; None if there are none."""
    spans = []
    for axis in (0, 1):
        low, high, to = view.box[axis], view.box[axis + 2], view.size[axis]
        at = view.crop[axis] - view.pad
        start, stop = max(at, 0), min(at + side, to)
        if start >= stop:
            return None
        if to != high - low:
            scale = (high - low) / to
            reach = max(scale, 1.0)
            start, stop = floor((start + 0.5) * scale - reach), floor((stop - 0.5) * scale + reach) + 1
        spans.append((low + max(start, 0), min(low + stop, high)))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _frame_of(data: bytes) -> Frame | None:
    """`frame_of`, once for a file whose size is asked for before it is decoded."""
    if getattr(_own, "data", None) is not data:
        _own.frame, _own.data = frame_of(data), data
    found: Frame | None = _own.frame
    return found


def _region(data: bytes, box: Box) -> npt.NDArray[np.uint8] | None:
    """The pixels in a box of a JPEG, uint8 (H, W, 3), contiguous; None where it cannot be decoded."""
    package = nvimgcodec()
    left, top, right, bottom = box
    try:
        stream = package.CodeStream(data).get_sub_code_stream(region=package.Region(top, left, bottom, right))
        image = _decoder().decode(stream, params=parameters())
    except RuntimeError:
        return None
    if image is None or tuple(image.shape) != (bottom - top, right - left, 3):
        return None
    return np.asarray(image)


@functools.cache
def parameters() -> Any:
    """For decoding as Pillow does: RGB, and not turned by EXIF."""
    package = nvimgcodec()
    return package.DecodeParams(apply_exif_orientation=False, color_spec=package.ColorSpec.SRGB)


OPTIONS = ":fancy_upsampling=1 :fast_idct=0"
"""As libjpeg decodes by default."""


def _decoder() -> Any:
    """One for each thread of each process."""
    process = os.getpid()
    if getattr(_own, "process", None) != process:
        if hasattr(_own, "decoder"):
            # Of the process that this one was forked from; ending it would wait for threads that are not here.
            _not_ours.append(_own.decoder)
        package = nvimgcodec()
        _own.decoder = package.Decoder(
            device_id=package.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[package.Backend(package.CPU_ONLY)],
            options=OPTIONS,
        )
        _own.process = process
    return _own.decoder


def _decodes() -> bool:
    file, size = io.BytesIO(), (16, 24)
    Image.new("RGB", size, (200, 100, 50)).save(file, "JPEG")
    out = np.zeros((8, 8, 3), np.uint8)
    view = Geometry((3, 4, 13, 16), (8, 8), 0, (0, 0), False)
    return decode(file.getvalue(), size, view, out) and bool((out == np.asarray(Image.open(file))[:8, :8]).all())


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """For a package that tells there of parts which are not installed, and which nobody here needs."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
