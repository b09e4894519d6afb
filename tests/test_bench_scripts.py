"""Each benchmark script runs on a tiny case, and writes its results between the markers of a page."""

from __future__ import annotations

import importlib
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import start

from lars_train.data.decode import native
from lars_train.models import fused_blocks

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(script: str, *arguments: str) -> str:
    """Run a script and return its output."""
    done = start([sys.executable, str(SCRIPTS / script), *arguments], Path.cwd())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def measure(folder: Path, script: str, *arguments: str) -> list[list[str]]:
    """Run a script that writes into a page, and return the rows of the page's tables as lists of cells."""
    name, page = Path(script).stem, folder / "page.md"
    cuda = f"<!-- {name} cuda: begin -->\n<!-- {name} cuda: end -->\nafter\n"
    page.write_text(f"before\n<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n{cuda}")
    run(script, *arguments, "--write", str(page))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"\n{cuda}")
    assert "old" not in text
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]


def number(cell: str) -> float:
    """Return the first number of a cell."""
    return float(re.split(r"[ %]", cell)[0].replace(",", ""))


def test_bench_step_has_a_row_for_each_contender(tmp_path: Path) -> None:
    names = ["(c) best bare, eager", "(d) lars-train", "(d) lars-train, unfused"]
    options = "--case small --images 8 --size 16 --starts 2 --rounds 2 --seconds 0 --only".split()
    _, *rows = measure(tmp_path, "bench/bench_step.py", *options, *names)
    assert [row[0] for row in rows] == names
    assert all(number(cell) > 0 for row in rows for cell in (row[1], row[5]))


def test_the_unfused_contender_runs_without_fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (SCRIPTS, SCRIPTS / "bench"):
        monkeypatch.syspath_prepend(folder)
    steps, seen = importlib.import_module("training_steps"), []
    monkeypatch.setattr(steps, "ours", lambda case: lambda: seen.append(len(fused_blocks._disabled)))
    steps.unfused(steps.CASES["cpu"][1])()
    assert seen == [1]
    assert fused_blocks._disabled == []


def test_a_sweep_has_a_row_for_each_configuration_failed_or_not() -> None:
    ours, timm = "(d) lars-train", "(b) timm"
    options = "--case small --size 16 --ghost 4 --sweep 8 4 --rounds 2 --seconds 0 --only".split()
    output = run("bench/bench_step.py", *options, ours, timm)
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| (")]
    expected = [(ours, "8", "4"), (timm, "8", "-"), (ours, "8", "8"), (ours, "4", "4"), (timm, "4", "-")]
    assert [tuple(row[:3]) for row in rows] == expected
    assert all((row[3] == "LookupError: timm has no such network") == (row[0] == timm) for row in rows)


def test_bench_startup_times_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS / "bench")
    module = importlib.import_module("bench_startup")
    settings = [*module.SETTINGS, "model=tiny", "launch.threads=1"]
    assert module.time_process([sys.executable, "-c", "import time; time.sleep(0.2)"]) > 0.2
    times = module.time_run(settings)
    assert list(times) == [module.DIRECTORY, module.SET_UP, module.FIRST, module.END]
    assert 0 < times[module.DIRECTORY] <= times[module.SET_UP] <= times[module.FIRST] <= times[module.END]
    assert module.time_between_runs(settings) > 0
    # The page has the medians of the rounds after the first, here of known times.
    rounds = iter([9.0, 1.0, 4.0, 2.0])
    monkeypatch.setattr(module, "time_process", lambda command: 0.5)
    monkeypatch.setattr(module, "time_run", lambda settings: dict.fromkeys(times, next(rounds)))
    monkeypatch.setattr(module, "time_between_runs", lambda settings: 3.0)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench_startup: begin -->\n<!-- bench_startup: end -->\n")
    monkeypatch.setattr(sys, "argv", ["bench_startup.py", "--rounds", "3", "--write", str(page)])
    module.main()
    _, *rows = [line.split("|")[-2].strip() for line in page.read_text().splitlines() if line.endswith(") |")]
    constant, varied = "0.50 (0.50 to 0.50)", "2.00 (1.00 to 4.00)"
    assert rows == [constant, constant, *[varied] * 4, "3.00 (3.00 to 3.00)"]


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
    rows = measure(tmp_path, "bench/input/bench_input.py", str(tmp_path / "in"), "--rounds", "1")
    page = (tmp_path / "page.md").read_text()
    assert " 3 images, 1 rounds " in page
    ours = ["ours, Pillow", *(["ours, native"] if native.is_available() else [])]
    for name in ("reference", *ours, "torchvision v2, tensor"):
        of_stores = [row for row in rows if row[0] == name and len(row) == 7]
        assert len(of_stores) == 3
        assert all(number(row[column]) > 0 for row in of_stores for column in (1, 2, 4, 5))
        differences = [row[column].partition(",")[0] for row in of_stores for column in (3, 6)]
        assert all(one == "-" if name == "reference" else float(one) < 0.1 for one in differences)
    for peer in ("TurboJPEG 3, region", "DALI, image_slice"):
        assert any(row[0] == peer for row in rows) != (f"- skipped: {peer}: " in page)
    for kind in ("reference", *(f"{name}, {kind}" for name in ours for kind in ("threads", "processes"))):
        assert [row[1] for row in rows if row[0] == kind and len(row) == 6] == ["1", "2"]


def test_bench_methods_has_a_row_for_each_method(tmp_path: Path) -> None:
    methods = ["model.ema=0.9", "model.blurpool=true loss=bce"]
    options = [*"--rounds 2 --updates 1 --settings".split(), "model=tiny data.image_size=16"]
    _, *rows = measure(tmp_path, "bench/bench_methods.py", *options, *methods)
    assert [row[0] for row in rows] == [f"`{method}`" for method in methods]
    assert all(number(row[1]) > 0 for row in rows)
