from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from lars_train.data.augment import UNIFORMS, Geometry, View, eval_geometry
from lars_train.data.decode import MAX_PIXELS, BadImage, decode

Pixels = npt.NDArray[np.uint8]
BILINEAR = functional.InterpolationMode.BILINEAR


@pytest.fixture(autouse=True)
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> Pixels:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(picture: Pixels | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def whole(width: int, height: int) -> Geometry:
    return Geometry((0, 0, width, height), (width, height), 0, (0, 0), False)


def always(view: Geometry) -> Callable[[int, int], Geometry]:
    return lambda width, height: view


def as_it_is(item: bytes | Pixels, size: int = 24) -> Pixels:
    return decode(item, whole, size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [False, True])
def test_box_resize_and_flip_equal_torchvisions(kind: str, flip: bool) -> None:
    data = encode(noise(71, 53), kind)
    view = Geometry((9, 4, 60, 37), (32, 32), 0, (0, 0), flip)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    expected = functional.resized_crop(picture, 4, 9, 33, 51, [32, 32], BILINEAR)
    expected = functional.hflip(expected) if flip else expected
    np.testing.assert_array_equal(decode(data, always(view), 32), expected)


@pytest.mark.parametrize(("width", "height"), [(71, 53), (53, 71), (32, 32), (20, 20), (36, 40)])
def test_evaluation_pixels_equal_torchvisions(width: int, height: int) -> None:
    pixels = noise(width, height)
    expected = functional.center_crop(functional.resize(Image.fromarray(pixels), 36, BILINEAR), 32)
    for item in (pixels, encode(pixels)):
        found = decode(item, lambda w, h: eval_geometry(w, h, size=32, eval_crop=8 / 9), 32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("encoded", [False, True])
def test_padding_crop_and_flip_equal_a_plain_array_computation(channels: int, encoded: bool) -> None:
    pixels = noise(28, 28, channels)
    rgb = np.repeat(pixels[..., None], 3, axis=2) if channels == 1 else pixels
    padded = np.pad(rgb, ((4, 4), (4, 4), (0, 0)))
    item = encode(pixels) if encoded else pixels
    for x, y, flip in [(0, 0, False), (8, 8, False), (4, 4, False), (1, 7, True)]:
        expected = padded[y : y + 28, x : x + 28]
        view = Geometry((0, 0, 28, 28), (28, 28), 4, (x, y), flip)
        found = decode(item, always(view), 28)
        np.testing.assert_array_equal(found, expected[:, ::-1] if flip else expected)


def test_result_is_an_own_writable_contiguous_array() -> None:
    pixels = noise(24, 24)
    before = pixels.copy()
    found = as_it_is(pixels)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    found[:] = 0
    np.testing.assert_array_equal(pixels, before)


def test_read_only_pixels_are_accepted() -> None:
    pixels = noise(40, 30)
    pixels.flags.writeable = False
    assert decode(pixels, lambda w, h: eval_geometry(w, h, size=24, eval_crop=1.0), 24).shape == (24, 24, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb_as_pillow_converts_it(mode: str) -> None:
    picture = Image.fromarray(noise(24, 24)).convert(mode)
    data = encode(picture, "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG")
    np.testing.assert_array_equal(as_it_is(data), picture.convert("RGB"))


def test_transparent_palette_gives_the_palettes_colours() -> None:
    picture = Image.fromarray(noise(24, 24)).quantize(16)
    expected = picture.convert("RGB")
    data = encode(picture, transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(as_it_is(data), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_to_eight(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (24, 24), dtype=np.uint16)
    data = encode(Image.fromarray(values), kind)
    np.testing.assert_array_equal(as_it_is(data)[..., 1], (values // 256).astype(np.uint8))


def test_floating_point_picture_is_bad() -> None:
    data = encode(Image.fromarray(np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(24, 24)), "TIFF")
    with pytest.raises(BadImage, match="floating-point"):
        as_it_is(data)


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(24, 24)
    np.testing.assert_array_equal(as_it_is(encode(pixels, exif=exif.tobytes())), pixels)


def test_damaged_exif_does_not_matter_and_does_not_warn() -> None:
    damaged = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x1a\x00\x05\x00\x00\x00\x01\x00\x00\xff\xff"
    data = encode(noise(24, 24), "JPEG", exif=damaged)
    plain = Image.open(io.BytesIO(encode(noise(24, 24), "JPEG")))
    np.testing.assert_array_equal(as_it_is(data), plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_truncated_picture_is_bad(kind: str) -> None:
    data = encode(noise(24, 24), kind)
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            as_it_is(data[: int(part * len(data))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "known format"),
        (b"\x00" * 4096, "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n", "known format"),
    ],
)
def test_what_is_no_picture_is_bad_for_a_stated_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        as_it_is(data)
    assert "0x" not in str(caught.value)  # an address in memory would differ between runs


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_bad_before_it_takes_memory(width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    with pytest.raises(BadImage, match="pixels"):
        as_it_is(png_of_size(width, height))


def test_bomb_limit_is_pillows_default() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_picture_that_resizing_would_blow_up_is_bad() -> None:
    with pytest.raises(BadImage, match="1x2000000 pixels, too elongated to be resized to 256x512000000"):
        decode(noise(1, 2_000_000, 1), lambda w, h: eval_geometry(w, h, size=224, eval_crop=0.875), 224)


def pixels_or_reason(data: bytes) -> Pixels | str:
    try:
        return decode(data, lambda w, h: eval_geometry(w, h, size=24, eval_crop=1.0), 24)
    except BadImage as error:
        return str(error)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_bytes_give_pixels_or_a_one_line_reason(kind: str, data: st.DataObject) -> None:
    item = bytearray(encode(noise(24, 24), kind))
    damage = st.tuples(st.integers(0, min(len(item), 200) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(damage, min_size=1, max_size=6)):
        item[place] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = pixels_or_reason(bytes(item))
    if isinstance(outcome, str):
        assert outcome.splitlines() == [outcome]
    else:
        assert outcome.shape == (24, 24, 3)


def test_errors_of_the_geometry_are_not_blamed_on_the_picture() -> None:
    def broken(width: int, height: int) -> Geometry:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode(encode(noise(24, 24)), broken, 24)


def test_imagenet_files_decode_as_torchvision_decodes_them() -> None:
    root = os.environ.get("LARS_TEST_DATA")
    if not root or not (Path(root) / "imagenet_sample").is_dir():
        pytest.skip("LARS_TEST_DATA names no folder with imagenet_sample")
    files = sorted((Path(root) / "imagenet_sample" / "train").glob("*/*.JPEG"))[::10]
    assert files
    view = View("inception", 224, True, 0, 0.875)
    rng = np.random.default_rng(0)
    for file in files:
        picture = Image.open(file).convert("RGB")
        expected = functional.center_crop(functional.resize(picture, 256, BILINEAR), 224)
        np.testing.assert_array_equal(decode(file.read_bytes(), view.evaluate, 224), expected)
        drawn = view.train(*picture.size, rng.random(UNIFORMS).tolist())
        left, top, right, bottom = drawn.box
        cut = functional.resized_crop(picture, top, left, bottom - top, right - left, [224, 224], BILINEAR)
        cut = functional.hflip(cut) if drawn.flip else cut
        np.testing.assert_array_equal(decode(file.read_bytes(), always(drawn), 224), cut)
