"""scripts/bench_input.py from end to end, on a few made-up pictures."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lars_train.data import library, native

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_input.py"


@pytest.mark.slow
def test_the_script_measures_every_contender_and_how_far_the_decoders_pixels_are_apart(tmp_path: Path) -> None:
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((400, 300 + number)).save(file, "JPEG")
        (tmp_path / f"{number}.jpg").write_bytes(file.getvalue())
    (tmp_path / "broken.jpg").write_bytes(file.getvalue()[:-300])
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fast = [name for name, module in (("native", native), ("library", library)) if module.is_there()]
    names = ["reference", "ours, Pillow", *(f"ours, {name}" for name in fast), "floor"]
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("| ")]
    measured = {(row[1].split(" (")[0], row[2]): row for row in rows[1:]}
    stores = {"as they are", "longer side at most 500, quality 90", "shorter side 256, quality 90"}
    for store in stores:
        for name in names:
            if name == "floor" and "Skipped: floor" in done.stdout:
                continue
            assert all(float(measured[store, name][column].replace(",", "")) > 0 for column in (3, 4, 6, 7))
    assert [measured["as they are", "reference"][column] for column in (4, 7)] == ["1.00", "1.00"]
    assert " 3 files, " in done.stdout
    whole = {(row[1], row[2]): row for row in rows if len(row) == 8}
    kinds = [f"ours, {name}, {kind}" for name in ("Pillow", *fast) for kind in ("threads", "processes")]
    for name in ["reference", *kinds]:
        for workers in ("1", "2"):
            assert all(float(value.replace(",", "")) > 0 for value in whole[name, workers][3:7])
    assert ("end to end, 2 workers: " in done.stdout) == ("native" in fast)
    assert done.stdout.count("of 6 views differ, by at most") == 3 * len(fast)
    assert done.stdout.count(" times the reference; ") == 6 * len(fast)
    assert all(int(line.split("by at most ")[1][0]) <= 1 for line in done.stdout.splitlines() if "differ, by" in line)
