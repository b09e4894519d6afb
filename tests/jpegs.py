"""Synthetic JPEGs of all kinds for the tests of the decoders, and Pillow's result for each."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from PIL import Image

from lars_train.data.decode.pillow import PILLOW, BadImage, decode
from lars_train.data.transforms import Geometry

Pixels = npt.NDArray[np.uint8]
KINDS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "gray", "rgb")


@cache
def synthetic_jpeg(kind: str, width: int, height: int, progressive: bool = False, quality: int = 80) -> bytes:
    """Return a JPEG of coarse colored noise, so that swapped rows or columns are visible."""
    if kind == "4:4:0":
        # Pillow cannot write 4:4:0. Exchange the sides and the first component's sampling factors of a 4:2:2.
        data = synthetic_jpeg("4:2:2", height, width, progressive, quality)
        at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        sides = data[at + 7 : at + 9] + data[at + 5 : at + 7]
        return data[: at + 5] + sides + data[at + 9 : at + 11] + b"\x12" + data[at + 12 :]
    rng = np.random.default_rng([width, height])
    coarse = rng.integers(0, 256, (2 + height // 4, 2 + width // 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"progressive": progressive, "quality": quality}
    if kind == "rgb":
        options["keep_rgb"] = True
    elif kind != "gray":
        options["subsampling"] = kind
    return encode(image.convert("L") if kind == "gray" else image, **options)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole_image(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pillow_view(image: Image.Image, view: Geometry, size: int) -> Pixels:
    """Return the view that torchvision's transforms return."""
    return window_of(image.crop(view.box).resize(view.size, Image.Resampling.BILINEAR), view, size)


def columns_first_view(image: Image.Image, view: Geometry, size: int) -> Pixels:
    """Return the view by two passes of Pillow, columns before rows; newer versions exchange them for some shapes."""
    box = image.crop(view.box)
    resized = box.resize((view.size[0], box.height), Image.Resampling.BILINEAR)
    return window_of(resized.resize(view.size, Image.Resampling.BILINEAR), view, size)


def window_of(resized: Image.Image, view: Geometry, size: int) -> Pixels:
    margin = view.pad + size + 5
    padded = np.pad(np.asarray(resized), ((margin, margin), (margin, margin), (0, 0)))
    x, y = view.crop[0] + margin - view.pad, view.crop[1] + margin - view.pad
    window = padded[y : y + size, x : x + size]
    return window[:, ::-1] if view.flip else window


@st.composite
def views(draw: st.DrawFn, width: int, height: int) -> tuple[Geometry, int]:
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))
    wide, high, size = draw(st.integers(1, 300)), draw(st.integers(1, 300)), draw(st.integers(1, 80))
    pad = draw(st.sampled_from([0, 0, 3]))
    crop = (draw(st.integers(-5, wide + pad)), draw(st.integers(-5, high + pad)))
    if draw(st.booleans()):
        wide, high, pad, crop = size, size, 0, (0, 0)
    return Geometry(box, (wide, high), pad, crop, draw(st.booleans())), size


def separate_scans(count: int) -> bytes:
    """Return a baseline JPEG whose `count` scans each hold one component, in turn, with the data of a gray JPEG."""
    gray = synthetic_jpeg("gray", 40, 33)
    segments, at = {}, 2
    while gray[at + 1] != 0xDA:
        length = 2 + int.from_bytes(gray[at + 2 : at + 4], "big")
        segments[gray[at + 1]] = segments.get(gray[at + 1], b"") + gray[at : at + length]
        at += length
    entropy = gray[at + 10 : -2]
    frame = b"\xff\xc0\x00\x11\x08\x00\x21\x00\x28\x03" + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    scans = (b"\xff\xda\x00\x08\x01" + bytes([1 + i % 3, 0, 0, 63, 0]) + entropy for i in range(count))
    return b"\xff\xd8" + segments[0xDB] + frame + segments[0xC4] + b"".join(scans) + b"\xff\xd9"


def many_scans(width: int, height: int, count: int) -> bytes:
    """Return a gray progressive JPEG whose scans after the first are almost empty: one more bit of one coefficient."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    def scan(coefficient: int, bits: int, data: str) -> bytes:
        header = segment(0xDA, bytes([1, 1, 0, coefficient, coefficient, bits]))
        return header + int(data + "1" * (-len(data) % 8), 2).to_bytes((len(data) + 7) // 8, "big")

    blocks = -(-width // 8) * -(-height // 8)
    # In a scan of the first coefficient, the code "0" is a difference of 0. In other scans it ends a run of at least
    # 16,384 blocks, and 14 bits with the rest of the run's length follow.
    tables = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00") + segment(0xC4, b"\x10\x01\x01" + bytes(14) + b"\xe0\x00")
    frame = segment(0xC2, b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\x01\x01\x11\x00")
    ends = ("0" + format(0, "014b")) * (blocks // 16384) + "10" * (blocks % 16384)
    bits = [13, *(bit + 1 << 4 | bit for bit in range(12, -1, -1))]
    scans = [scan(coefficient, bit, ends) for bit in bits for coefficient in range(1, 64)]
    start = b"\xff\xd8" + segment(0xDB, b"\x00" + b"\x10" * 64) + frame + tables + scan(0, 0, "0" * blocks)
    return start + b"".join(scans[: count - 1]) + b"\xff\xd9"


def unsupported_files() -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of files that the C decoder leaves to Pillow."""
    image = whole_image(synthetic_jpeg("4:2:0", 40, 40))
    yield "CMYK", encode(image.convert("CMYK"))
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        yield kind, encode(image, kind)
    yield "nothing", b""
    yield "text", b"<html>404 not found</html>"
    jpeg = synthetic_jpeg("4:2:0", 40, 40)
    at = jpeg.index(b"\xff\xc0")
    yield "12 bits", jpeg[: at + 4] + b"\x0c" + jpeg[at + 5 :]
    yield "arithmetic coding", jpeg[:at] + b"\xff\xc9" + jpeg[at + 2 :]
    yield "lossless", jpeg[:at] + b"\xff\xc3" + jpeg[at + 2 :]
    yield "4:1:1", jpeg[: at + 11] + b"\x41" + jpeg[at + 12 :]
    gray = synthetic_jpeg("gray", 40, 40)
    at_gray = gray.index(b"\xff\xc0")
    yield "gray with sampling factors", gray[: at_gray + 11] + b"\x22" + gray[at_gray + 12 :]
    yield "20,000 x 20,000 pixels", jpeg[: at + 5] + b"\x4e\x20\x4e\x20" + jpeg[at + 9 :]
    yield "height 0", jpeg[: at + 5] + b"\x00\x00" + jpeg[at + 7 :]


def outcome(data: bytes, view: Geometry, size: int, decoder: str) -> Pixels | str:
    """Return the pixels, or the reason for a bad image."""
    try:
        return decode(data, lambda w, h: view, size, decoder=decoder)
    except BadImage as error:
        return str(error)


def same_outcome(data: bytes, view: Geometry, size: int, decoder: str) -> bool:
    """Return True if a decoder and Pillow give the same reason, or pixels at most one level apart."""
    found, expected = outcome(data, view, size, decoder), outcome(data, view, size, PILLOW)
    if isinstance(found, str) or isinstance(expected, str):
        return isinstance(found, str) and isinstance(expected, str) and found == expected
    return bool(np.abs(found.astype(int) - expected).max() <= 1)
