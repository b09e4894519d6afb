"""CIFAR-10 and Fashion-MNIST are read with torchvision, and downloaded once and silently. A failure is explained."""

from __future__ import annotations

import gzip
import pickle
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets as torchvision_datasets

from lars_train.data.dataset import fingerprint
from lars_train.data.sources.builtin import default_root, open_arrays
from lars_train.errors import ConfigError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PLANES = np.random.default_rng(0).integers(0, 256, (6, 20, 3, 32, 32), dtype=np.uint8)
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the files of CIFAR-10, with 20 images in each of the six batches."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
    for planes, name in zip(PLANES, names, strict=True):
        batch = {"data": planes.reshape(20, -1), "labels": [(7 * i) % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_CLASSES}))
    # The checksums are those of the real files.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    return str(tmp_path)


def test_held_out_images_keep_their_training_names(cifar: str) -> None:
    whole, held = open_arrays("cifar10", cifar), open_arrays("cifar10", cifar, 0.2)
    found = {}
    for source in (held.train, held.val):
        for sample in range(len(source)):
            number = int(source.name(sample).removeprefix("train/"))
            found[number] = source
            assert np.array_equal(source.read(sample), whole.train.read(number))
            assert source.labels[sample] == whole.train.labels[number]
    assert sorted(found) == list(range(100))
    # A fifth of the ten images of each class is held out.
    assert np.bincount(held.val.labels).tolist() == [2] * 10
    assert held.fingerprint != whole.fingerprint
    assert open_arrays("cifar10", cifar, 0.2).fingerprint == held.fingerprint


def test_cifar10_equals_its_files(cifar: str) -> None:
    data = open_arrays("cifar10", cifar)
    assert data.classes == tuple(CIFAR_CLASSES)
    assert (len(data.train), len(data.val)) == (100, 20)
    for source, batches in ((data.train, PLANES[:5]), (data.val, PLANES[5:])):
        planes = batches.reshape(-1, 3, 32, 32)
        for sample in range(len(source)):
            image = source.read(sample)
            assert isinstance(image, np.ndarray)
            assert image.dtype == np.uint8
            assert np.array_equal(image, planes[sample].transpose(1, 2, 0))
            assert source.labels[sample] == 7 * (sample % 20) % 10
        assert source.labels.dtype == np.int32
    assert data.train.name(17) == "train/00000017"
    assert data.val.location(3) == "cifar10 val/00000003"
    copy = pickle.loads(pickle.dumps(data.val))
    assert np.array_equal(copy.read(5), data.val.read(5))


def test_the_fingerprint_covers_names_and_labels(cifar: str) -> None:
    data = open_arrays("cifar10", cifar)
    splits = [
        ([source.name(i).encode() + b"\0" for i in range(len(source))], source.labels)
        for source in (data.train, data.val)
    ]
    assert data.fingerprint == fingerprint(CIFAR_CLASSES, *splits)


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(head + values.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Write the unpacked files of Fashion-MNIST, with 30 and 10 images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = np.arange(count * 784).astype(np.uint8).reshape(count, 28, 28)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def test_fashion_mnist_equals_its_files(fashion: Path) -> None:
    data = open_arrays("fashion_mnist", str(fashion))
    assert (len(data.train), len(data.val)) == (30, 10)
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    assert np.array_equal(data.train.read(3), np.arange(3 * 784, 4 * 784).astype(np.uint8).reshape(28, 28))
    assert data.train.labels.tolist() == [i % 10 for i in range(30)]


def test_a_damaged_file_is_reported_with_its_folder(fashion: Path) -> None:
    file = fashion / "FashionMNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"data=fashion_mnist: .*Delete damaged files.*data\.root") as caught:
        open_arrays("fashion_mnist", str(fashion))
    assert str(fashion) in str(caught.value)


class Downloader:
    """A fake of torchvision's class. The first instance with download=True downloads, which takes some time."""

    present = False
    downloads = 0
    inside = 0
    overlap = 0
    guard = threading.Lock()

    def __init__(self, root: str, train: bool, download: bool) -> None:
        kind = type(self)
        print("Downloading", root)
        print("100%", file=sys.stderr)
        assert socket.getdefaulttimeout() is not None
        with kind.guard:
            kind.inside += 1
            kind.overlap = max(kind.overlap, kind.inside)
        time.sleep(0.01)
        if download and not kind.present:
            kind.downloads += 1
            kind.present = True
        with kind.guard:
            kind.inside -= 1
        if not kind.present:
            raise RuntimeError("Dataset not found")
        self.data: Any = np.zeros((2, 4, 4, 3), np.uint8)
        self.targets = [0, 1]
        self.classes = ["a", "b"]


def test_concurrent_opens_download_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fresh(Downloader):
        pass

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", Fresh)
    root = str(tmp_path / "not" / "yet")
    with ThreadPoolExecutor(4) as pool:
        sizes = list(pool.map(lambda _: len(open_arrays("cifar10", root).train), range(4)))
    assert sizes == [2] * 4
    assert (Fresh.downloads, Fresh.overlap) == (1, 1)
    assert socket.getdefaulttimeout() is None
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


def test_a_failed_download_reports_the_reason_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    for name, kind, by_hand in (
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz in"),
        ("fashion_mnist", "FashionMNIST", "four .gz files"),
    ):
        monkeypatch.setattr(torchvision_datasets, kind, fail)
        with pytest.raises(ConfigError) as caught:
            open_arrays(name, str(tmp_path))
        message = str(caught.value)
        assert message.startswith(f"data={name}: no usable copy in {tmp_path} (")
        for part in ("Name or service not known", by_hand, "set data.root"):
            assert part in message


def test_a_read_only_folder_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(Downloader):
        pass

    monkeypatch.setattr(torchvision_datasets, "CIFAR10", Fresh)
    (tmp_path / "file").write_bytes(b"")
    root = str(tmp_path / "file" / "below")
    with pytest.raises(ConfigError, match=r"the folder is not writable.*data\.root"):
        open_arrays("cifar10", root)
    assert Fresh.downloads == 0
    Fresh.present = True
    assert len(open_arrays("cifar10", root).val) == 2


def test_downloads_go_to_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root("cifar10") == tmp_path / "lars_train/cifar10"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_root("fashion_mnist") == Path("/home/somebody/.cache/lars_train/fashion_mnist")


def test_the_real_fashion_mnist_opens_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is missing (Debian package dataset-fashion-mnist)")

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("unexpected download")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FASHION_MNIST.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    data = open_arrays("fashion_mnist", str(tmp_path))
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert np.bincount(data.val.labels).tolist() == [1000] * 10
