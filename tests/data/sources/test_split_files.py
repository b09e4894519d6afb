"""Data sets of parquet files in `data.root` are found, and refused for training with the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.data.sources.split_files import parquet_folders
from lars_train.errors import ConfigError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def found(root: Path) -> dict[str, dict[str, list[str]]]:
    return {
        str(folder.path.relative_to(root)): {
            word: [str(file.relative_to(folder.path)) for file in files] for word, files in folder.files.items()
        }
        for folder in parquet_folders(root)
    }


def test_parquet_is_found_where_the_hub_and_its_tools_put_it(tmp_path: Path) -> None:
    hub = ["README.md", ".git/x.parquet", "banner.png"]
    files = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    other = ["test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    names = {"train": files, "test": other[:1], "validation": other[1:]}
    data = make(tmp_path / "clone", *hub, *(f"data/{name}" for name in files + other))
    assert found(data) == {"data": names}
    assert found(data / "data") == {".": names}
    snapshot = "snapshots/0123/data"
    cache = make(tmp_path / "datasets--x", "refs/main", "blobs/0", *(f"{snapshot}/{name}" for name in files + other))
    assert found(cache) == {snapshot: names}
    converted = make(tmp_path / "converted", "default/train/0000.parquet", "default/validation/0000.parquet")
    assert found(converted) == {"default": {"train": ["train/0000.parquet"], "validation": ["validation/0000.parquet"]}}
    assert found(make(tmp_path / "single", "0000.parquet")) == {".": {"": ["0000.parquet"]}}
    configs = make(tmp_path / "configs", "a/train.parquet", "b/train.parquet")
    assert list(found(configs)) == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "holdout"),
    [
        (["train/n1/1.jpg", "val/n1/1.jpg", "labels.parquet", "about/meta.parquet"], None),
        (["n1/1.jpg", "n1/2.jpg", "n2/1.jpg", "n2/2.jpg", "labels.parquet"], 0.5),
        (["train/n1/1.jpg", "train/meta.parquet", "val/n1/1.jpg"], None),
    ],
)
def test_parquet_beside_images_is_not_a_data_set(tmp_path: Path, names: list[str], holdout: float | None) -> None:
    make(tmp_path, *names)
    assert parquet_folders(tmp_path) == []
    data = open_folder(str(tmp_path), holdout)
    assert len(data.train) + len(data.val) == sum(name.endswith(".jpg") for name in names)


def test_parquet_is_refused_with_the_command_that_packs_it(tmp_path: Path) -> None:
    make(tmp_path / "my data", "data/train-0.parquet", "data/validation-0.parquet")
    command = f"`lars-data pack '{tmp_path}/my data/data' STORE`"
    for root in (tmp_path / "my data", tmp_path / "my data/data", tmp_path / "my data/data/train-0.parquet"):
        for holdout in (None, 0.1):
            with pytest.raises(ConfigError) as error:
                open_folder(str(root), holdout)
            assert command in str(error.value)
            with pytest.raises(ConfigError) as error:
                open_imagenet(str(root), holdout, None)
            assert command in str(error.value)
    make(tmp_path / "two", "a/train.parquet", "b/train.parquet")
    with pytest.raises(ConfigError, match=r"pack \S*/two/a STORE` or `lars-data pack \S*/two/b STORE`"):
        open_folder(str(tmp_path / "two"), None)


def test_the_search_for_parquet_opens_few_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{split}/n{i:03d}/{j}.jpg" for split in ("train", "val") for i in range(100) for j in (1, 2)]
    root = make(tmp_path, *names)
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(str(path)), scandir(path))[1])
    assert parquet_folders(root) == []
    assert parquet_folders(root / "train") == []
    assert len(listed) <= 8
