"""Tar shards in webdataset's layout are a data set, whoever made them, or a message that helps."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lars_train.data import webdataset
from lars_train.data.folder import open_folder
from lars_train.data.imagenet import open_imagenet
from lars_train.data.source import Dataset
from lars_train.errors import ConfigError
from lars_train.stores.encode import Encoding
from lars_train.stores.pack import Request, pack, silent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lars_train" / "index"


def tar(path: Path, files: Mapping[str, bytes], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def everything(data: Dataset) -> list[list[tuple[str, str, bytes]]]:
    return [
        [(s.name(i), data.classes[s.labels[i]], bytes(s.read(i))) for i in range(len(s))]
        for s in (data.train, data.val)
    ]


def test_labels_come_from_cls_or_json_or_the_folder(tmp_path: Path) -> None:
    def root(name: str, labelled: Any) -> Dataset:
        for split in ("train", "val"):
            for number, c in enumerate((7, 10, 9)):
                files = labelled(f"{c}_{number}", c, split.encode() + b"%d" % c)
                tar(tmp_path / name / split / f"{number:04d}.tar", files)
        return open_folder(str(tmp_path / name), None)

    pictures = {7: ("7_0", b"7"), 9: ("9_2", b"9"), 10: ("10_1", b"10")}
    by_number = [("10_1", "10", b"10"), ("7_0", "7", b"7"), ("9_2", "9", b"9")]
    for name, labelled in (
        ("cls", lambda key, c, data: {f"{key}.jpg": data, f"{key}.cls": b"%d\n" % c}),
        ("json", lambda key, c, data: {f"{key}.json": json.dumps({"label": c, "x": [1]}).encode(), f"{key}.jpg": data}),
        ("bare", lambda key, c, data: {f"{key}.json": b"%d" % c, f"{key}.jpg": data, f"{key}.txt": b"a cat"}),
    ):
        data = root(name, labelled)
        # Numbers are in the order of numbers.
        assert data.classes == ("7", "9", "10")
        for split, found in zip((b"train", b"val"), everything(data), strict=True):
            assert found == [(f"{key}.jpg", c, split + text) for key, c, text in by_number]
    named = root("named", lambda key, c, data: {f"{key}.png": data, f"{key}.cls": f"cat {c}".encode()})
    assert named.classes == ("cat 10", "cat 7", "cat 9")
    folders = root("folders", lambda key, c, data: {f"./k{c}/{key}.jpg": data, f"./k{c}/{key}.txt": b"x"})
    assert folders.classes == ("k10", "k7", "k9")
    assert everything(folders)[0] == [(f"k{c}/{pictures[c][0]}.jpg", f"k{c}", b"train%d" % c) for c in (10, 7, 9)]


def test_shards_in_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    for name, data in (("train-000", b"t0"), ("train-001", b"t1"), ("validation-000", b"v"), ("test-000", b"x")):
        tar(tmp_path / "data" / f"imagenet1k-{name}.tar", {f"a/{data.decode()}.jpg": data})
    data = open_folder(str(tmp_path / "data"), None)
    assert everything(data) == [[("a/t0.jpg", "a", b"t0"), ("a/t1.jpg", "a", b"t1")], [("a/v.jpg", "a", b"v")]]
    assert data.train.where(1) == f"{tmp_path}/data/imagenet1k-train-001.tar!a/t1.jpg"
    assert open_imagenet(str(tmp_path / "data"), None, None).fingerprint == data.fingerprint
    for name in ("one", "two"):
        tar(tmp_path / "other" / f"{name}.tar", {f"a/{name}{i}.jpg": b"%d" % i for i in range(4)})
    held = open_folder(str(tmp_path / "other"), 0.25)
    assert (len(held.train), len(held.val)) == (6, 2)


def test_of_several_pictures_in_a_sample_the_one_with_the_shortest_extension_counts(tmp_path: Path) -> None:
    files = {"a/1.mask.png": b"mask", "a/1.jpg": b"picture", "a/1.cls": b"0", "a/2.txt": b"no picture", "a/.x.jpg": b""}
    for split in ("train", "val"):
        tar(tmp_path / "data" / split / "0.tar", files)
    assert everything(open_folder(str(tmp_path / "data"), None))[0] == [("a/1.jpg", "a", b"picture")]


def test_names_that_begin_anew_in_each_shard_are_told_apart_by_the_shard(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number in range(2):
            files = {f"{i:03d}.{kind}": b"%d" % number for i in range(2) for kind in ("jpg", "cls")}
            tar(tmp_path / "data" / split / f"s{number}.tar", files)
    assert everything(open_folder(str(tmp_path / "data"), None))[0] == [
        (f"s{number}/{i:03d}.jpg", str(number), b"%d" % number) for number in range(2) for i in range(2)
    ]
    for number in range(2):
        tar(tmp_path / "data" / "train" / f"s{number}.tar", {f"{c}/1.jpg": b"%d" % number for c in "ab"})
        tar(tmp_path / "data" / "val" / f"s{number}.tar", {f"{c}/{number}.jpg": b"%d" % number for c in "ab"})
    assert everything(open_folder(str(tmp_path / "data"), None))[0] == [
        (f"s{number}/{c}/1.jpg", c, b"%d" % number) for number in range(2) for c in "ab"
    ]


def test_a_packed_store_without_its_index_is_the_same_data_set_still(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for c in ("n2", "n1", "n10"):
            for i in range(3):
                path = tmp_path / "data" / split / c / f"{c}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(f"{c}{i}".encode())
    pack(Request(str(tmp_path / "data"), str(tmp_path / "store"), Encoding(), shards=2), silent)
    before = open_folder(str(tmp_path / "store"), None)
    (tmp_path / "store" / "index.lars").unlink()
    after = open_folder(str(tmp_path / "store"), None)
    assert after.fingerprint == before.fingerprint
    assert everything(after) == everything(before)
    # And what others made is packed like a folder.
    pack(Request(str(tmp_path / "store"), str(tmp_path / "again"), Encoding(), shards=2), silent)
    assert open_folder(str(tmp_path / "again"), None).fingerprint == before.fingerprint


def test_the_index_is_built_once_and_anew_when_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    members = webdataset.members
    monkeypatch.setattr(webdataset, "members", lambda handle: (read.append(handle), members(handle))[1])
    root = tmp_path / "data"
    for split in ("train", "val"):
        tar(root / split / "0.tar", {"a/1.jpg": b"one"})
    first = open_folder(str(root), None)
    assert len(read) == 2
    assert open_folder(str(root), None).fingerprint == first.fingerprint
    assert len(read) == 2
    tar(root / "train" / "0.tar", {"a/2.jpg": b"two"})
    os.utime(root / "train" / "0.tar", (1, 1))
    assert everything(open_folder(str(root), None))[0] == [("a/2.jpg", "a", b"two")]
    tar(root / "train" / "1.tar", {"a/3.jpg": b"three"})
    assert len(open_folder(str(root), None).train) == 2
    assert capsys.readouterr().err == ""
    for path in cache.glob("*.index"):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(open_folder(str(root), None).train) == 2
    assert "is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in root.rglob("*")) == ["0.tar", "0.tar", "1.tar", "train", "val"]


def test_tars_beside_class_folders_are_no_shards(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "n1").mkdir(parents=True)
        (root / split / "n1" / "1.jpg").write_bytes(b"x")
    tar(root / "train" / "n1.tar", {"1.jpg": b"x"})
    tar(root / "ILSVRC2012_img_train.tar", {"1.jpg": b"x"})
    data = open_folder(str(root), None)
    assert data.train.where(0) == f"{root}/train/n1/1.jpg"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"1.jpg": b"x"}, r"1\.jpg has no label: neither a \.cls"),
        ({"a/1.txt": b"x"}, "hold no pictures"),
        ({}, "hold no pictures"),
        ({"a/1.jpg": b"x", "a/1.cls": b""}, "0.tar cannot be used .*holds no label"),
        ({"a/1.jpg": b"x", "a/1.cls": b"\0"}, "holds no label"),
        ({"a/1.jpg": b"x", "a/1.cls": b"1" * 5000}, "holds no label"),
        ({"a/1.jpg": b"x", "a/1.json": b"{"}, "is no JSON"),
        ({"a/1.jpg": b"x", "a/1.json": b"[" * 100_000}, "is no JSON"),
        ({"a/1.jpg": b"x", "a/1.cls": b"1", "a/2.jpg": b"x", "a/2.cls": b"cat"}, "some labels are numbers"),
        ({"a/1.jpg": b"x", "b/1.jpg": b"y", "./a/1.jpg": b"z"}, r"a/1\.jpg is in it twice"),
    ],
)
def test_shards_that_cannot_be_used_are_told_apart(tmp_path: Path, files: dict[str, bytes], told: str) -> None:
    for split in ("train", "val"):
        tar(tmp_path / "data" / split / "0.tar", files)
    with pytest.raises(ConfigError, match=told) as error:
        open_folder(str(tmp_path / "data"), None)
    assert str(error.value).isprintable()


def test_classes_of_the_validation_set_alone_are_told(tmp_path: Path) -> None:
    tar(tmp_path / "data/train/0.tar", {"a/1.jpg": b"x", "c/1.jpg": b"x"})
    tar(tmp_path / "data/val/0.tar", {"b/1.jpg": b"x", "a/1.jpg": b"x"})
    with pytest.raises(ConfigError, match="has 1 classes that the training set has not, such as b'b'"):
        open_folder(str(tmp_path / "data"), None)
    # The other way round a class is without pictures to validate on.
    tar(tmp_path / "data/val/0.tar", {"a/1.jpg": b"x"})
    assert open_folder(str(tmp_path / "data"), None).classes == ("a", "c")


def test_compressed_and_cut_shards_are_told(tmp_path: Path) -> None:
    tar(tmp_path / "data/train/0.tar.gz", {"a/1.jpg": b"x"}, format=tarfile.PAX_FORMAT)
    with pytest.raises(ConfigError, match=r"0\.tar\.gz is compressed.*plain \.tar"):
        open_folder(str(tmp_path / "data"), None)
    shutil.rmtree(tmp_path / "data")
    for split in ("train", "val"):
        tar(tmp_path / "data" / split / "0.tar", {f"a/{i}.jpg": b"x" * 600 for i in range(9)})
    os.truncate(tmp_path / "data/train/0.tar", 2000)
    with pytest.raises(ConfigError, match=r"train/0\.tar cannot be used .*get it again"):
        open_folder(str(tmp_path / "data"), None)


def test_links_and_odd_names_in_a_shard_lead_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    for split in ("train", "val"):
        path = tmp_path / "data" / split / "0.tar"
        tar(path, {"../../../secret.jpg": b"up", f"/{secret}": b"abs", "a/../x.jpg": b"in", "a/\x1b[31m.jpg": b"red"})
        with tarfile.open(path, "a") as archive:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(f"a/link{kind!r}.jpg")
                link.type, link.linkname = kind, str(secret)
                archive.addfile(link)
    data = open_folder(str(tmp_path / "data"), None)
    assert everything(data)[0] == [("a/\x1b[31m.jpg", "a", b"red")]
    assert data.train.where(0).isprintable()
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["0.tar", "0.tar", "train", "val"]
