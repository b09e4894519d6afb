"""Decode the bytes of an image to the pixels of one view.

Pillow decodes and resizes; native.py can decode JPEGs instead, to the same pixels within 1 level. Images are treated as
in torchvision's ImageFolder: decoded in full, not rotated by EXIF, the alpha channel dropped. Sources read the bytes,
and transforms.py chooses the view.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from lars_train.data.decode import native
from lars_train.data.transforms import Geometry

PILLOW, NATIVE = "pillow", "native"
"""The decoders of JPEGs."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The supported image formats, by Pillow's names."""

MAX_PIXELS = 2**30 // 12
"""The most pixels of an image, before and after resizing: Pillow's default limit for decompression bombs."""

MAX_SCANS = 500
MAX_SCANNED = 32 * MAX_PIXELS
"""The most scans of a JPEG, and the most pixels summed over its scans.

A few bytes can request another scan over the whole image. Cameras and encoders write about 10 scans.
"""

# The next marker that is neither a stuffed byte nor a restart marker.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")
_EOI, _SOS = 0xD9, 0xDA

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2

_CONVERT = "convert it to 8 or 16 unsigned bits"

# An entry of warnings.filters. `_open_image` rejects decompression bombs, so the warnings about them are not needed.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


class BadImage(Exception):
    """The image cannot be decoded. The message is the reason, in one line."""


