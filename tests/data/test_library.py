"""nvImageCodec beside Pillow: its pixels to the last bit, the same judgement of damaged files, threads and forks."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import (
    KINDS,
    Pixels,
    columns_first,
    encode,
    in_one_step,
    made_up,
    not_for_it,
    outcome,
    same_outcome,
    separate_scans,
    views,
    whole_picture,
)
from PIL import Image

from lars_train.data import library
from lars_train.data.augment import UNIFORMS, Geometry, View
from lars_train.data.decode import LIBRARY, PILLOW, BadImage, decode

pytestmark = pytest.mark.skipif(
    library.nvimgcodec() is None or importlib.util.find_spec("numba") is None,
    reason="nvImageCodec or numba is not installed",
)


def by_library(data: bytes, view: Geometry, size: int) -> Pixels:
    """The view, which must have been decoded by it."""
    out = np.full((size, size, 3), 77, np.uint8)
    found = library.size_of(data)
    assert found is not None
    assert library.decode(data, found, view, out)
    return out


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(KINDS), st.booleans(), st.integers(1, 700), st.integers(1, 500), st.booleans(), st.data())
def test_any_view_of_any_kind_has_pillows_pixels(
    kind: str, progressive: bool, width: int, height: int, small: bool, data: st.DataObject
) -> None:
    if small:
        width, height = 1 + width % 40, 1 + height % 40
    jpeg = made_up(kind, width, height, progressive)
    view, size = data.draw(views(width, height))
    if library.needed(view, size) is None:
        return
    picture = whole_picture(jpeg)
    found = by_library(jpeg, view, size)
    np.testing.assert_array_equal(found, columns_first(picture, view, size))
    assert np.abs(found.astype(int) - in_one_step(picture, view, size)).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_crop_at_any_offset_has_the_pixels_of_the_full_decode(kind: str, progressive: bool) -> None:
    # Two blocks of 16 and a narrow rest.
    jpeg = made_up(kind, 36, 35, progressive)
    pixels = np.asarray(whole_picture(jpeg))
    # Progressive ones differ in how coefficients are read, not in what is made of them.
    step = 3 if progressive else 1
    for left, top in itertools.product(range(0, 36, step), range(0, 35, step)):
        # Of any width and height, in step with the offsets.
        box = (left, top, min(36, left + 1 + top % 17), min(35, top + 1 + left % 15))
        wide, high = box[2] - left, box[3] - top
        found = by_library(jpeg, Geometry(box, (wide, high), 0, (0, 0), False), 17)
        np.testing.assert_array_equal(found[:high, :wide], pixels[top : box[3], left : box[2]], err_msg=str(box))
        assert not found[high:].any()
        assert not found[:, wide:].any()


def test_a_tiny_picture_can_become_a_large_view_and_a_large_one_a_pixel() -> None:
    for kind, (width, height), size in itertools.product(KINDS, [(1, 1), (2, 3), (700, 500), (3, 900)], [1, 224]):
        view = Geometry((0, 0, width, height), (size, size), 0, (0, 0), False)
        jpeg = made_up(kind, width, height)
        np.testing.assert_array_equal(by_library(jpeg, view, size), columns_first(whole_picture(jpeg), view, size))


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8))
    turned, plain = encode(picture, exif=exif.tobytes()), encode(picture)
    assert library.size_of(turned) == (28, 20)
    view = Geometry((0, 0, 28, 20), (28, 20), 0, (0, 0), False)
    np.testing.assert_array_equal(by_library(turned, view, 28), by_library(plain, view, 28))


@pytest.mark.parametrize(("name", "data"), list(not_for_it()))
def test_what_is_not_for_it_is_refused_and_judged_by_pillow(name: str, data: bytes) -> None:
    if name == "20,000 x 20,000 pixels":
        found = library.size_of(data)
        assert found == (20_000, 20_000)
    else:
        assert library.size_of(data) is None
    assert same_outcome(data, Geometry((0, 0, 40, 40), (16, 16), 0, (0, 0), False), 16, LIBRARY)


@pytest.mark.parametrize("kind", ["4:2:0", "grey"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_short_anywhere_is_bad_for_both_also_below_the_view(kind: str, progressive: bool) -> None:
    data = made_up(kind, 40, 40, progressive, 40)
    view = Geometry((4, 2, 20, 9), (16, 16), 0, (0, 0), False)
    assert not isinstance(outcome(data, view, 16, LIBRARY), str)
    for length in range(0, len(data)):
        assert same_outcome(data[:length], view, 16, LIBRARY), length
        if length < len(data) - 2:
            assert isinstance(outcome(data[:length], view, 16, LIBRARY), str), length


@pytest.mark.parametrize("kind", KINDS)
def test_a_progressive_picture_without_its_last_scans_is_pillows_which_smooths_it(kind: str) -> None:
    jpeg = made_up(kind, 100, 90, True)
    view = Geometry((20, 20, 40, 40), (16, 16), 0, (0, 0), False)
    starts = [i for i in range(len(jpeg)) if jpeg[i : i + 2] == b"\xff\xda"]
    assert len(starts) > 3
    for number in range(1, len(starts)):
        # Up to where the segments before the next scan begin: tables, if there are any.
        end = jpeg.rfind(b"\xff\xc4", starts[number - 1], starts[number])
        data = jpeg[: end if end > 0 else starts[number]] + b"\xff\xd9"
        assert not library.decode(data, (100, 90), view, np.empty((16, 16, 3), np.uint8))
        pixels = decode(data, lambda w, h: view, 16, decoder=LIBRARY)
        np.testing.assert_array_equal(pixels, in_one_step(whole_picture(data), view, 16))


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["4:2:0", "4:4:4", "grey"]), st.booleans(), st.data())
def test_damaged_files_are_judged_as_pillow_judges_them(kind: str, progressive: bool, data: st.DataObject) -> None:
    item = bytearray(made_up(kind, 40, 40, progressive, 40))
    # From the frame header on: Pillow's own reading of what comes before is another matter.
    first = next(i for i in range(len(item)) if item[i] == 0xFF and item[i + 1] in (0xC0, 0xC2))
    damage = st.tuples(st.integers(first + 9, len(item) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(damage, min_size=1, max_size=3)):
        item[place] = value
    assert same_outcome(bytes(item), Geometry((4, 2, 20, 9), (16, 16), 0, (0, 0), True), 16, LIBRARY)


def test_a_jpeg_of_too_many_scans_is_bad_as_with_pillow() -> None:
    view = Geometry((0, 0, 40, 33), (16, 16), 0, (0, 0), False)
    for data in (separate_scans(3), separate_scans(500)):
        assert same_outcome(data, view, 16, LIBRARY)
    with pytest.raises(BadImage, match="more than 500 scans"):
        decode(separate_scans(501), lambda w, h: view, 16, decoder=LIBRARY)


def test_other_threads_run_while_it_decodes() -> None:
    data = made_up("4:2:0", 1500, 1500)
    package = library.nvimgcodec()
    stream, decoder, parameters = package.CodeStream(data), library._decoder(), library.parameters()
    gate, done = threading.Lock(), []
    gate.acquire()
    other = threading.Thread(target=lambda: done.append(gate.acquire()))
    other.start()
    before = sys.getswitchinterval()
    # Nobody is made to give up the interpreter: the other thread gets it if, and only if, the decoder leaves it.
    sys.setswitchinterval(1000)
    try:
        gate.release()
        for _ in range(100):
            decoder.decode(stream, params=parameters)
            if done:
                break
    finally:
        sys.setswitchinterval(before)
    assert done
    other.join()


def test_threads_do_not_disturb_one_another() -> None:
    jobs = [
        (made_up(kind, 90, 70, progressive), Geometry((i, i, 80, 60), (33, 37), 0, (0, 0), bool(i % 2)))
        for i, (kind, progressive) in enumerate(itertools.product(KINDS, [False, True]))
    ]
    jobs += [(data[:-200], view) for data, view in jobs]
    alone = [outcome(data, view, 32, LIBRARY) for data, view in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            together = pool.map(lambda job: outcome(*job, 32, LIBRARY), jobs)
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


FORKED = """
import os, sys
sys.path.insert(0, "tests")
from jpegs import made_up
from lars_train.data import library
from lars_train.data.augment import Geometry
from lars_train.data.decode import decode
view = Geometry((3, 3, 80, 60), (33, 37), 0, (0, 0), False)
here = decode(made_up("4:2:0", 90, 70), lambda w, h: view, 32, decoder="library")
child = os.fork()
there = decode(made_up("4:2:0", 90, 70), lambda w, h: view, 32, decoder="library")
if child == 0:
    os._exit(0 if (here == there).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_decodes_too_and_nothing_is_said_on_stderr() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], cwd=root, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_package_that_cannot_decode_or_has_another_interface_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.is_there()
    for package in (None, object()):
        library.is_there.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(library, "nvimgcodec", lambda package=package: package)
            assert not library.is_there()
    library.is_there.cache_clear()


