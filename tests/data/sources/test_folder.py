"""Class folders open as the same data set from a directory and from a zip, or are refused with a remedy."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lars_train.data.dataset import Source
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.tree import holdout_mask
from lars_train.errors import ConfigError

MakeTree = Callable[[Mapping[Any, bytes]], str]

PETS: dict[Any, bytes] = {
    "train/cat/1.jpg": b"c1",
    "train/cat/2.jpg": b"c2",
    "train/dog/1.jpg": b"d1",
    "val/cat/9.jpg": b"c9",
    "val/dog/9.jpg": b"d9",
}


def everything(source: Source) -> list[tuple[str, int, bytes]]:
    return [(source.name(i), int(source.labels[i]), bytes(source.read(i))) for i in range(len(source))]


def test_every_image_is_read_once_with_its_label(make_tree: MakeTree) -> None:
    data = open_folder(make_tree(PETS), None)
    assert data.classes == ("cat", "dog")
    assert everything(data.train) == [
        ("cat/1.jpg", 0, b"c1"),
        ("cat/2.jpg", 0, b"c2"),
        ("dog/1.jpg", 1, b"d1"),
    ]
    assert everything(data.val) == [("cat/9.jpg", 0, b"c9"), ("dog/9.jpg", 1, b"d9")]
    assert data.train.labels.dtype == np.int32


def test_a_location_is_the_full_path(make_directory: MakeTree, make_zip: MakeTree) -> None:
    directory, archive = make_directory(PETS), make_zip(PETS)
    assert open_folder(directory, None).train.location(2) == f"{directory}/train/dog/1.jpg"
    assert open_folder(archive, None).train.location(2) == f"{archive}!train/dog/1.jpg"


def test_a_directory_and_a_zip_of_it_are_the_same_data_set(make_directory: MakeTree, make_zip: MakeTree) -> None:
    files = {**PETS, "train/cat/ü/é.jpg": b"u", "train/dog/Ω.png": b"o"}
    directory, archive = (open_folder(make(files), None) for make in (make_directory, make_zip))
    assert directory.fingerprint == archive.fingerprint
    assert everything(directory.train) == everything(archive.train)
    assert directory.fingerprint != open_folder(make_directory({"train/cat/3.jpg": b""}), None).fingerprint


def test_ids_follow_the_bytewise_order_of_the_whole_path(make_tree: MakeTree) -> None:
    # A slash sorts after "-" and before "0"; "é" after every ASCII name; upper case before lower case.
    classes = ["a", "a-b", "a0", "Z", "é", "z"]
    within = ["2.jpg", "10.jpg", "B.jpg", "é.jpg", "sub/1.jpg", "sub-1.jpg", "a b.jpg"]
    names = [f"{c}/{n}" for c in classes for n in within]
    data = open_folder(make_tree({f"{s}/{n}": n.encode() for n in names for s in ("train", "val")}), None)
    expected = sorted(names, key=os.fsencode)
    assert data.classes == tuple(sorted(classes, key=os.fsencode))
    for source in (data.train, data.val):
        assert [source.name(i) for i in range(len(source))] == expected
        assert [data.classes[label] for label in source.labels] == [name.split("/")[0] for name in expected]
        assert [source.read(i) for i in range(len(source))] == [name.encode() for name in expected]


def test_names_that_are_not_utf8_keep_their_bytes(make_directory: MakeTree) -> None:
    data = open_folder(make_directory({**PETS, b"train/cat/\xff\xfe.jpg": b"odd"}), None)
    assert os.fsencode(data.train.name(2)) == b"cat/\xff\xfe.jpg"
    assert data.train.read(2) == b"odd"
    data.train.location(2).encode()


def test_classes_that_decode_to_the_same_name_are_refused(make_directory: MakeTree) -> None:
    files = {
        b"%s/%s/1.jpg" % (split, c): b"" for split in (b"train", b"val") for c in (b"caf\xe9", rb"caf\xe9", b"tea")
    }
    with pytest.raises(ConfigError, match=r"train has two classes .* both decode to caf\\xe9"):
        open_folder(make_directory(files), None)


def test_only_visible_images_count(make_tree: MakeTree) -> None:
    images = [f"train/cat/x.{s}" for s in ("JPG", "jpeg", "Png", "bmp", "webp", "ppm", "pgm", "tif", "TIFF", "gif")]
    others = [
        "train/cat/notes.txt",
        "train/cat/.x.jpg",
        "train/cat/.hidden/x.jpg",
        "train/cat/jpg",
        "train/cat/__MACOSX/x.jpg",
        "train/.cache/x.jpg",
        "train/loose.jpg",
        "__MACOSX/train/cat/x.jpg",
        "README",
    ]
    data = open_folder(make_tree(dict.fromkeys([*images, *others, "val/cat/1.jpg"], b"")), None)
    assert [data.train.name(i) for i in range(len(data.train))] == sorted(i[6:] for i in images)
    assert data.classes == ("cat",)


@pytest.mark.parametrize(
    ("present", "chosen"),
    [(("test", "validation", "val"), "val"), (("test", "validation"), "validation"), (("test",), "test")],
)
def test_the_validation_folder_has_one_of_three_names(
    make_tree: MakeTree, present: tuple[str, ...], chosen: str
) -> None:
    data = open_folder(make_tree({"train/a/1.jpg": b"", **{f"{p}/a/1.jpg": p.encode() for p in present}}), None)
    assert data.val.read(0) == chosen.encode()


def test_links_are_followed_but_not_in_circles(tmp_path: Path, make_directory: MakeTree) -> None:
    root = Path(make_directory(PETS))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.jpg").write_bytes(b"far")
    (root / "train/cat/more").symlink_to(elsewhere)
    (root / "train/cat/loop").symlink_to(root / "train/cat")
    data = open_folder(str(root), None)
    assert [data.train.name(i) for i in range(3)] == ["cat/1.jpg", "cat/2.jpg", "cat/more/far.jpg"]
    assert data.train.read(2) == b"far"
    assert len(data.train) == 4


def test_an_unreadable_file_is_an_oserror_with_its_name(make_directory: MakeTree) -> None:
    source = open_folder(make_directory(PETS), None).train
    Path(source.location(1)).unlink()
    with pytest.raises(OSError, match=r"cat/2\.jpg") as caught:
        source.read(1)
    assert source.location(1) in str(caught.value)
    assert source.read(0) == b"c1"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_images_is_an_oserror(make_directory: MakeTree) -> None:
    source = open_folder(make_directory(PETS), None).train
    path = Path(source.location(1))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="not a regular file"):
        source.read(1)


def test_a_source_can_be_pickled(make_tree: MakeTree) -> None:
    source = open_folder(make_tree(PETS), None).train
    source.read(0)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source)


def test_holdout_replaces_the_validation_folder(make_tree: MakeTree) -> None:
    # With holdout, hyperparameters can be tuned without the test images.
    files = {f"train/{c}/{i}.jpg": b"" for c in "ab" for i in range(4)}
    data = open_folder(make_tree({**files, "val/a/9.jpg": b"", "test/b/9.jpg": b""}), 0.25)
    names = [source.name(i) for source in (data.train, data.val) for i in range(len(source))]
    assert sorted(f"train/{name}" for name in names) == sorted(files)
    assert len(data.val) == 2


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_holdout_takes_its_share_of_each_class_from_training(make_tree: MakeTree, prefix: str) -> None:
    sizes = {"a": 2, "b": 5, "c": 14, "d": 15, "e": 100}
    names = [f"{c}/{i:03d}.jpg" for c, n in sizes.items() for i in range(n)]
    root = make_tree({prefix + name: name.encode() for name in names})
    data = open_folder(root, 0.1)
    train, val = ([s.name(i) for i in range(len(s))] for s in (data.train, data.val))
    assert sorted(train + val) == names
    assert train == sorted(train)
    assert val == sorted(val)
    # The nearest whole number to a tenth, but at least one.
    assert np.bincount(data.val.labels).tolist() == [1, 1, 1, 2, 10]
    for source in (data.train, data.val):
        for i, label in enumerate(source.labels):
            assert source.name(i).startswith(data.classes[label] + "/")
            assert bytes(source.read(i)).decode() == source.name(i)
    assert open_folder(root, 0.1).fingerprint == data.fingerprint
    assert open_folder(root, 0.2).fingerprint != data.fingerprint


def test_the_held_out_ranks_never_change() -> None:
    # Fixed values: a change would leak training images into the validation set of older runs.
    assert np.flatnonzero(holdout_mask(20, 0.25)).tolist() == [0, 5, 9, 10, 13]
    assert holdout_mask(2, 0.001).sum() == 1
    assert holdout_mask(2, 0.999).sum() == 1
    # No bias: 1 in 10 of the first and of the last thousand, within 4 sigma.
    for half in np.split(holdout_mask(2000, 0.1), 2):
        assert abs(half.sum() - 100) < 4 * np.sqrt(1000 * 0.1 * 0.9)


def test_unlabeled_test_images_are_not_a_validation_set(make_tree: MakeTree) -> None:
    files = {"train/a/1.jpg": b"", "train/a/2.jpg": b"", "test/1.jpg": b""}
    assert len(open_folder(make_tree(files), 0.5).val) == 1
    with pytest.raises(ConfigError, match=r"no validation set.*data\.holdout=0\.1"):
        open_folder(make_tree(files), None)


TWO: dict[Any, bytes] = dict.fromkeys(("train/a/1.jpg", "train/a/2.jpg", "val/a/1.jpg"), b"")
MANY = {f"train/c{i}/": b"" for i in range(7)}


@pytest.mark.parametrize(
    ("files", "holdout", "message"),
    [
        ({}, None, r"data\.root=.*has no train/ folder; it holds no folders at all"),
        ({"train.zip": b"", "val.zip": b""}, None, r"no train/ folder; train\.zip in it is not read; unzip it"),
        ({"cat/1.jpg": b"", "dog/1.jpg": b""}, None, r"no train/.*found cat/, dog/.*data\.holdout=0\.1"),
        ({"deep/pets/train/cat/1.jpg": b"", "other/x.jpg": b""}, None, r"data\.root=.*found deep/, other/"),
        (
            {"pets/train/cat/1.jpg": b"", "other/x.jpg": b""},
            None,
            r"pets/ in it holds train/: give pets/ as data\.root",
        ),
        ({"train/a/1.jpg": b""}, None, r"data\.root=.*no validation set.*set data\.holdout=0\.1"),
        (
            {"train/1.jpg": b"", "val/a/1.jpg": b""},
            None,
            r"data\.root.*no class folders \(1 image directly in it",
        ),
        ({"train/a/1.jpg": b"", "val/": b""}, None, r"data\.root.*val has no class folders"),
        (
            {**TWO, "train/b/x.txt": b""},
            None,
            r"data\.root.*train has class folders without images: b/ \(skipped: 1 \.txt file\); remove",
        ),
        ({**TWO, "val/b/": b""}, None, r"data\.root.*val has class folders without images: b/; remove"),
        ({**TWO, **MANY}, None, r"without images: c0/, c1/, c2/, c3/, c4/ and 2 more"),
        ({**TWO, "train/b/1.jpg": b""}, None, r"data\.root.*different classes: b/ only in train/.*Each class needs"),
        ({**TWO, "val/b/1.jpg": b"", "train/c/1.jpg": b""}, None, r"c/ only in train/; b/ only in val/"),
        ({"train/a/1.jpg": b""}, 0.1, r"data\.holdout=0\.1.*one image or none: a/.*add images"),
        ({"train/a/1.jpg": b"", "train/b/": b""}, 0.1, r"one image or none: a/, b/.*remove the folder"),
        (TWO, 1.5, r"data\.holdout=1\.5.*between 0 and 1"),
    ],
)
def test_an_unusable_tree_is_refused_with_the_reason(
    make_tree: MakeTree, files: dict[Any, bytes], holdout: float | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_folder(make_tree(files), holdout)


def test_an_unusable_root_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "pets.tar").write_bytes(b"")
    for root, message in (
        (None, r"data\.root is not set: .*data\.root=PATH"),
        ("", r"data\.root is not set"),
        (str(tmp_path / "none"), r"data\.root=.*none cannot be opened \(No such file or directory\); give"),
        (str(tmp_path / "pets.tar"), r"data\.root=.*pets\.tar is neither a folder nor a \.zip; unpack"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_folder(root, None)


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, make_directory: MakeTree) -> None:
    root = Path(make_directory(PETS))
    monkeypatch.setenv("HOME", str(root.parent))
    assert len(open_folder(f"~/{root.name}", None).train) == 3
