"""From the bytes of one picture to the pixels of one view. Pillow decodes and resizes, nothing is drawn here.

Pictures are taken as torchvision's image folder takes them: decoded in full, not turned by EXIF, an alpha
channel dropped. Reading the bytes is the source's business, and choosing the view is augment.py's.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from lars_train.data.augment import Geometry

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The picture formats that are read, by Pillow's names."""

MAX_PIXELS = 2**30 // 12
"""The largest picture in pixels, before and after resizing: Pillow's default for suspecting a bomb."""


class BadImage(Exception):
    """The bytes of one sample cannot be decoded; str(e) is the reason, in one line."""


def decode(
    item: bytes | npt.NDArray[np.uint8], geometry: Callable[[int, int], Geometry], size: int
) -> npt.NDArray[np.uint8]:
    """The view of one picture: uint8 (size, size, 3), RGB.

    `item` is an encoded picture or decoded uint8 pixels, (H, W) or (H, W, 3). `geometry` is called with
    its width and height in pixels. Resizing is Pillow's antialiased bilinear, on 8-bit channels. Raises
    BadImage where no whole picture can be had from the bytes.
    """
    picture = item if isinstance(item, np.ndarray) else _picture(item)
    if isinstance(picture, np.ndarray):
        height, width = picture.shape[:2]
    else:
        width, height = picture.size
    view = geometry(width, height)
    whole = (0, 0, width, height)
    if view.box != whole or view.size != (width, height):
        if view.size[0] * view.size[1] > MAX_PIXELS:
            wide, high = view.size
            raise BadImage(f"{width}x{height} pixels, too elongated to be resized to {wide}x{high}")
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if view.box != whole:
            picture = picture.crop(view.box)
        picture = picture.resize(view.size, Image.Resampling.BILINEAR)
    return _window(np.asarray(picture), view, size)


def _picture(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    with warnings.catch_warnings():
        # Pillow warns of damaged EXIF data and the like, which the pixels do not suffer from, and of
        # possible bombs, which are refused below.
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                raise BadImage(f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS}")
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


def _window(pixels: npt.NDArray[np.uint8], view: Geometry, size: int) -> npt.NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    height, width = pixels.shape[:2]
    left, top = view.crop[0] - view.pad, view.crop[1] - view.pad
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, width), min(top + size, height)
    out = np.zeros((size, size, 3), dtype=np.uint8)
    window = out[:, ::-1] if view.flip else out
    window[y0 - top : y1 - top, x0 - left : x1 - left] = pixels[y0:y1, x0:x1]
    return out