@pytest.mark.slow
def test_photographs_of_imagenet_are_within_a_level_of_pillows() -> None:
    root = os.environ.get("LARS_TEST_DATA")
    if not root or not (Path(root) / "imagenet_sample").is_dir():
        pytest.skip("LARS_TEST_DATA names no folder with imagenet_sample")
    files = sorted((Path(root) / "imagenet_sample" / "train").glob("*/*.JPEG"))
    assert files
    view, rng, apart = View("inception", 224, True, 0, 0.875), np.random.default_rng(0), []
    for file in files:
        data = file.read_bytes()
        picture = whole_picture(data)
        for drawn in (view.evaluate(*picture.size), view.train(*picture.size, rng.random(UNIFORMS).tolist())):
            found = by_library(data, drawn, 224)
            np.testing.assert_array_equal(found, columns_first(picture, drawn, 224), err_msg=str(file))
            difference = np.abs(found.astype(int) - in_one_step(picture, drawn, 224))
            assert difference.max() <= 1, file
            apart.append(difference.mean())
    assert np.mean(apart) < 0.05


@pytest.mark.parametrize("missing", ["nvidia.nvimgcodec", "numba"])
def test_without_one_of_its_packages_it_is_not_there(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from lars_train.data import library; assert not library.is_there()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_numba_is_told_not_to_compile_it_is_not_there() -> None:
    code = "from lars_train.data import library; assert not library.is_there()"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "NUMBA_DISABLE_JIT": "1"})


@pytest.mark.slow
def test_compiled_code_that_is_cut_short_or_garbled_is_made_anew(tmp_path: Path) -> None:
    code = "from lars_train.data import library; assert library.is_there()"
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def start() -> dict[Path, int]:
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
        return {file: file.stat().st_size for file in tmp_path.rglob("fixed_point.*.nb?")}

    whole = start()
    assert len(whole) == 8
    for number, file in enumerate(whole):
        file.write_bytes((b"", b"no such thing", file.read_bytes()[: whole[file] // 2])[number % 3])
    start()
    again = start()
    assert again.keys() == whole.keys()
    assert all(again[file] == pytest.approx(size, rel=0.05) for file, size in whole.items())


@pytest.mark.slow
def test_where_nothing_can_be_cached_it_is_compiled_anew(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "from lars_train.data import library; assert library.is_there()"
    # A folder within a file: nobody can make it, not even root.
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_pillow_alone_is_asked_with_another_decoders_name() -> None:
    data, view = made_up("4:2:0", 40, 40), Geometry((4, 2, 20, 9), (16, 16), 0, (0, 0), False)
    np.testing.assert_array_equal(
        decode(data, lambda w, h: view, 16, decoder=PILLOW), in_one_step(whole_picture(data), view, 16)
    )
