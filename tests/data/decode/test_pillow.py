"""Views decoded with Pillow equal torchvision's, and files that cannot be decoded have a reason."""

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

from lars_train.data.decode.pillow import MAX_PIXELS, BadImage, decode, whole_image
from lars_train.data.transforms import UNIFORMS, Geometry, View

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


def encode(image: Pixels | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def whole(width: int, height: int) -> Geometry:
    return Geometry((0, 0, width, height), (width, height), 0, (0, 0), False)


def always(view: Geometry) -> Callable[[int, int], Geometry]:
    return lambda width, height: view


def decode_unchanged(item: bytes | Pixels, size: int = 24) -> Pixels:
    return decode(item, whole, size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("flip", [False, True])
def test_box_resize_and_flip_equal_torchvisions(kind: str, flip: bool) -> None:
    data = encode(noise(71, 53), kind)
    view = Geometry((9, 4, 60, 37), (32, 32), 0, (0, 0), flip)
    image = Image.open(io.BytesIO(data)).convert("RGB")
    expected = functional.resized_crop(image, 4, 9, 33, 51, [32, 32], BILINEAR)
    expected = functional.hflip(expected) if flip else expected
    np.testing.assert_array_equal(decode(data, always(view), 32), expected)


@pytest.mark.parametrize(("width", "height"), [(71, 53), (53, 71), (32, 32), (20, 20), (36, 40)])
def test_evaluation_pixels_equal_torchvisions(width: int, height: int) -> None:
    pixels = noise(width, height)
    expected = functional.center_crop(functional.resize(Image.fromarray(pixels), 36, BILINEAR), 32)
    for item in (pixels, encode(pixels)):
        found = decode(item, View("none", 32, False, 0, 8 / 9).evaluate, 32)
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


def test_the_result_is_a_new_writable_contiguous_array() -> None:
    pixels = noise(24, 24)
    before = pixels.copy()
    found = decode_unchanged(pixels)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    found[:] = 0
    np.testing.assert_array_equal(pixels, before)


def test_read_only_pixels_are_accepted() -> None:
    pixels = noise(40, 30)
    pixels.flags.writeable = False
    assert decode(pixels, View("none", 24, False, 0, 1.0).evaluate, 24).shape == (24, 24, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_color_mode_is_converted_to_rgb_by_pillow(mode: str) -> None:
    image = Image.fromarray(noise(24, 24)).convert(mode)
    data = encode(image, "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG")
    np.testing.assert_array_equal(decode_unchanged(data), image.convert("RGB"))


def test_transparent_palette_gives_the_palettes_colors() -> None:
    image = Image.fromarray(noise(24, 24)).quantize(16)
    expected = image.convert("RGB")
    data = encode(image, transparency=bytes(range(0, 256, 16)))
    np.testing.assert_array_equal(decode_unchanged(data), expected)


def tiff(values: npt.NDArray[Any], bits: int = 0, sample_format: int = 1, photometric: int = 1) -> bytes:
    """Return a gray little-endian TIFF of `values`, (H, W): the pixels, or packed bytes of pixels of `bits` each."""
    height, width = values.shape
    bits, width = (bits, width * 8 // bits) if bits else (8 * values.itemsize, width)
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 130, 277: 1, 278: height}
    entries |= {279: values.nbytes, 339: sample_format}
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in entries.items())
    return struct.pack("<4sIH", b"II*\0", 8, len(entries)) + directory.ljust(120, b"\0") + values.tobytes()


SIXTEEN = np.random.default_rng(0).integers(0, 2**16, (24, 24, 4), dtype=np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_to_eight(kind: str) -> None:
    values = SIXTEEN[..., 0]
    data = encode(Image.fromarray(values), kind)
    found = decode_unchanged(data)[..., 1]
    np.testing.assert_array_equal(found, (values // 256).astype(np.uint8))
    assert np.abs(found - values / 257).max() < 1


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_color_and_alpha_give_the_upper_bytes(color_type: int, channels: int) -> None:
    values = SIXTEEN[..., :channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png_of_size(24, 24, rows, depth=16, color_type=color_type)
    expected = (values[..., :3] if channels > 2 else values[..., :1]) // 256
    np.testing.assert_array_equal(decode_unchanged(data), np.broadcast_to(expected, (24, 24, 3)))


def test_a_tiff_of_12_bits_or_with_white_as_zero_is_converted() -> None:
    values = SIXTEEN[..., 0]
    np.testing.assert_array_equal(decode_unchanged(tiff(values, photometric=0))[..., 0], (65535 - values) // 256)
    packed = noise(36, 24, 1)
    first, middle, last = packed[:, ::3].astype(int), packed[:, 1::3], packed[:, 2::3]
    twelve = np.stack([first << 4 | middle >> 4, (middle & 15).astype(int) << 8 | last], 2).reshape(24, 24)
    np.testing.assert_array_equal(decode_unchanged(tiff(packed, bits=12))[..., 0], twelve // 16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(np.full((24, 24), 100_000, np.int32), sample_format=2), r"32-bit signed integer pixels \(mode I\)"),
        (tiff(np.full((24, 24), 100_000, np.uint32)), r"32-bit unsigned integer pixels \(mode I\)"),
        (tiff(np.full((24, 24), -1000, np.int16), sample_format=2), r"16-bit signed integer pixels \(mode I\)"),
        (tiff(np.full((24, 24), -1, np.int8), sample_format=2), r"8-bit signed integer pixels \(mode L\)"),
        (tiff(np.full((24, 24), 0.5, np.float32), sample_format=3), r"floating-point pixels \(mode F\)"),
        (b"Pf 24 24 -1.0\n" + np.full((24, 24), 0.5, np.float32).tobytes(), r"floating-point pixels \(mode F\)"),
        (tiff(np.full((24, 24), 0.5, np.float64), sample_format=3), "a damaged TIFF, or one with pixels that"),
    ],
    ids=["int32", "uint32", "int16", "int8", "float32", "PFM", "float64"],
)
def test_pixels_without_a_defined_white_are_bad_with_a_remedy(data: bytes, reason: str) -> None:
    for read in (decode_unchanged, whole_image):
        with pytest.raises(BadImage, match=f"^{reason}.*; convert it to 8 or 16 unsigned bits$"):
            read(data)


def test_alpha_is_dropped_and_one_bit_is_black_and_white() -> None:
    for channels in (2, 4):
        values = noise(24, 24, channels)
        gray = values[..., :1] if channels == 2 else values[..., :3]
        np.testing.assert_array_equal(decode_unchanged(encode(values)), np.broadcast_to(gray, (24, 24, 3)))
    bits = noise(24, 24, 1) > 127
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(
            decode_unchanged(encode(Image.fromarray(bits), kind))[..., 0], bits * np.uint8(255)
        )


@pytest.mark.parametrize("ycck", [False, True])
def test_the_inks_of_a_jpeg_become_the_printed_colors(ycck: bool) -> None:
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (40, 90, 160, 30)]
    # Blocks of one color, which JPEG preserves.
    cells = np.array([*inks, (200, 10, 60, 100), (5, 5, 5, 5), (128, 128, 128, 128)], np.uint8).reshape(3, 3, 4)
    cmyk = cells.repeat(8, axis=0).repeat(8, axis=1)
    data = encode(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100, subsampling=0)
    # Adobe's convention: a JPEG stores 255 minus each ink, and YCCK is the YCbCr of 255 minus the first three of these.
    stored = 255.0 - cmyk
    bright = stored[..., :3]
    if ycck:
        at = data.index(b"Adobe") + 11
        data = data[:at] + b"\x02" + data[at + 1 :]
        luma, blue, red = np.moveaxis(bright, 2, 0) - [[[0]], [[128]], [[128]]]
        channels = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
        bright = 255 - np.stack(channels, axis=2).clip(0, 255)
    expected = bright * stored[..., 3:] / 255
    assert np.abs(decode_unchanged(data) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    first, second = (noise(24, 24, 1, seed) // 16 * 16 for seed in (0, 1))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(first, kind, save_all=True, append_images=[Image.fromarray(second)], duration=100, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decode_unchanged(data), np.broadcast_to(first[..., None], (24, 24, 3)))


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(24, 24)
    np.testing.assert_array_equal(decode_unchanged(encode(pixels, exif=exif.tobytes())), pixels)


def test_damaged_exif_is_ignored_without_a_warning() -> None:
    damaged = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x1a\x00\x05\x00\x00\x00\x01\x00\x00\xff\xff"
    data = encode(noise(24, 24), "JPEG", exif=damaged)
    plain = Image.open(io.BytesIO(encode(noise(24, 24), "JPEG")))
    np.testing.assert_array_equal(decode_unchanged(data), plain)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_a_truncated_image_is_bad(kind: str) -> None:
    data = encode(noise(24, 24), kind)
    for part in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            decode_unchanged(data[: int(part * len(data))])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "known format"),
        (b"\x00" * 4096, "known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n", "known format"),
    ],
)
def test_a_file_that_is_not_an_image_is_bad_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode_unchanged(data)
    assert "0x" not in str(caught.value)  # an address in memory would differ between runs


def png_of_size(width: int, height: int, rows: bytes = b"\x00" * 1000, depth: int = 8, color_type: int = 0) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_bad_before_it_takes_memory(width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    with pytest.raises(BadImage, match="pixels"):
        decode_unchanged(png_of_size(width, height))


def test_the_bomb_limit_is_pillows_default() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS


def test_an_image_that_resizing_would_make_huge_is_bad() -> None:
    with pytest.raises(BadImage, match="1x2000000 pixels, too elongated to resize to 256x512000000"):
        decode(noise(1, 2_000_000, 1), View("none", 224, False, 0, 0.875).evaluate, 224)


def pixels_or_reason(data: bytes) -> Pixels | str:
    try:
        return decode(data, View("none", 24, False, 0, 1.0).evaluate, 24)
    except BadImage as error:
        return str(error)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF"]), st.data())
def test_damaged_bytes_give_pixels_or_a_one_line_reason(kind: str, data: st.DataObject) -> None:
    item = bytearray(encode(noise(24, 24), kind))
    damage = st.tuples(st.integers(0, min(len(item), 200) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(damage, min_size=1, max_size=6)):
        item[position] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = pixels_or_reason(bytes(item))
    if isinstance(outcome, str):
        assert outcome.splitlines() == [outcome]
    else:
        assert outcome.shape == (24, 24, 3)


def test_errors_of_the_geometry_are_not_blamed_on_the_image() -> None:
    def broken(width: int, height: int) -> Geometry:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        decode(encode(noise(24, 24)), broken, 24)


def test_imagenet_files_decode_as_with_torchvision() -> None:
    root = os.environ.get("LARS_TEST_DATA")
    if not root or not (Path(root) / "imagenet_sample").is_dir():
        pytest.skip("LARS_TEST_DATA names no folder with imagenet_sample")
    files = sorted((Path(root) / "imagenet_sample" / "train").glob("*/*.JPEG"))[::10]
    assert files
    view = View("inception", 224, True, 0, 0.875)
    rng = np.random.default_rng(0)
    for file in files:
        image = Image.open(file).convert("RGB")
        expected = functional.center_crop(functional.resize(image, 256, BILINEAR), 224)
        np.testing.assert_array_equal(decode(file.read_bytes(), view.evaluate, 224), expected)
        drawn = view.train(*image.size, rng.random(UNIFORMS).tolist())
        left, top, right, bottom = drawn.box
        cut = functional.resized_crop(image, top, left, bottom - top, right - left, [224, 224], BILINEAR)
        cut = functional.hflip(cut) if drawn.flip else cut
        np.testing.assert_array_equal(decode(file.read_bytes(), always(drawn), 224), cut)
