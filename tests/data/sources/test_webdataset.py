"""Tar shards in webdataset's layout open as a data set, or are refused with the reason and the remedy."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lars_train.config import DataConfig
from lars_train.data.dataset import Dataset
from lars_train.data.open import open_dataset, open_validation
from lars_train.data.sources import tar_samples
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lars_train" / "index"


def tar(path: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def everything(data: Dataset) -> list[list[tuple[str, str, bytes]]]:
    return [
        [(s.name(i), data.classes[s.labels[i]], bytes(s.read(i))) for i in range(len(s))]
        for s in (data.train, data.val)
    ]


def test_labels_come_from_cls_or_json_or_the_folder(tmp_path: Path) -> None:
    def root(name: str, members_of: Any) -> Dataset:
        for split in ("train", "val"):
            for number, c in enumerate((7, 10, 9)):
                files = members_of(f"{c}_{number}", c, split.encode() + b"%d" % c)
                tar(tmp_path / name / split / f"{number:04d}.tar", files)
        return open_folder(str(tmp_path / name), None)

    images = {7: ("7_0", b"7"), 9: ("9_2", b"9"), 10: ("10_1", b"10")}
    by_number = [("10_1", "10", b"10"), ("7_0", "7", b"7"), ("9_2", "9", b"9")]
    for name, members_of in (
        ("cls", lambda key, c, data: {f"{key}.jpg": data, f"{key}.cls": b"%d\n" % c}),
        ("json", lambda key, c, data: {f"{key}.json": json.dumps({"label": c, "x": [1]}).encode(), f"{key}.jpg": data}),
        ("bare", lambda key, c, data: {f"{key}.json": b"%d" % c, f"{key}.jpg": data, f"{key}.txt": b"a cat"}),
    ):
        data = root(name, members_of)
        # Numeric labels are in numeric order.
        assert data.classes == ("7", "9", "10")
        for split, found in zip((b"train", b"val"), everything(data), strict=True):
            assert found == [(f"{key}.jpg", c, split + text) for key, c, text in by_number]
    named = root("named", lambda key, c, data: {f"{key}.png": data, f"{key}.cls": f"cat {c}".encode()})
    assert named.classes == ("cat 10", "cat 7", "cat 9")
    folders = root("folders", lambda key, c, data: {f"./k{c}/{key}.jpg": data, f"./k{c}/{key}.txt": b"x"})
    assert folders.classes == ("k10", "k7", "k9")
    assert everything(folders)[0] == [(f"k{c}/{images[c][0]}.jpg", f"k{c}", b"train%d" % c) for c in (10, 7, 9)]


def test_shards_in_one_folder_belong_to_the_split_in_their_names(tmp_path: Path) -> None:
    for name, data in (("train-000", b"t0"), ("train-001", b"t1"), ("validation-000", b"v"), ("test-000", b"x")):
        tar(tmp_path / "data" / f"imagenet1k-{name}.tar", {f"a/{data.decode()}.jpg": data})
    data = open_folder(str(tmp_path / "data"), None)
    assert everything(data) == [[("a/t0.jpg", "a", b"t0"), ("a/t1.jpg", "a", b"t1")], [("a/v.jpg", "a", b"v")]]
    assert data.train.location(1) == f"{tmp_path}/data/imagenet1k-train-001.tar!a/t1.jpg"
    assert open_imagenet(str(tmp_path / "data"), None, None).fingerprint == data.fingerprint
    for name in ("one", "two"):
        tar(tmp_path / "other" / f"{name}.tar", {f"a/{name}{i}.jpg": b"%d" % i for i in range(4)})
    held = open_folder(str(tmp_path / "other"), 0.25)
    assert (len(held.train), len(held.val)) == (6, 2)


def both(root: Path, files: Mapping[str, bytes] | Sequence[tuple[str, bytes]]) -> str:
    """Write the same shard for training and validation, and return the root."""
    for split in ("train", "val"):
        tar(root / split / "0.tar", files)
    return str(root)


def test_digits_after_a_dot_belong_to_the_name(tmp_path: Path) -> None:
    dots = {f"{c}/{c}.{i}.jpg": b"%d" % i for c in ("cat", "dog") for i in range(10)}
    data = open_folder(both(tmp_path / "dots", dots), None)
    assert [(name, c) for name, c, _ in everything(data)[0]] == sorted((name, name[:3]) for name in dots)
    members_of = {f"x.{i}.{kind}": b"%d" % (i % 3) for i in range(6) for kind in ("jpg", "cls")}
    assert everything(open_folder(both(tmp_path / "cls", members_of), None))[0] == [
        (f"x.{i}.jpg", str(i % 3), b"%d" % (i % 3)) for i in range(6)
    ]
    # A label without a number in its name belongs to all images of the group.
    shared = {"a.0.jpg": b"", "a.1.jpg": b"", "a.cls": b"7", "b.0.jpg": b"", "b.cls": b"8"}
    data = open_folder(both(tmp_path / "shared", shared), None)
    assert [(name, c) for name, c, _ in everything(data)[0]] == [("a.0.jpg", "7"), ("a.1.jpg", "7"), ("b.0.jpg", "8")]
    assert data.inventory.skipped == {}


def test_one_of_several_images_in_a_sample_can_be_chosen(tmp_path: Path) -> None:
    files = {f"{c}/1.{kind}": kind.encode() for c in "ab" for kind in ("mask.png", "jpg", "cls")}
    root = both(tmp_path / "data", files | {"a/1.cls": b"0", "b/1.cls": b"1"})
    with pytest.raises(ConfigError, match=r"sample a/1 has several images \(mask\.png, jpg\).*data\.image_key=jpg,"):
        open_folder(root, None)
    for key, kind in (("jpg", b"jpg"), ("mask.png", b"mask.png"), ("tif:JPG", b"jpg")):
        data = open_folder(root, None, image_key=key)
        assert [content for _, _, content in everything(data)[0]] == [kind] * 2
        # Two in each split.
        assert data.inventory.skipped == {"images not chosen by data.image_key": 4}
    with pytest.raises(ConfigError, match=r"none for data\.image_key=tif \(mask.*data\.image_key=tif:jpg,"):
        open_imagenet(root, None, None, image_key="tif")
    # If dots in names merge images into one sample, the remedy is to replace the dots.
    for names in (
        [f"ILSVRC2012.val.{i}" for i in range(1000)],
        [f"ILSVRC2012.val_{i}" for i in range(1000)],
        ["ILSVRC2012.val.0", "ILSVRC2012.val.1"],
    ):
        dotted = both(tmp_path / "dotted", {f"cat/{name}.jpg": b"" for name in names})
        for key in (None, "jpg"):
            with pytest.raises(ConfigError, match=r"cat/ILSVRC2012 has several.*, as in cat/ILSVRC2012_val_0") as error:
                open_folder(dotted, None, image_key=key)
            assert "image_key" not in str(error.value)
            assert len(str(error.value)) < len(dotted) + 400
    # The only image of a sample need not match data.image_key.
    one = both(tmp_path / "one", {"a/1.png": b"", "b/1.png": b""})
    assert len(open_folder(one, None, image_key="jpg").train) == 2


@pytest.mark.parametrize(
    "files",
    [
        [("cat/0.jpg", b"1"), ("cat/0.jpeg", b"2"), ("dog/0.jpg", b"3")],
        [("cat/0.jpg", b"1")] * 3 + [("dog/0.jpg", b"3")],
        [("cat/0.jpg", b"1"), ("dog/0.jpg", b"3"), ("cat/0.jpg", b"1")],
        [("0.jpg", b""), ("0.cls", b"0"), ("0.cls", b"1"), ("1.jpg", b""), ("1.cls", b"1")],
    ],
)
def test_duplicate_members_of_a_sample_are_an_error(tmp_path: Path, files: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ConfigError, match=r"0\.(jpg|cls) appears twice|cat/0 has several images \(jpg, jpeg\)"):
        open_folder(both(tmp_path / "data", files), None)


def test_the_class_is_the_folder_below_the_common_prefix(tmp_path: Path) -> None:
    for split in ("train", "val"):
        tar(tmp_path / "a" / f"{split}-0.tar", {f"ILSVRC/Data/{split}/{c}/x/1.jpg": b"" for c in ("cat", "dog")})
    tar(tmp_path / "one" / "train-0.tar", {f"Data/train/{c}/1.jpg": b"" for c in ("cat", "dog")})
    tar(tmp_path / "one" / "val-0.tar", {"Data/val/cat/1.jpg": b"", "Data/val/cat/2.jpg": b""})
    # The names of the validation set also share the class folder.
    tar(tmp_path / "below" / "train-0.tar", {f"{c}/1.jpg": b"" for c in ("cat", "dog")})
    tar(tmp_path / "below" / "val-0.tar", {"cat/a/1.jpg": b"", "cat/b/1.jpg": b""})
    for name, labels in (("a", [0, 1]), ("one", [0, 0]), ("below", [0, 0])):
        data = open_folder(str(tmp_path / name), None)
        assert data.classes == ("cat", "dog")
        assert data.train.labels.tolist() == [0, 1]
        assert data.val.labels.tolist() == labels


def test_labels_that_contradict_the_training_folders_are_refused(tmp_path: Path) -> None:
    def shard(labels: Mapping[str, int], more: Mapping[str, bytes]) -> dict[str, bytes]:
        files = {f"{c}/{i}.{kind}": b"%d" % n for c, n in labels.items() for i in "12" for kind in ("jpg", "cls")}
        return files | more

    root = tmp_path / "data"
    tar(root / "train.tar", shard({"cat": 0, "dog": 1}, {}))
    # A folder that is not a class of the training set is ignored.
    tar(root / "val.tar", shard({"cat": 0, "dog": 1, "more": 1}, {}))
    assert open_folder(str(root), None).classes == ("cat", "dog")
    tar(root / "val.tar", shard({"cat": 0, "dog": 1}, {"cat/3.jpg": b"", "cat/3.cls": b"1"}))
    with pytest.raises(ConfigError, match=r"cat/3\.jpg .* in the folder cat, but its label belongs to dog"):
        open_folder(str(root), None)


@pytest.mark.parametrize(
    ("cls", "metadata", "wrong"),
    [
        (b"0", b'{"label": 1}', "0 and .*json 1"),
        (b"0", b'{"cls": "1"}', "0 and .*json 1"),
        (b"cat", b'{"label": "dog"}', "cat and .*json dog"),
        (b"1", b'{"label": "1"}', ""),
        (b"1", b'{"class": "dog"}', ""),
        (b"1", b'{"label": [1]}', ""),
        (b"1", b"no JSON", ""),
    ],
)
def test_contradicting_labels_of_a_sample_are_refused(tmp_path: Path, cls: bytes, metadata: bytes, wrong: str) -> None:
    tar(tmp_path / "data" / "0.tar", {"a.jpg": b"", "a.cls": cls, "a.json": metadata, "b.jpg": b"", "b.cls": cls})
    if wrong:
        with pytest.raises(ConfigError, match=rf"a\.cls holds the label {wrong}; correct one"):
            open_validation(DataConfig(name="folder", root=str(tmp_path / "data"), holdout=0.5))
    else:
        assert open_folder(str(tmp_path / "data"), 0.5).classes == (cls.decode(),)


def test_a_byte_order_mark_is_not_part_of_a_label(tmp_path: Path) -> None:
    files = {"a.jpg": b"", "a.cls": b"\xef\xbb\xbf1\r\n", "b.jpg": b"", "b.cls": b"0"}
    assert open_folder(both(tmp_path / "data", files), None).classes == ("0", "1")


@pytest.mark.parametrize(
    ("kind", "label"),
    [("cls", text) for text in ("-1", "1.0", "+1", "1e3", "-0.5")]
    + [("json", text) for text in ('{"label": -1}', '{"cls": 1.5}', '{"label": true}', '{"label": "-1"}', "-1")],
)
def test_a_number_that_cannot_be_a_class_is_an_error(tmp_path: Path, kind: str, label: str) -> None:
    files = {"c/a.jpg": b"", f"c/a.{kind}": label.encode(), "d/b.jpg": b"", "d/b.cls": b"0"}
    with pytest.raises(ConfigError, match=rf"train/0\.tar: c/a\.{kind} holds the label .*; a label must be a"):
        open_folder(both(tmp_path / "data", files), None)


def test_links_and_members_that_are_not_images_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "data"
    files = {"a/1.jpg": b"", "a/1.txt": b"of a sample", "b/1.jpg": b"", "b/2.avif": b"", "b/2.cls": b"1"}
    odd = {
        "a/._1.jpg": b"",
        "@eaDir/a/1.jpg": b"",
        "@eaDir/a/2.jpg": b"",
        "../x.jpg": b"",
        "a/./x.jpg": b"",
        "README": b"",
    }
    both(root, files | odd)
    with tarfile.open(root / "val" / "0.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo("a/link.jpg")
            link.type, link.linkname = kind, "a/1.jpg"
            archive.addfile(link)
    (root / "train" / "0.idx").write_bytes(b"")
    (root / "train" / "loose.jpg").write_bytes(b"")
    (root / "train" / "1.tar.gz").write_bytes(b"")
    counts = {".avif files": 2, ".cls files": 2, ".txt files": 2, "hidden files": 2, "@eaDir folders": 2}
    counts |= {
        "entries with unsafe names": 4,
        "files without a suffix": 2,
        "symbolic links": 1,
        "hard links": 1,
        ".idx files": 1,
        "images beside tar files": 1,
        "compressed tar files": 1,
    }
    for _ in range(2):  # from the index the second time
        data = open_folder(str(root), None)
        assert dict(data.inventory.skipped) == counts
        assert (len(data.train), len(data.val)) == (2, 2)
    store = tmp_path / "store"
    pack(Request(str(root), str(store), Encoding()), silent)
    assert open_folder(str(store), None).inventory == data.inventory


def test_other_members_of_a_sample_are_counted(tmp_path: Path) -> None:
    files = dict.fromkeys(("cat/1.jpg", "cat/1.avif", "cat/1.seg.npy", "cat/1.txt", "dog/2.0.jpg", "dog/2.jp2"), b"")
    data = open_folder(both(tmp_path / "data", files), None)
    assert data.inventory.skipped == {".avif files": 2, ".jp2 files": 2, ".npy files": 2, ".txt files": 2}


def chunk(members_of: Any, count: int = 4) -> dict[str, bytes]:
    """Return images of the classes 0 and 1 in turn. Each folder has two images and is not a class."""
    files = {}
    for i in range(count):
        files |= {f"chunk{i // 2}/{i}.{kind}": content for kind, content in members_of(i % 2).items()}
        files |= {f"chunk{i // 2}/{i}.jpg": b"%d" % (i % 2)}
    return files


def notes(data: Dataset) -> list[str]:
    """Return the log lines on labels and skipped files."""
    return [line for line in data.inventory.lines() if "labels" in line or "skipped" in line]


def json_of(**values: Any) -> bytes:
    return json.dumps(values).encode()


CAT, DOG = "cat", "dog"


@pytest.mark.parametrize(
    ("members_of", "classes", "expected"),
    [
        (lambda c: {"json": json_of(url="x", category=(DOG, CAT)[c])}, (CAT, DOG), [".json (category)"]),
        (
            lambda c: {"json": json_of(class_id=c + 8), "txt": b"a cat"},
            ("8", "9"),
            [".json (class_id)", "8 .txt files"],
        ),
        (lambda c: {"json": json_of(Class=(DOG, CAT)[c])}, (CAT, DOG), [".json (Class)"]),
        (lambda c: {"label": b"%d\n" % (c + 9)}, ("9", "10"), [".label"]),
        (lambda c: {"lbl": (b"dog", b"cat")[c], "json": json_of(caption="x")}, (CAT, DOG), [".lbl", "8 .json files"]),
        (lambda c: {"txt": b"%d" % (c + 9)}, ("9", "10"), [".txt"]),
        # Both places define the same classes; numbers are preferred.
        (
            lambda c: {"json": json_of(category_name=(DOG, CAT)[c], category_id=c)},
            ("0", "1"),
            [".json (category_id)"],
        ),
    ],
)
def test_labels_under_other_keys_and_extensions_are_noted(
    tmp_path: Path, members_of: Any, classes: tuple[str, ...], expected: list[str]
) -> None:
    data = open_folder(both(tmp_path / "data", chunk(members_of)), None)
    assert data.classes == classes
    names = [classes.index(c) if classes != (CAT, DOG) else (DOG, CAT).index(c) for _, c, _ in everything(data)[0]]
    assert names == [int(content) for *_, content in everything(data)[0]] == [0, 1, 0, 1]
    source, *skipped = expected
    assert notes(data) == [f"NOTE: labels from {source}", *(f"skipped: {counts}" for counts in skipped)]
    # The index and a packed store keep the notes.
    assert open_folder(str(tmp_path / "data"), None).inventory == data.inventory
    pack(Request(str(tmp_path / "data"), str(tmp_path / "store"), Encoding()), silent)
    assert open_folder(str(tmp_path / "store"), None).inventory == data.inventory


@pytest.mark.parametrize(
    ("members_of", "expected"),
    [
        # The format of img2dataset.
        (
            lambda c: {"txt": b"a cat", "json": json_of(caption="a cat", url="x", key="0")},
            [".json (caption, url, key), .txt", "8 .json files, 8 .txt files"],
        ),
        (
            lambda c: {"json": json_of(target=c, category="pet")},
            [".json (target, category)", "8 .json files"],
        ),
        (lambda c: {"json": json_of(category=[c])}, [".json (category)", "8 .json files"]),
        (lambda c: {"txt": b"%d" % c if c else b"a cat"}, [".txt", "8 .txt files"]),
        (lambda c: {"label": b"1\n2"}, [".label", "8 .label files"]),
        (lambda c: {"label": b"\xff\x00"}, [".label", "8 .label files"]),
        (
            lambda c: {"json": json.dumps({"": 0} | {f"{i:02}": i for i in range(9)}).encode()},
            [".json (00, 01, 02, 03, 04 and 4 more)", "8 .json files"],
        ),
        (lambda c: {}, []),
    ],
)
def test_possible_labels_are_noted_if_folders_are_the_classes(
    tmp_path: Path, members_of: Any, expected: list[str]
) -> None:
    data = open_folder(both(tmp_path / "data", chunk(members_of)), None)
    assert data.classes == ("chunk0", "chunk1")
    places, *counts = expected or [""]
    note = [f"NOTE: labels from folders in the names, not from {places}"] if expected else []
    assert notes(data) == note + [f"skipped: {count}" for count in counts]


def test_folders_that_match_the_labels_of_a_key_name_the_classes(tmp_path: Path) -> None:
    labels = {"cat": 7, "dog": 3}
    files = {
        f"{c}/{i}.{kind}": json_of(category_id=n) for c, n in labels.items() for i in "12" for kind in ("jpg", "json")
    }
    data = open_folder(both(tmp_path / "data", files), None)
    assert data.classes == ("cat", "dog")
    assert notes(data) == [
        "NOTE: labels from folders in the names, not from .json (category_id)",
        "skipped: 8 .json files",
    ]


def test_members_beside_a_labeled_image_are_counted(tmp_path: Path) -> None:
    files = chunk(lambda c: {"cls": b"%d" % c, "txt": b"a cat", "json": json_of(caption="a cat"), "label": b"x"})
    data = open_folder(both(tmp_path / "data", files), None)
    assert notes(data) == ["skipped: 8 .json files, 8 .label files, 8 .txt files"]
    assert notes(open_folder(both(tmp_path / "two", chunk(lambda c: {"json": json_of(label=c, x=1)})), None)) == []


def test_images_without_a_label_are_refused(tmp_path: Path) -> None:
    named = chunk(lambda c: {"cls": b"chunk%d" % c})
    tar(tmp_path / "data" / "train.tar", named | {"chunk0/x.jpg": b"", "chunk1/y.jpg": b"", "chunk1/y.txt": b"a cat"})
    tar(tmp_path / "data" / "val.tar", named)
    assert notes(open_folder(str(tmp_path / "data"), None)) == [
        "NOTE: train: labels of 2 images from folders in the names, not from .txt",
        "skipped: 1 .txt file",
    ]
    tar(tmp_path / "data" / "train.tar", {"0.jpg": b"", "0.label": b"1", "1.jpg": b"", "1.json": json_of(target=2)})
    with pytest.raises(
        ConfigError, match=r"0\.jpg has no label: .*, nor a clear label in \.json \(target\), \.label; add"
    ):
        open_folder(str(tmp_path / "data"), 0.5)


def unmatched(layout: str, kind: str) -> list[tuple[str, bytes]]:
    """Return four images in the folders part0 and part1, and four members of `kind` with other keys."""
    image, label = {
        "longer": ("part{}/{}.front.jpg", f"part{{}}/{{}}.front.{kind}"),
        "later": ("part{}/{}.jpg", f"part{{}}/{{}}.{kind}"),
        "elsewhere": ("images/part{}/{}.jpg", f"labels/part{{}}/{{}}.{kind}"),
        "appended": ("part{}/{}.jpg", f"part{{}}/{{}}.jpg.{kind}"),
    }[layout]
    pairs = [[(name.format(i // 2, i), b"%d" % (i % 2)) for name in (image, label)] for i in range(4)]
    return (
        [pair[of] for of in (0, 1) for pair in pairs] if layout == "later" else [one for pair in pairs for one in pair]
    )


@pytest.mark.parametrize("layout", ["longer", "later", "elsewhere", "appended"])
def test_labels_without_an_image_are_refused_or_noted(tmp_path: Path, layout: str) -> None:
    files = unmatched(layout, "cls")
    label = next(name for name, _ in files if name.endswith(".cls"))
    expected = (
        f"its shards hold 4 .cls files belonging to no image, such as {label}, and {files[0][0]} has no label; the"
    )
    with pytest.raises(ConfigError, match=f"{re.escape(expected)}.* must be adjacent and share their name"):
        open_folder(both(tmp_path / "data", files), None)
    for kind in ("json", "npy", "label"):
        data = open_folder(both(tmp_path / kind, unmatched(layout, kind)), None)
        assert data.classes == ("part0", "part1")
        assert notes(data) == [
            f"NOTE: labels from folders in the names, not from .{kind}",
            f"skipped: 8 .{kind} files",
        ]


def test_labels_without_an_image_are_ignored_if_images_have_one(tmp_path: Path) -> None:
    more = {"chunk0/9.cls": b"1", "chunk0/8.json": b"1"}
    data = open_folder(both(tmp_path / "data", chunk(lambda c: {"cls": b"%d" % c}) | more), None)
    assert (data.classes, notes(data)) == (("0", "1"), ["skipped: 2 .cls files, 2 .json files"])


def test_class_tars_are_refused_with_the_command_to_unpack_them(tmp_path: Path) -> None:
    root = tmp_path / "my cat's $data"
    for wnid in ("n01440764", "n01443537"):
        tar(root / "train" / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": b"" for i in range(3)})
    with pytest.raises(
        ConfigError, match=r"n01440764_0\.JPEG has no label.*as in ImageNet's training archive"
    ) as error:
        open_imagenet(str(root), 0.3, None)
    command = str(error.value).partition("unpack them: ")[2]
    # The command may be repeated, also after a part was done, and does not change the working directory.
    (root / "train" / "n01440764").mkdir()
    for shell in ("sh", "bash"):
        done = subprocess.run([shell, "-ec", f"{command}\npwd"], check=True, cwd=tmp_path, stdout=subprocess.PIPE)
        assert done.stdout == os.fsencode(tmp_path) + b"\n"
    data = open_imagenet(str(root), 0.3, None)
    assert data.classes == ("n01440764", "n01443537")
    assert data.inventory.skipped == {".tar files": 2}


def test_class_tars_in_both_splits_get_a_command_for_each(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        for c in ("cat", "dog", "emu"):
            tar(root / split / f"{c}.tar", {"1.jpg": b""})
    with pytest.raises(ConfigError, match="has no label") as error:
        open_folder(str(root), None)
    both_at_once = str(error.value).partition("unpack them: ")[2]
    (root / "train" / "cat").mkdir()
    (root / "train" / "cat" / "1.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"val has no class folders .*\.tar files.*unpack them: \(cd .*val"):
        open_folder(str(root), None)
    subprocess.run(["sh", "-ec", both_at_once], check=True)
    assert open_folder(str(root), None).classes == ("cat", "dog", "emu")


def test_a_tar_of_tars_is_refused_with_the_command_to_unpack_it(tmp_path: Path) -> None:
    root = tmp_path / "my data"
    for wnid in ("n01440764", "n01443537"):
        tar(tmp_path / f"{wnid}.tar", {f"{wnid}_{i}.JPEG": b"" for i in range(2)})
    inner = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    tar(root / "ILSVRC2012_img_train.tar", inner)
    with pytest.raises(ConfigError, match=r"hold no images \(skipped: 2 \.tar files\)") as error:
        open_folder(str(root), 0.5)
    subprocess.run(["sh", "-ec", str(error.value).partition("each tar in it: ")[2]], check=True)
    assert open_folder(str(root), 0.5).classes == ("n01440764", "n01443537")


@pytest.mark.parametrize("names", [("train-0", "val-0"), ("0000", "0001", "0002", "0003"), ("a", "b"), ("train/a",)])
def test_tars_that_are_not_classes_get_no_unpack_command(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        tar(tmp_path / "data" / f"{name}.tar", {f"{name[-1]}.jpg": b""})
    with pytest.raises(ConfigError, match=r"has no label.*; add its label, or leave it out") as error:
        open_folder(str(tmp_path / "data"), 0.5)
    assert "tar -x" not in str(error.value)


@pytest.mark.parametrize("folder", ["", "test/", "test/images/", "images/"])
def test_a_test_set_without_labels_does_not_prevent_training(tmp_path: Path, folder: str) -> None:
    root = tmp_path / "data"
    tar(root / "train.tar", {f"train/{c}/{i}.jpg": b"" for c in ("cat", "dog") for i in range(2)})
    tar(root / "test.tar", {f"{folder}{i}.jpg": b"" for i in range(2)})
    data = open_folder(str(root), 0.5)
    assert (data.classes, data.inventory.unused) == (("cat", "dog"), ("test",))
    with pytest.raises(ConfigError, match=r"no validation set .*test cannot serve as one"):
        open_folder(str(root), None)


def test_holdout_reads_only_the_training_shards(tmp_path: Path) -> None:
    root = tmp_path / "data"
    tar(root / "train.tar", {f"{c}/{i}.jpg": b"" for c in ("cat", "dog") for i in range(2)})
    # A test set with labels for some of its images.
    tar(root / "test.tar", {"cat/1.jpg": b"", "2.jpg": b""})
    with pytest.raises(ConfigError, match=r"2\.jpg has no label"):
        open_folder(str(root), None)
    for _ in range(2):  # from the index the second time
        data = open_folder(str(root), 0.5)
        assert (data.classes, len(data.train), len(data.val)) == (("cat", "dog"), 2, 2)
        assert data.inventory.unused == ("test",)
    # Classes that only the validation set has do not matter either, and an index of both splits can serve training.
    tar(root / "test.tar", {"emu/1.jpg": b""})
    assert open_imagenet(str(root), 0.5, None).fingerprint == data.fingerprint
    tar(root / "test.tar", {"cat/1.jpg": b"", "cat/1.txt": b"x"})
    assert len(open_folder(str(root), None).val) == 1
    assert open_folder(str(root), 0.5).inventory == data.inventory


def test_split_folders_in_a_shard_are_not_classes(tmp_path: Path) -> None:
    names = [f"ILSVRC/Data/{split}/{c}/1.jpg" for split in ("train", "val") for c in "ab"]
    tar(tmp_path / "data" / "ILSVRC.tar", dict.fromkeys(names, b""))
    for opened in (open_dataset, open_validation):
        with pytest.raises(ConfigError, match=r"are splits, not classes \(train, val\); unpack the shards"):
            opened(DataConfig(name="folder", root=str(tmp_path / "data"), holdout=0.5))


def test_names_repeated_in_each_shard_get_the_shards_name(tmp_path: Path) -> None:
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


def test_a_packed_store_without_its_index_is_the_same_data_set(tmp_path: Path) -> None:
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
    # Shards of other programs are packed like a folder.
    pack(Request(str(tmp_path / "store"), str(tmp_path / "again"), Encoding(), shards=2), silent)
    assert open_folder(str(tmp_path / "again"), None).fingerprint == before.fingerprint


def test_the_index_is_built_once_and_rebuilt_if_a_shard_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[int] = []
    members = tar_samples.members
    monkeypatch.setattr(tar_samples, "members", lambda handle, *more: (read.append(handle), members(handle, *more))[1])
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


def test_tars_beside_class_folders_are_not_shards(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for split in ("train", "val"):
        (root / split / "n1").mkdir(parents=True)
        (root / split / "n1" / "1.jpg").write_bytes(b"x")
    tar(root / "train" / "n1.tar", {"1.jpg": b"x"})
    tar(root / "ILSVRC2012_img_train.tar", {"1.jpg": b"x"})
    data = open_folder(str(root), None)
    assert data.train.location(0) == f"{root}/train/n1/1.jpg"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"1.jpg": b"x"}, r"1\.jpg has no label: neither a \.cls"),
        ({"1.jpg": b"x", "2.jpg": b"x", "2.cls": b"0"}, r"1\.jpg has no label: .*; add its label, or leave it out"),
        ({"a/1.txt": b"x"}, "hold no images"),
        ({}, "hold no images"),
        ({"a/1.jpg": b"x", "a/1.cls": b""}, "0.tar cannot be used .*holds no label"),
        ({"a/1.jpg": b"x", "a/1.cls": b"\0"}, "holds no label"),
        ({"a/1.jpg": b"x", "a/1.cls": b"1" * 5000}, "holds no label"),
        ({"a/1.jpg": b"x", "a/1.json": b"{"}, "is not valid JSON"),
        ({"a/1.jpg": b"x", "a/1.json": b"[" * 100_000}, "is not valid JSON"),
        (
            {"a/1.jpg": b"x", "a/1.cls": b"1", "a/2.jpg": b"x", "a/2.cls": b"cat"},
            r"names \(a/1\.jpg has 1, a/2\.jpg has cat\)",
        ),
        ({"a/1.jpg": b"x", "b/1.jpg": b"y", "./a/1.jpg": b"z"}, r"a/1\.jpg appears twice"),
    ],
)
def test_unusable_shards_are_refused_with_the_reason(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    for split in ("train", "val"):
        tar(tmp_path / "data" / split / "0.tar", files)
    with pytest.raises(ConfigError, match=expected) as error:
        open_folder(str(tmp_path / "data"), None)
    assert str(error.value).isprintable()


def test_a_class_only_in_the_validation_set_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "data/train/0.tar", {"a/1.jpg": b"x", "c/1.jpg": b"x"})
    tar(tmp_path / "data/val/0.tar", {"b/1.jpg": b"x", "a/1.jpg": b"x"})
    with pytest.raises(ConfigError, match="has 1 class that the training set lacks, such as b;"):
        open_folder(str(tmp_path / "data"), None)
    # Conversely, a class without validation images is only noted.
    tar(tmp_path / "data/val/0.tar", {"a/1.jpg": b"x"})
    assert open_folder(str(tmp_path / "data"), None).classes == ("a", "c")


def test_compressed_and_truncated_shards_are_refused(tmp_path: Path) -> None:
    tar(tmp_path / "data/train/0.tar.gz", {"a/1.jpg": b"x"}, format=tarfile.PAX_FORMAT)
    with pytest.raises(ConfigError, match=r"0\.tar\.gz is compressed.*plain \.tar"):
        open_folder(str(tmp_path / "data"), None)
    shutil.rmtree(tmp_path / "data")
    for split in ("train", "val"):
        tar(tmp_path / "data" / split / "0.tar", {f"a/{i}.jpg": b"x" * 600 for i in range(9)})
    os.truncate(tmp_path / "data/train/0.tar", 2000)
    with pytest.raises(ConfigError, match=r"train/0\.tar cannot be used .*copy it again"):
        open_folder(str(tmp_path / "data"), None)


@pytest.mark.parametrize(
    ("names", "missing", "expected"),
    [
        (
            ("train.tar", "val.TAR.gz"),
            "no validation set",
            r"\(.*; val\.TAR\.gz cannot serve as one\); val\.TAR\.gz is",
        ),
        (("val-0.tar", "train-0.tgz", "train-1.tgz"), "no train/ folder", r"train-0\.tgz is"),
    ],
)
def test_a_compressed_split_beside_plain_ones_is_named(
    tmp_path: Path, names: tuple[str, ...], missing: str, expected: str
) -> None:
    for name in names:
        tar(tmp_path / "data" / name, {f"{c}/{i}.jpg": b"" for c in "ab" for i in range(2)})
    with pytest.raises(
        ConfigError, match=rf"has {missing}.* ?{expected} compressed, .*decompress such shards to plain"
    ) as error:
        open_folder(str(tmp_path / "data"), None)
    assert "holdout" not in str(error.value)
    holdout = 0.5 if "train.tar" in names else None
    data = open_validation(DataConfig(name="folder", root=str(tmp_path / "data"), holdout=holdout))
    assert data.inventory.unused == (names[1],)
    assert data.inventory.skipped == {"compressed tar files": len(names) - 1}


def test_tars_beside_other_folders_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("train-0", "val-0"):
        tar(root / f"{name}.tar", {f"{c}/{i}.jpg": b"" for c in "ab" for i in range(2)})
    (root / "meta").mkdir()
    (root / "meta" / "notes.txt").write_bytes(b"")
    expected = (
        r"tars that lie beside folders are not read \(train-0\.tar, val-0\.tar beside meta/\): "
        "to read them, move the folders"
    )
    for holdout in (None, 0.5):
        for opened in (open_dataset, open_validation):
            with pytest.raises(ConfigError, match=expected) as error:
                opened(DataConfig(name="folder", root=str(root), holdout=holdout))
            assert "set data.holdout" not in str(error.value)
    (root / "meta").rename(tmp_path / "meta")
    assert len(open_folder(str(root), None).train) == 4


@pytest.mark.parametrize("shard", ["test-0.tar", "test/0.tar"])
def test_holdout_needs_training_tars(tmp_path: Path, shard: str) -> None:
    tar(tmp_path / "data" / shard, {f"{c}/{i}.jpg": b"" for c in "ab" for i in range(2)})
    for holdout in (None, 0.5):
        with pytest.raises(
            ConfigError, match=r"all its tars belong to test\. .* train-\*\.tar; mode=evaluate needs no training shards"
        ):
            open_folder(str(tmp_path / "data"), holdout)


def test_links_and_unsafe_names_in_a_shard_are_harmless(tmp_path: Path) -> None:
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
    assert data.train.location(0).isprintable()
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["0.tar", "0.tar", "train", "val"]


@pytest.mark.parametrize("shard", ["{}.tar", "val-{}.tar", "val/{}.tar", "Test/{}.tar", "set-valid-{}.tar"])
def test_validation_shards_without_training_shards_are_evaluated(tmp_path: Path, shard: str) -> None:
    for number in range(2):
        tar(tmp_path / "data" / shard.format(number), {f"{c}/{number}.jpg": b"%d" % number for c in "ab"})
    (tmp_path / "data" / shard.format("x")).with_suffix(".txt").write_bytes(b"")
    root = str(tmp_path / "data")
    expected = [(f"{c}/{number}.jpg", c, b"%d" % number) for c in "ab" for number in range(2)]
    for place in (root, str(tmp_path / "store")):
        for name in ("folder", "imagenet"):
            data = open_validation(DataConfig(name=name, root=place, order="shards"))
            assert everything(data) == [[], expected]
            assert dict(data.inventory.skipped) == {".txt files": 1}
        if place == root:
            pack(Request(root, str(tmp_path / "store"), Encoding()), silent)
        elif shard != "{}.tar":
            with pytest.raises(ConfigError, match=r"has no train/ folder; found val/.*mode=evaluate needs no train/"):
                open_folder(place, None)


def test_labels_of_validation_shards_alone_are_in_numeric_order(tmp_path: Path) -> None:
    files = {f"{c}.{kind}": b"%d" % c for c in (10, 9, 7) for kind in ("jpg", "cls")}
    tar(tmp_path / "data" / "val-0.tar", files)
    data = open_validation(DataConfig(name="folder", root=str(tmp_path / "data")))
    assert (data.classes, data.val.labels.tolist()) == (("7", "9", "10"), [2, 0, 1])
    tar(tmp_path / "data" / "val-1.tar", {"x.jpg": b""})
    with pytest.raises(ConfigError, match=r"x\.jpg has no label"):
        open_validation(DataConfig(name="folder", root=str(tmp_path / "data")))


def test_training_shards_do_not_serve_as_validation(tmp_path: Path) -> None:
    tar(tmp_path / "data" / "train-0.tar", {f"{c}/{i}.jpg": b"" for c in "ab" for i in range(4)})
    with pytest.raises(ConfigError, match=r"has no validation set .*; to evaluate .* held out, set data\.holdout=S"):
        open_validation(DataConfig(name="folder", root=str(tmp_path / "data")))
    assert len(open_validation(DataConfig(name="folder", root=str(tmp_path / "data"), holdout=0.25)).val) == 2


def test_files_beside_shards_are_counted_for_any_first_split(tmp_path: Path) -> None:
    for name in ("test", "train", "val"):
        tar(tmp_path / "data" / f"{name}-0.tar", {f"{c}/{name}.jpg": b"" for c in "ab"})
    (tmp_path / "data" / "notes.txt").write_bytes(b"")
    assert dict(open_folder(str(tmp_path / "data"), None).inventory.skipped) == {".txt files": 1}
