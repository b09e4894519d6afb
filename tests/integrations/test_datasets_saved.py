"""Folders that Hugging Face's datasets saves are trained on, also after a kill, and evaluated; nothing needs datasets.

Skips without the package: scripts/dev/test_with.sh integrations installs it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from jpegs import synthetic_jpeg
from tiny import ALONE, begin, final, losses, ran

from lars_train.data.dataset import Dataset
from lars_train.data.sources.huggingface import open_huggingface

datasets = pytest.importorskip("datasets")

NAMES = ("cat", "dog", "owl")
RUN = (
    "data=huggingface data.root=saved data.image_size=16 model=small model.ghost_batch=8 precision=fp32 device=cpu "
    "batch.size=16 optimizer.lr=2 epochs=6 log_every=1 launch.threads=1 checkpoint.every_updates=2 data.workers=2"
).split()


def rows(count: int, first: int) -> dict[str, list[Any]]:
    images = [{"bytes": synthetic_jpeg("4:2:0", 20 + first + i, 24), "path": f"{i}.jpg"} for i in range(count)]
    return {"image": images, "label": [i % 3 for i in range(count)]}


def split(count: int, first: int, **kinds: Any) -> Any:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES)), **kinds}
    return datasets.Dataset.from_dict(rows(count, first), features=datasets.Features(features))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    both = datasets.DatasetDict({"train": split(64, 0), "validation": split(24, 100)})
    both.save_to_disk(str(folder / "saved"), num_shards={"train": 3, "validation": 1})
    return folder


def assert_equal(data: Dataset, train: dict[str, list[Any]], val: dict[str, list[Any]]) -> None:
    for source, expected in ((data.train, train), (data.val, val)):
        assert [source.read(i) for i in range(len(source))] == [image["bytes"] for image in expected["image"]]
        assert source.labels.tolist() == expected["label"]


def test_a_saved_data_set_is_read_as_it_is(saved: Path) -> None:
    data = open_huggingface(str(saved / "saved"))
    assert_equal(data, rows(64, 0), rows(24, 100))
    assert data.classes == NAMES


def test_a_shuffled_and_filtered_data_set_is_read(tmp_path: Path) -> None:
    # An indices mapping and images in files, as a data set has after the usual calls and from an image folder.
    for i in range(12):
        path = tmp_path / "images" / NAMES[i % 3] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(synthetic_jpeg("4:2:0", 20 + i, 24))
    files = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=tmp_path)
    taken = files.shuffle(seed=1).select(range(2, 11)).filter(lambda row: row["label"] != -1)
    taken.save_to_disk(str(tmp_path / "saved"))
    expected = taken.cast_column("image", datasets.Image(decode=False))[:]
    data = open_huggingface(str(tmp_path / "saved"), 0.3)
    found = {s.read(i): int(s.labels[i]) for s in (data.train, data.val) for i in range(len(s))}
    stored = {Path(image["path"]).read_bytes() if not image["bytes"] else image["bytes"] for image in expected["image"]}
    assert found.keys() == stored
    assert sorted(found.values()) == sorted(expected["label"])


def test_a_split_made_by_the_package_is_read(tmp_path: Path) -> None:
    split(40, 0).train_test_split(0.25, seed=0).save_to_disk(str(tmp_path / "saved"))
    data = open_huggingface(str(tmp_path / "saved"))
    assert (len(data.train), len(data.val), data.inventory.val) == (30, 10, "test")


def test_a_killed_run_ends_with_the_same_weights(saved: Path) -> None:
    program = begin([*ALONE, *RUN, "run.dir=killed"], saved)
    end = time.monotonic() + 200
    while not (saved / "killed" / "checkpoints" / "update-000000004.pt").exists():
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(program.pid, signal.SIGKILL)
    ran([*ALONE, *RUN, "run.dir=killed", "data.workers=0"], saved)
    ran([*ALONE, *RUN, "run.dir=whole"], saved)
    assert len(json.loads((saved / "killed" / "run.json").read_text())["started"]) == 2
    assert final(saved / "killed")["weights_sha256"] == final(saved / "whole")["weights_sha256"]
    assert losses(saved / "killed") == losses(saved / "whole")
    output = ran([*ALONE, "mode=evaluate", "checkpoint.path=whole", "device=cpu", "launch.threads=1"], saved)
    assert f"top-1 {final(saved / 'whole')['final_top1']:.2f} %" in output
    assert "24 images" in output
