"""Skipped files are counted by reason, alike for a folder, a zip, and a store packed from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lars_train.data.inventory import Inventory, format_counts, merge_counts
from lars_train.data.sources import directory
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent

MakeTree = Callable[[Mapping[Any, bytes]], str]

PETS = {f"{split}/{c}/{i}.jpg": b"x" for split in ("train", "Valid") for c in ("cat", "dog") for i in range(2)}
SKIPPED = {
    "train/cat/@eaDir/0.jpg/SYNOPHOTO_THUMB_XL.jpg": "@eaDir folders",
    "train/cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg": "",
    "Valid/@eaDir/x.jpg": "@eaDir folders",
    "train/dog/#recycle/x.jpg": "#recycle folders",
    "train/cat/a.avif": ".avif files",
    "train/cat/b.JP2": ".jp2 files",
    "train/dog/c.heic": ".heic files",
    "train/dog/deep/er/notes.txt": ".txt files",
    "Valid/notes.txt": ".txt files",
    "train/dog/README": "files without a suffix",
    "train/dog/x.a suffix that nobody has": "files of other kinds",
    "train/loose.jpg": "images outside class folders",
    "loose.png": "images outside class folders",
    "train/cat/._0.jpg": "hidden files",
    "train/.cache/1.jpg": "hidden folders",
    "extra/cat/1.jpg": "folders beside the splits",
    "@eaDir/1.jpg": "@eaDir folders",
    "@eaDir/2.jpg": "",
    "#recycle/x.jpg": "#recycle folders",
    "$RECYCLE.BIN/x.jpg": "$RECYCLE.BIN folders",
    "train/$Recycle.Bin/x.jpg": "$Recycle.Bin folders",
    "train/System Volume Information/x.jpg": "System Volume Information folders",
    "System Volume Information/x.jpg": "System Volume Information folders",
    "Valid/lost+found/x.jpg": "lost+found folders",
    "Valid/.Trash-1000/x.jpg": "hidden folders",
    ".hid/train/1.jpg": "hidden folders",
    ".x.jpg": "hidden files",
    # Not counted.
    "train/cat/.DS_Store": "",
    "train/cat/Thumbs.db": "",
    "Valid/desktop.ini": "",
    "__MACOSX/train/cat/._0.jpg": "",
}
COUNTS = {reason: list(SKIPPED.values()).count(reason) for reason in sorted(set(SKIPPED.values())) if reason}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lars_train" / "index"


def test_each_skipped_file_is_counted_once_by_its_reason(make_tree: MakeTree) -> None:
    data = open_folder(make_tree({**PETS, **dict.fromkeys(SKIPPED, b"x")}), None)
    assert data.inventory == Inventory("train", "Valid", (), COUNTS)
    assert [data.train.name(i) for i in range(4)] == ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"]
    assert (len(data.train), len(data.val), data.classes) == (4, 4, ("cat", "dog"))


def test_files_beside_class_folders_in_the_root_are_counted(make_tree: MakeTree) -> None:
    files = {f"{c}/{i}.jpg": b"" for c in "ab" for i in range(2)} | {"README.md": b"", "@eaDir/x": b"", "1.jpg": b""}
    skipped = open_folder(make_tree(files), 0.5).inventory.skipped
    assert skipped == {".md files": 1, "@eaDir folders": 1, "images outside class folders": 1}


def test_plain_data_has_nothing_to_report(make_tree: MakeTree) -> None:
    assert open_folder(make_tree(PETS), None).inventory == Inventory("train", "Valid")


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "jpeg", "pnm", "pbm"])
def test_every_suffix_that_pillow_decodes_is_an_image(make_tree: MakeTree, suffix: str) -> None:
    data = open_folder(make_tree({**PETS, f"train/cat/2.{suffix}": b"x"}), None)
    assert len(data.train) == 5
    assert data.inventory.skipped == {}


def test_a_zip_with_backslashes_equals_its_folder(make_zip: MakeTree, make_directory: MakeTree) -> None:
    windows = open_folder(make_zip({name.replace("/", "\\"): data for name, data in PETS.items()}), None)
    assert windows.fingerprint == open_folder(make_directory(PETS), None).fingerprint


def test_names_that_point_outside_a_zip_are_counted(make_zip: MakeTree) -> None:
    outside = dict.fromkeys(("../x.jpg", "/x.jpg", "train/cat/..\\x.jpg", "train//x.jpg"), b"")
    assert open_folder(make_zip({**PETS, **outside}), None).inventory.skipped == {"entries with unsafe names": 4}


def test_circular_links_and_pipes_are_counted(make_directory: MakeTree) -> None:
    root = Path(make_directory(PETS))
    (root / "train/cat/self").symlink_to("self")
    (root / "train/cat/up").symlink_to(root / "train")
    (root / "train/dog/here").symlink_to(root / "train/dog")
    os.mkfifo(root / "train/dog/pipe.jpg")
    data = open_folder(str(root), None)
    assert data.inventory.skipped == {
        "files without a suffix": 1,
        "links to an enclosing folder": 2,
        "pipes, sockets and devices": 1,
    }
    assert len(data.train) == 4


def test_classes_without_images_are_reported_with_their_content(make_tree: MakeTree) -> None:
    files = {**PETS, "train/bird/1.avif": b"", "train/bird/2.avif": b""}
    with pytest.raises(ConfigError, match=r"without images: bird/ \(skipped: 2 \.avif files\)"):
        open_folder(make_tree(files), None)


@pytest.mark.parametrize("holdout", [None, 0.5])
def test_a_store_has_the_inventory_of_its_original(make_tree: MakeTree, tmp_path: Path, holdout: float | None) -> None:
    root, store = make_tree({**PETS, **dict.fromkeys(SKIPPED, b"x"), "test/1.jpg": b""}), tmp_path / "store"
    summary = pack(Request(root, str(store), Encoding()), silent)
    packed, original = (open_folder(place, holdout) for place in (str(store), root))
    assert packed.fingerprint == original.fingerprint
    assert packed.inventory == original.inventory
    assert packed.inventory.val == ("" if holdout else "Valid")
    kept = json.loads((store / "store.json").read_text())
    parts = [kept["original"]["skipped"], *(kept["splits"][split]["not_read"] for split in ("train", "val"))]
    assert merge_counts(*parts) == COUNTS
    assert kept["original"] == summary["original"]
    # A store packed from a store has it too.
    pack(Request(str(store), str(tmp_path / "again"), Encoding()), silent)
    assert open_folder(str(tmp_path / "again"), holdout).inventory == packed.inventory


def test_an_index_of_a_folder_keeps_the_counts(
    make_directory: MakeTree, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MIN_INDEXED", 1)
    root = make_directory({**PETS, **dict.fromkeys(SKIPPED, b"x")})
    for path in (Path(root), *Path(root).rglob("*")):
        if path.is_dir():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    first = open_folder(root, None).inventory
    assert len(list(cache.glob("*.index"))) == 2
    monkeypatch.setattr(directory, "make_listing", lambda *_: pytest.fail("the folder was read again"))
    assert open_folder(root, None).inventory == first == Inventory("train", "Valid", (), COUNTS)


def test_an_index_of_an_earlier_version_is_rebuilt_with_a_note(
    make_directory: MakeTree, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(directory, "MIN_INDEXED", 1)
    root = make_directory(PETS)
    for path in (Path(root), *Path(root).rglob("*")):
        if path.is_dir():
            os.utime(path, (1_000_000_000, 1_000_000_000))
    with monkeypatch.context() as before:
        before.setattr(directory, "_VERSION", 1)
        open_folder(root, None)
    assert len(open_folder(root, None).train) == 4
    assert capsys.readouterr().err.count("was made by another version of lars-train") == 2
    open_folder(root, None)
    assert capsys.readouterr().err == ""


def test_a_flat_validation_folder_counts_other_files(make_tree: MakeTree) -> None:
    files = {f"train/n{c}/1.JPEG": b"" for c in "12"} | {"val/1.JPEG": b"", "val/2.JPEG": b"", "val/x.txt": b""}
    data = open_imagenet(make_tree({**files, "val/labels.csv": b"1,n1\n2,n1\n"}), None, None)
    assert data.inventory == Inventory("train", "val", (), {".txt files": 1}, unvalidated=1)
    assert list(data.inventory.lines())[1] == "NOTE: classes without validation images: 1"


def test_images_beside_the_only_folder_of_a_zip_are_counted(make_zip: MakeTree) -> None:
    wrapped = {f"pets/{name}": data for name, data in PETS.items()}
    assert open_folder(make_zip({**wrapped, "x.jpg": b"", "y.txt": b""}), None).inventory.skipped == {
        "images outside class folders": 1
    }


def test_images_outside_all_folders_are_reported(make_tree: MakeTree) -> None:
    with pytest.raises(ConfigError, match=r"no train/ folder; it holds 2 images outside class folders"):
        open_folder(make_tree({"1.jpg": b"", "2.jpg": b"", "x.txt": b""}), 0.5)


def test_classes_with_similar_names_are_reported(make_tree: MakeTree) -> None:
    twins = ("Cat", "caf\u00e9", "cafe\u0301", "dog ")
    files = {**PETS, **{f"{split}/{name}/1.jpg": b"" for split in ("train", "Valid") for name in twins}}
    data = open_folder(make_tree(files), None)
    assert data.classes == ("Cat", "cafe\u0301", "caf\u00e9", "cat", "dog", "dog ")
    assert list(data.inventory.lines())[1] == (
        "NOTE: classes whose names look alike: Cat, cafe\u0301, caf\u00e9, cat, dog"
    )


def test_a_line_names_five_reasons_and_sums_the_rest() -> None:
    counts = {f".{c} files": number for number, c in enumerate("abcdefgh", 1)}
    assert format_counts(counts) == "8 .h files, 7 .g files, 6 .f files, 5 .e files, 4 .d files, 6 others"
    assert format_counts({"entries with unsafe names": 1, ".txt files": 1234}) == (
        "1,234 .txt files, 1 entry with unsafe names"
    )
    assert format_counts(dict.fromkeys([f".{c} files" for c in "abcdef"], 1)).endswith("1 .e file, 1 other")
    assert format_counts({"others": 1}) == "1 other"
    # The record is bounded for any number of suffixes.
    many = merge_counts({f".{i} files": 1 for i in range(1000)})
    assert (len(many), sum(many.values())) == (31, 1000)
    assert sum(merge_counts(many, many).values()) == 2000
