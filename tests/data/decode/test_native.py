"""The C decoder of JPEGs agrees with Pillow on pixels and on damaged files, and leaks no memory."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import (
    KINDS,
    Pixels,
    columns_first_view,
    encode,
    many_scans,
    outcome,
    pillow_view,
    same_outcome,
    separate_scans,
    synthetic_jpeg,
    unsupported_files,
    views,
    whole_image,
)
from PIL import Image

from lars_train.data.decode import native
from lars_train.data.decode import pillow as decode_module
from lars_train.data.decode.pillow import NATIVE, PILLOW, BadImage, decode
from lars_train.data.loading.reader import EvalReader
from lars_train.data.transforms import UNIFORMS, Geometry, View

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(native.jpeg is None, reason="the C decoder was not built")


@pytest.fixture(scope="module")
def fuzz_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_jpeg", ROOT / "scripts" / "verify" / "fuzz_jpeg.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_native(data: bytes, view: Geometry, size: int) -> Pixels:
    """Return the view; fail unless the C decoder decodes it."""
    out = np.full((size, size, 3), 77, np.uint8)
    found = native.size_of(data)
    assert found is not None
    assert native.decode_jpeg(data, found, view, out)
    return out


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(KINDS), st.booleans(), st.integers(1, 700), st.integers(1, 500), st.booleans(), st.data())
def test_every_view_of_every_jpeg_has_pillows_pixels(
    kind: str, progressive: bool, width: int, height: int, small: bool, data: st.DataObject
) -> None:
    if small:
        width, height = 1 + width % 40, 1 + height % 40
    jpeg = synthetic_jpeg(kind, width, height, progressive)
    view, size = data.draw(views(width, height))
    image = whole_image(jpeg)
    found = by_native(jpeg, view, size)
    np.testing.assert_array_equal(found, columns_first_view(image, view, size))
    assert np.abs(found.astype(int) - pillow_view(image, view, size)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_crop_at_any_offset_has_the_pixels_of_the_full_decode(kind: str, progressive: bool) -> None:
    # Two blocks of 16 and a narrow remainder.
    jpeg = synthetic_jpeg(kind, 36, 35, progressive)
    pixels = np.asarray(whole_image(jpeg))
    for left, top in itertools.product(range(36), range(35)):
        # The width and the height vary with the offsets.
        box = (left, top, min(36, left + 1 + top % 17), min(35, top + 1 + left % 15))
        wide, high = box[2] - left, box[3] - top
        view = Geometry(box, (wide, high), 0, (0, 0), False)
        found = by_native(jpeg, view, 17)
        np.testing.assert_array_equal(found[:high, :wide], pixels[top : box[3], left : box[2]], err_msg=str(box))
        assert not found[high:].any()
        assert not found[:, wide:].any()


def test_extreme_enlargements_and_reductions_have_pillows_pixels() -> None:
    for kind, (width, height), size in itertools.product(KINDS, [(1, 1), (2, 3), (700, 500), (3, 900)], [1, 224]):
        view = Geometry((0, 0, width, height), (size, size), 0, (0, 0), False)
        jpeg = synthetic_jpeg(kind, width, height)
        np.testing.assert_array_equal(by_native(jpeg, view, size), columns_first_view(whole_image(jpeg), view, size))


def test_an_extreme_reduction_of_a_row_is_left_to_pillow() -> None:
    for width, decodes in ((15_000, True), (20_000, False)):
        jpeg = synthetic_jpeg("4:2:0", width, 1)
        view, out = Geometry((0, 0, width, 1), (1, 1), 0, (0, 0), False), np.empty((1, 1, 3), np.uint8)
        assert native.decode_jpeg(jpeg, (width, 1), view, out) == decodes
        pixels = decode(jpeg, lambda w, h, view=view: view, 1, decoder=NATIVE)
        np.testing.assert_array_equal(pixels, columns_first_view(whole_image(jpeg), view, 1))


def test_scans_that_do_not_interleave_components_are_decoded() -> None:
    jpeg = separate_scans(3)
    view = Geometry((3, 5, 30, 29), (16, 16), 0, (0, 0), False)
    np.testing.assert_array_equal(by_native(jpeg, view, 16), columns_first_view(whole_image(jpeg), view, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_an_incomplete_progressive_jpeg_is_left_to_pillow(kind: str) -> None:
    jpeg = synthetic_jpeg(kind, 100, 90, True)
    view = Geometry((20, 20, 40, 40), (16, 16), 0, (0, 0), False)
    starts = [i for i in range(len(jpeg)) if jpeg[i : i + 2] == b"\xff\xda"]
    for number in range(1, len(starts)):
        # Up to the segments before the next scan: tables, if any.
        end = jpeg.rfind(b"\xff\xc4", starts[number - 1], starts[number])
        data = jpeg[: end if end > 0 else starts[number]] + b"\xff\xd9"
        assert not native.decode_jpeg(data, (100, 90), view, np.empty((16, 16, 3), np.uint8))
        pixels = decode(data, lambda w, h: view, 16, decoder=NATIVE)
        np.testing.assert_array_equal(pixels, pillow_view(whole_image(data), view, 16))


def test_too_many_scans_are_bad_for_either_decoder() -> None:
    assert decode_module.MAX_SCANS == 500
    most, more = separate_scans(500), separate_scans(501)
    view = Geometry((0, 0, 40, 33), (16, 16), 0, (0, 0), False)
    by_native(most, view, 16)
    out = np.ones((16, 16, 3), np.uint8)
    assert not native.decode_jpeg(more, (40, 33), view, out)
    assert not out.any()
    for choice in (PILLOW, NATIVE):
        decode(most, lambda w, h: view, 16, decoder=choice)
        with pytest.raises(BadImage, match=r"501 scans of 40x33 pixels; .* at most 500 are .* Save it again with"):
            decode(more, lambda w, h: view, 16, decoder=choice)


def test_both_decoders_have_the_same_limit_of_scans_times_pixels() -> None:
    most = decode_module.MAX_SCANNED // (4000 * 4000)
    assert most == 178
    view = Geometry((0, 0, 4000, 4000), (16, 16), 0, (0, 0), False)
    out = np.empty((16, 16, 3), np.uint8)
    # jpeg.c has the same limit. Below the limit it refuses this file for its missing bits.
    assert native.jpeg.decode(*arguments(many_scans(4000, 4000, most), 4000, view, out)) == 1
    more = many_scans(4000, 4000, most + 1)
    assert native.jpeg.decode(*arguments(more, 4000, view, out)) == 4
    for choice in (PILLOW, NATIVE):
        with pytest.raises(BadImage, match=r"with 179 scans of 4000x4000 pixels; .* at most 178 are decoded"):
            decode(more, lambda w, h: view, 16, decoder=choice)
    assert not isinstance(outcome(many_scans(4000, 4000, most), view, 16, PILLOW), str)


def arguments(data: bytes, side: int, view: Geometry, out: Pixels) -> tuple[object, ...]:
    return (data, len(data), out.ctypes.data, side, side, *view.box, *view.size, 0, 0, False, len(out))


def test_scan_markers_outside_the_image_are_not_counted() -> None:
    plain = synthetic_jpeg("4:2:0", 40, 33)
    comment = b"\xff\xfe\x0f\xa2" + b"\xff\xda" * 2000
    jpeg = plain[:2] + comment + plain[2:] + b"\xff\xda\x00\x02" * 1000
    view = Geometry((3, 5, 30, 29), (16, 16), 0, (0, 0), False)
    expected = columns_first_view(whole_image(plain), view, 16)
    for choice in (PILLOW, NATIVE):
        found = decode(jpeg, lambda w, h: view, 16, decoder=choice)
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "jpe", "jfif", "JPEG", "png", "bmp", ""])
def test_a_jpeg_of_any_name_is_decoded_by_the_native_decoder(extension: str) -> None:
    class Named:
        labels = np.zeros(1, np.int32)

        def __len__(self) -> int:
            return 1

        def name(self, sample: int) -> str:
            return f"1.{extension}"

        location = name

        def read(self, sample: int) -> bytes:
            return synthetic_jpeg("4:2:0", 40, 33)

    reader = EvalReader(Named(), View("none", 16, False, 0, 1.0), NATIVE)
    outcome = reader.fill(0, [0], np.empty((1, 16, 16, 3), np.uint8), np.empty(1, np.int64))
    assert (outcome.fast, outcome.bad) == (1, ())
    assert native.has_jpegs(Named()) == (extension not in ("png", "bmp", ""))


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    view = Geometry((0, 0, 24, 24), (24, 24), 0, (0, 0), False)
    rotated, plain = encode(image, exif=exif.tobytes()), encode(image)
    np.testing.assert_array_equal(by_native(rotated, view, 24), by_native(plain, view, 24))


@pytest.mark.parametrize(("name", "data"), list(unsupported_files()))
def test_unsupported_files_are_left_to_pillow(name: str, data: bytes) -> None:
    view = Geometry((0, 0, 40, 40), (16, 16), 0, (0, 0), False)
    size = native.size_of(data)
    if size is not None:
        out = np.ones((16, 16, 3), np.uint8)
        whole = Geometry((0, 0, *size), (16, 16), 0, (0, 0), False)
        assert not native.decode_jpeg(data, size, whole, out)
        assert not out.any()
    assert same_outcome(data, view, 16, NATIVE)


@pytest.mark.parametrize("kind", ["4:2:0", "gray"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_truncated_anywhere_is_bad_for_both_decoders(kind: str, progressive: bool) -> None:
    data = synthetic_jpeg(kind, 40, 40, progressive, 40)
    view = Geometry((4, 2, 20, 9), (16, 16), 0, (0, 0), False)
    assert not isinstance(outcome(data, view, 16, NATIVE), str)
    for length in range(0, len(data)):
        assert same_outcome(data[:length], view, 16, NATIVE), length
        if length < len(data) - 2:
            assert isinstance(outcome(data[:length], view, 16, NATIVE), str), length


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["4:2:0", "4:4:4", "gray"]), st.booleans(), st.data())
def test_damaged_files_have_the_same_outcome_as_pillow(kind: str, progressive: bool, data: st.DataObject) -> None:
    item = bytearray(synthetic_jpeg(kind, 40, 40, progressive, 40))
    # From the frame header on: Pillow parses the segments before it by itself.
    first = next(i for i in range(len(item)) if item[i] == 0xFF and item[i + 1] in (0xC0, 0xC2))
    damage = st.tuples(st.integers(first + 9, len(item) - 1), st.integers(0, 255))
    for position, value in data.draw(st.lists(damage, min_size=1, max_size=3)):
        item[position] = value
    assert same_outcome(bytes(item), Geometry((4, 2, 20, 9), (16, 16), 0, (0, 0), True), 16, NATIVE)


def test_an_invalid_view_or_buffer_raises() -> None:
    data, out = synthetic_jpeg("4:2:0", 40, 40), np.zeros((16, 16, 3), np.uint8)
    for box in [(-1, 0, 9, 9), (0, 0, 41, 9), (0, 0, 9, 41), (5, 5, 5, 9), (5, 9, 9, 5)]:
        with pytest.raises(ValueError, match="view"):
            native.decode_jpeg(data, (40, 40), Geometry(box, (16, 16), 0, (0, 0), False), out)
    view = Geometry((0, 0, 40, 40), (16, 16), 0, (0, 0), False)
    for wide, high in [(0, 16), (16, -1), (2**40, 16)]:
        with pytest.raises((ValueError, OverflowError)):
            native.decode_jpeg(data, (40, 40), Geometry(view.box, (wide, high), 0, (0, 0), False), out)
    # The size differs from the header's.
    assert not native.decode_jpeg(data, (30, 40), Geometry((0, 0, 30, 40), (16, 16), 0, (0, 0), False), out)
    for buffer in [out[:, ::-1], out[:8], out.astype(np.int8), out[..., :2]]:
        with pytest.raises(ValueError, match="out"):
            native.decode_jpeg(data, (40, 40), view, buffer)
    with pytest.raises(TypeError):
        native.jpeg.decode(data)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="length"):
        native.jpeg.size(data, len(data) + 1)


def test_other_threads_run_during_decoding() -> None:
    data = synthetic_jpeg("4:2:0", 1500, 1500)
    out = np.empty((224, 224, 3), np.uint8)
    # No numpy in the loop: it may release the GIL.
    arguments = (data, len(data), out.ctypes.data, 1500, 1500, 0, 0, 1500, 1500, 224, 224, 0, 0, False, 224)
    gate, done = threading.Lock(), []
    gate.acquire()
    other = threading.Thread(target=lambda: done.append(gate.acquire()))
    other.start()
    before = sys.getswitchinterval()
    # The interpreter forces no switch of threads, so the other thread runs only if the decoder releases the GIL.
    sys.setswitchinterval(1000)
    try:
        gate.release()
        for _ in range(300):
            native.jpeg.decode(*arguments)
            if done:
                break
    finally:
        sys.setswitchinterval(before)
    assert done
    other.join()


def test_concurrent_decoding_gives_the_same_results() -> None:
    jobs = [
        (synthetic_jpeg(kind, 90, 70, progressive), Geometry((i, i, 80, 60), (32, 32), 0, (0, 0), bool(i % 2)))
        for i, (kind, progressive) in enumerate(itertools.product(KINDS, [False, True]))
    ]
    jobs += [(data[:-200], view) for data, view in jobs]
    alone = [outcome(data, view, 32, NATIVE) for data, view in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            together = pool.map(lambda job: outcome(*job, 32, NATIVE), jobs)
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_decoding_leaks_no_memory(fuzz_script: ModuleType) -> None:
    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    rng = np.random.default_rng(0)
    images = []
    for data in fuzz_script.seeds():
        if size := native.size_of(data):
            images += [(data, size), (data, size), (data[: int(len(data) * rng.uniform(0.7, 1))], size)]
    out, before = np.empty((32, 32, 3), np.uint8), 0.0
    for i in range(6000):
        data, (width, height) = images[i % len(images)]
        box = (i % width, i % height, width, height)
        native.decode_jpeg(data, (width, height), Geometry(box, (32, 32), 0, (0, 0), i % 2 == 1), out)
        if i == 600:
            before = resident_mb()
    # Without a leak an allocator may keep this much.
    assert resident_mb() - before < 4


def test_sanitizers_find_nothing_in_mutated_files(fuzz_script: ModuleType, tmp_path: Path) -> None:
    if not sanitizers_work(tmp_path, fuzz_script):
        pytest.skip("no C compiler with sanitizers")
    arguments = ["--count", "4000", "--seconds", "60", "--keep", str(tmp_path / "finding.jpg")]
    assert fuzz_script.main(arguments) == 0


def sanitizers_work(folder: Path, script: ModuleType) -> bool:
    source = folder / "try.c"
    source.write_text("#include <stdio.h>\n#include <jpeglib.h>\nint main(void) { return 0; }\n")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    command = [str(compiler), *script.SANITIZED, str(source), "-ljpeg", "-o", str(folder / "try")]
    return compiler is not None and not subprocess.run(command, capture_output=True).returncode


def test_without_vectors_the_pixels_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, include = shutil.which(os.environ.get("CC", "cc")), Path(sysconfig.get_paths()["include"])
    if compiler is None or not (include / "Python.h").is_file():
        pytest.skip("no C compiler or no Python.h")
    target = tmp_path / "jpeg.abi3.so"
    source = ROOT / "lars_train" / "data" / "decode" / "jpeg.c"
    flags = ["-O2", "-shared", "-fPIC", "-DLARS_PLAIN_C", "-Wall", "-Wextra", "-Werror", f"-I{include}"]
    subprocess.run([compiler, *flags, str(source), "-ljpeg", "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("jpeg", target)
    assert spec is not None
    assert spec.loader is not None
    plain = importlib.util.module_from_spec(spec)
    rng = np.random.default_rng(0)
    for number in range(60):
        width, height, wide, high, size = rng.integers(1, 200, 5).tolist()
        data = synthetic_jpeg(KINDS[number % 6], width, height)
        box = (width // 5, height // 4, width, height)
        view = Geometry(box, (wide, high), 0, (wide // 9, -(high // 9)), bool(number % 2))
        with_vectors = by_native(data, view, size)
        with monkeypatch.context() as patch:
            patch.setattr(native, "jpeg", plain)
            np.testing.assert_array_equal(by_native(data, view, size), with_vectors)


def test_the_decoder_is_available_if_it_was_built() -> None:
    assert native.is_available()


def test_an_incompatible_libjpeg_makes_it_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    # A libjpeg of another version at run time refuses every call.
    monkeypatch.setattr(native.jpeg, "decode", lambda *arguments: 2)
    native.is_available.cache_clear()
    try:
        assert not native.is_available()
    finally:
        native.is_available.cache_clear()


def test_a_package_without_the_extension_can_be_imported() -> None:
    code = (
        "import sys; sys.modules['lars_train.data.decode.jpeg'] = None\n"
        "from lars_train.data.decode import native; assert not native.is_available() and native.size_of(b'') is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_photographs_of_imagenet_have_pillows_pixels() -> None:
    root = os.environ.get("LARS_TEST_DATA")
    if not root or not (Path(root) / "imagenet_sample").is_dir():
        pytest.skip("LARS_TEST_DATA names no folder with imagenet_sample")
    files = sorted((Path(root) / "imagenet_sample" / "train").glob("*/*.JPEG"))
    assert files
    view, rng, differences = View("inception", 224, True, 0, 0.875), np.random.default_rng(0), []
    for file in files:
        data = file.read_bytes()
        image = whole_image(data)
        for drawn in (view.evaluate(*image.size), view.train(*image.size, rng.random(UNIFORMS).tolist())):
            found = by_native(data, drawn, 224)
            np.testing.assert_array_equal(found, columns_first_view(image, drawn, 224), err_msg=str(file))
            difference = np.abs(found.astype(int) - pillow_view(image, drawn, 224))
            assert difference.max() <= 1, file
            differences.append(difference.mean())
    assert np.mean(differences) < 0.05
