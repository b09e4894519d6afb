"""Images and labels of a folder in the format of ``save_to_disk`` are read without the package that writes it.

pyarrow writes the files here. tests/integrations/test_datasets_saved.py reads those of the package itself.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lars_train.config import DataConfig
from lars_train.data.dataset import Dataset
from lars_train.data.open import open_dataset
from lars_train.data.sources.huggingface import open_huggingface
from lars_train.errors import ConfigError

pa = pytest.importorskip("pyarrow")

RANDOM = np.random.default_rng(0)
NAMES = ("cat", "dog", "owl")
IMAGES = [RANDOM.bytes(int(RANDOM.integers(1, 4000))) for _ in range(60)]
Row = tuple[bytes | None, str | None, Any]
TRAIN: list[Row] = [(IMAGES[i], f"{i}.jpg", i % 3) for i in range(40)]
VAL: list[Row] = [(IMAGES[40 + i], f"{40 + i}.jpg", i % 3) for i in range(20)]


def features(names: Sequence[str] | None, label: str) -> dict[bytes, bytes]:
    kind = {"_type": "ClassLabel", "names": list(names)} if names else {"_type": "Value", "dtype": "int64"}
    about = {"image": {"_type": "Image"}, label: kind}
    return {b"huggingface": json.dumps({"info": {"features": about}}).encode()}


def save(
    folder: Path,
    rows: Sequence[Row],
    names: Sequence[str] | None = NAMES,
    label_type: Any = None,
    extra: Mapping[str, Any] | None = None,
    label: str = "label",
    files: int = 2,
    batch: int = 7,
    **options: Any,
) -> None:
    """Write one split: Arrow streams of several batches, and the list of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(files):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        images, paths, labels = ([row[i] for row in part] for i in range(3))
        structs = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
        columns: dict[str, Any] = {
            "image": pa.array(structs, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array(labels, label_type or pa.int64()),
            **{name: pa.array([value] * len(part)) for name, value in (extra or {}).items()},
        }
        table = pa.table(columns).replace_schema_metadata(features(names, label))
        name = f"data-{number:05d}-of-{files:05d}.arrow"
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema, **options) as stream:
            stream.write_table(table, max_chunksize=batch)
        listed.append({"filename": name})
    (folder / "state.json").write_text(json.dumps({"_data_files": listed}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "data" / "train", TRAIN)
    save(tmp_path / "data" / "validation", VAL)
    return tmp_path / "data"


def content(data: Dataset) -> list[list[tuple[bytes, int]]]:
    """Return (image, label) of each sample of both splits."""
    return [[(bytes(s.read(i)), int(s.labels[i])) for i in range(len(s))] for s in (data.train, data.val)]


def expected(*splits: Sequence[Row]) -> list[list[tuple[bytes | None, Any]]]:
    return [[(image, label) for image, _, label in rows] for rows in splits]


def test_images_and_labels_are_those_of_the_rows(root: Path) -> None:
    data = open_dataset(DataConfig(name="huggingface", root=str(root)))
    assert content(data) == expected(TRAIN, VAL)
    assert data.classes == NAMES
    assert data.train.name(21) == "00000021-21.jpg"
    assert data.train.location(21) == f"{root}/train/data-00001-of-00002.arrow!00000021-21.jpg"
    assert list(data.inventory.lines()) == ["validation: validation"]


def test_threads_and_copies_read_the_same_images(root: Path) -> None:
    data = open_huggingface(str(root))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(data.train.read, list(range(40)) * 20))
    assert found == IMAGES[:40] * 20
    copy = pickle.loads(pickle.dumps(data.train))
    assert [copy.read(i) for i in range(40)] == IMAGES[:40]
    child = os.fork()
    if child == 0:
        os._exit(0 if [data.train.read(i) for i in range(40)] == IMAGES[:40] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_index_needs_no_pyarrow_to_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_huggingface(str(root))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert data.train.read(5) == IMAGES[5]
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        open_huggingface(str(root))


def test_holdout_takes_validation_from_training(root: Path) -> None:
    data = open_huggingface(str(root), 0.25)
    assert sorted([*content(data)[0], *content(data)[1]]) == sorted(expected(TRAIN)[0])
    # A quarter of 14, 13 and 13 images, rounded.
    assert [np.count_nonzero(data.val.labels == label) for label in range(3)] == [4, 3, 3]
    assert list(data.inventory.lines()) == ["not used: validation"]


def test_a_single_saved_split_needs_holdout(tmp_path: Path) -> None:
    save(tmp_path, TRAIN)
    assert len(open_huggingface(str(tmp_path), 0.25).val) == 10
    with pytest.raises(ConfigError, match=r"has no validation split with labels; set data\.holdout=0\.1"):
        open_huggingface(str(tmp_path))


def test_rows_without_a_label_are_counted(root: Path) -> None:
    save(root / "train", [*TRAIN[:5], (b"x", "x.jpg", -1), (b"y", None, None), *TRAIN[5:]], files=1)
    data = open_huggingface(str(root))
    assert content(data) == expected(TRAIN, VAL)
    assert list(data.inventory.lines())[1:] == ["skipped: 2 rows without a label"]
    # The name has the number of the row.
    assert data.train.name(5) == "00000007-5.jpg"


def test_a_test_set_without_labels_is_not_used(root: Path) -> None:
    save(root / "test", [(b"x", "x.jpg", -1)] * 4)
    data = open_huggingface(str(root))
    assert data.inventory.val == "validation"
    assert data.inventory.unused == ("test",)
    (root / "validation").rename(root / "extra")
    with pytest.raises(ConfigError, match="no validation split with labels"):
        open_huggingface(str(root))


def test_labels_without_names_are_their_own_names(tmp_path: Path) -> None:
    for split, rows in (("train", TRAIN), ("val", VAL)):
        save(tmp_path / split, [(data, path, 10 * label + 5) for data, path, label in rows], names=None)
    data = open_huggingface(str(tmp_path))
    assert (data.classes, data.numbers) == (("5", "15", "25"), (5, 15, 25))
    assert content(data) == expected(TRAIN, VAL)


def test_labels_may_be_texts(tmp_path: Path) -> None:
    for split, rows in (("train", TRAIN), ("val", VAL)):
        texts = [(data, path, NAMES[label]) for data, path, label in rows]
        save(tmp_path / split, texts, names=None, label_type=pa.string())
    data = open_huggingface(str(tmp_path))
    assert (data.classes, data.numbers) == (NAMES, ())
    assert content(data) == expected(TRAIN, VAL)


def test_the_fingerprint_covers_labels_and_paths(root: Path, tmp_path: Path) -> None:
    first = open_huggingface(str(root)).fingerprint
    save(root / "train", TRAIN, files=1, batch=100)  # the same rows in one file
    assert open_huggingface(str(root)).fingerprint == first
    for changed in ((IMAGES[0], "0.jpg", 1), (IMAGES[0], "other.jpg", 0)):
        save(root / "train", [changed, *TRAIN[1:]])
        assert open_huggingface(str(root)).fingerprint != first


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"coarse": 1, "fine": 2}, r"unclear which column holds the labels.*the columns are image, y, coarse, fine"),
        ({}, r"unclear which column holds the labels"),
    ],
)
def test_unclear_columns_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    for split in ("train", "val"):
        save(tmp_path / split, VAL, names=None, extra=columns, label="y")
    with pytest.raises(ConfigError, match=message):
        open_huggingface(str(tmp_path))


