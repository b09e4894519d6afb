"""A store packed from Hugging Face's parquet equals the folder that the parquet was made from, or is refused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import everything, request, tree

from lars_train.config import DataConfig
from lars_train.data.open import open_validation
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError, DataError
from lars_train.pack import parquet
from lars_train.pack.lars_data import main
from lars_train.pack.layout import open_original
from lars_train.pack.packing import Request, pack, silent

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RANDOM = np.random.default_rng(0)
WNIDS = ("n01440764", "n01443537", "n02110185", "n15075141")
ENGLISH = ("tench, Tinca tinca", "goldfish", "Siberian husky", "toilet tissue")
Row = tuple[bytes | None, str | None, Any]
"""Encoded image, path, label."""

# ImageNet's own paths in a folder, from which the Hub made its names.
FILES = {
    "train": {f"{w}/{w}_{i * 37}.JPEG": RANDOM.bytes(int(RANDOM.integers(1, 3000))) for w in WNIDS for i in range(11)},
    "validation": {
        f"{w}/ILSVRC2012_val_{i * 4 + k:08d}.JPEG": RANDOM.bytes(200) for k, w in enumerate(WNIDS) for i in range(3)
    },
}


def hub_rows(files: Mapping[str, bytes]) -> list[Row]:
    """Return the Hub's rows for these files: shuffled, labels by rank of the wnid, with the wnid in the path."""
    rows = []
    for name, data in files.items():
        wnid, _, base = name.partition("/")
        rows.append((data, f"{base.removesuffix('.JPEG')}_{wnid}.JPEG", WNIDS.index(wnid)))
    random.Random(0).shuffle(rows)
    return rows


def metadata(image: str, classes: Sequence[str] | None, label: str = "label") -> dict[bytes, bytes]:
    label_type = {"names": list(classes), "_type": "ClassLabel"} if classes is not None else {"_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": {image: {"_type": "Image"}, label: label_type}}}).encode()}


def write(
    path: Path,
    rows: Sequence[Row],
    *,
    image: str = "image",
    plain: bool = False,
    classes: Sequence[str] | None = ENGLISH,
    bytes_type: Any = None,
    label_type: Any = None,
    group: int = 4,
    **options: Any,
) -> None:
    binary = bytes_type or pa.binary()
    images, paths, labels = zip(*rows, strict=True)
    if plain:
        column = pa.array(images, binary)
    else:
        both = [{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)]
        column = pa.array(both, pa.struct([("bytes", binary), ("path", pa.string())]))
    table = pa.table({image: column, "label": pa.array(labels, label_type or pa.int64())})
    if classes is not None:
        table = table.replace_schema_metadata(metadata(image, classes))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **options)


