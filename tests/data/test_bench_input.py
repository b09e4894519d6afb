"""scripts/bench/input/bench_input.py: from end to end on a few made-up pictures, and its parts one by one."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lars_train.data.decode import native
from lars_train.data.transforms import Geometry
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent

# A peer is what torchvision will leave to torchcodec.
pytestmark = pytest.mark.filterwarnings("ignore:.*TorchVision are deprecated:DeprecationWarning")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STORES = ("as they are", "packed, longer side at most 500", "packed, shorter side 256")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench" / "input"))


def photograph(number: int, size: tuple[int, int] = (400, 300)) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures in two class folders."""
    for number, size in enumerate([(400, 300), (300, 410), (640, 320), (701, 500)]):
        path = tmp_path / "pictures" / "train" / "aabb"[number] / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photograph(number, size))
    return tmp_path / "pictures"


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """The cells of each row, by store and contender."""
    found, store = {}, ""
    for line in page.splitlines():
        if line.startswith("Pictures "):
            store = line.removeprefix("Pictures ").split(", mean")[0]
        elif line.startswith("End to end"):
            store = "end to end"
        elif line.startswith("| "):
            name, *cells = (cell.strip() for cell in line.strip("| ").split("|"))
            key = name if store != "end to end" else f"{name}, {cells.pop(0)}"
            found[store, key] = cells
    return found


def number_in(cell: str) -> float:
    return float(cell.split(" (")[0].replace(",", ""))


@pytest.mark.slow
def test_one_command_measures_every_contender_and_writes_page_and_plot(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(photograph(number, (400, 300 + number)))
    (tmp_path / "in" / "broken.jpg").write_bytes(photograph(3)[:-300])
    (tmp_path / "page.md").write_text("before\n<!-- bench_input: begin -->\nold\n<!-- bench_input: end -->\nafter\n")
    command = [
        sys.executable,
        str(SCRIPTS / "bench" / "input" / "bench_input.py"),
        str(tmp_path / "in"),
        "--rounds",
        "1",
        "--peers",
    ]
    command += ["--write", str(tmp_path / "page.md"), "--plot", str(tmp_path / "results" / "input")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = (tmp_path / "page.md").read_text()
    assert done.stdout.strip() in page
    assert "old" not in page
    assert "(results/input.svg)" in page
    assert (tmp_path / "results" / "input.png").stat().st_size > 0
    assert " 3 pictures, files, " in page
    rows = rows_of(page)
    ours = ["ours, Pillow", *(["ours, native"] if native.is_available() else [])]
    names = ["reference", *ours, "torchvision v2, Pillow", "torchvision v2, tensor", "Pillow, draft"]
    for store in STORES:
        for name in [*names, *([] if "skipped: floor" in page else ["floor"])]:
            cells = rows[store, name]
            assert all(number_in(cells[column]) > 0 for column in (0, 1, 4, 5))
            assert name == "floor" or cells[3] != "-"
    assert [rows["as they are", "reference"][column] for column in (1, 5)] == ["1.00 (1.00 to 1.00)"] * 2
    for peer in ("OpenCV, area", "DALI, image_slice", "tf.data, decode_and_crop_jpeg", "pillow-simd"):
        assert (("as they are", peer) in rows) != (f"- skipped: {peer}: " in page)
    for kind in ["reference", *(f"{name}, {kind}" for name in ours for kind in ("threads", "processes"))]:
        for workers in ("1", "2"):
            assert all(number_in(cell) > 0 for cell in rows["end to end", f"{kind}, {workers}"])
    if native.is_available():
        assert page.count(" times the fastest of the ") == 6
        assert page.count("of 6 views by ours, native differ from Pillow's, by at most") == 3


def test_zip_and_packed_store_give_the_bytes_of_the_folder(folder: Path, tmp_path: Path) -> None:
    from bench_input_pictures import open_pictures

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
        for path in sorted(folder.rglob("*.JPEG")):
            file.write(path, path.relative_to(folder))
    pack(Request(str(folder / "train"), str(tmp_path / "store"), Encoding()), silent)
    pack(Request(str(folder / "train"), str(tmp_path / "small"), Encoding(short=256)), silent)
    wanted = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))]
    for path, kind in ((folder, "files"), (tmp_path / "all.zip", "zip"), (tmp_path / "store", "tar shards")):
        found = open_pictures(path, 10)
        assert kind in found.kind
        assert [found.source.read(i) for i in range(len(found.source))] == wanted
        assert found.variant == ""
    assert open_pictures(tmp_path / "small", 10).variant == "short=256 quality=90"
    every_other = open_pictures(folder, 2).source
    assert [every_other.read(i) for i in range(len(every_other))] == wanted[::2]


def test_a_place_without_jpegs_is_refused_with_its_name(tmp_path: Path) -> None:
    from bench_input_pictures import open_pictures

    from lars_train.errors import ConfigError

    (tmp_path / "no.jpg").write_bytes(b"no")
    with pytest.raises(ConfigError, match="there is no JPEG"):
        open_pictures(tmp_path, 10)
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_pictures(tmp_path / "nowhere", 10)