def decode(
    item: bytes | npt.NDArray[np.uint8],
    geometry: Callable[[int, int], Geometry],
    size: int,
    *,
    decoder: str = PILLOW,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Return the view of one image: uint8 (size, size, 3), RGB, in `out` if given (contiguous). See `decode_into`."""
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
    """Write the view of one image to `out`, uint8 (S, S, 3), RGB, contiguous. Return True if NATIVE decoded it.

    `item`: an encoded image, or decoded uint8 pixels, (H, W) or (H, W, 3). `geometry`: a pure function of width and
    height in pixels. Resizing is Pillow's antialiased bilinear, on 8-bit channels. `decoder`: PILLOW; or NATIVE, which
    must be available, for the JPEGs that it can decode.

    Raises BadImage if the bytes hold no complete image; then the content of `out` is undefined. Only Pillow can reject
    a file, because it tries every file that NATIVE cannot decode. NATIVE may skip the rows below the view, and then
    misses damage there that leaves the file's structure intact. Pillow misses most such damage, too.
    """
    if decoder == NATIVE and isinstance(item, bytes):
        found = native.size_of(item)
        if found is not None and found[0] * found[1] <= MAX_PIXELS:
            view = geometry(*found)
            _check_size(found, view)
            if native.decode_jpeg(item, found, view, out):
                return True
    image = item if isinstance(item, np.ndarray) else _open_image(item)
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
    else:
        width, height = image.size
    view = geometry(width, height)
    whole = (0, 0, width, height)
    if view.box != whole or view.size != (width, height):
        _check_size((width, height), view)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if view.box != whole:
            image = image.crop(view.box)
        image = image.resize(view.size, Image.Resampling.BILINEAR)
    _copy_window(np.asarray(image), view, out)
    return False


def _copy_window(pixels: npt.NDArray[np.uint8], view: Geometry, out: npt.NDArray[np.uint8]) -> None:
    """Copy the window of `view` from the resized image, (H, W) or (H, W, 3), to `out`, with zeros beyond the image."""
    size = len(out)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    height, width = pixels.shape[:2]
    left, top = view.crop[0] - view.pad, view.crop[1] - view.pad
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, width), min(top + size, height)
    out[:] = 0
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    if not view.flip:
        out[rows, columns] = pixels[y0:y1, x0:x1]
        return
    for channel in range(3):
        # Channel by channel: numpy is six times as slow at reversing rows of 3-byte pixels.
        out[:, ::-1, channel][rows, columns] = pixels[y0:y1, x0:x1, channel % pixels.shape[2]]


def _ignore_warnings() -> None:
    """Ignore Pillow's warnings in this process: about bombs, and about damaged EXIF data, which affects no pixel.

    The filter cannot be limited to the decoding, because `warnings.catch_warnings` is not thread-safe.
    """
    if list(warnings.filters[:1]) != [_QUIET]:
        warnings.filterwarnings("ignore", module=_QUIET[3].pattern)


def whole_image(data: bytes) -> Image.Image:
    """Decode the whole image in `data` with Pillow: 8-bit gray (L) as L, all else as RGB. Raises BadImage."""
    return _open_image(data, keep_gray=True)


def _check_size(size: tuple[int, int], view: Geometry) -> None:
    if view.size != size and view.size[0] * view.size[1] > MAX_PIXELS:
        (width, height), (new_width, new_height) = size, view.size
        raise BadImage(f"{width}x{height} pixels, too elongated to resize to {new_width}x{new_height}")


def _open_image(data: bytes, *, keep_gray: bool = False) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    _ignore_warnings()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_count(image)
        if data.startswith(b"\xff\xd8"):
            _check_scans(data, *image.size)
        return _load(image, keep_gray=keep_gray)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        # Pillow's message holds a memory address, which differs between processes.
        if data.startswith((b"II*\0", b"MM\0*")):
            raise BadImage(f"a damaged TIFF, or one with pixels that Pillow cannot read; {_CONVERT}") from None
        raise BadImage(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # plugins raise OSError, SyntaxError, struct.error, KeyError and more
        text = " ".join(str(error).split())
        raise BadImage(f"{type(error).__name__}: {text}" if text else type(error).__name__) from error


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return the pixels of an image of any mode: uint8 (H, W) for 8-bit gray (L), else (H, W, 3), RGB.

    Raises BadImage for pixels without a defined black and white, and other errors of Pillow if it cannot read them.
    """
    _check_count(image)
    return np.asarray(_load(image, keep_gray=True))


def _check_count(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}")


def _load(image: Image.Image, *, keep_gray: bool) -> Image.Image:
    _check_pixel_type(image)
    if keep_gray and image.mode == "L":
        image.load()
        return image
    return _to_rgb(image)


def _check_scans(data: bytes, width: int, height: int) -> None:
    """Raise `BadImage` for a JPEG with too many scans. jpeg.c has the same limits."""
    most = min(MAX_SCANS, MAX_SCANNED // (width * height))
    # The cheap count includes thumbnails and data after the image; the exact count does not.
    if data.count(b"\xff\xda") > most and (scans := _count_scans(data)) > most:
        raise BadImage(
            f"a JPEG with {scans} scans of {width}x{height} pixels; at this size, at most {most} are decoded (the "
            f"limits are {MAX_SCANS} scans, and {MAX_SCANNED:,} pixels in all scans). Save it again with fewer scans"
        )


def _count_scans(data: bytes) -> int:
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) is not None and (marker := found[1][0]) != _EOI:
        scans += marker == _SOS
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _check_pixel_type(image: Image.Image) -> None:
    """Raise `BadImage` for pixels without a defined black and white, and for types that Pillow mistakes for others."""
    if image.mode == "F":
        raise BadImage(f"floating-point pixels (mode F), whose black and white are undefined; {_CONVERT}")
    if isinstance(image, TiffImageFile):
        bits, format_ = (max(image.tag_v2.get(tag) or (1,)) for tag in (_BITS, _SAMPLE_FORMAT))
        if format_ == _SIGNED or (image.mode == "I" and format_ == _UNSIGNED):
            kind = "signed" if format_ == _SIGNED else "unsigned"
            raise BadImage(
                f"{bits}-bit {kind} integer pixels (mode {image.mode}), whose black and white are undefined; {_CONVERT}"
            )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):
        # 16-bit gray, or 12-bit in a TIFF. Keep the upper 8 bits, as Pillow itself does for 16-bit RGB.
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        bits = max(tags.get(_BITS, (16,)))
        gray = np.asarray(image).astype(np.int64) >> (bits - 8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            gray = 255 - gray
        image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")