def hub(root: Path, count: int = 3, **options: Any) -> str:
    """Write ``imagenet-1k`` as on the Hub: files of all splits in one folder, the test set without labels."""
    (root / ".git").mkdir(parents=True)
    (root / "README.md").write_text("# ImageNet")
    for split, files in FILES.items():
        rows = hub_rows(files)
        cuts = [round(i * len(rows) / count) for i in range(count + 1)]
        for i, (first, end) in enumerate(itertools.pairwise(cuts)):
            write(root / "data" / f"{split}-{i:05d}-of-{count:05d}.parquet", rows[first:end], **options)
    test = [(b"test", f"ILSVRC2012_test_{i:08d}.JPEG", -1) for i in range(5)]
    write(root / "data" / "test-00000-of-00001.parquet", test, **options)
    return str(root)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Write the folder that the Hub's data set was made from."""
    for split, place in (("train", "train"), ("validation", "val")):
        for name, data in FILES[split].items():
            path = tmp_path / "imagenet" / place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return str(tmp_path / "imagenet")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return ``imagenet-1k`` as on the Hub, and a store of it. Tests only read them."""
    path = tmp_path_factory.mktemp("packed")
    root = hub(path / "hub")
    pack(request(root, path / "store"), silent)
    return root, path / "store"


def run(*arguments: str) -> object:
    try:
        main(arguments)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image": "img", "compression": "none", "write_page_checksum": True},
        {"compression": "zstd", "use_dictionary": False, "group": 1000},
        {"bytes_type": "large", "label_type": "int16", "group": 1},
        {"data_page_version": "2.0", "data_page_size": 100, "store_schema": False},
        {"classes": None},
    ],
)
def test_a_store_of_the_hubs_imagenet_equals_its_folder(tmp_path: Path, folder: str, options: dict[str, Any]) -> None:
    kinds = {"large": pa.large_binary(), "int16": pa.int16()}
    root = hub(tmp_path / "hub", **{k: kinds.get(v, v) if isinstance(v, str) else v for k, v in options.items()})
    before = tree(tmp_path / "hub")
    pack(request(root, tmp_path / "store"), silent)
    expected = open_imagenet(folder, None, None)
    for opened in (open_imagenet(str(tmp_path / "store"), None, None), open_folder(str(tmp_path / "store"), None)):
        assert everything(opened) == everything(expected)
        assert opened.classes == expected.classes == WNIDS
        assert opened.fingerprint == expected.fingerprint
    assert open_folder(str(tmp_path / "store"), 0.3).fingerprint == open_folder(folder, 0.3).fingerprint
    assert tree(tmp_path / "hub") == before
    # Also without the index, from the names and labels in the shards.
    (tmp_path / "store" / "index.lars").unlink()
    assert open_folder(str(tmp_path / "store"), None).fingerprint == expected.fingerprint


def test_a_subset_of_the_classes_equals_its_folder(tmp_path: Path) -> None:
    some = {name: data for name, data in FILES["train"].items() if not name.startswith(WNIDS[1])}
    write(tmp_path / "hub" / "train.parquet", hub_rows(some))
    for name, data in some.items():
        path = tmp_path / "data" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack(request(str(tmp_path / "hub"), tmp_path / "store"), silent)
    store, data = (open_folder(str(tmp_path / name), 0.2) for name in ("store", "data"))
    assert everything(store) == everything(data)
    assert store.fingerprint == data.fingerprint


def test_packing_decodes_each_row_group_twice_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[str, int]] = []
    rows_at_a_time: list[int] = []
    batches = parquet.image_batches

    def recorded(path: Path, group: int, column: str) -> Any:
        decoded.append((path.name, group))
        for batch in batches(path, group, column):
            rows_at_a_time.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet, "image_batches", recorded)
    write(tmp_path / "hub" / "train-a.parquet", [(b"%d" % i, f"{i:03d}.jpg", i % 4) for i in range(300)], group=50)
    write(tmp_path / "hub" / "train-b.parquet", [(b"%d" % i, f"{i:03d}.jpg", i % 4) for i in range(300, 450)], group=50)
    pack(request(str(tmp_path / "hub"), tmp_path / "one", shards=1), silent)
    first = decoded[: len(decoded) // 2]
    assert len(first) == len(set(first)) == 9
    assert decoded == first * 2
    assert max(rows_at_a_time) <= 16
    # A row group that two shards share is decoded for each of them.
    decoded.clear()
    pack(request(str(tmp_path / "hub"), tmp_path / "four", shards=4), silent)
    assert len(decoded) <= 2 * (9 + 3)
    # Shuffled, so that a reader of whole shards does not get one class after the other.
    assert first != sorted(first)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_store_does_not_depend_on_the_number_of_processes(packed: tuple[str, Path], tmp_path: Path) -> None:
    root, store = packed
    pack(request(root, tmp_path / "store", jobs=2), silent)
    assert tree(tmp_path / "store") == tree(store)


def pack_until_killed(number: int, asked: Request) -> None:
    """Pack, and kill this process at the `number`-th read of an image."""
    read = parquet.ParquetSource.read
    calls = itertools.count(1)

    def killing(self: parquet.ParquetSource, sample: int) -> bytes:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, sample)

    parquet.ParquetSource.read = killing  # type: ignore[method-assign]
    pack(asked, silent)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_image_packing_resumes_to_the_same_store(packed: tuple[str, Path], tmp_path: Path) -> None:
    root, undisturbed = packed
    shards = sum(name.endswith(".tar") for name in tree(undisturbed))
    left = []
    # In the first shard, in the second and so on; the last two during verification.
    for number in (3, 20, 33, 3, 20, 33):
        process = multiprocessing.get_context("fork").Process(
            target=pack_until_killed, args=(number, request(root, tmp_path / "store"))
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left.append(sum(name.endswith(".tar") for name in tree(tmp_path / "store")))
    assert left == [0, 1, 3, 3, shards, shards]
    pack(request(root, tmp_path / "store"), silent)
    assert tree(tmp_path / "store") == tree(undisturbed)


def test_the_command_packs_and_verifies_against_its_source(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hub(tmp_path / "hub")
    assert run("pack", "hub", "store", "--shards", "2", "--jobs", "1") == 0
    assert "train: 44 images, 4 classes" in capsys.readouterr().out
    for source in ("hub", "hub/data", folder):
        assert run("verify", "store", "--source", source, "--jobs", "1") == 0
        assert f"intact, and equal to {source}" in capsys.readouterr().out
    assert run("info", "store") == 0
    assert f"fingerprint {open_folder(folder, None).fingerprint}" in capsys.readouterr().out
    assert run("pack", "hub", "store", "--shards", "2", "--jobs", "1") == 0
    assert "already exists" in capsys.readouterr().out
    assert run("pack", folder, "store2", "--jobs", "1") == 0
    assert run("verify", "store2", "--source", "hub", "--jobs", "1") == 0
    rows = hub_rows(FILES["train"])
    rows[7] = (b"other", *rows[7][1:])
    for path in (tmp_path / "hub/data").glob("train*"):
        path.unlink()
    write(tmp_path / "hub/data/train.parquet", rows)
    capsys.readouterr()
    assert run("verify", "store", "--source", "hub", "--jobs", "1") == 1
    assert "differs from the original" in capsys.readouterr().out
    assert run("pack", "hub", "store3", "--val-labels", "x", "--jobs", "1") == 2
    assert "the labels are in the parquet files" in capsys.readouterr().err


def test_without_wnids_classes_are_named_after_the_metadata(tmp_path: Path) -> None:
    classes = ["z/ebra", " .hidden ", "a\u202eb", "", "never"]
    for classes[3], expected in (
        ("dog", ("z_ebra", "_.hidden", "a_b", "dog")),
        ("z_ebra", ("0", "1", "2", "3")),
        ("", ("0", "1", "2", "3")),
    ):
        rows = [(b"%d" % i, f"{i}.png", i % 4) for i in range(12)]
        for split in ("train", "test"):
            write(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", rows, classes=classes, image="img")
        original = open_original(str(tmp_path / "hub"), None)
        assert original.classes == expected
        found = {
            source.name(i): (source.read(i), int(source.labels[i]))
            for source in original.splits.values()
            for i in range(12)
        }
        assert found == {f"{expected[i % 4]}/{i}.png": (b"%d" % i, i % 4) for i in range(12)}
        assert list(original.splits) == ["train", "val"]


@pytest.mark.parametrize("file", ["train-00000-of-00001", "0"])
def test_classes_named_like_splits_are_refused_as_folders_are(file: str, tmp_path: Path) -> None:
    path = tmp_path / "hub" / f"{file}.parquet"
    for classes, refused in (
        (("train", "val"), "train, val"),
        (("cat", "test", "Training Set"), "test, Training Set"),
        (("bus", "car", "train"), ""),
    ):
        rows = [(b"%d" % i, f"{i}.jpg", i % len(classes)) for i in range(6)]
        write(path, rows, classes=classes)
        if refused:
            with pytest.raises(ConfigError, match=rf"its classes \({refused}\) are parts of a data set"):
                open_original(str(tmp_path / "hub"), None)
        else:
            assert open_original(str(tmp_path / "hub"), None).classes == classes
    write(path, [(b"x", None, "train"), (b"y", None, "val")], classes=None, label_type=pa.string())
    with pytest.raises(ConfigError, match=r"its classes \(train, val\) are parts of a data set"):
        open_original(str(tmp_path / "hub"), None)


def test_a_test_set_without_labels_is_not_the_validation_set(tmp_path: Path) -> None:
    rows: list[Row] = [(b"%d" % i, f"{i}.jpg", i % 2) for i in range(4)]
    write(tmp_path / "hub" / "train.parquet", rows)
    test = tmp_path / "hub" / "test.parquet"
    write(test, [(image, path, -1) for image, path, _ in rows])
    assert list(open_original(str(tmp_path / "hub"), None).splits) == ["train"]
    write(test, [(image, path, None) for image, path, _ in rows])
    assert list(open_original(str(tmp_path / "hub"), None).splits) == ["train"]
    pq.write_table(pq.read_table(test).drop_columns(["label"]), test)
    assert list(open_original(str(tmp_path / "hub"), None).splits) == ["train"]
    write(test, rows)
    assert list(open_original(str(tmp_path / "hub"), None).splits) == ["train", "val"]


@pytest.mark.parametrize("name", ["validation/0.parquet", "data/test-00000-of-00001.parquet", "0.parquet"])
def test_a_validation_set_alone_is_packed_and_evaluated(tmp_path: Path, name: str) -> None:
    rows = [(b"%d" % i, f"{i}.jpg", (1, 3)[i % 2]) for i in range(8)]
    for classes, names in ((ENGLISH, ("goldfish", "toilet tissue")), (None, ("1", "3"))):
        write(tmp_path / "hub" / name, rows, classes=classes)
        store = tmp_path / f"store-{names[0]}"
        pack(request(str(tmp_path / "hub"), store), silent)
        data = open_validation(DataConfig(name="folder", root=str(store)))
        found = {(int(data.val.read(i)), data.classes[data.val.labels[i]]) for i in range(len(data.val))}
        assert found == {(i, names[i % 2]) for i in range(8)}
        assert (len(data.train), data.inventory.train) == (0, "")
        main(["verify", str(store), "--source", str(tmp_path / "hub"), "--jobs", "1"])


def test_parquet_without_labels_or_training_rows_is_refused(tmp_path: Path) -> None:
    rows: list[Row] = [(b"%d" % i, f"{i}.jpg", i % 2) for i in range(4)]
    write(tmp_path / "a" / "test.parquet", [(image, path, -1) for image, path, _ in rows])
    write(tmp_path / "b" / "validation.parquet", rows)
    write(tmp_path / "b" / "train.parquet", rows)
    pq.write_table(pq.read_table(tmp_path / "b" / "train.parquet").slice(0, 0), tmp_path / "b" / "train.parquet")
    for folder, message in (("a", "; test has no labels or no rows"), ("b", r"or none with rows\.$")):
        with pytest.raises(ConfigError, match=rf"no parquet files for training, .*{message}"):
            open_original(str(tmp_path / folder), None)


def test_wnids_that_contradict_the_labels_name_no_class(tmp_path: Path) -> None:
    for label_of in (lambda i: i % 2, lambda i: 1 - i // 6):  # two wnids in one class; not in the order of the labels
        rows = [(b"%d" % i, f"n0000000{i // 6}_{i}.JPEG", label_of(i)) for i in range(12)]
        write(tmp_path / "hub" / "train.parquet", rows)
        original = open_original(str(tmp_path / "hub"), None)
        assert original.classes == ENGLISH[:2]
        source = original.splits["train"]
        assert {(source.read(i), int(source.labels[i])) for i in range(12)} == {
            (b"%d" % i, label_of(i)) for i in range(12)
        }


def test_labels_that_are_names_are_the_classes(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.large_string()):
        rows = [(b"%d" % i, f"{i}.jpg", "cat" if i % 3 else "ant") for i in range(9)]
        write(tmp_path / "hub" / "train.parquet", rows, classes=None, label_type=kind)
        original = open_original(str(tmp_path / "hub"), None)
        assert original.classes == ("ant", "cat")
        assert original.splits["train"].labels.tolist() == [0] * 3 + [1] * 6


@pytest.mark.parametrize("png", [False, True])
def test_images_without_paths_are_named_after_file_and_row(tmp_path: Path, png: bool) -> None:
    images = [(b"\x89PNG" if png else b"\xff\xd8") + b"%d" % i for i in range(10)]
    suffix = "png" if png else "jpg"
    for plain in (False, True):
        for first, name in ((0, "train-0"), (6, "train-1")):
            rows = [(images[i], None, i % 2) for i in range(first, min(first + 6, 10))]
            write(tmp_path / "hub" / f"{name}.parquet", rows, plain=plain, group=4)
        source = open_original(str(tmp_path / "hub"), None).splits["train"]
        assert {source.name(i): source.read(i) for i in range(10)} == {
            f"{ENGLISH[i % 2]}/train-{i // 6}_{i % 6:07d}.{suffix}": images[i] for i in range(10)
        }
        name = f"{ENGLISH[0]}/train-1_0000002.{suffix}"
        assert source.name(9) == name
        assert source.location(9) == f"{tmp_path}/hub/train-1.parquet, row 2 ({name})"


PATHS = st.none() | st.sampled_from(["a.jpg", "x/a.jpg", "..", ".jpg", "a", "a\0.jpg", "n00000001_1_n00000001.JPEG"])
ROWS = st.lists(st.tuples(PATHS | st.text(max_size=6), st.integers(0, 3)), min_size=1, max_size=20)


@given(rows=ROWS)
@settings(max_examples=25, deadline=None)
def test_each_image_has_a_distinct_name_and_its_label(
    rows: list[tuple[str | None, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("any")
    write(root / "train.parquet", [(b"%d" % i, path, label) for i, (path, label) in enumerate(rows)])
    original = open_original(str(root), None)
    source = original.splits["train"]
    ids = range(len(source))
    assert sorted(source.read(i) for i in ids) == sorted(b"%d" % i for i in range(len(rows)))
    present = sorted({label for _, label in rows})
    for i in ids:
        assert present[source.labels[i]] == rows[int(source.read(i))][1]
        folder, _, base = source.name(i).partition("/")
        assert original.classes[source.labels[i]] == folder
        assert "/" not in base
        assert not base.startswith(".")
    names = [os.fsencode(source.name(i)) for i in ids]
    assert names == sorted(set(names))


def test_a_null_image_ends_packing_or_is_left_out_and_listed(tmp_path: Path) -> None:
    rows: list[Row] = [(b"%d" % i, f"{i}.jpg", i // 6) for i in range(8)]
    rows[5] = (None, "5.jpg", 0)
    write(tmp_path / "hub" / "train.parquet", rows)
    asked = request(str(tmp_path / "hub"), tmp_path / "store")
    with pytest.raises(DataError, match=r"train\.parquet, row 5 \(.*/5\.jpg\): the image is null.*--on-error skip"):
        pack(asked, silent)
    summary = pack(request(asked.source, tmp_path / "store", skip=True), silent)
    assert [left["image"] for left in summary["skipped"]] == ["tench, Tinca tinca/5.jpg"]
    assert len(open_folder(str(tmp_path / "store"), 0.2).train) == 5


def test_the_first_image_may_be_null(tmp_path: Path) -> None:
    rows: list[Row] = [(None, "0.jpg", 0), *((b"%d" % i, f"{i}.jpg", 0) for i in range(1, 4))]
    write(tmp_path / "hub" / "train.parquet", rows, group=1)
    source = open_original(str(tmp_path / "hub"), None).splits["train"]
    assert source.read(1) == b"1"


def test_damage_is_never_packed(tmp_path: Path) -> None:
    rows: list[Row] = [(RANDOM.bytes(500), f"{i}.jpg", i % 2) for i in range(12)]
    path = tmp_path / "hub" / "train.parquet"
    write(path, rows, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False)
    raw = bytearray(path.read_bytes())
    place = raw.index(rows[6][0])  # type: ignore[arg-type]
    raw[place + 9] ^= 1
    path.write_bytes(raw)
    asked = request(str(tmp_path / "hub"), tmp_path / "store")
    with pytest.raises(DataError, match=r"train\.parquet, row [4-7] .*cannot be read: .*--on-error skip"):
        pack(asked, silent)
    summary = pack(request(asked.source, tmp_path / "store", skip=True), silent)
    # The damaged page belongs to a row group of four.
    assert {left["image"].partition("/")[2] for left in summary["skipped"]} == {f"{i}.jpg" for i in range(4, 8)}
    data = open_folder(str(tmp_path / "store"), 0.2)
    found = {data.train.read(i) for i in range(len(data.train))} | {data.val.read(i) for i in range(len(data.val))}
    assert found == {row[0] for row in rows[:4] + rows[8:]}


def outcome(root: str) -> str:
    """Open a data set, read all of its images, and return what happened."""
    try:
        source = open_original(root, None).splits["train"]
    except ConfigError as error:
        return "refused" if "train.parquet" in str(error) else str(error)
    for sample in range(len(source)):
        try:
            source.read(sample)
        except OSError:
            return "bad image"
    return "read"


def test_damage_anywhere_raises_only_the_expected_errors(tmp_path: Path) -> None:
    rows = hub_rows(FILES["validation"])
    path = tmp_path / "hub" / "train.parquet"
    write(path, rows, write_page_checksum=True)
    whole = path.read_bytes()
    dice = random.Random(0)
    outcomes = []
    for _ in range(150):
        raw = bytearray(whole)
        if dice.random() < 0.2:
            del raw[dice.randrange(len(raw)) :]
        for _ in range(dice.randrange(1, 4)):
            if raw:
                # The footer is a small part of the file, but matters most.
                at = dice.choice((dice.randrange(len(raw)), max(0, len(raw) - 1 - dice.randrange(1500))))
                raw[at] = dice.randrange(256)
        path.write_bytes(raw)
        outcomes.append(outcome(str(tmp_path / "hub")))
    assert set(outcomes) == {"read", "refused", "bad image"}


def refused(tmp_path: Path, **columns: Any) -> str:
    """Write a file with these columns and return the message with which it is refused."""
    path = tmp_path / "hub" / "train.parquet"
    path.parent.mkdir(exist_ok=True)
    meta = columns.pop("meta", None)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(meta) if meta else table, path)
    with pytest.raises(ConfigError) as error:
        open_original(str(tmp_path / "hub"), None)
    assert str(error.value).isprintable()
    return str(error.value)


def test_each_kind_of_unusable_column_has_its_message(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"x", "path": "1.jpg"}])
    assert "which column holds the labels. Expected a column of type ClassLabel, or one called label" in refused(
        tmp_path, image=image
    )
    assert "unclear which column holds the images." in refused(tmp_path, label=[1], photo=[b"x"])
    assert "the columns are label, pho\\u202eto" in refused(tmp_path, label=[1], **{"pho\u202eto": [b"x"]})
    for elsewhere in (
        pa.array([{"bytes": None, "path": "/data/1.jpg"}], image.type),
        pa.array([{"bytes": None, "path": "/data/1.jpg"}]),
        pa.array([{"path": "/data/1.jpg"}]),
        pa.array(["/data/1.jpg"]),
    ):
        assert "holds only the paths of images, not the images" in refused(tmp_path, image=elsewhere, label=[0])
    assert "column image is of type list" in refused(tmp_path, image=pa.array([[1, 2]]), label=[0])
    assert "column label is of type double" in refused(tmp_path, image=image, label=[0.5])
    for meta in (b"{", b"[]", b'{"info": {"features": 3}}', b"[" * 100_000):
        assert "its Hugging Face metadata is damaged" in refused(
            tmp_path, image=image, label=[0], meta={b"huggingface": meta}
        )
    no_list = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}})
    assert "cannot be read" in refused(tmp_path, image=image, label=[0], meta={b"huggingface": no_list})
    assert "none with rows" in refused(tmp_path, image=image[:0], label=pa.array([], pa.int64()))


@pytest.mark.parametrize("label", [-1, None, 4, 2**40])
def test_a_label_without_a_class_is_reported_with_its_row(tmp_path: Path, label: int | None) -> None:
    rows = [(b"x", f"{i}.jpg", 0) for i in range(9)]
    rows[6] = (b"x", "6.jpg", label)  # type: ignore[assignment]
    for split, own in (("train", rows), ("validation", rows[:4])):
        write(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", own)
    with pytest.raises(
        ConfigError, match=f"train-00000-of-00001.parquet, row 6: the label {label} is not one of the 4 classes"
    ):
        open_original(str(tmp_path / "hub"), None)


@pytest.mark.parametrize("label", ["-1", "1.0", "+1"])
def test_a_text_label_that_is_an_unusual_number_is_refused(tmp_path: Path, label: str) -> None:
    write(
        tmp_path / "hub" / "train.parquet",
        [(b"x", None, "cat"), (b"y", None, label)],
        classes=None,
        label_type=pa.string(),
    )
    with pytest.raises(ConfigError, match=r"train\.parquet, row 1: the label .* is not a class number or name"):
        open_original(str(tmp_path / "hub"), None)


def test_skipped_columns_and_files_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Row] = [(b"%d" % i, None, i % 2) for i in range(4)]
    for name in ("train", "valid", "extra"):
        write(tmp_path / "hub" / f"{name}-0.parquet", rows if name == "train" else rows[:1], classes=None)
    write(tmp_path / "hub" / "test-0.parquet", [(b"x", None, -1)], classes=None)
    for path in (tmp_path / "hub").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("img", table["image"]).append_column("cls", table["label"]), path)
    assert run("pack", str(tmp_path / "hub"), str(tmp_path / "store"), "--jobs", "1") == 0
    out = capsys.readouterr().out
    assert "validation: valid; not used: test\n" in out
    assert "NOTE: classes without validation images: 1\n" in out
    data = open_folder(str(tmp_path / "store"), None)
    assert data.inventory.skipped == {"other columns of images or labels": 2, "parquet files outside any split": 1}
    assert (data.inventory.val, data.inventory.unused, data.inventory.unvalidated) == ("valid", ("test",), 1)


def test_each_kind_of_mismatch_between_files_has_its_message(tmp_path: Path) -> None:
    def assert_refused(place: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            open_original(str(tmp_path / place), None)

    hub(tmp_path / "gap")
    (tmp_path / "gap/data/train-00001-of-00003.parquet").unlink()
    assert_refused("gap", r"has 2 of 3 files train-\.\.\.; train-00001-of-00003\.parquet is missing: download")
    for config in ("full", "small"):
        hub(tmp_path / "configs" / config)
    assert_refused("configs", r"several data sets of parquet files; give the folder of one: .*full/data, .*small/data")
    rows = [(b"x", f"{i}.jpg", i % 2) for i in range(4)]
    write(tmp_path / "mixed" / "train-a.parquet", rows)
    write(tmp_path / "mixed" / "train-b.parquet", rows, classes=ENGLISH[::-1])
    assert_refused("mixed", r"train-b\.parquet and train-a\.parquet differ in columns or classes")
    write(tmp_path / "split" / "train.parquet", rows)
    write(tmp_path / "split" / "val.parquet", rows, classes=ENGLISH[::-1])
    assert_refused("split", "the training and the validation set have different classes")
    write(tmp_path / "split" / "val.parquet", [(b"x", "1.jpg", 3)])
    assert_refused("split", "the training set lacks 1 class of the validation set, such as 3")


def test_without_pyarrow_only_parquet_is_refused_with_the_remedy(folder: str, tmp_path: Path) -> None:
    hub(tmp_path / "hub")
    code = (
        "import sys\nsys.modules['pyarrow'] = None\nfrom lars_train.pack.lars_data import main\n"
        f"main(['pack', {folder!r}, {str(tmp_path / 'one')!r}, '--jobs', '1'])\n"
        f"main(['pack', {str(tmp_path / 'hub')!r}, {str(tmp_path / 'two')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "verified" in done.stdout
    assert done.returncode == 2
    assert "pip install pyarrow" in done.stderr
    assert not (tmp_path / "two").exists()
