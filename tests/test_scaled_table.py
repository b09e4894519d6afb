"""reproduce_scaled_table.py: a small study runs from start to end, and a second start trains nothing."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import start

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "results" / "reproduce_scaled_table.py"
RUNS = {"table-256-sgd-recipe-seed0", *(f"table-{row}-lars-recipe-seed0" for row in ("8k", "16k", "32k"))}
RUNS.add("table-32k-sgd-12.8-seed0")


def write_images(path: Path, train: int, test: int) -> None:
    """Write a zip with images of two classes: noise of different brightness."""
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train), ("test", test)):
            for number in range(count):
                label = number % 2
                pixels = generator.integers(100 * label, 100 * label + 156, (32, 32, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                archive.writestr(f"{split}/{label}/{number:04d}.jpg", file.getvalue())


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("|")]


def test_a_plateaus_ends_are_interpolated_linearly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.syspath_prepend(SCRIPT.parents[1])
    module = importlib.import_module("scaled_report")

    def near(*found: float | None) -> tuple[float | None, float | None]:
        points = [module.Point(lr, top1, False) for lr, top1 in zip((1.0, 10.0, 100.0), found, strict=True)]
        result: tuple[float | None, float | None] = module.plateau(points)
        return result

    # The limit of 78 is halfway to either neighbor: on the logarithmic axis, a factor of the square root of ten.
    assert near(76.0, 80.0, 76.0) == pytest.approx((10**0.5, 10**1.5))
    # The limit of 78 is a quarter of the way from 79 at a rate of 10 to 75 at 100.
    assert near(80.0, 79.0, 75.0) == (None, pytest.approx(10**1.25))
    assert near(80.0, 79.0, None) == (None, 10.0)
    assert near(79.0, 80.0, 79.0) == (None, None)
    assert near(None, 50.0, None) == (10.0, 10.0)


def test_a_folder_with_another_page_is_rejected_and_unchanged(tmp_path: Path) -> None:
    write_images(tmp_path / "set.zip", 2, 2)
    (tmp_path / "README.md").write_text("another page\n")
    done = start([sys.executable, str(SCRIPT), "--data", "set.zip", "--write", "."], tmp_path)
    assert done.returncode == 2
    assert "choose another folder" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "set.zip"]
    assert (tmp_path / "README.md").read_text() == "another page\n"


@pytest.mark.slow
def test_a_second_start_trains_nothing(tmp_path: Path) -> None:
    write_images(tmp_path / "set.zip", 64, 22)

    def study(epochs: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *"--data set.zip --quick --write page --epochs".split(), epochs]
        return start(command, tmp_path)

    first = study("1")
    assert first.returncode == 0, first.stdout + first.stderr
    output = first.stdout
    rows = [line.split(" | ") for line in table_of(output)[2:]]
    assert [row[0] for row in rows] == ["| 256", "| 8K", "| 16K", "| 32K", "| 32K"]
    runs, records = tmp_path / "runs/scaled-set-quick", tmp_path / "page/runs"
    assert {path.name for path in records.iterdir()} == RUNS
    page = (tmp_path / "page/README.md").read_text()
    assert all(" | ".join(row) in page for row in rows)
    assert (tmp_path / "page/report/table.md").exists()
    curves = (tmp_path / "page/curves.svg").read_text()
    assert [curves.count(f">{row}, lr ") for row in ("256", "8K", "16K", "32K")] == [2, 1, 1, 2]
    # Top-1 is that of the 22 test images in the run's own log; records name no host and no folder.
    for run, row in zip(("256-sgd-recipe", "32k-sgd-12.8"), (rows[0], rows[-1]), strict=True):
        lines = (records / f"table-{run}-seed0/metrics.jsonl").read_text().splitlines()
        (evaluated,) = [json.loads(line) for line in lines if "val/top1" in line]
        assert evaluated["val/count"] == 22
        assert row[4] == f"{evaluated['val/top1']:.2f}"
        record = json.loads((records / f"table-{run}-seed0/run.json").read_text())
        assert all({"host", "directory", "executable"}.isdisjoint(one) for one in record["started"])

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")}
    assert table_of(study("1").stdout) == table_of(output)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")} == before
    assert (tmp_path / "page/README.md").read_text() == page

    done = study("2")
    assert done.returncode == 2
    assert "epochs" in done.stderr
    assert (tmp_path / "page/README.md").read_text() == page
