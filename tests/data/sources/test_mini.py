"""The embedded set equals what its script makes, and opens without a path or a network."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from lars_train.data.sources.builtin import ARCHIVE, open_mini

SCRIPT = Path(__file__).parents[3] / "scripts" / "dev" / "make_mini.py"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_mini", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_archive_is_balanced_sorted_stored_and_small() -> None:
    assert ARCHIVE.stat().st_size < 9e6
    with zipfile.ZipFile(ARCHIVE) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    assert names == sorted(names)
    per_class = Counter(name.rsplit("/", 1)[0] for name in names)
    assert Counter(per_class.values()) == {1000: 10, 200: 10}
    assert all(per_class[f"train/{c}"] == 1000 for c in ("ankle-boot", "bag", "trouser"))
    assert {(e.compress_type, e.date_time, e.external_attr) for e in entries} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 0o100644 << 16)
    }


def test_the_license_of_the_images_is_in_the_distribution() -> None:
    # A wheel has it among its licenses.
    found = [
        Path(str(file.locate()))
        for distribution in importlib.metadata.distributions(name="lars-train")
        for file in distribution.files or ()
        if str(file).endswith("licenses/lars_train/data/embedded/LICENSE")
    ]
    path = next(path for path in [ARCHIVE.parent / "LICENSE", *found] if path.exists())
    text = path.read_text()
    assert "MIT License" in text
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in text


def test_the_embedded_set_opens() -> None:
    data = open_mini()
    assert (len(data.train), len(data.val), len(data.classes)) == (10_000, 2_000, 10)
    assert np.bincount(data.train.labels).tolist() == [1000] * 10
    assert np.bincount(data.val.labels).tolist() == [200] * 10
    assert data.classes == tuple(sorted(data.classes))
    with zipfile.ZipFile(ARCHIVE) as archive:
        for sample in range(0, 10_000, 997):
            name = data.train.name(sample)
            assert name.split("/")[0] == data.classes[data.train.labels[sample]]
            image = Image.open(io.BytesIO(archive.read(f"train/{name}")))
            assert (image.mode, image.size, image.format) == ("L", (28, 28), "PNG")
            # The first read decodes, the second uses the cache.
            for _ in range(2):
                assert np.array_equal(data.train.read(sample), np.asarray(image))
            assert data.train.location(sample) == f"{ARCHIVE}!train/{name}"
    assert np.array_equal(pickle.loads(pickle.dumps(data.val)).read(7), data.val.read(7))


def test_classes_look_like_their_names() -> None:
    # Trousers are two legs with a gap; bags fill the width; a wrong class list would mix them up.
    data = open_mini()

    def mean(name: str) -> np.ndarray:
        ids = [i for i, label in enumerate(data.val.labels) if data.classes[label] == name]
        images = [np.asarray(data.val.read(i), np.float64) for i in ids]
        average: np.ndarray = np.stack(images).mean(0)
        return average

    trouser, bag, boot = mean("trouser"), mean("bag"), mean("ankle-boot")
    assert trouser[20:, 13:15].mean() < trouser[20:, 9:12].mean()
    assert bag[14:24].mean() > 2 * trouser[14:24].mean()
    assert boot[:8, :8].mean() < boot[:8, 16:].mean()


def test_the_script_reproduces_the_images() -> None:
    if not FASHION_MNIST.is_dir():
        pytest.skip(f"{FASHION_MNIST} is missing (Debian package dataset-fashion-mnist)")

    def pixels(archive: bytes) -> dict[str, bytes]:
        """Return the pixels of every entry. Another zlib compresses them to other bytes."""
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return {name: Image.open(io.BytesIO(opened.read(name))).tobytes() for name in opened.namelist()}

    assert pixels(script().build(FASHION_MNIST)) == pixels(ARCHIVE.read_bytes())


def test_the_script_reads_both_layouts_of_the_source(tmp_path: Path) -> None:
    make = script()
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    idx = b"\0\0\x08\x03" + np.array(pixels.shape, ">u4").tobytes() + pixels.tobytes()
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx))
    for stem in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        assert np.array_equal(make.read_idx(make.find_idx(tmp_path, stem)), pixels)
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        make.find_idx(tmp_path, "train-labels-idx1-ubyte")
