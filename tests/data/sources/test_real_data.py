"""Real files: CIFAR-10 as JPEG in a zip, and photographs of ImageNet. Skipped without LARS_TEST_DATA."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError

DATA = Path(os.environ.get("LARS_TEST_DATA", ""))
needs_data = pytest.mark.skipif(
    "LARS_TEST_DATA" not in os.environ,
    reason="LARS_TEST_DATA names no folder with cifar10_jpeg.zip and imagenet_sample/",
)


@needs_data
def test_cifar10_is_read_from_its_zip() -> None:
    path = DATA / "cifar10_jpeg.zip"
    data = open_folder(str(path), None)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.val.labels).tolist() == [1000] * 10
    assert data.classes[3] == "cat"
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("train/"))
        for sample in range(0, 50_000, 499):
            content = data.train.read(sample)
            assert f"train/{data.train.name(sample)}" == names[sample]
            assert content == archive.read(names[sample])
            assert Image.open(io.BytesIO(bytes(content))).size == (32, 32)


@needs_data
def test_photographs_of_imagenet_are_read(tmp_path: Path) -> None:
    sample = DATA / "imagenet_sample" / "train"
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(sample.resolve())
    data = open_imagenet(str(tmp_path), None, None)
    wnids = sorted(os.listdir(sample))
    assert data.classes == tuple(wnids)
    assert len(data.train) == sum(len(os.listdir(sample / wnid)) for wnid in wnids)
    for i in range(0, len(data.train), 20):
        assert data.train.name(i).startswith(data.classes[data.train.labels[i]])
        assert min(Image.open(io.BytesIO(bytes(data.train.read(i)))).size) > 32
    with pytest.raises(ConfigError, match=r"data\.holdout=0\.1.*one image or none"):
        open_imagenet(str(DATA / "imagenet_sample"), 0.1, None)
