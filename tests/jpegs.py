"""JPEGs of all kinds for the tests of the decoders, made up, and what Pillow makes of them."""

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
KINDS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "grey", "rgb")


@cache
def made_up(kind: str, width: int, height: int, progressive: bool = False, quality: int = 80) -> bytes:
    """A JPEG of coarse coloured noise, in which rows and columns that are mixed up show."""
    if kind == "4:4:0":
        # Pillow writes none: a 4:2:2 with its sides and the first component's sampling factors exchanged.
        data = made_up("4:2:2", height, width, progressive, quality)
        at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC2))
        sides = data[at + 7 : at + 9] + data[at + 5 : at + 7]
        return data[: at + 5] + sides + data[at + 9 : at + 11] + b"\x12" + data[at + 12 :]
    rng = np.random.default_rng([width, height])
    coarse = rng.integers(0, 256, (2 + height // 4, 2 + width // 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"progressive": progressive, "quality": quality}
    if kind == "rgb":
        options["keep_rgb"] = True
    elif kind != "grey":
        options["subsampling"] = kind
    return encode(picture.convert("L") if kind == "grey" else picture, **options)


def encode(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def whole_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def in_one_step(picture: Image.Image, view: Geometry, size: int) -> Pixels:
    """The view as torchvision's transforms take it."""
    return window_of(picture.crop(view.box).resize(view.size, Image.Resampling.BILINEAR), view, size)


def columns_first(picture: Image.Image, view: Geometry, size: int) -> Pixels:
    """The view by two of Pillow's passes, columns before rows, which newer versions exchange for some shapes."""
    box = picture.crop(view.box)
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
    """A baseline JPEG whose `count` scans hold a component each, in turn, of a grey one's data."""
    grey = made_up("grey", 40, 33)
    segments, at = {}, 2
    while grey[at + 1] != 0xDA:
        length = 2 + int.from_bytes(grey[at + 2 : at + 4], "big")
        segments[grey[at + 1]] = segments.get(grey[at + 1], b"") + grey[at : at + length]
        at += length
    entropy = grey[at + 10 : -2]
    frame = b"\xff\xc0\x00\x11\x08\x00\x21\x00\x28\x03" + b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    scans = (b"\xff\xda\x00\x08\x01" + bytes([1 + i % 3, 0, 0, 63, 0]) + entropy for i in range(count))
    return b"\xff\xd8" + segments[0xDB] + frame + segments[0xC4] + b"".join(scans) + b"\xff\xd9"


def many_scans(width: int, height: int, count: int) -> bytes:
    """A grey progressive JPEG whose scans after the first are almost empty: each is one more bit of one coefficient."""

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body

    def scan(coefficient: int, bits: int, data: str) -> bytes:
        header = segment(0xDA, bytes([1, 1, 0, coefficient, coefficient, bits]))
        return header + int(data + "1" * (-len(data) % 8), 2).to_bytes((len(data) + 7) // 8, "big")

    blocks = -(-width // 8) * -(-height // 8)
    # "0" is no difference in a scan of the first coefficient, and in others the end of 16,384 blocks and 14 bits more.
    tables = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00") + segment(0xC4, b"\x10\x01\x01" + bytes(14) + b"\xe0\x00")
    frame = segment(0xC2, b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\x01\x01\x11\x00")
    ends = ("0" + format(0, "014b")) * (blocks // 16384) + "10" * (blocks % 16384)
    bits = [13, *(bit + 1 << 4 | bit for bit in range(12, -1, -1))]
    scans = [scan(coefficient, bit, ends) for bit in bits for coefficient in range(1, 64)]
    start = b"\xff\xd8" + segment(0xDB, b"\x00" + b"\x10" * 64) + frame + tables + scan(0, 0, "0" * blocks)
    return start + b"".join(scans[: count - 1]) + b"\xff\xd9"


def not_for_it() -> Iterator[tuple[str, bytes]]:
    picture = whole_picture(made_up("4:2:0", 40, 40))
    yield "CMYK", encode(picture.convert("CMYK"))
    for kind in ("PNG", "WEBP", "BMP", "GIF", "TIFF"):
        yield kind, encode(picture, kind)
    yield "nothing", b""
    yield "text", b"<html>404 not found</html>"
    jpeg = made_up("4:2:0", 40, 40)
    at = jpeg.index(b"\xff\xc0")
    yield "12 bits", jpeg[: at + 4] + b"\x0c" + jpeg[at + 5 :]
    yield "arithmetic coding", jpeg[:at] + b"\xff\xc9" + jpeg[at + 2 :]
    yield "lossless", jpeg[:at] + b"\xff\xc3" + jpeg[at + 2 :]
    yield "4:1:1", jpeg[: at + 11] + b"\x41" + jpeg[at + 12 :]
    grey = made_up("grey", 40, 40)
    at_grey = grey.index(b"\xff\xc0")
    yield "grey with sampling factors", grey[: at_grey + 11] + b"\x22" + grey[at_grey + 12 :]
    yield "20,000 x 20,000 pixels", jpeg[: at + 5] + b"\x4e\x20\x4e\x20" + jpeg[at + 9 :]
    yield "height 0", jpeg[: at + 5] + b"\x00\x00" + jpeg[at + 7 :]


def outcome(data: bytes, view: Geometry, size: int, decoder: str) -> Pixels | str:
    try:
        return decode(data, lambda w, h: view, size, decoder=decoder)
    except BadImage as error:
        return str(error)


def same_outcome(data: bytes, view: Geometry, size: int, decoder: str) -> bool:
    """Whether a decoder and Pillow have the same reason, or pixels at most a level apart."""
    one, other = outcome(data, view, size, decoder), outcome(data, view, size, PILLOW)
    if isinstance(one, str) or isinstance(other, str):
        return one is other or (isinstance(one, str) and isinstance(other, str) and one == other)
    return bool(np.abs(one.astype(int) - other).max() <= 1)
