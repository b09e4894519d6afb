"""reproduce_scaled_table.py: a small study from end to end, and one that goes on from its records elsewhere."""

from __future__ import annotations

import importlib
import io
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from program import environment

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "results" / "reproduce_scaled_table.py"
RUNS = {"table-256-sgd-recipe-seed0", *(f"table-{row}-lars-recipe-seed0" for row in ("8k", "16k", "32k"))}
RUNS.add("table-32k-sgd-12.8-seed0")


def pictures(path: Path, train: int, test: int) -> None:
    """A .zip of two classes of noise that differ in brightness."""
    draw = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train), ("test", test)):
            for number in range(count):
                label = number % 2
                pixels = draw.integers(100 * label, 100 * label + 156, (32, 32, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG")
                archive.writestr(f"{split}/{label}/{number:04d}.jpg", file.getvalue())


def table_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("|")]


def test_the_plateau_of_a_sweep_ends_where_straight_lines_between_its_points_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    module = importlib.import_module("scaled_results")

    def near(*found: float | None) -> tuple[float | None, float | None]:
        result: tuple[float | None, float | None] = module.plateau(
            [module.Point(lr, top1, False) for lr, top1 in zip((1.0, 10.0, 100.0), found, strict=True)], 2.0
        )
        return result

    # Half way down on a logarithmic axis: the square root of ten times the rate.
    assert near(76.0, 80.0, 76.0) == pytest.approx((10**0.5, 10**1.5))
    # A quarter of the way down to the last one, which is itself beyond the best's neighbour.
    assert near(80.0, 79.0, 75.0) == (None, pytest.approx(10**1.25))
    assert near(80.0, 79.0, None) == (None, 10.0)
    assert near(79.0, 80.0, 79.0) == (None, None)
    assert near(None, 50.0, None) == (10.0, 10.0)


def test_the_baseline_is_the_cell_that_was_chosen_without_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    module = importlib.import_module("scaled_results")
    cell = {"batch": 10, "optimizer": "sgd", "lr": 0.1, "recipe": False, "diverged": 0}
    found = [
        module.Result(row="256", final=(70.0, 72.0), best=(75.0, 75.0), baseline=True, **cell),
        module.Result(row="256", final=(80.0, 82.0), best=(83.0, 83.0), baseline=False, **cell),
    ]
    apart = [line.split(" | ")[6] for line in module.result_table(found)[2:]]
    assert apart == ["+0.00", "+10.00"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--data nowhere.zip", "no such file"),
        ("--data text", "neither a folder nor a .zip"),
        ("--data empty", "has not the folders train/"),
        ("--data set.zip --write text", "is no folder"),
        ("--data set.zip --runs text", "is no folder"),
        ("--data set.zip --write text/below", "or is in none"),
        ("--data set.zip --write foreign", "not of this script"),
        ("--data set.zip --write reported", "not of this script"),
        ("--data set.zip --write pictured", "curves.png"),
        ("--data set.zip --write others", "without images.txt"),
        ("--data set.zip --runs new/runs --write new", "where the runs are"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("reproduce_scaled_table")
    pictures(tmp_path / "set.zip", 2, 2)
    (tmp_path / "empty").mkdir()
    for name in ("foreign/README.md", "reported/report/table.md", "pictured/curves.png", "others/runs/mine/final.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("of another\n")
    (tmp_path / "text").write_text("no archive")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments.split()])
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(SystemExit) as refused:
        script.main()
    assert refused.value.code == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_told_apart_and_a_folder_is_its_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    described = importlib.import_module("scaled_images").described
    pictures(tmp_path / "set.zip", 6, 2)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        archive.extractall(tmp_path / "folder")
    assert described(tmp_path / "folder") == described(tmp_path / "set.zip")
    (one, *_) = (tmp_path / "folder").rglob("*.jpg")
    one.write_bytes(one.read_bytes() + b"0")
    assert described(tmp_path / "folder") != described(tmp_path / "set.zip")


@pytest.mark.parametrize("name", ["data/plain-1.zip", "my data=1, (x)/tiny.zip", "it's", "back\\", "a\\'b", "ünï"])
def test_a_path_reaches_hydra_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = importlib.import_module("reproduce_scaled_table")
    (override,) = OverridesParser.create().parse_overrides([f"data.root={script.quoted(name)}"])
    assert override.value() == name


@pytest.mark.slow
def test_records_of_ended_runs_stand_for_them_anywhere_and_those_of_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "set.zip", 64, 22)
    arguments = "--data set.zip --quick --epochs 1 --write page".split()
    first = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0, first.stdout + first.stderr
    rows = [line.split(" | ") for line in table_of(first.stdout)[2:]]
    assert [row[0] for row in rows] == ["| 256", "| 8K", "| 16K", "| 32K", "| 32K"]
    records = tmp_path / "page" / "runs"
    assert {path.name for path in records.iterdir() if path.is_dir()} == RUNS
    page = (tmp_path / "page" / "README.md").read_text()
    assert all(" | ".join(row) in page for row in rows)
    assert (tmp_path / "page" / "report" / "table.md").exists()
    drawn = (tmp_path / "page" / "curves.svg").read_text()
    assert [drawn.count(f">{row}, lr ") for row in ("256", "8K", "16K", "32K")] == [2, 1, 1, 2]
    # Of the 22 test images, as the runs' own files have it.
    for run, row in zip(("256-sgd-recipe", "32k-sgd-12.8"), (rows[0], rows[-1]), strict=True):
        lines = (records / f"table-{run}-seed0" / "metrics.jsonl").read_text().splitlines()
        (evaluated,) = [json.loads(line) for line in lines if "val/top1" in line]
        assert evaluated["val/count"] == 22
        assert row[4] == f"{evaluated['val/top1']:.2f}"

    # On another machine, where no run was made: nothing is trained, the page is the same.
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    script = importlib.import_module("reproduce_scaled_table")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments, "--runs", "elsewhere"])
    script.main()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["images.txt"]
    assert (tmp_path / "page" / "README.md").read_text() == page
    assert table_of(capsys.readouterr().out) == table_of(first.stdout)

    # What else lies beside the records stays.
    (records / "precious").mkdir()
    script.main()
    assert {path.name for path in records.iterdir() if path.is_dir()} == RUNS | {"precious"}

    # Other images: refused before anything is made, whether runs or records are there.
    pictures(tmp_path / "other.zip", 64, 24)
    for folders in (["--runs", "runs/scaled-set-quick"], ["--runs", "third", "--write", "page"]):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--data", "other.zip", "--quick", "--epochs", "1", *folders])
        with pytest.raises(SystemExit) as refused:
            script.main()
        assert refused.value.code == 2
        assert "other images" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()

    # A record, or a run, with another setting is of another run: not taken for this one, and not written over.
    run = script.Run(script.Cell("32k", "sgd", 12.8), 0, choice=False)
    data = [*script.FOLDER, "data.root=/elsewhere/set.zip"]
    found = script.Study(data, tmp_path / "elsewhere", 1, 1, records).final(run)
    assert found == json.loads((records / run.name / "final.json").read_text())
    record = records / run.name / "run.json"
    record.write_text(record.read_text().replace("optimizer.lr=12.8", "optimizer.lr=1.6"))
    for epochs, told in ((1, "optimizer.lr=1.6 there, optimizer.lr=12.8 wanted"), (2, "epochs=2")):
        for folder, other in ((tmp_path / "elsewhere", records), (records, None)):
            with pytest.raises(SystemExit):
                script.Study(data, folder, epochs, 1, other).final(run)
            assert told in capsys.readouterr().err
    record.write_text(record.read_text().replace("optimizer.lr=1.6", "optimizer.lr=12.8"))
    for file, text in (("final.json", "{}"), ("final.json", "[]"), ("run.json", "{")):
        (record.parent / file).write_text(text)
        with pytest.raises(SystemExit):
            script.Study(data, tmp_path / "elsewhere", 1, 1, records).final(run)
        assert str(record.parent) in capsys.readouterr().err
