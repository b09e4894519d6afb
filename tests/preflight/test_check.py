"""``mode=check`` on the embedded data, on broken data and on two ranks finds the faults and leaves no file."""

from __future__ import annotations

import io
import os
import pickle
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from resolving import resolved
from tiny import start_ranks

from lars_train import commands
from lars_train.config import Config
from lars_train.errors import NotReady
from lars_train.launch import Ranks
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent
from lars_train.preflight import check, measure_io
from lars_train.preflight.measure_io import marker_file, measure_write_speed, nearest_existing
from lars_train.training.run_directory import Invocation

QUICK = ["mode=check", "check.seconds=0.05", "check.samples=40", "precision=fp32", "launch.threads=1", "device=cpu"]


def config(*settings: str) -> Config:
    return resolved(*QUICK, *settings)


def checked(*settings: str) -> dict[str, Any]:
    return check.check(config(*settings), Ranks())


def jpeg(red: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 50, 90)).save(file, "JPEG")
    return file.getvalue()


def tree(root: Path, *, broken: int = 0) -> Path:
    """Write 24 training and 8 validation images of two classes; the first `broken` ones are truncated."""
    for split, count in (("train", 12), ("val", 4)):
        for name in ("n1", "n2"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                data = jpeg(number)
                whole = split == "val" or name == "n2" or number >= broken
                (folder / f"{number:02d}.JPEG").write_bytes(data if whole else data[:100])
    return root


SMALL = ["model=small", "batch.size=8", "optimizer.lr=1", "model.ghost_batch=4", "data.image_size=16", "epochs=9"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lars_train.preflight.check.say", lambda text: None)
    # The real start of this process, long before the test, would use up the small `check.seconds`.
    monkeypatch.setattr(check, "_process_start", lambda: time.monotonic() + 60)
    monkeypatch.setitem(check.PARTS, "sample", 1e6)
    return tmp_path


def test_the_embedded_data_set_is_ready_and_no_file_remains(folder: Path) -> None:
    found = checked("data=mini")
    assert found["problems"] == []
    assert found["lines"][-1] == "ready"
    assert list(folder.iterdir()) == []
    (rank,) = found["findings"]["ranks"]
    assert {"train": 10_000, "val": 2_000, "classes": 10}.items() <= rank["counts"].items()
    assert rank["sample"]["images"] == 40
    assert rank["sample"]["bad"] == ()
    assert rank["step"]["images_per_s"] > 0
    assert rank["input"]["images_per_s"] > 0
    # Weights and momentum in float32, and little else.
    held = rank["step"]["checkpoint_bytes"]
    assert 2 * rank["step"]["gradient_bytes"] <= held < 2.1 * rank["step"]["gradient_bytes"]
    assert found["findings"]["exchange"] is None
    # Ranks that the launcher starts return it pickled.
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_folder_that_is_not_imagenet_is_not_ready_as_imagenet(folder: Path) -> None:
    root = tree(folder / "data")
    (problem,) = checked("data=imagenet", f"data.root={root}", *SMALL)["problems"]
    assert "is not ImageNet: it has 2 classes and 24 training images" in problem
    found = checked("data=folder", f"data.root={root}", *SMALL, "data.size_schedule=[32,64,0,8]")
    assert found["problems"] == []
    assert any("fits images of 64 pixels; all speeds are for the first epoch's 32" in line for line in found["lines"])


def test_a_store_at_a_url_is_checked_by_its_first_shard(folder: Path) -> None:
    pytest.importorskip("fsspec")
    pack(Request(str(tree(folder / "data")), str(folder / "store"), Encoding(), shards=3), silent)
    cache = ["data.order=shards", "data.window_shards=2", "data.cache_dir=cache", "data.cache_gb=0.001"]
    found = checked("data=folder", f"data.root=file://{folder}/store", *SMALL, *cache)
    assert found["problems"] == []
    (rank,) = found["findings"]["ranks"]
    assert rank["input"]["images_per_s"] == rank["input"]["per_core"] > 0
    (needed,) = (place["needed"] for place in rank["folders"] if place["use"] == "cache")
    # The cache may still grow by a megabyte less what it holds.
    assert 0.9e6 < needed < 1e6


def test_broken_images_are_found_with_their_files(folder: Path) -> None:
    root = tree(folder / "data", broken=2)
    found = checked("data=folder", f"data.root={root}", *SMALL, "check.samples=64")
    (problem,) = found["problems"]
    assert "2 of 32 sampled images" in problem
    for name in ("00", "01"):
        assert str(root / "train" / "n1" / f"{name}.JPEG") in problem


def test_an_error_is_listed_and_the_other_parts_are_measured(folder: Path) -> None:
    found = checked("data=imagenet", "data.root=/nowhere/at/all")
    (problem,) = found["problems"]
    assert "data.root=/nowhere/at/all" in problem
    assert any(line.startswith("checkpoints") and "written at" in line for line in found["lines"])


def test_a_full_disk_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(measure_io.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    (problem,) = checked("data=mini")["problems"]
    assert "a disk has 10 kB free" in problem
    assert "run.dir" in problem


def test_a_limit_on_open_files_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        (problem,) = checked("data=mini")["problems"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "300 files" in problem
    assert "ulimit -n" in problem


def test_another_run_in_the_directory_is_found(folder: Path) -> None:
    taken = folder / "runs" / "mine"
    taken.mkdir(parents=True)
    (taken / "letters.txt").write_text("dear")
    (problem,) = checked("data=mini", "run.name=mine")["problems"]
    assert "holds other files" in problem
    assert os.listdir(taken) == ["letters.txt"]


def test_problems_are_printed_and_the_command_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"lines": ["machine        x", "", "To fix:", "1. this", "2. that"], "problems": ["this", "that"]}
    monkeypatch.setattr(commands, "check", lambda config, ranks: found)
    with pytest.raises(NotReady, match="not ready: 2 problems to fix"):
        commands.run(config("data=mini"), Invocation())
    assert capsys.readouterr().out.endswith("To fix:\n1. this\n2. that\n")


@pytest.mark.slow
def test_two_ranks_are_compared_and_rank_0_ends_with_code_1(folder: Path) -> None:
    root, taken = tree(folder / "data"), folder / "mine"
    taken.mkdir()
    (taken / "letters.txt").write_text("dear")
    settings = [
        "mode=check",
        "check.seconds=0.05",
        "device=cpu",
        "data=folder",
        f"data.root={root}",
        "run.dir=mine",
        *SMALL,
    ]
    done, other = start_ranks([*settings, "precision=fp32", "launch.threads=1"], folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (other.stdout, other.stderr) == ("", "")
    lines = {line[:15].strip(): line[15:] for line in done.stdout.splitlines()}
    assert " 2 ranks" in lines["machine"]
    assert "on 2 ranks" in lines["training step"]
    assert re.match(r"fp32 [1-9]\d{0,2}(\.\d+)? [GT]FLOP/s", lines["precision"])
    assert "ms" in lines["all-reduce"]
    # Both ranks have one clock.
    assert float(lines["clocks"].split()[1]) < 0.5
    problems = done.stdout.partition("To fix:\n")[2].splitlines()
    assert len(problems) == 1
    assert "run directory mine holds other files" in problems[0]
    assert done.stderr.count("lars-train: ") == 1
    assert "lars-train: not ready: 1 problem to fix." in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["data", "mine"]
    assert os.listdir(taken) == ["letters.txt"]


def test_written_bytes_are_counted_and_removed(folder: Path) -> None:
    written, seconds = measure_write_speed(folder, 50_000_000, 60)
    assert written == 50_000_000
    assert seconds > 0
    assert list(folder.iterdir()) == []
    assert measure_write_speed(folder, 1 << 40, 0.0)[0] == 0


def test_a_marker_file_exists_within_its_context_only(folder: Path) -> None:
    place = nearest_existing(folder / "runs" / "deep" / "er")
    assert place == folder
    with marker_file(place) as (name, token):
        assert (folder / name).read_text() == token
    assert list(folder.iterdir()) == []
