"""ImageNet opens in each of its layouts, with each kind of labels for a flat validation folder."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError

MakeTree = Callable[[Mapping[Any, bytes]], str]

WNIDS = ("n01440764", "n01443537", "n02084071")
TRAIN = {f"train/{w}/{w}_{i}.JPEG": b"" for w in WNIDS for i in range(3)}
# The classes of images 1, 2, ... of the flat validation folder.
TRUTH = ("n02084071", "n01440764", "n01440764", "n01443537")
IMAGES = [f"ILSVRC2012_val_{k:08d}.JPEG" for k in range(1, 5)]
FLAT = {**TRAIN, **{f"val/{name}": name.encode() for name in IMAGES}}
KAGGLE = "ImageId,PredictionString\n" + "".join(
    f"{name[:-5]},{wnid} 111 108 230 183 {wnid} 1 2 3 4 \n"
    for name, wnid in reversed(list(zip(IMAGES, TRUTH, strict=True)))
)
DEVKIT = "ILSVRC2012_devkit_t12/data"
TEXT = "ILSVRC2012_validation_ground_truth.txt"


def meta_mat() -> bytes:
    """Make a meta.mat as in the devkit: 1-based IDs in another order than the wnids, and inner nodes last."""
    ids = {3: "n01440764", 1: "n01443537", 2: "n02084071", 1001: "n00001740"}
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.empty((len(ids), 1), fields)
    for row, (number, wnid) in enumerate(ids.items()):
        synsets[row, 0] = (float(number), wnid, f"words of {wnid}", 0.0)
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    return out.getvalue()


LINES = b"2\n3\n3\n1\n"


def check(root: str, val_labels: str | None = None) -> None:
    data = open_imagenet(root, None, val_labels)
    assert data.classes == WNIDS
    assert [data.val.name(i) for i in range(len(data.val))] == IMAGES
    assert [data.classes[label] for label in data.val.labels] == list(TRUTH)
    assert [data.val.read(i) for i in range(len(data.val))] == [name.encode() for name in IMAGES]
    assert data.val.labels.dtype == np.int32
    assert len(data.train) == 9


def test_validation_images_in_class_folders_need_no_table(make_tree: MakeTree) -> None:
    files = {**TRAIN, **{f"val/{wnid}/{name}": b"" for name, wnid in zip(IMAGES, TRUTH, strict=True)}}
    data = open_imagenet(make_tree(files), None, None)
    assert [(data.val.name(i), data.val.labels[i]) for i in range(4)] == [
        ("n01440764/" + IMAGES[1], 0),
        ("n01440764/" + IMAGES[2], 0),
        ("n01443537/" + IMAGES[3], 1),
        ("n02084071/" + IMAGES[0], 2),
    ]


def test_a_share_of_the_training_images_can_be_held_out(make_tree: MakeTree) -> None:
    data = open_imagenet(make_tree(TRAIN), 0.3, None)
    assert np.bincount(data.val.labels).tolist() == [1, 1, 1]
    assert len(data.train) == 6


@pytest.mark.parametrize("folder", ["", "val/"])
def test_kaggles_table_is_found_in_the_tree(make_tree: MakeTree, folder: str) -> None:
    check(make_tree({**FLAT, f"{folder}LOC_val_solution.csv": KAGGLE.encode()}))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_kaggles_table_is_found_up_to_three_folders_above(make_directory: MakeTree, levels: int) -> None:
    inside = "ILSVRC/Data/CLS-LOC/"
    table = "/".join([*inside.split("/")[: 3 - levels], "LOC_val_solution.csv"])
    root = make_directory({**{inside + str(n): c for n, c in FLAT.items()}, table: KAGGLE.encode()})
    check(f"{root}/{inside}")


@pytest.mark.parametrize(
    "table",
    [
        KAGGLE,
        "filename,wnid\n" + "".join(f"{n},{w}\n" for n, w in zip(IMAGES, TRUTH, strict=True)),
        "\ufeff" + "".join(f'"val/{n}",{w}\r\n' for n, w in zip(IMAGES, TRUTH, strict=True)),
        "".join(f"{n[:-5]}, {w},dog\n" for n, w in zip(IMAGES, TRUTH, strict=True)) + "\nabsent,n9\n",
    ],
    ids=["kaggle", "header", "bom-path-quotes", "bare-extra"],
)
def test_any_table_of_image_and_wnid_is_accepted(tmp_path: Path, make_tree: MakeTree, table: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(table, newline="")
    check(make_tree(FLAT), str(path))
    # The table may also be in the tree.
    check(make_tree({**FLAT, "val/labels.csv": table.encode()}))


@pytest.mark.parametrize("kind", ["found", "devkit", "data", "text"])
def test_the_devkit_gives_labels_by_position(tmp_path: Path, make_tree: MakeTree, kind: str) -> None:
    devkit = {f"{DEVKIT}/{TEXT}": LINES, f"{DEVKIT}/meta.mat": meta_mat()}
    if kind == "found":
        check(make_tree({**FLAT, **devkit}))
        return
    for name, content in devkit.items():
        path = tmp_path / "kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    given = {"devkit": "ILSVRC2012_devkit_t12", "data": DEVKIT, "text": f"{DEVKIT}/{TEXT}"}[kind]
    check(make_tree(FLAT), str(tmp_path / "kit" / given))


def test_both_tables_and_both_storages_have_one_fingerprint(make_directory: MakeTree, make_zip: MakeTree) -> None:
    csv = {**FLAT, "LOC_val_solution.csv": KAGGLE.encode()}
    devkit = {**FLAT, f"{DEVKIT}/{TEXT}": LINES, f"{DEVKIT}/meta.mat": meta_mat()}
    prints = {open_imagenet(make(files), None, None).fingerprint for make in (make_zip,) for files in (csv, devkit)}
    prints.add(open_imagenet(make_directory(csv), None, None).fingerprint)
    assert len(prints) == 1


def table(*rows: str) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


ROWS = [f"{n},{w}" for n, w in zip(IMAGES, TRUTH, strict=True)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"not lie in class folders.*LOC_val_solution\.csv.*set data\.val_labels=PATH"),
        ({"a.csv": table(*ROWS), "b.csv": table(*ROWS)}, r"not lie in class folders.*set data\.val_labels=PATH"),
        (
            {"LOC_val_solution.csv": table(*ROWS[1:])},
            r"data\.val_labels: .*no row for 1 of 4 images.*val_00000001\.JPEG; set data\.val_labels",
        ),
        (
            {"LOC_val_solution.csv": table(*ROWS, f"{IMAGES[0]},{WNIDS[0]}")},
            r"data\.val_labels: .*val_00000001 two classes, n02084071 and n01440764; delete one",
        ),
        (
            {"LOC_val_solution.csv": table(*ROWS[1:], f"{IMAGES[0]},n09999999")},
            r"data\.val_labels: ILSVRC2012_val_00000001\.JPEG is of class n09999999.*no folder.*add the class",
        ),
        (
            {f"{DEVKIT}/{TEXT}": LINES + b"1\n", f"{DEVKIT}/meta.mat": meta_mat()},
            r"data\.val_labels: .*has 5 lines, and val/ 4 images.*give a CSV",
        ),
        (
            {f"{DEVKIT}/{TEXT}": b"2\n3\n3\n77\n", f"{DEVKIT}/meta.mat": meta_mat()},
            r"data\.val_labels: .*the ID 77, which meta\.mat .*the same devkit",
        ),
        (
            {f"{DEVKIT}/{TEXT}": LINES, f"{DEVKIT}/meta.mat": b"MATLAB, not"},
            r"data\.val_labels: the meta\.mat beside .* is damaged.*unpack the devkit again",
        ),
        ({f"{DEVKIT}/{TEXT}": LINES}, r"data\.val_labels: .*text file needs meta\.mat beside it"),
    ],
)
def test_a_table_that_does_not_match_is_refused(make_tree: MakeTree, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_imagenet(make_tree({**FLAT, **files}), None, None)


def test_an_unusable_path_to_labels_is_refused(tmp_path: Path, make_directory: MakeTree) -> None:
    root = make_directory(FLAT)
    folders = {**TRAIN, **{f"val/{w}/1.JPEG": b"" for w in WNIDS}}
    (tmp_path / "notes.txt").write_bytes(b"1\n")
    for given in ("none.csv", "data"):
        with pytest.raises(ConfigError, match=r"data\.val_labels=.* is neither a file nor .*; give a CSV"):
            open_imagenet(root, None, str(tmp_path / given))
    with pytest.raises(ConfigError, match=r"data\.val_labels: .*notes\.txt cannot be used.*needs the suffix \.csv"):
        open_imagenet(root, None, str(tmp_path / "notes.txt"))
    for path in Path(root, "val").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"data\.val_labels=.*class folders, .*drop data\.val_labels"):
        open_imagenet(make_directory(folders), None, str(tmp_path / "notes.txt"))


def test_without_scipy_the_message_has_two_remedies(monkeypatch: pytest.MonkeyPatch, make_tree: MakeTree) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    root = make_tree({**FLAT, f"{DEVKIT}/{TEXT}": LINES, f"{DEVKIT}/meta.mat": meta_mat()})
    with pytest.raises(ConfigError, match=r"data\.val_labels: .*`pip install scipy`, or .*CSV"):
        open_imagenet(root, None, None)
    monkeypatch.undo()
    check(root)
