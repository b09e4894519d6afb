"""Folders, zips, tars and parquet files use one list of names for training and validation sets."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lars_train.data.inventory import Inventory
from lars_train.data.sources.folder import open_folder, open_folder_validation
from lars_train.errors import ConfigError
from lars_train.pack.layout import open_original

Found = tuple[Inventory, list[bytes]]
"""The inventory, and the bytes of all validation images."""


def read(root: Path) -> Found:
    data = open_folder(str(root), None)
    return data.inventory, [bytes(data.val.read(i)) for i in range(len(data.val))]


def files(names: Sequence[str]) -> dict[str, bytes]:
    return {f"{name}/{c}/1.jpg": name.encode() for name in names for c in "ab"}


def by_folder(root: Path, names: Sequence[str]) -> Found:
    for name, content in files(names).items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(content)
    return read(root)


def by_zip(root: Path, names: Sequence[str]) -> Found:
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for name, content in files(names).items():
            archive.writestr(name, content)
    return read(root / "data.zip")


def tar(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for c in "ab":
            info = tarfile.TarInfo(f"{c}/1.jpg")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def by_tar_folder(root: Path, names: Sequence[str]) -> Found:
    for name in names:
        tar(root / name / "0.tar", name.encode())
    return read(root)


def by_tar_name(root: Path, names: Sequence[str]) -> Found:
    for name in names:
        tar(root / f"pets-{name}-000.tar", name.encode())
    return read(root)


def by_parquet_folder(root: Path, names: Sequence[str]) -> Found:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in names:
        (root / name).mkdir()
        table = arrow.table({"image": [name.encode()] * 2, "label": [0, 1]})
        parquet.write_table(table, root / name / "0.parquet")
    original = open_original(str(root), None)
    val = original.splits["val"]
    return original.inventory, [bytes(val.read(i)) for i in range(len(val))]


SOURCES = [by_folder, by_zip, by_tar_folder, by_tar_name, by_parquet_folder]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train", "valid", "test"), "valid"),
        (("train", "dev", "validation"), "validation"),
        (("train", "val", "valid", "validation", "dev", "test"), "val"),
        (("train", "test"), "test"),
    ],
)
def test_every_source_has_the_same_names_of_splits(
    tmp_path: Path, source: Callable[[Path, Sequence[str]], Found], names: tuple[str, ...], chosen: str
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    inventory, images = source(root, names)
    assert (inventory.train, inventory.val) == ("train", chosen)
    assert images == [chosen.encode()] * 2
    assert set(inventory.unused) == set(names) - {"train", chosen}
    (line,) = inventory.lines()
    assert all(name in line for name in names[1:])
    # The use of a test set has a NOTE.
    assert line.startswith("NOTE") == (chosen == "test")


@pytest.mark.parametrize("source", [by_folder, by_zip, by_tar_folder, by_parquet_folder])
def test_the_case_of_a_splits_name_does_not_matter(
    tmp_path: Path, source: Callable[[Path, Sequence[str]], Found]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    inventory, images = source(root, ("Train", "VAL", "Test"))
    assert (inventory.train, inventory.val, inventory.unused) == ("Train", "VAL", ("Test",))
    assert images == [b"VAL"] * 2


@pytest.mark.parametrize("source", [by_folder, by_zip])
@pytest.mark.parametrize("names", [("training", "testing"), ("val", "test"), ("Testing", "unlabeled")])
def test_names_of_splits_are_never_classes(
    tmp_path: Path, source: Callable[[Path, Sequence[str]], Found], names: tuple[str, ...]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(ConfigError, match=r"has no train/ folder; found .*Name the split folders") as error:
        source(root, names)
    assert "holdout" not in str(error.value)
    with pytest.raises(ConfigError, match=r"has no train/ folder; found .*Name the split folders"):
        open_folder(str(root / "data.zip" if source is by_zip else root), 0.5)


def every_source(root: Path, files: Sequence[str]) -> list[str]:
    """Write the files into a folder, a zip, and a tar outside any split, and return their paths."""
    (root / "tars").mkdir(parents=True)
    with (
        zipfile.ZipFile(root / "data.zip", "w") as archive,
        tarfile.open(root / "tars" / "0.tar", "w") as shard,
    ):
        for name in files:
            (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "data" / name).write_bytes(b"")
            archive.writestr(name, b"")
            shard.addfile(tarfile.TarInfo(name))
    return [str(root / place) for place in ("data", "data.zip", "tars")]


def below(folders: Sequence[str]) -> list[str]:
    return [f"{folder}/{number}.jpg" for folder in folders for number in range(2)]


LOOKING_LIKE_SPLITS = [
    ("cat", "dog", "test"),
    ("cat", "dog", "bird", "unlabeled"),
    ("cat", "dog", "Testing"),
    ("training", "testing", "docs"),
    ("training", "eval"),
    ("train2017", "val2017"),
    ("train_images", "test_images"),
    ("Training Set", "Test Set"),
    ("train-set", "val-set"),
    ("images_train", "images_val"),
    ("train_new", "val_new"),
    ("cat", "dog", "bird", "val2017"),
]


@pytest.mark.parametrize("folders", LOOKING_LIKE_SPLITS)
def test_a_folder_like_a_split_beside_classes_is_an_error(tmp_path: Path, folders: tuple[str, ...]) -> None:
    places = every_source(tmp_path, below(folders))
    like = next(name for name in folders if name not in ("cat", "dog", "bird"))
    for place in places:
        with pytest.raises(ConfigError, match=like) as error:
            open_folder(place, 0.5)
        assert "holdout" not in str(error.value)
        with pytest.raises(ConfigError, match=like) as error:
            open_folder_validation(place)
        assert "holdout" not in str(error.value)
    for place in places[:2]:
        with pytest.raises(ConfigError, match=rf"no train/ folder; (found )?.*{like}") as error:
            open_folder(place, None)
        assert "holdout" not in str(error.value)
        with pytest.raises(ConfigError, match=like):
            open_original(place, None)


@pytest.mark.parametrize("names", [("training-0", "testing-0"), ("eval-0",), ("training-0", "val-0"), ("a", "Eval2")])
def test_files_named_after_other_splits_are_never_read_as_one(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        tar(tmp_path / "tars" / f"{name}.tar", b"x")
    for opened in (lambda root: open_folder(root, 0.5), open_folder_validation, lambda root: open_original(root, None)):
        with pytest.raises(ConfigError, match="name the splits train and val"):
            opened(str(tmp_path / "tars"))
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name in names:
        parquet.write_table(arrow.table({"image": [b"x"], "label": [0]}), tmp_path / f"{name}.parquet")
    (tmp_path / "tars").rename(tmp_path.parent / f"{tmp_path.name}-tars")
    with pytest.raises(ConfigError, match="name the splits train and val"):
        open_original(str(tmp_path), None)


def test_folders_named_after_shards_are_not_classes(tmp_path: Path) -> None:
    for number in range(2):
        path = tmp_path / "data" / f"train-{number}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name in below([f"train-{number}/cat", f"train-{number}/dog"]):
                archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConfigError, match=r"are splits, not classes \(train-0, train-1\)"):
        open_folder(str(tmp_path / "data"), 0.5)


def test_shards_named_eval_are_reported_as_unused(tmp_path: Path) -> None:
    for name in ("train-0", "eval-0", "eval-1", "more-0"):
        tar(tmp_path / "data" / f"{name}.tar", b"x")
    with pytest.raises(ConfigError, match=r"no validation set .*eval cannot serve as one"):
        open_folder(str(tmp_path / "data"), None)
    tar(tmp_path / "data" / "val-0.tar", b"x")
    inventory = open_folder(str(tmp_path / "data"), None).inventory
    assert (inventory.unused, inventory.skipped) == (("eval",), {"shards outside any split": 1})


def test_classes_with_the_words_of_splits_stay_classes(tmp_path: Path) -> None:
    for place in every_source(tmp_path / "root", below(["cat", "n01440764", "test tube"])):
        assert open_folder(place, 0.5).classes == ("cat", "n01440764", "test tube")
        assert len(open_folder_validation(place).val) == 6
    # Inside a split, a class may have the name of a split.
    vehicles = ("bus", "car", "freight train", "train")
    inside = below([f"{split}/{name}" for split in ("train", "val") for name in vehicles])
    for place in every_source(tmp_path / "split", inside)[:2]:
        assert open_folder(place, None).classes == vehicles


def test_splits_within_a_split_are_not_classes(tmp_path: Path) -> None:
    for place in every_source(tmp_path, below(["test/train", "test/val"])):
        with pytest.raises(ConfigError, match=r"parts of the data, not classes|splits, not classes"):
            open_folder_validation(place)


MOVE = r"move the images of cat/train/ to train/cat/"


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("ds0/train/cat", "ds0/train/dog", "ds0/val/cat", "ds1/train/cat"),
            r"ds0/ in it holds train/: give ds0/ as data\.root",
        ),
        (("cat/train", "cat/val", "dog/train", "dog/val"), MOVE),
        (("cat/train", "dog/Test Set", "fox"), MOVE),
        (("b/training/cat", "b/eval/cat", "a", "c"), r"b/ in it holds training/: give b/ as data\.root"),
    ],
)
def test_splits_within_classes_are_refused(tmp_path: Path, folders: tuple[str, ...], message: str) -> None:
    for place in every_source(tmp_path, below(folders))[:2]:
        for opened in (
            lambda root: open_folder(root, 0.5),
            open_folder_validation,
            lambda root: open_original(root, None),
        ):
            with pytest.raises(ConfigError, match=f"its folders hold splits; {message}"):
                opened(place)


@pytest.mark.parametrize(
    "folders",
    [("toys/train", "cat", "dog/test"), ("cat/train", "dog/train"), ("cat/test", "dog/val"), ("a/a/train", "b")],
)
def test_folders_in_classes_may_be_named_like_one_split(tmp_path: Path, folders: tuple[str, ...]) -> None:
    # At most half of the classes have such folders, or the folders name only training or only validation sets.
    folders = (*folders, "x", "y") if "cat" in folders else folders
    for place in every_source(tmp_path, below(folders))[:2]:
        assert open_folder(place, 0.5).classes == tuple(sorted({name.partition("/")[0] for name in folders}))


@pytest.mark.parametrize("name", ["eval", "Evaluation", "testing", "val2017"])
def test_a_folder_that_looks_like_a_validation_set_is_named(tmp_path: Path, name: str) -> None:
    for place in every_source(tmp_path, below([f"{split}/{c}" for split in ("train", name, "more") for c in "ab"]))[:2]:
        for opened in (lambda root: open_folder(root, None), open_folder_validation):
            with pytest.raises(
                ConfigError, match=rf"no validation set .*; {name}/ looks like one: rename {name}/ to val/"
            ):
                opened(place)
        for inventory in (open_folder(place, 0.5).inventory, open_original(place, None).inventory):
            assert (inventory.unused, inventory.skipped) == ((name,), {"folders beside the splits": 1})


def test_a_folder_of_tars_that_looks_like_a_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    inventory, _ = by_tar_folder(tmp_path / "data", ("train", "val", "eval", "more"))
    assert (inventory.unused, inventory.skipped) == (("eval",), {"folders beside the splits": 1})


@pytest.mark.parametrize("source", [by_folder, by_zip, by_tar_folder])
@pytest.mark.parametrize(("names", "twins"), [(("train", "Train", "val"), "train"), (("train", "VAL", "val"), "val")])
def test_splits_that_differ_only_in_case_are_an_error(
    tmp_path: Path, source: Callable[[Path, Sequence[str]], Found], names: tuple[str, ...], twins: str
) -> None:
    (tmp_path / "Case").mkdir()
    if (tmp_path / "case").exists():
        pytest.skip("the file system ignores case")
    root = tmp_path / "data"
    root.mkdir()
    other = next(name for name in names if name.lower() == twins != name)
    with pytest.raises(ConfigError, match=f"the names {twins}/ and {other}/ differ only in case"):
        source(root, names)


def test_a_validation_set_that_holdout_replaces_is_reported(tmp_path: Path) -> None:
    by_folder(tmp_path / "data", ("train", "val", "test"))
    for c in "ab":
        (tmp_path / "data" / "train" / c / "2.jpg").write_bytes(b"")
    assert list(open_folder(str(tmp_path / "data"), 0.5).inventory.lines()) == ["not used: val, test"]


def test_shards_of_no_split_are_counted(tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "extra-0", "extra-1"):
        tar(tmp_path / "data" / f"{name}.tar", b"x")
    (tmp_path / "data" / "README").write_bytes(b"")
    assert read(tmp_path / "data")[0].skipped == {"files without a suffix": 1, "shards outside any split": 2}


def test_files_beside_folders_of_splits_are_counted(tmp_path: Path) -> None:
    beside = {"@eaDir folders": 1, "folders beside the splits": 1, "hidden files": 1, "images outside class folders": 1}
    for kind, source, none in (("tar", by_tar_folder, "shards"), ("parquet", by_parquet_folder, "parquet files")):
        root = tmp_path / kind
        root.mkdir()
        for folder in ("more", "@eaDir"):
            (root / folder).mkdir()
            (root / folder / f"0.{kind}").write_bytes(b"")
        for name in (f"extra.{kind}", "loose.jpg", ".x.jpg", "README.md"):
            (root / name).write_bytes(b"")
        assert source(root, ("train", "val"))[0].skipped == {**beside, f"{none} outside any split": 1}


def test_files_beside_parquet_files_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    by_parquet_folder(root, ("train", "val"))
    for split in ("train", "val"):
        (root / split / "0.parquet").rename(root / f"{split}-0.parquet")
        (root / split).rmdir()
    for name in ("loose.jpg", ".x.parquet", "README.md"):
        (root / name).write_bytes(b"")
    skipped = open_original(str(root), None).inventory.skipped
    assert skipped == {".md files": 1, "hidden files": 1, "images beside parquet files": 1}


@pytest.mark.parametrize("name", ["train/0.tar", "test-train-0.tar", "0.tar"])
def test_files_beside_tars_are_counted_once_with_holdout(tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for image in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"):
            archive.addfile(tarfile.TarInfo(image))
    (path.parent / "README.md").write_bytes(b"")
    assert open_folder(str(tmp_path / "data"), 0.5).inventory.skipped == {".md files": 1}


def test_a_test_set_of_tars_without_labels_is_not_used(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "train-0.tar", b"x")
    with tarfile.open(tmp_path / "data" / "test-0.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("1.jpg"))
    with pytest.raises(ConfigError, match=r"no validation set"):
        open_folder(str(tmp_path / "data"), None)
