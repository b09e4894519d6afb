"""From the bytes of one picture to the pixels of one view. Nothing is drawn here.

Pillow decodes and resizes, or native.py for JPEGs. Both give the same pixels but for one level here and there: newer
versions of Pillow resize some shapes in another order. Pictures are taken as torchvision's image folder takes them:
decoded in full, not turned by EXIF, an alpha channel dropped. Reading the bytes is the source's business, and choosing
the view is augment.py's.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lars_train.data import native
from lars_train.data.augment import Geometry

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The picture formats that are read, by Pillow's names."""

MAX_PIXELS = 2**30 // 12
"""The largest picture in pixels, before and after resizing: Pillow's default for suspecting a bomb."""

MAX_SCANS = 500
"""The most scans of a JPEG: each goes over the whole picture, and takes but a few bytes to ask for."""


# As an entry of warnings.filters. What is suspected to be a bomb is refused below.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class BadImage(Exception):
    """The bytes of one sample cannot be decoded; str(e) is the reason, in one line."""


def decode(
    item: bytes | npt.NDArray[np.uint8],
    geometry: Callable[[int, int], Geometry],
    size: int,
    *,
    by_native: bool = False,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The view of one picture: uint8 (size, size, 3), RGB, written to `out` where that is given (contiguous).

    As `decode_into`, which it calls.
    """
    if out is None:
        out = np.empty((size, size, 3), dtype=np.uint8)
    decode_into(out, item, geometry, by_native=by_native)
    return out


def decode_into(
    out: npt.NDArray[np.uint8],
    item: bytes | npt.NDArray[np.uint8],
    geometry: Callable[[int, int], Geometry],
    *,
    by_native: bool = False,
) -> bool:
    """Write the view of one picture to `out`, uint8 (S, S, 3), RGB, contiguous; whether native.py decoded it.

    `item` is an encoded picture or decoded uint8 pixels, (H, W) or (H, W, 3). `geometry` is called with
    its width and height in pixels, and must always give the same for the same. Resizing is Pillow's antialiased
    bilinear, on 8-bit channels. `by_native`: JPEGs by native.py, which must be there, as far as it can.

    Raises BadImage where no whole picture can be had from the bytes; `out` may hold anything then. Whether there is one
    is for Pillow to say: it has all files that native.py refuses. Of a JPEG that it does not refuse, the rows below the
    view are not decoded; damage there that leaves the file's structure whole goes unnoticed, as it is by Pillow in most
    cases.
    """
    if by_native and isinstance(item, bytes):
        found = native.size_of(item)
        if found is not None and found[0] * found[1] <= MAX_PIXELS:
            view = geometry(*found)
            _check_size(found, view)
            if native.decode(item, found, view, out):
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
    _window(np.asarray(picture), view, out)
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


def _window(pixels: npt.NDArray[np.uint8], view: Geometry, out: npt.NDArray[np.uint8]) -> None:
    size = len(out)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    height, width = pixels.shape[:2]
    left, top = view.crop[0] - view.pad, view.crop[1] - view.pad
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, width), min(top + size, height)
    out[:] = 0
    window = out[:, ::-1] if view.flip else out
    window[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
