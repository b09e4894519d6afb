"""Each benchmark script runs on a tiny case, and writes its results between the markers of a page."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import environment

from lars_train.data.decode import native

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TINY = "--images 8 --size 16"
RUN = (
    "data.image_size=16 data.num_classes=10 model=tiny model.ghost_batch=4 batch.size=8 log_every=5 precision=fp32 "
    "launch.threads=1"
)


def run(script: str, *arguments: str) -> str:
    """Run a script and return its output. The timeout allows for a busy machine."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measure(folder: Path, script: str, *arguments: str, marker: str = "") -> list[list[str]]:
    """Run a script that writes into a page, and return the rows of the page's tables as lists of cells."""
    name, page = Path(script).stem, folder / "page.md"
    marker = marker or name
    page.write_text(f"before\n<!-- {marker}: begin -->\nold\n<!-- {marker}: end -->\nafter\n")
    run(script, *arguments, "--write", str(page))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def number(cell: str) -> float:
    """Return the first number of a cell."""
    return float(re.split(r"[ %]", cell)[0].replace(",", ""))


def test_bench_step_has_a_row_for_each_contender(tmp_path: Path) -> None:
    names = ["(c) best bare, eager", "(d) lars-train"]
    options = f"--case small {TINY} --threads 1 --starts 1 --rounds 2 --seconds 0 --only".split()
    _, *rows = measure(tmp_path, "bench/bench_step.py", *options, *names)
    assert [row[0] for row in rows] == names
    assert all(number(cell) > 0 for row in rows for cell in (row[1], row[5], row[6]))


def test_a_sweep_has_a_row_for_each_configuration_failed_or_not() -> None:
    ours, timm = "(d) lars-train", "(b) timm"
    options = "--case small --size 16 --threads 1 --ghost 4 --sweep 8 4 --rounds 2 --seconds 0 --only".split()
    output = run("bench/bench_step.py", *options, ours, timm)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| (")]
    expected = [(ours, "8", "4"), (timm, "8", "-"), (ours, "8", "8"), (ours, "4", "4"), (timm, "4", "-")]
    assert [tuple(row[:3]) for row in rows] == expected
    assert all((row[3] == "LookupError: timm has no such network") == (row[0] == timm) for row in rows)


def test_bench_reduction_compares_updates_without_exchange(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    options = "--case small --images 4 --size 16 --accumulation 2 --rounds 2 --seconds 0".split()
    _, (_, micro_batches, *times) = measure(tmp_path, "bench/bench_reduction.py", *options)
    assert micro_batches == "2 x 4"
    assert all(number(cell) > 0 for cell in times)


def test_profile_step_accounts_for_the_whole_step(tmp_path: Path) -> None:
    options = f"--case small {TINY} --updates 1 --threads 1".split()
    rows = measure(tmp_path, "bench/profile_step.py", *options)
    shares = {row[0]: [number(cell) for cell in row[1:] if cell] for row in rows if "%" in row[1]}
    assert sum(map(sum, shares.values())) == pytest.approx(100, abs=0.1 * len(shares))
    assert shares["convolutions"][1] > 0


def test_ghost_batches_and_lars_do_not_multiply_the_launches(tmp_path: Path) -> None:
    found = {}
    for ghosts in ("2", "4"):
        rows = measure(tmp_path, "bench/count_launches.py", "--model", "resnet18", "--size", "32", "--ghosts", ghosts)
        found[ghosts] = [[int(number(cell)) for cell in row[1:]] for row in rows[1:4]]
    assert found["2"] == found["4"]
    bare, one, several = found["4"]
    # ResNet-18 has 20 batch norms. Each adds three launches (zeros for its statistics, two sums) where torch has one
    # (the batch count). The bare row counts the two launches of the loss as forward pass, the others as the rest.
    assert one[0] - bare[0] == 20 * (3 - 1) - 2
    assert one[2] == several[2] <= 25
    assert several[3] < 30


def test_bench_trainer_has_a_row_for_a_run(tmp_path: Path) -> None:
    options = ["--case", "small", "--intervals", "1", *RUN.split()]
    _, (name, update, _, around, share) = measure(tmp_path, "bench/bench_trainer.py", *options)
    assert name == "small, 8 x 16 x 16, fp32, a log line each 5 updates"
    assert 0 < number(around) < number(update)
    assert number(share) == pytest.approx(100 * number(around) / number(update), abs=0.5)


def test_bench_startup_times_every_stage(tmp_path: Path) -> None:
    rows = measure(tmp_path, "bench/bench_startup.py", "--rounds", "1", "--model", "tiny")
    times = [number(row[1]) for row in rows[1:]]
    assert len(times) == 7
    assert times[1] < times[2] <= times[3] <= times[4] <= times[5]


def test_bench_index_reports_time_and_memory() -> None:
    output = run("bench/bench_index.py", *"--images 2000 --processes 2".split())
    assert output.startswith("2,000 training images")
    assert "2 processes hold" in output


def photograph(seed: int, size: tuple[int, int]) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def test_bench_input_measures_every_contender_on_every_store(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        (tmp_path / "in" / f"{seed}.jpg").write_bytes(photograph(seed, (400, 300 + seed)))
    (tmp_path / "in" / "broken.jpg").write_bytes(photograph(3, (400, 300))[:-300])
    options = [str(tmp_path / "in"), "--rounds", "1", "--peers", "--plot", str(tmp_path / "results/input")]
    rows = measure(tmp_path, "bench/input/bench_input.py", *options)
    page = (tmp_path / "page.md").read_text()
    assert "(results/input.svg)" in page
    assert (tmp_path / "results/input.png").stat().st_size > 0
    assert " 3 images, files, " in page
    ours = ["ours, Pillow", *(["ours, native"] if native.is_available() else [])]
    for name in ("reference", *ours, "torchvision v2, Pillow", "torchvision v2, tensor", "Pillow, draft"):
        of_stores = [row for row in rows if row[0] == name and len(row) == 9]
        assert len(of_stores) == 3
        assert all(number(row[column]) > 0 for row in of_stores for column in (1, 2, 5, 6))
    for peer in ("OpenCV, area", "DALI, image_slice", "tf.data, decode_and_crop_jpeg", "pillow-simd"):
        assert any(row[0] == peer for row in rows) != (f"- skipped: {peer}: " in page)
    for kind in ("reference", *(f"{name}, {kind}" for name in ours for kind in ("threads", "processes"))):
        assert [row[1] for row in rows if row[0] == kind and len(row) == 6] == ["1", "2"]
    if native.is_available():
        assert page.count(" times the fastest of the ") == 6
        assert page.count("of 6 views by ours, native differ from Pillow's, by at most") == 3
