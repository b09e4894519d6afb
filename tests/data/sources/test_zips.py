"""Threads and processes read a zip in place, and hostile zips do no harm."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from lars_train.data.dataset import Source
from lars_train.data.decode.pillow import PILLOW
from lars_train.data.loading.reader import EvalReader
from lars_train.data.sources.folder import open_folder
from lars_train.data.transforms import View
from lars_train.errors import ConfigError

MakeTree = Callable[[Mapping[Any, bytes]], str]

RANDOM = np.random.default_rng(0)
CONTENT = {
    f"{split}/{c}/{i}.jpg": RANDOM.bytes(int(RANDOM.integers(0, 5000)))
    for split in ("train", "val")
    for c in "ab"
    for i in range(10)
}


def pack(path: Path, method: int, files: Mapping[str, bytes] = CONTENT) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


class Barrier(Protocol):
    def wait(self, timeout: float | None = None) -> int: ...


def has_files(source: Source) -> bool:
    return all(source.read(i) == CONTENT[f"train/{source.name(i)}"] for i in range(len(source)))


def read_together(source: Source, start: Barrier, rounds: int) -> bool:
    start.wait(30)
    return all(has_files(source) for _ in range(rounds))


def child(source: Source, start: Barrier, verdict: multiprocessing.SimpleQueue[bool]) -> None:
    try:
        verdict.put(read_together(source, start, 100))
    except OSError:
        verdict.put(False)


@pytest.fixture
def archive(tmp_path: Path) -> str:
    return pack(tmp_path / "x.zip", zipfile.ZIP_STORED)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_stored_and_deflated_entries_are_read(tmp_path: Path, method: int) -> None:
    source = open_folder(pack(tmp_path / "x.zip", method), None).train
    assert len(source) == 20
    assert has_files(source)
    assert sorted(os.listdir(tmp_path)) == ["x.zip"]


def test_entries_of_a_streamed_zip_are_read(tmp_path: Path) -> None:
    # Written to a pipe, a zip has sizes after the data instead of in the local header.
    class Pipe(io.BytesIO):
        def tell(self) -> int:
            raise io.UnsupportedOperation("a pipe has no position")

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in CONTENT.items():
            archive.writestr(name, content)
    # Bytes before the zip are allowed (self-extracting zips begin with a program).
    (tmp_path / "x.zip").write_bytes(b"#!program" + pipe.getvalue())
    assert has_files(open_folder(str(tmp_path / "x.zip"), None).train)


def test_one_folder_around_everything_is_the_root(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", 0, {f"pets/{n}": c for n, c in CONTENT.items()} | {"README": b""})
    source = open_folder(path, None).train
    assert has_files(source)
    assert source.location(0) == f"{path}!pets/train/a/0.jpg"
    classes = pack(tmp_path / "y.zip", 0, {n.replace("train/", "pets/"): b"" for n in CONTENT if "val" not in n})
    assert open_folder(classes, 0.1).classes == ("a", "b")


def test_a_leading_dot_and_slash_is_removed_from_names(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", 0, {"./": b"", **{f"./{name}": data for name, data in CONTENT.items()}})
    data = open_folder(path, None)
    assert has_files(data.train)
    assert data.inventory.skipped == {}
    assert data.fingerprint == open_folder(pack(tmp_path / "y.zip", 0), None).fingerprint
    # Only once: the rest is not a plain name.
    path = pack(tmp_path / "x.zip", 0, {"././train/a/x.jpg": b"", **CONTENT})
    assert open_folder(path, None).inventory.skipped == {"entries with unsafe names": 1}


def test_hostile_names_are_skipped(tmp_path: Path) -> None:
    hostile = [
        "../../x.jpg",
        "/etc/x.jpg",
        "train/../../x.jpg",
        "train/a/../../../x.jpg",
        "train//x.jpg",
        "/train/a/x.jpg",
        "train/a/./x.jpg",
        "C:/train/a/x.jpg",
        "..\\..\\x.jpg",
    ]
    path = pack(tmp_path / "x.zip", 0, {**dict.fromkeys(hostile, b"bad"), **CONTENT})
    data = open_folder(path, None)
    assert data.classes == ("a", "b")
    assert len(data.train) == 20
    assert has_files(data.train)
    assert sorted(os.listdir(tmp_path)) == ["x.zip"]


def test_a_name_in_another_code_page_keeps_its_bytes(tmp_path: Path) -> None:
    path = Path(pack(tmp_path / "x.zip", 0, {**CONTENT, "train/a/e_.jpg": b"accent"}))
    path.write_bytes(path.read_bytes().replace(b"train/a/e_.jpg", b"train/a/\xc3\xa9.jpg"))
    source = open_folder(str(path), None).train
    assert [source.read(i) for i in range(len(source)) if source.name(i) == "a/é.jpg"] == [b"accent"]


def test_a_damaged_entry_is_reported_with_its_name_once(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = "train/a/3.jpg"
        path = Path(pack(tmp_path / "x.zip", method))
        raw = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            raw[archive.getinfo(name).header_offset + 30 + len(name) + 40] ^= 0x55
        path.write_bytes(raw)
        source = open_folder(str(path), None).train
        with pytest.raises(OSError, match=r"^(damaged|cannot be read)"):
            source.read(3)
        reader = EvalReader(source, View("none", 8, False, 0, 1.0), PILLOW)
        (bad,) = reader.fill(0, [3], np.empty((1, 8, 8, 3), np.uint8), np.empty(1, np.int64)).bad
        assert bad.where == f"{path}!{name}"
        assert name not in bad.reason
        assert source.read(4) == CONTENT["train/a/4.jpg"]


def test_a_zip_that_changes_during_the_run_is_an_oserror(archive: str) -> None:
    source = open_folder(archive, None).train
    kept = pickle.dumps(source)
    Path(archive).write_bytes(b"\0" * 200_000)
    with pytest.raises(OSError, match="replaced"):
        source.read(1)
    Path(archive).write_bytes(b"")
    with pytest.raises(OSError, match="too short"):
        source.read(1)
    Path(archive).unlink()
    with pytest.raises(OSError, match="No such file"):
        pickle.loads(kept).read(1)


def test_threads_can_share_a_source(archive: str) -> None:
    source = open_folder(archive, None).train
    assert has_files(source)
    start = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: read_together(source, start, 100), range(4)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_can_share_a_source_with_their_parent(archive: str) -> None:
    source = open_folder(archive, None).train
    assert has_files(source)  # the parent has the file open now, and continues to read
    context = multiprocessing.get_context("fork")
    verdict: multiprocessing.SimpleQueue[bool] = context.SimpleQueue()
    start = context.Barrier(4)
    children = [context.Process(target=child, args=(source, start, verdict)) for _ in range(3)]
    for process in children:
        process.start()
    assert read_together(source, start, 100)
    assert [verdict.get() for _ in children] == [True] * 3
    for process in children:
        process.join(30)


def test_a_source_with_an_open_file_can_be_pickled(archive: str) -> None:
    source = open_folder(archive, None).train
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    thread = threading.Thread(target=lambda: copy.read(0))
    thread.start()
    thread.join()
    assert has_files(copy)


def test_a_sample_takes_29_bytes_and_its_name(tmp_path: Path) -> None:
    files = {f"{s}/class/{i:06d}.jpg": b"" for s in ("train", "val") for i in range(5000)}
    source = open_folder(pack(tmp_path / "x.zip", 0, files), None).train
    # 150 MB for ImageNet's 1,281,167 samples are 117 bytes each; their names take about 30.
    assert len(pickle.dumps(source)) / len(source) < len("class/000000.jpg") + 50


def rewrite(path: str, edit: Callable[[bytearray], None]) -> None:
    raw = bytearray(Path(path).read_bytes())
    edit(raw)
    Path(path).write_bytes(raw)


def in_directory(name: str, offset: int, value: bytes) -> Callable[[bytearray], None]:
    """Overwrite a field of the entry in the central directory (APPNOTE.TXT, 4.3.12)."""

    def edit(raw: bytearray) -> None:
        start = raw.rindex(name.encode()) - 46
        assert raw[start : start + 4] == b"PK\x01\x02"
        raw[start + offset : start + offset + len(value)] = value

    return edit


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, struct.pack("<H", 1), "train/a/3.jpg is encrypted"),
        (10, struct.pack("<H", 14), "train/a/3.jpg is neither stored nor deflated"),
        (20, struct.pack("<I", 1 << 30), "train/a/3.jpg lies beyond the end of the file"),
        (24, struct.pack("<I", 1 << 30), "train/a/3.jpg states a size that deflate cannot reach"),
    ],
)
def test_opening_names_an_entry_that_cannot_be_read(archive: str, offset: int, value: bytes, message: str) -> None:
    rewrite(archive, in_directory("train/a/3.jpg", offset, value))
    with pytest.raises(ConfigError, match=rf"data\.root=.*x\.zip: {message}; make"):
        open_folder(archive, None)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_opening_names_a_duplicate_image(archive: str) -> None:
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("train/b/0.jpg", b"another")
    with pytest.raises(ConfigError, match=r"data\.root=.*train/b/0\.jpg appears twice; make"):
        open_folder(archive, None)


@pytest.mark.parametrize("keep", [0, 10, -10])
def test_a_file_that_is_not_a_complete_zip_is_refused(archive: str, keep: int) -> None:
    Path(archive).write_bytes(Path(archive).read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"data\.root=.*x\.zip is not a valid zip .*download it again"):
        open_folder(archive, None)
