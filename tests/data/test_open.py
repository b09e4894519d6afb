"""`data.name` selects the data set, and a setting that does not apply to it is an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lars_train.config import DataConfig
from lars_train.data import open_dataset
from lars_train.data.open import open_validation
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent

MakeTree = Callable[[Mapping[Any, bytes]], str]


@pytest.fixture
def pets(tmp_path: Path) -> str:
    for name in ("train/cat/1.jpg", "train/cat/2.jpg", "train/dog/1.jpg", "train/dog/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return str(tmp_path)


def test_the_name_selects_the_data_set(pets: str) -> None:
    assert open_dataset(DataConfig(name="mini")).classes[0] == "ankle-boot"
    data = open_dataset(DataConfig(name="folder", root=pets, holdout=0.5))
    assert (len(data.train), len(data.val), data.classes) == (2, 2, ("cat", "dog"))
    held = open_dataset(DataConfig(name="mini", holdout=0.1))
    assert (len(held.train), len(held.val)) == (9000, 1000)
    data = open_dataset(DataConfig(name="synthetic", train_count=30, val_count=20, num_classes=3, image_size=8))
    assert (len(data.train), len(data.val), len(data.classes)) == (30, 20, 3)
    assert getattr(data.train.read(0), "shape", None) == (8, 8, 3)


def test_a_single_class_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "train" / "cat" / f"{number}.jpg").write_bytes(b"")
    for data in (
        DataConfig(name="folder", root=str(tmp_path), holdout=0.5),
        DataConfig(name="imagenet", root=str(tmp_path), holdout=0.5),
        DataConfig(name="synthetic", train_count=30, val_count=20, num_classes=1, image_size=8),
    ):
        with pytest.raises(ConfigError, match=r"found one class \((cat|class-0)\)"):
            open_dataset(data)
    with pytest.raises(ConfigError, match=r"found one class \(cat\)"):
        pack(Request(str(tmp_path), str(tmp_path) + "-store", Encoding()), silent)


def test_a_data_set_of_other_classes_than_imagenets_is_refused(tmp_path: Path) -> None:
    def put(classes: int) -> DataConfig:
        for number in range(classes):
            for image in range(2):
                path = tmp_path / "train" / f"n{number:08d}" / f"{image}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
        return DataConfig(name="imagenet", root=str(tmp_path), holdout=0.5)

    with pytest.raises(ConfigError, match=r"is not ImageNet: it has 3 classes and 3 training.*1,281,167.*data=folder"):
        open_dataset(put(3))
    # A few images of all classes still are ImageNet.
    assert len(open_dataset(put(1000)).train) == 1000


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_cifar10_and_fashion_mnist_are_read_from_the_root(pets: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"data={name}: no usable copy in {pets}/train/cat/1.jpg"):
        open_dataset(DataConfig(name=name, root=f"{pets}/train/cat/1.jpg"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "mini", "root": "/x"}, r"data\.root=/x has no effect with data=mini; .*set data=folder"),
        ({"name": "synthetic", "root": "/x"}, r"data\.root=/x has no effect with data=synthetic"),
        (
            {"name": "synthetic", "holdout": 0.1},
            r"data\.holdout=0\.1 has no effect with data=synthetic; .*data\.val_count",
        ),
        (
            {"name": "folder", "val_labels": "x.csv"},
            r"data\.val_labels=x\.csv has no effect with data=folder",
        ),
        ({"name": "mini", "image_key": "jpg"}, r"data\.image_key=jpg has no effect with data=mini"),
        ({"name": "folder", "root": ".", "image_key": "jpg"}, r"image_key=jpg: .* is not a folder of tars"),
        ({"name": "mini", "train_count": 100}, r"data\.train_count=100 has no effect with data=mini"),
        ({"name": "folder", "num_classes": 5}, r"data\.num_classes=5 has no effect with data=folder"),
        ({"name": "synthetic", "train_count": 100}, r"data\.name=synthetic needs .*data\.val_count"),
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


@pytest.mark.parametrize(("inside", "beside"), [("", ""), ("test/", ""), ("val/", "train/owl/1.jpg")])
def test_an_evaluation_needs_only_the_validation_images(inside: str, beside: str, make_tree: MakeTree) -> None:
    files = {f"{inside}{name}": name.encode() for name in ("dog/1.jpg", "cat/1.jpg", "cat/2.jpg")}
    root = make_tree({**files, **({beside: b""} if beside else {})})
    for name in ("folder", "imagenet"):
        data = open_validation(DataConfig(name=name, root=root))
        assert (len(data.train), len(data.val), data.classes) == (0, 3, ("cat", "dog"))
        assert [data.val.read(sample) for sample in range(3)] == [b"cat/1.jpg", b"cat/2.jpg", b"dog/1.jpg"]
        assert data.val.labels.tolist() == [0, 0, 1]


def test_a_flat_validation_folder_needs_no_training_images(make_directory: MakeTree) -> None:
    table = b"ImageId,PredictionString\nb,n02 1 2 3 4\na,n07 1 2 3 4\nc,n02 1 2 3 4\n"
    root = make_directory({"LOC_val_solution.csv": table, **{f"val/{name}.JPEG": b"" for name in "abc"}})
    data = open_validation(DataConfig(name="imagenet", root=root))
    assert (data.classes, data.val.labels.tolist()) == (("n02", "n07"), [1, 0, 0])


def test_an_evaluation_without_validation_images_is_refused(make_directory: MakeTree) -> None:
    root = make_directory(
        {
            "t/train/cat/1.jpg": b"",
            "t/train/dog/1.jpg": b"",
            "v/val/1.jpg": b"",
            "s/val/cat/1.jpg": b"",
            "s/val/dog/1.jpg": b"",
            "c/cat/1.jpg": b"",
            "c/dog/1.jpg": b"",
            "o/cat/1.jpg": b"",
        }
    )
    for settings, message in (
        ({"root": f"{root}/t"}, rf"has no validation set .*; to evaluate .* images, set data\.root={root}/t/train\."),
        ({"root": f"{root}/v"}, "v/val has no class folders"),
        ({"root": f"{root}/o"}, r"one class \(cat\)"),
        ({"root": f"{root}/c", "order": "shards"}, "is not stored in tar shards"),
        ({"root": f"{root}/c", "name": "imagenet", "val_labels": "x.csv"}, r"drop data\.val_labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_validation(DataConfig(**{"name": "folder", **settings}))
    assert len(open_validation(DataConfig(name="folder", root=f"{root}/t/train")).val) == 2
    # The share that the checkpoint held out does not count as a validation set.
    for settings, remedy in (
        (
            {"root": f"{root}/s"},
            "To evaluate all 2 images of the data set, set data.holdout=null. Its value 0.1 comes from",
        ),
        (
            {"root": f"{root}/c"},
            "To evaluate all 2 images of the data set, set data.holdout=null. Its value 0.1 comes from",
        ),
        ({"root": f"{root}/t"}, ""),
        ({"root": f"{root}/v"}, ""),
    ):
        with pytest.raises(ConfigError) as error:
            open_validation(DataConfig(name="folder", holdout=0.1, **settings))
        assert remedy in str(error.value)
        assert ("null" in str(error.value)) == bool(remedy)
    held = open_validation(DataConfig(name="mini", holdout=0.1))
    assert len(held.train) > 0