def test_other_columns_are_counted(root: Path) -> None:
    save(root / "train", TRAIN, names=None, extra={"fine_label": 1})
    save(root / "validation", VAL, names=None, extra={"fine_label": 1})
    assert open_huggingface(str(root)).inventory.skipped == {"other columns of images or labels": 1}


def test_a_null_image_is_a_bad_image(root: Path) -> None:
    save(root / "train", [(None, "x.jpg", 0), *TRAIN[1:]])
    assert open_huggingface(str(root)).train.read(0) == b""


def test_rows_with_paths_alone_are_refused(root: Path) -> None:
    save(root / "train", [(None, path, label) for _, path, label in TRAIN])
    with pytest.raises(ConfigError, match="holds only the paths of images"):
        open_huggingface(str(root))


def test_a_compressed_file_is_refused(root: Path) -> None:
    save(root / "train", TRAIN, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(ConfigError, match="compressed"):
        open_huggingface(str(root))


@pytest.mark.parametrize("left", [0, 10, 1000, 9000])
def test_a_file_that_is_cut_short_is_refused(root: Path, left: int) -> None:
    path = root / "train" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} cannot be read .*; save it again\."):
        open_huggingface(str(root))


def test_a_file_outside_the_folder_is_refused(root: Path) -> None:
    (root / "train" / "state.json").write_text('{"_data_files": [{"filename": "../validation/x.arrow"}]}')
    with pytest.raises(ConfigError, match="outside the folder"):
        open_huggingface(str(root))


def test_other_folders_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"load_dataset\(NAME\)\.save_to_disk\(FOLDER\)"):
        open_huggingface(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.root=.* cannot be opened \(No such file"):
        open_huggingface(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"data\.root is not set"):
        open_huggingface(None)
    (tmp_path / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ConfigError, match="lars-data pack"):
        open_huggingface(str(tmp_path))


def test_splits_that_cannot_be_trained_on_are_refused(root: Path) -> None:
    save(root / "train", [(image, name, None) for image, name, _ in TRAIN])
    with pytest.raises(ConfigError, match="train: no row has a label"):
        open_huggingface(str(root))
    save(root / "train", TRAIN)
    (root / "train" / "data-00001-of-00002.arrow").unlink()
    save(root / "other", TRAIN, label="kind")
    shutil.copy(root / "other" / "data-00001-of-00002.arrow", root / "train")
    with pytest.raises(ConfigError, match="differ in columns or classes; save them again"):
        open_huggingface(str(root))
    (root / "train" / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(ConfigError, match="train has no Arrow files"):
        open_huggingface(str(root))
    shutil.rmtree(root / "train")
    with pytest.raises(ConfigError, match="has no split called train; it has other, validation"):
        open_huggingface(str(root))


def test_labels_outside_the_names_are_refused(root: Path) -> None:
    save(root / "validation", [(b"x", "x.jpg", 3)] * 3)
    with pytest.raises(ConfigError, match=r"1 label of its rows, such as 3, have no name in the ClassLabel"):
        open_huggingface(str(root))
    save(root / "validation", VAL, names=("a", "b", "c"))
    with pytest.raises(ConfigError, match="have different classes"):
        open_huggingface(str(root))
