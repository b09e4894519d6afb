"""`data.name` chooses the data set, and a setting that it does not know is an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lars_train.config import DataConfig
from lars_train.data import open_dataset
from lars_train.errors import ConfigError


@pytest.fixture
def pets(tmp_path: Path) -> str:
    for name in ("train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "train/dog/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


def test_the_name_chooses_the_data_set(pets: str) -> None:
    assert open_dataset(DataConfig(name="mini")).classes[0] == "ankle-boot"
    for name in ("folder", "imagenet"):
        data = open_dataset(DataConfig(name=name, root=pets, holdout=0.5))
        assert (len(data.train), len(data.val), data.classes) == (2, 2, ("cat", "dog"))
    held = open_dataset(DataConfig(name="mini", holdout=0.1))
    assert (len(held.train), len(held.val)) == (9000, 1000)
    data = open_dataset(DataConfig(name="synthetic", train_count=30, val_count=20, num_classes=3, image_size=8))
    assert (len(data.train), len(data.val), len(data.classes)) == (30, 20, 3)
    assert getattr(data.train.read(0), "shape", None) == (8, 8, 3)


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_arrays_are_looked_for_in_the_root(pets: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data={name}: no usable copy in {pets}/train/cat/1.jpg"):
        open_dataset(DataConfig(name=name, root=f"{pets}/train/cat/1.jpg"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mini", "root": "/x"}, r"data\.root=/x has no meaning with data=mini; .*set data=folder"),
        ({"name": "synthetic", "root": "/x"}, r"data\.root=/x has no meaning with data=synthetic"),
        (
            {"name": "synthetic", "holdout": 0.1},
            r"data\.holdout=0\.1 has no meaning with data=synthetic; .*data\.val_count",
        ),
        (
            {"name": "folder", "val_labels": "x.csv"},
            r"data\.val_labels=x\.csv has no meaning with data=folder",
        ),
        ({"name": "mini", "train_count": 100}, r"data\.train_count=100 has no meaning with data=mini"),
        ({"name": "folder", "num_classes": 5}, r"data\.num_classes=5 has no meaning with data=folder"),
        ({"name": "synthetic", "train_count": 100}, r"data\.name=synthetic wants .*data\.val_count"),
        ({"name": "folder"}, r"data\.root is not set"),
        ({"name": "imagenet"}, r"data\.root is not set"),
        ({"name": "minni"}, r"data\.name=minni"),
    ],
)
def test_a_setting_that_would_be_ignored_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_dataset(DataConfig(**settings))


def test_torchvision_is_imported_only_for_its_own_data_sets() -> None:
    code = (
        "import sys; from lars_train.config import DataConfig; from lars_train.data.open import open_dataset; "
        "open_dataset(DataConfig(name='mini')); "
        "sys.exit('torchvision' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