# DCT-scaled decoding is another filter; a box or a flip that is not the same gives far more than that.
@pytest.mark.parametrize(
    ("name", "mean", "most"),
    [("torchvision v2, Pillow", 0, 0), ("torchvision v2, tensor", 0.1, 2), ("Pillow, draft", 4, 40)],
)
def test_peers_of_torchvision_and_pillow_make_the_references_pixels(
    folder: Path, name: str, mean: float, most: int
) -> None:
    from bench_input import rows
    from bench_input_contenders import TASKS, full_decode, of_bytes
    from bench_input_peers import BY_VIEW
    from bench_input_pictures import open_pictures

    pictures = open_pictures(folder, 10).source
    peer = of_bytes(name, BY_VIEW[name][1]())
    assert peer.views is not None
    for task in TASKS:
        for number in range(3):
            for one, other in zip(peer.views(task, pictures, number), full_decode(task, pictures, number), strict=True):
                apart = np.abs(rows(one).astype(int) - other)
                assert apart.mean() <= mean
                assert apart.max() <= most


def test_torchs_interpolation_of_whole_pictures_is_the_references(folder: Path) -> None:
    from bench_input import rows
    from bench_input_contenders import TASKS, drawings, full_decode
    from bench_input_decoders import from_region, interpolated
    from bench_input_pictures import open_pictures

    pictures = open_pictures(folder, 10).source
    for task in TASKS:
        for (data, drawn), wanted in zip(drawings(task, pictures, 1), full_decode(task, pictures, 1), strict=True):
            pixels = np.array(Image.open(io.BytesIO(data)))
            view = drawn(pixels.shape[1], pixels.shape[0])
            assert np.abs(rows(interpolated(pixels, view)).astype(int) - wanted).max() <= 2
            if task == "train":
                left, top, right, bottom = view.box
                region = rows(from_region(pixels[top:bottom, left:right], view.flip))
                assert np.abs(region.astype(int) - wanted).max() <= 2


def test_the_window_of_an_evaluation_is_the_centre_of_the_picture() -> None:
    from bench_input_contenders import VIEW, window

    # The shorter side becomes 256, of which 224 are shown: 7/8 of 512 pixels.
    assert window(VIEW.evaluate(1024, 512)) == (288, 32, 736, 480)
    assert window(VIEW.evaluate(256, 256)) == (16, 16, 240, 240)
    assert window(Geometry((5, 7, 105, 307), (224, 224), 0, (0, 0), True)) == (5, 7, 105, 307)


def test_a_peer_that_is_not_there_or_fails_is_left_out_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_input_peers
    from bench_input_pictures import open_pictures

    def absent() -> Any:
        raise ModuleNotFoundError("No module named 'absent'")

    def fails() -> Any:
        def view(data: bytes, drawn: object) -> Any:
            raise RuntimeError("no such mode")

        return view

    works = bench_input_peers.BY_VIEW["torchvision v2, Pillow"]
    monkeypatch.setattr(
        bench_input_peers, "BY_VIEW", {"one": ("absent", absent), "two": ("two", fails), "three": works}
    )
    monkeypatch.setattr(bench_input_peers, "BY_PASS", {})
    skipped: list[str] = []
    found = bench_input_peers.line_up(tmp_path, open_pictures(folder, 10).source, tmp_path / "nowhere", skipped)
    assert [peer.name for peer in found] == ["three"]
    assert found[0].versions.startswith("torchvision 0.")
    assert [reason.partition(":")[0] for reason in skipped] == ["one", "two", "pillow-simd"]
    assert "No module named 'absent' (pip install absent)" in skipped[0]
    assert "no such mode" in skipped[1]
    # Pillow itself is the one that it was.
    assert sys.modules["PIL.Image"] is Image


def made_up() -> Any:
    from bench_input_results import Apart, Results

    results = Results({"as they are": 1e5}, ["reference", "ours, native", "floor", "peer"])
    for task in ("train", "eval"):
        key = "as they are"
        results.rates["reference", task, key] = np.array([100.0, 200.0, 100.0])
        results.rates["ours, native", task, key] = np.array([260.0, 500.0, 270.0])
        results.rates["floor", task, key] = np.array([325.0, 640.0, 330.0])
        results.apart["ours, native", task, key] = Apart(0.01, 1, 2, 3)
    results.rates["peer", "train", "as they are"] = np.array([261.0, 400.0, 262.0])
    return results


def test_tables_and_comparisons_are_medians_of_each_rounds_ratio() -> None:
    from bench_input_results import comparisons, tables

    results = made_up()
    row = next(line for line in tables(results) if line.startswith("| ours, native"))
    # The ratios of the rounds are 2.6, 2.5 and 2.7.
    assert row.split(" | ")[1:5] == ["270", "2.60 (2.52 to 2.68)", "0.80", "0.010, 1"]
    assert next(line for line in tables(results) if line.startswith("| peer")).endswith("| - | - | - | - |")
    # The only peer measured training alone; the reference is none.
    assert list(comparisons(results)) == [
        "- train, as they are: ours, native is 1.03 times the fastest of the 1 peers measured, peer",
        "- pixels, as they are: 4 of 6 views by ours, native differ from Pillow's, by at most 1 level(s), "
        "mean difference 0.0100",
    ]


def test_the_plot_names_every_contender_and_store(tmp_path: Path) -> None:
    from bench_input_plot import draw

    png, svg = draw(made_up(), tmp_path / "new" / "input")
    assert Image.open(png).size[0] > 1000
    text = svg.read_text()
    for word in ("reference", "ours, native", "floor (no resizing)", ">peer<", "pictures as they are"):
        assert word in text
    again = svg.read_bytes()
    draw(made_up(), tmp_path / "new" / "input")
    assert svg.read_bytes() == again
