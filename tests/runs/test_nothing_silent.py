"""Every mode reports skipped files and the split it uses, and accepts class names that are not UTF-8."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lars_train import commands
from lars_train.config import Config, resolve
from lars_train.errors import NotReady
from lars_train.pack.lars_data import main as stores
from lars_train.preflight import check
from lars_train.report.lars_report import main as report
from lars_train.training.run_directory import Invocation

CLASSES = (b"cat", b"n\xff\xfe")
SHOWN = "n\\xff\\xfe"
SKIPPED = {".avif files": 1, ".txt files": 2, "@eaDir folders": 1, "images outside class folders": 1}
LINES = [
    "validation: Valid; not used: test",
    "skipped: 2 .txt files, 1 .avif file, 1 @eaDir folder, 1 image outside class folders",
]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 50, 90)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 16 + 4 images of two classes with odd files among them, and train on them."""
    root = tmp_path_factory.mktemp("odd")
    files = {b"train/cat/x.avif": b"", b"train/x.txt": b"", b"Valid/cat/x.txt": b"", b"train/x.jpg": b""}
    files |= {b"train/cat/@eaDir/x.jpg": b"", b"test/cat/1.jpg": b""}
    for split, count in ((b"train", 8), (b"Valid", 2)):
        files |= {b"%s/%s/%d.png" % (split, c, i): png(20 * i) for c in CLASSES for i in range(count)}
    for name, content in files.items():
        path = root / "data" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run(root, "train")
    return root


def run(root: Path, mode: str, **changes: Any) -> dict[str, Any]:
    values = {
        "mode": mode,
        "epochs": 1,
        "device": "cpu",
        "compile": False,
        "batch": {"size": 8},
        "recipe": {"rows": {"32k": {}}},
        "run": {"dir": str(root / "run")},
        "data": {"name": "folder", "root": str(root / "data"), "image_size": 16, "workers": 0},
        "model": {"name": "small", "ghost_batch": 4},
        "optimizer": {"lr": 0.1},
        "schedule": {"warmup_epochs": 0.0},
        "precision": {"name": "fp32"},
        "launch": {"threads": 1, "nproc": 1},
        "check": {"seconds": 0.05, "samples": 8},
    }
    raw = OmegaConf.merge(OmegaConf.structured(Config), values)
    for key, value in changes.items():
        OmegaConf.update(raw, key.replace("__", "."), value)
    assert isinstance(raw, DictConfig)
    return commands.run(resolve(raw), Invocation(("lars-train",)))


def reported(text: str) -> list[str]:
    """Return those of `LINES` that occur in `text`, in the order of `text`."""
    return [expected for line in text.splitlines() for expected in LINES if line.endswith(expected)]


def test_a_run_reports_and_records_split_and_skipped_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, "train", run__dir=str(tmp_path / "run"))
    assert reported(capsys.readouterr().out) == LINES
    record = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert {
        "train_images": 16,
        "val_images": 4,
        "classes": 2,
        "train": "train",
        "val": "Valid",
    }.items() <= record.items()
    assert (record["unused"], record["skipped"]) == (["test"], SKIPPED)


def test_an_evaluation_reports_its_split_and_names_every_class(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder, "evaluate", checkpoint__path=str(folder / "run"), evaluate__report=str(tmp_path / "report"))
    # An evaluation reads only the validation images.
    printed = capsys.readouterr().out
    assert reported(printed) == LINES[:1]
    assert "skipped: 1 .txt file\n" in printed
    assert (found["val/count"], found["read"]["skipped"]) == (4, {".txt files": 1})
    with (tmp_path / "report" / "per_class.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["cat", SHOWN]
    assert (tmp_path / "report" / "confusion.png").stat().st_size > 1000


def test_a_plan_reports_split_and_skipped_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "plan")
    assert reported(capsys.readouterr().out) == LINES


def test_a_check_reports_split_and_skipped_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check.PARTS, "sample", 1e6)
    try:
        findings = run(folder, "check")["findings"]
        assert findings["ranks"][0]["counts"]["inventory"]["skipped"] == SKIPPED
    except NotReady:
        pass
    assert "; ".join(LINES) in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["plan", "check"])
def test_numbers_sorted_as_text_are_reported_before_a_run(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        for number in range(11):
            (tmp_path / "data" / split / str(number)).mkdir(parents=True)
            for image in range(2):
                (tmp_path / "data" / split / str(number) / f"{image}.png").write_bytes(png(number))
    with contextlib.suppress(NotReady):
        run(tmp_path, mode)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("in text order: outputs 0, 1, ... are the classes 0, 1, 10, 2") == 1


def test_pack_verify_and_info_report_split_and_skipped_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    for command in (["pack", str(folder / "data"), store], ["verify", store], ["info", store]):
        stores([*command, *(["--jobs", "1"] if command[0] != "info" else [])])
        assert reported(capsys.readouterr().out) == LINES
    run(folder, "train", run__dir=str(tmp_path / "run"), data__root=store)
    assert reported(capsys.readouterr().out) == LINES
    classes = json.loads((tmp_path / "store" / "store.json").read_text())["splits"]["train"]["classes"]
    assert [entry["pictures"] for entry in classes] == [8, 8]


def test_reports_and_exports_escape_class_names(folder: Path, tmp_path: Path) -> None:
    report([str(folder / "run"), "--out", str(tmp_path / "report")])
    assert (tmp_path / "report" / "table.md").exists()
    run(folder, "export", checkpoint__path=str(folder / "run"), export__path=str(tmp_path / "weights.safetensors"))
    raw = (tmp_path / "weights.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["lars_train"])["classes"] == ["cat", SHOWN]
