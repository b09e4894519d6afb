"""A folder's index gives the same data set as the folder, is built once, and is not used if stale or damaged."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packed import everything

from lars_train.data.sources import directory
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.data.sources.index_files import Damaged, read_mapped, write_mapped

NAMES = ["a/2.jpg", "a/10.JPEG", "a-b/x.png", "a0/é.jpg", "a0/deep/er/1.jpg", "Z/1.jpg", "Z/2.jpg"]
FILES = [f"{split}/{name}" for split in ("train", "val") for name in NAMES]


def backdate(root: Path) -> None:
    """Set the modification times of the folders back, as if they had not changed for a long time."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, (1_000_000_000, 1_000_000_000))


def put(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder, and allow an index for folders of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(directory, "MIN_INDEXED", 1)
    return tmp_path / "cache" / "lars_train" / "index"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in FILES:
        put(root / name, name.encode())
    backdate(root)
    return root


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of folders whose entries were listed."""
    listed: list[str] = []
    scandir = os.scandir

    def recorded(path: str | bytes | os.PathLike[str]) -> object:
        listed.append(os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recorded)
    return listed


def walked_fingerprint(root: Path) -> str:
    """Compute the fingerprint from its definition, by walking the folder."""
    digest = hashlib.sha256()
    classes = sorted((entry.name for entry in (root / "train").iterdir()), key=os.fsencode)
    digest.update(b"".join(os.fsencode(name) + b"\0" for name in classes))
    for split in ("train", "val"):
        found = [path.relative_to(root / split) for path in (root / split).rglob("*") if path.is_file()]
        names = sorted(os.fsencode(path) for path in found)
        labels = [classes.index(os.fsdecode(name).split("/")[0]) for name in names]
        digest.update(b"\0" + struct.pack("<Q", len(names)) + b"".join(name + b"\0" for name in names))
        digest.update(np.array(labels, "<i4").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("holdout", [None, 0.5])
def test_an_index_gives_the_same_data_set_as_the_folder(
    cache: Path, root: Path, read: list[str], holdout: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(root / "train" / "a-b" / "y.png")
    backdate(root)
    with monkeypatch.context() as patched:
        patched.setattr(directory, "MIN_INDEXED", 10**9)
        plain = open_folder(str(root), holdout)
    assert not cache.exists()
    made = open_folder(str(root), holdout)
    del read[:]
    mapped = open_folder(str(root), holdout)
    # Only the root and the splits are listed, no class folder.
    assert {Path(path) for path in read if path.startswith(f"{root}/")} <= {root / "train", root / "val"}
    assert plain.fingerprint == made.fingerprint == mapped.fingerprint
    assert everything(plain) == everything(made) == everything(mapped)
    assert plain.classes == mapped.classes == ("Z", "a", "a-b", "a0")
    if holdout is None:
        assert mapped.fingerprint == walked_fingerprint(root)


def test_the_index_holds_paths_labels_and_sizes(cache: Path, root: Path) -> None:
    put(root / "train/a/3.jpg", b"12345")
    (root / "train/a/4.jpg").symlink_to("nowhere")
    backdate(root)
    data = open_folder(str(root), None)
    tables = [read_mapped(path) for path in cache.glob("*.index")]
    ((meta, arrays),) = [table for table in tables if table[0]["split"].endswith("train")]
    names = bytes(arrays["names"]).split(b"\0")[:-1]
    assert names == [os.fsencode(data.train.name(i)) for i in range(len(data.train))]
    assert [meta["classes"][label] for label in arrays["labels"]] == [name.decode().split("/")[0] for name in names]
    sizes = dict(zip(names, arrays["sizes"].tolist(), strict=True))
    assert (sizes[b"a/3.jpg"], sizes[b"a/4.jpg"]) == (5, -1)
    assert sizes[b"Z/1.jpg"] == len("train/Z/1.jpg")


def a_new_file(root: Path) -> None:
    put(root / "train/a/9.jpg")


def a_file_removed(root: Path) -> None:
    (root / "train/a/2.jpg").unlink()


def another_name(root: Path) -> None:
    (root / "train/a0/deep/er/1.jpg").rename(root / "train/a0/deep/er/2.jpg")


def a_new_class(root: Path) -> None:
    put(root / "train/new/1.jpg")
    put(root / "val/new/1.jpg")


def a_file_in_a_folder_below(root: Path) -> None:
    put(root / "val/a0/deep/er/3.jpg")


def a_link_to_another_folder(root: Path) -> None:
    (root / "train/a/more").symlink_to(root.parent / "elsewhere")
    put(root.parent / "elsewhere" / "1.jpg")


@pytest.mark.parametrize(
    "change",
    [a_new_file, a_file_removed, another_name, a_new_class, a_file_in_a_folder_below, a_link_to_another_folder],
)
def test_added_removed_and_renamed_files_are_detected(cache: Path, root: Path, change: Callable[[Path], None]) -> None:
    before = open_folder(str(root), None)
    change(root)
    after = open_folder(str(root), None)
    assert after.fingerprint != before.fingerprint
    if change is not a_link_to_another_folder:
        assert after.fingerprint == walked_fingerprint(root)


def test_a_change_in_a_linked_folder_is_detected(cache: Path, root: Path) -> None:
    a_link_to_another_folder(root)
    backdate(root)
    backdate(root.parent / "elsewhere")
    before = open_folder(str(root), None)
    put(root.parent / "elsewhere" / "2.jpg")
    assert len(open_folder(str(root), None).train) == len(before.train) + 1


def test_changed_content_needs_no_new_index(cache: Path, root: Path, read: list[str]) -> None:
    before = open_folder(str(root), None)
    (root / "train/Z/1.jpg").write_bytes(b"longer than it was before")
    del read[:]
    after = open_folder(str(root), None)
    assert not any(path.endswith("/Z") for path in read)
    assert after.fingerprint == before.fingerprint
    assert after.train.read(0) == b"longer than it was before"


def test_a_folder_that_changed_just_now_gets_no_index(cache: Path, root: Path) -> None:
    put(root / "train/a/9.jpg")
    open_folder(str(root), None)
    assert len(list(cache.glob("*.index"))) == 1  # val's
    # On a file system with a coarse clock, a later file may have the same time.
    now = (root / "train/a").stat().st_mtime_ns
    put(root / "train/a/91.jpg")
    os.utime(root / "train/a", ns=(now, now))
    assert "a/91.jpg" in {sample[0] for sample in everything(open_folder(str(root), None))}


def truncate(raw: bytearray) -> None:
    del raw[-1:]


def flip(raw: bytearray) -> None:
    raw[-1] ^= 1


def flip_header(raw: bytearray) -> None:
    raw[40] ^= 1


def empty(raw: bytearray) -> None:
    del raw[:]


@pytest.mark.parametrize("damage", [truncate, flip, flip_header, empty])
def test_a_damaged_index_is_reported_and_rebuilt(
    cache: Path, root: Path, damage: Callable[[bytearray], None], capsys: pytest.CaptureFixture[str], read: list[str]
) -> None:
    before = open_folder(str(root), None)
    assert capsys.readouterr().err == ""
    for path in cache.glob("*.index"):
        raw = bytearray(path.read_bytes())
        damage(raw)
        path.write_bytes(raw)
    assert everything(open_folder(str(root), None)) == everything(before)
    err = capsys.readouterr().err
    assert err.count("is damaged") == 2
    assert str(root / "train") in err
    del read[:]
    assert open_folder(str(root), None).fingerprint == before.fingerprint
    assert capsys.readouterr().err == ""
    assert not any(path.endswith("/Z") for path in read)


def header(**changes: object) -> dict[str, object]:
    return {"meta": {}, "arrays": {}, "bytes": 0, "crc": 0, **changes}


@pytest.mark.parametrize(
    "content",
    [
        [],
        None,
        {},
        header(meta=[]),
        header(arrays={"names": ["|O", 1, 0]}),
        header(arrays={"names": ["<i8", 1, 0]}),
        header(arrays={"names": ["<i8", -1, 0]}),
        header(arrays={"names": ["|u1", 0, -64]}),
        header(arrays={"names": ["<i8", 2**62, 0]}),
        header(arrays={"names": ["|u1", 1.0, 0]}),
        header(arrays={"names": 1}),
        header(arrays=[1]),
        header(bytes=1),
    ],
)
def test_an_array_file_with_an_inconsistent_header_is_refused(content: object, tmp_path: Path) -> None:
    text = json.dumps(content).encode()
    (tmp_path / "x").write_bytes(struct.pack("<8sII", b"LARSARR1", zlib.crc32(text), len(text)) + text)
    with pytest.raises(Damaged):
        read_mapped(tmp_path / "x")


def test_a_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    text = b"[" * 100_000
    (tmp_path / "x").write_bytes(struct.pack("<8sII", b"LARSARR1", zlib.crc32(text), len(text)) + text)
    with pytest.raises(Damaged):
        read_mapped(tmp_path / "x")


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.array([0, 3, 2**40], np.int64)},
        {"starts": np.array([0, -3, 4], np.int64)},
        {"starts": np.array([1, 2, 4], np.int64)},
        {"starts": np.array([0, 1, 4], np.int64)},
        {"starts": np.zeros(0, np.int64)},
        {"starts": np.array([0, 2, 4], np.uint8)},
        {"labels": np.array([0, 7], np.int32)},
        {"labels": np.array([0, -1], np.int32)},
        {"labels": np.array([0], np.int32)},
        {"sizes": np.zeros(1, np.int64)},
    ],
)
def test_an_inconsistent_index_is_not_used(
    change: dict[str, np.ndarray], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "two"
    for split in ("train", "val"):
        for name in "ab":
            put(root / split / name / "1.jpg")
    backdate(root)
    before = open_folder(str(root), None)
    for path in cache.glob("*.index"):
        meta, arrays = read_mapped(path)
        write_mapped(path, meta, {**arrays, **change})
    assert everything(open_folder(str(root), None)) == everything(before)
    assert capsys.readouterr().err.count("is damaged") == 2


@pytest.fixture
def unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


@pytest.mark.usefixtures("cache", "unwritable_cache")
def test_without_a_writable_cache_the_folder_is_read_with_a_note(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert open_folder(str(root), None).fingerprint == walked_fingerprint(root)
    assert "can be saved in" in capsys.readouterr().err


def test_the_data_folder_is_not_changed(cache: Path, root: Path) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*"))
    open_folder(str(root), None)
    assert list(cache.glob("*.index"))
    assert sorted((str(path), path.stat().st_mtime_ns) for path in root.rglob("*")) == before


def test_only_the_last_four_indexes_of_a_folder_are_kept(cache: Path, root: Path) -> None:
    for number in range(7):
        put(root / "train" / "a" / f"more{number}.jpg")
        backdate(root)
        os.utime(root / "train/a", (1_100_000_000 + number, 1_100_000_000 + number))
        assert open_folder(str(root), None).fingerprint == walked_fingerprint(root)
    assert len(list(cache.glob("*.index"))) == 4 + 1


def open_and_count(root: str, start: float, counts: multiprocessing.SimpleQueue[tuple[str, int]]) -> None:
    listed = 0
    scandir = os.scandir

    def watched(path: str | bytes | os.PathLike[str]) -> object:
        nonlocal listed
        listed += os.fsdecode(path).endswith("deep/er")
        return scandir(path)

    os.scandir = watched  # type: ignore[assignment]
    time.sleep(max(0.0, start - time.time()))
    counts.put((open_folder(root, None).fingerprint, listed))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_only_one_of_several_processes_reads_the_folder(cache: Path, root: Path) -> None:
    context = multiprocessing.get_context("fork")
    counts: multiprocessing.SimpleQueue[tuple[str, int]] = context.SimpleQueue()
    start = time.time() + 0.2
    processes = [context.Process(target=open_and_count, args=(str(root), start, counts)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [counts.get() for _ in processes]
    for process in processes:
        process.join(30)
    assert {fingerprint for fingerprint, _ in found} == {walked_fingerprint(root)}
    # Once per split.
    assert sum(listed for _, listed in found) == 2


def test_only_the_training_folder_beside_a_flat_one_is_indexed(cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    for name in ("train/n1/a.JPEG", "train/n2/b.JPEG", "val/1.JPEG", "val/2.JPEG"):
        put(root / name, name.encode())
    (root / "LOC_val_solution.csv").write_text("1,n2\n2,n1\n")
    backdate(root)
    first, second = (open_imagenet(str(root), None, None) for _ in range(2))
    assert len(list(cache.glob("*.index"))) == 1
    assert everything(first) == everything(second)
    assert first.fingerprint == second.fingerprint
