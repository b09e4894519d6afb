"""From the bytes of one picture to the pixels of one view. Nothing is drawn here.

Pillow decodes and resizes; JPEGs may go to native.py or library.py first, one at a time, or to gpu.py, several at once.
On the CPU all give the same pixels but for one level here and there. Pictures are taken as torchvision's image folder
takes them: decoded in full, not turned by EXIF, an alpha channel dropped. Reading the bytes is the source's business,
and choosing the view is augment.py's.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lars_train.data import library, native
from lars_train.data.augment import Geometry
from lars_train.data.window import window

PILLOW, NATIVE, LIBRARY, GPU = "pillow", "native", "library", "gpu"
"""The decoders of JPEGs."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The picture formats that are read, by Pillow's names."""

MAX_PIXELS = 2**30 // 12
"""The largest picture in pixels, before and after resizing: Pillow's default for suspecting a bomb."""

MAX_SCANS = 500
"""The most scans of a JPEG: each goes over the whole picture, and takes but a few bytes to ask for."""


# As an entry of warnings.filters. What is suspected to be a bomb is refused below.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class _Fast(Protocol):
    """A module that decodes JPEGs one at a time, as far as it can."""

    def size_of(self, data: bytes) -> tuple[int, int] | None: ...
    def decode(self, data: bytes, size: tuple[int, int], view: Geometry, out: npt.NDArray[np.uint8]) -> bool: ...


_FAST: dict[str, _Fast] = {NATIVE: native, LIBRARY: library}


class BadImage(Exception):
    """The bytes of one sample cannot be decoded; str(e) is the reason, in one line."""


def decode(
    item: bytes | npt.NDArray[np.uint8],
    geometry: Callable[[int, int], Geometry],
    size: int,
    *,
    decoder: str = PILLOW,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The view of one picture: uint8 (size, size, 3), RGB, written to `out` where that is given (contiguous).

    As `decode_into`, which it calls.
    """
    if out is None:
        out = np.empty((size, size, 3), dtype=np.uint8)
    decode_into(out, item, geometry, decoder=decoder)
    return out


def decode_into(
    out: npt.NDArray[np.uint8],
    item: bytes | npt.NDArray[np.uint8],
    geometry: Callable[[int, int], Geometry],
    *,
    decoder: str = PILLOW,
) -> bool:
    """Write the view of one picture to `out`, uint8 (S, S, 3), RGB, contiguous; whether `decoder` did, not Pillow.

    `item` is an encoded picture or decoded uint8 pixels, (H, W) or (H, W, 3). `geometry` is called with
    its width and height in pixels, and must always give the same for the same. Resizing is Pillow's antialiased
    bilinear, on 8-bit channels. `decoder`: NATIVE or LIBRARY, which must be there, for JPEGs as far as it can; with
    another all is Pillow's.

    Raises BadImage where no whole picture can be had from the bytes; `out` may hold anything then. Whether there is one
    is for Pillow to say: it has all files that the others refuse. Of a JPEG that they do not refuse, the rows below the
    view may not be decoded; damage there that leaves the file's structure whole goes unnoticed, as it is by Pillow in
    most cases.
    """
    fast = _FAST.get(decoder)
    if fast is not None and isinstance(item, bytes):
        found = fast.size_of(item)
        if found is not None and found[0] * found[1] <= MAX_PIXELS:
            view = geometry(*found)
            _check_size(found, view)
            if fast.decode(item, found, view, out):
                return True
    picture = item if isinstance(item, np.ndarray) else _picture(item)
    if isinstance(picture, np.ndarray):
        height, width = picture.shape[:2]
    else:
        width, height = picture.size
    view = geometry(width, height)
    whole = (0, 0, width, height)
    if view.box != whole or view.size != (width, height):
        _check_size((width, height), view)
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if view.box != whole:
            picture = picture.crop(view.box)
        picture = picture.resize(view.size, Image.Resampling.BILINEAR)
    window(np.asarray(picture), view, out)
    return False


def _silence() -> None:
    """Have this process ignore Pillow's warnings: of bombs, and of damaged EXIF data, which no pixel suffers from.

    For the decoding alone it could not be done: `warnings.catch_warnings` is not for several threads.
    """
    if list(warnings.filters[:1]) != [_QUIET]:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)


def whole_picture(data: bytes) -> Image.Image:
    """The whole picture in `data` by Pillow: 8-bit grey (L) as it is, all else as RGB. Raises BadImage."""
    return _picture(data, keep_grey=True)


def _check_size(size: tuple[int, int], view: Geometry) -> None:
    if view.size != size and view.size[0] * view.size[1] > MAX_PIXELS:
        (width, height), (wide, high) = size, view.size
        raise BadImage(f"{width}x{height} pixels, too elongated to be resized to {wide}x{high}")


def _picture(data: bytes, *, keep_grey: bool = False) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans")
    _silence()
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise BadImage(f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS}")
        if keep_grey and picture.mode == "L":
            picture.load()
            return picture
        return _to_rgb(picture)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        # Pillow's own text holds an address in memory, different in each process.
        raise BadImage(f"not a picture in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # plugins raise OSError, SyntaxError, struct.error, KeyError and more
        text = " ".join(str(error).split())
        raise BadImage(f"{type(error).__name__}: {text}" if text else type(error).__name__) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        picture.load()
        return picture
    if picture.mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    if picture.mode.startswith("I"):
        # 16 bits of grey, which Pillow's own conversion would cut off at 255 instead of scaling.
        grey = np.asarray(picture).astype(np.int64) >> 8
        picture = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")
