"""Threads and processes read a store in place, and the content of untrusted tars and indexes is checked."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lars_train.data.dataset import Source
from lars_train.data.sources import shards
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.index_files import read_mapped, write_mapped
from lars_train.data.sources.tars import END, BadTar, entry, members
from lars_train.errors import ConfigError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent

RANDOM = np.random.default_rng(0)
CONTENT = {
    f"{split}/{c}/{i}.jpg": RANDOM.bytes(int(RANDOM.integers(0, 5000)))
    for split in ("train", "val")
    for c in "ab"
    for i in range(10)
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for name, content in CONTENT.items():
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_bytes(content)
    pack(Request(str(folder / "data"), str(folder / "store"), Encoding(), shards=4), silent)
    return folder / "store"


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    """Return a copy of the store that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


def has_files(source: Source) -> bool:
    return all(source.read(i) == CONTENT[f"train/{source.name(i)}"] for i in range(len(source)))


def test_threads_can_share_a_source(store: Path) -> None:
    source = open_folder(str(store), None).train
    start = threading.Barrier(4)

    def read(_: int) -> bool:
        start.wait()
        return all(has_files(source) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_processes_can_share_a_source_with_their_parent(store: Path) -> None:
    source = open_folder(str(store), None).train
    assert has_files(source)  # the parent has the shards open now, and continues to read
    context = multiprocessing.get_context("fork")
    verdict: multiprocessing.SimpleQueue[bool] = context.SimpleQueue()
    children = [
        context.Process(target=lambda: verdict.put(all(has_files(source) for _ in range(20)))) for _ in range(3)
    ]
    for process in children:
        process.start()
    assert all(has_files(source) for _ in range(20))
    assert [verdict.get() for _ in children] == [True] * 3
    for process in children:
        process.join(30)


def test_a_source_with_open_shards_can_be_pickled(store: Path) -> None:
    source = open_folder(str(store), 0.5).train
    source.read(0)
    assert has_files(pickle.loads(pickle.dumps(source)))


def test_more_shards_than_may_be_open_can_be_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to count open files")
    monkeypatch.setattr(shards, "_HANDLES", 2)
    before = handles()
    source = open_folder(str(store), None).train
    opened = handles()
    assert has_files(source)
    assert has_files(source)
    assert handles() == opened + 2
    del source
    assert handles() == before


def test_a_sample_takes_24_bytes_and_its_name(tmp_path: Path, store: Path) -> None:
    source = open_folder(str(store), None).train
    assert isinstance(source, shards.ShardSource)
    assert sum(array.itemsize for array in (source.labels, *vars(source._places).values())) == 4 + 4 + 8 + 8


def test_a_changed_or_missing_shard_is_an_error(store: Path) -> None:
    source = open_folder(str(store), None).train
    kept = pickle.dumps(source)
    shard = store / "train" / "train-000001.tar"
    sample = next(i for i in range(len(source)) if shard.name in source.location(i) and len(bytes(source.read(i))) > 0)
    raw = shard.read_bytes()
    os.truncate(shard, 10)
    with pytest.raises(OSError, match="is too short"):
        source.read(sample)
    with pytest.raises(ConfigError, match=r"train/train-000001\.tar is not a file of .* bytes"):
        open_folder(str(store), None)
    shard.unlink()
    with pytest.raises(OSError, match=r"train-000001\.tar"):
        pickle.loads(kept).read(sample)
    with pytest.raises(ConfigError, match=r"store: train/train-000001\.tar cannot be read \(No such file"):
        open_folder(str(store), None)
    shard.write_bytes(raw)
    assert has_files(open_folder(str(store), None).train)


@pytest.mark.parametrize("name", ["fifo", "folder", "device"])
def test_anything_but_a_regular_file_as_a_shard_is_refused(store: Path, name: str) -> None:
    shard = store / "train" / "train-000001.tar"
    shard.unlink()
    if name == "fifo":
        os.mkfifo(shard)
    elif name == "folder":
        shard.mkdir()
    else:
        shard.symlink_to("/dev/zero")
    # Its size matches the index, so that only its type is wrong.
    meta, arrays = read_mapped(store / "index.lars")
    shard_named("train/train-000001.tar", shard.stat().st_size)(meta, arrays)
    write_mapped(store / "index.lars", meta, arrays)
    with pytest.raises(ConfigError, match="is not a file of"):
        open_folder(str(store), None)


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def at(name: str, value: int, index: int = 0) -> Edit:
    def edit(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return edit


def shard_named(name: object, size: object = None) -> Edit:
    def edit(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        old = meta["splits"]["train"]["shards"][0]
        meta["splits"]["train"]["shards"][0] = [name, old[1] if size is None else size]

    return edit


def overlapping(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    shard, offset = arrays["train.shard"].copy(), arrays["train.offset"].copy()
    size = arrays["train.size"].copy()
    shard[:2], offset[:2], size[:2] = 0, (512, 600), 100
    arrays.update({"train.shard": shard, "train.offset": offset, "train.size": size})


def entry_of(key: str, value: object) -> Edit:
    return lambda meta, arrays: meta.__setitem__(key, value)


@pytest.mark.parametrize(
    "edit",
    [
        at("train.offset", -512),
        at("train.offset", 2**62),
        at("train.size", -1),
        at("train.size", 2**62),
        at("train.size", 2**63 - 1),
        at("train.shard", 4),
        at("train.shard", -1),
        at("train.labels", 2),
        at("train.labels", -1),
        at("train.starts", 2**40, 1),
        overlapping,
        shard_named("../../etc/passwd.tar"),
        shard_named("/etc/passwd.tar"),
        shard_named("train/../../x.tar"),
        shard_named("train/x\0.tar"),
        shard_named("train/.x.tar"),
        shard_named("train/index.lars"),
        shard_named("train\\x.tar"),
        shard_named(["train/x.tar"]),
        shard_named("train/train-000000.tar", -1),
        shard_named("train/train-000000.tar", 1.5),
        lambda meta, arrays: meta["splits"].update(other=meta["splits"]["val"]),
        lambda meta, arrays: meta["splits"]["train"].update(shards=[]),
        lambda meta, arrays: arrays.pop("val.sums"),
        lambda meta, arrays: arrays.update({"val.sums": np.zeros(3, np.uint64)}),
        lambda meta, arrays: arrays.update({"val.offset": arrays["val.offset"][1:]}),
        lambda meta, arrays: arrays.update({"val.offset": arrays["val.offset"].astype(np.uint64)}),
        entry_of("classes", ["a", "a"]),
        entry_of("classes", [["a"], ["b"]]),
        entry_of("classes", 7),
        entry_of("classes", ["\u20ac", "b"]),
        entry_of("kind", "folder"),
        entry_of("version", 2),
        entry_of("splits", None),
        entry_of("inventory", None),
        entry_of("inventory", {"train": "train", "val": "val"}),
        entry_of("inventory", {"train": 1, "val": "val", "unused": [], "skipped": {}}),
        entry_of("inventory", {"train": "x" * 2000, "val": "val", "unused": [], "skipped": {}}),
        entry_of("inventory", {"train": "train", "val": "val", "unused": ["x"] * 200, "skipped": {}}),
        entry_of("inventory", {"train": "train", "val": "val", "unused": [], "skipped": [1]}),
        lambda meta, arrays: meta["splits"]["train"].update(skipped={"x": -1}),
        lambda meta, arrays: meta["splits"]["train"].update(skipped={"x": 1.5}),
        lambda meta, arrays: meta["splits"]["train"].update(skipped={str(i): 1 for i in range(1000)}),
    ],
)
def test_an_inconsistent_index_is_refused_in_one_line(store: Path, edit: Edit) -> None:
    meta, arrays = read_mapped(store / "index.lars")
    arrays = dict(arrays)
    edit(meta, arrays)
    write_mapped(store / "index.lars", meta, arrays)
    with pytest.raises(ConfigError, match=r"(index\.lars|x\.tar) cannot be (used|read)") as expected:
        open_folder(str(store), None)
    assert str(expected.value).isprintable()


def test_text_of_an_index_is_printed_without_control_characters(store: Path) -> None:
    meta, arrays = read_mapped(store / "index.lars")
    meta["inventory"] = {"train": "\x1b[31m", "val": "\n", "unused": ["\u202e"], "skipped": {"\x07 files": 3}}
    write_mapped(store / "index.lars", meta, arrays)
    assert all(line.isprintable() for line in open_folder(str(store), None).inventory.lines())


def test_names_in_an_index_never_become_paths(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta, arrays = read_mapped(store / "index.lars")
    hostile = [b"../" * 9 + b"outside.jpg", b"/etc/passwd", b"\x1b[31mred\nnew line", *(b"x%d" % i for i in range(17))]
    blob = b"".join(name + b"\0" for name in hostile)
    starts = np.cumsum([0, *(len(name) + 1 for name in hostile)])
    arrays = {**arrays, "train.names": np.frombuffer(blob, np.uint8), "train.starts": starts.astype(np.int64)}
    write_mapped(store / "index.lars", meta, arrays)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(os.fspath(path)), real(path, *a, **k))[1])
    source = open_folder(str(store), None).train
    assert {bytes(source.read(i)) for i in range(len(source))} == {c for n, c in CONTENT.items() if n[0] == "t"}
    assert all(source.location(i).isprintable() for i in range(len(source)))
    assert opened
    assert all(Path(path).parent == store / "train" and path.endswith(".tar") for path in opened)


def listed(raw: bytes, tmp_path: Path) -> list[tuple[bytes, bytes]]:
    (tmp_path / "x.tar").write_bytes(raw)
    handle = os.open(tmp_path / "x.tar", os.O_RDONLY)
    try:
        return [(name, raw[offset : offset + size]) for name, offset, size in members(handle)]
    finally:
        os.close(handle)


FILES = {
    "a/1.jpg": b"one",
    "empty": b"",
    f"long/{'x' * 150}/{'y' * 90}.jpg": b"two" * 300,
    f"{'z' * 300}.jpg": b"three",
    "é/画像.jpg": b"four",
    "not utf-8 \udcff.jpg": b"five",
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_equal_those_that_tarfile_wrote_in_any_format(form: int, tmp_path: Path) -> None:
    file = io.BytesIO()
    expected = []
    options: dict[str, Any] = {"errors": "surrogateescape", "pax_headers": {"comment": "for all"}}
    with tarfile.open(fileobj=file, mode="w", format=form, **options) as archive:
        for name, content in FILES.items():
            if form == tarfile.USTAR_FORMAT and len(name) > 250:
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(info, io.BytesIO(content))
            expected.append((os.fsencode(name), content))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                other = tarfile.TarInfo("other" * 15)
                other.type, other.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "t" * 99
                archive.addfile(other)
    assert listed(file.getvalue(), tmp_path) == expected


def test_our_entries_can_be_read_by_tarfile_and_by_us(tmp_path: Path) -> None:
    raw = b"".join(b"".join((*entry(os.fsencode(n), c)[:1], c, entry(os.fsencode(n), c)[1])) for n, c in FILES.items())
    with tarfile.open(fileobj=io.BytesIO(raw + END), errors="surrogateescape") as archive:
        found = {info.name: getattr(archive.extractfile(info), "read", bytes)() for info in archive}
    assert found == FILES
    assert listed(raw + END, tmp_path) == [(os.fsencode(name), content) for name, content in FILES.items()]


def header(size: bytes = b"00000000003", kind: bytes = b"0", name: bytes = b"a.jpg") -> bytes:
    """Return a POSIX ustar header: name 100, mode 8, uid 8, gid 8, size 12, mtime 12, chksum 8, typeflag 1, ..."""
    fields = struct.pack(
        "<100s8s8s8s12s12s8s1s100s8s", name, b"", b"", b"", size, b"", b" " * 8, kind, b"", b"ustar\x0000"
    )
    block = bytearray(fields.ljust(512, b"\0"))
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: bytes, size: int | None = None) -> bytes:
    body = b"".join(records)
    stated = len(body) if size is None else size
    return header(b"%011o" % stated, b"x") + body + bytes(-len(body) % 512)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest) + 2))
    return str(length).encode() + rest


DATA = b"abc" + bytes(509)


def test_hostile_headers_are_valid_apart_from_the_attack(tmp_path: Path) -> None:
    assert listed(header() + DATA + END, tmp_path) == [(b"a.jpg", b"abc")]
    assert listed(pax(record(b"path", b"b.jpg"), record(b"size", b"2")) + header() + DATA + END, tmp_path) == [
        (b"b.jpg", b"ab")
    ]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "ends early"),
        (header() + DATA, "ends early"),
        (header() + DATA[:100], "ends early|beyond the end"),
        (header()[:200], "ends early"),
        (b"x" * 1024, "no header at byte 0"),
        (header()[:148] + b"0000000\0" + header()[156:] + DATA + END, "checksum is wrong"),
        (header(b"-0000000003") + DATA + END, "no size, or a negative one"),
        (header(b"\xff" * 12) + DATA + END, "no size, or a negative one"),
        (header(b"") + DATA + END, "no size"),
        (header(b"9") + DATA + END, "no size"),
        (header(b"77777777777") + DATA + END, "beyond the end"),
        (header(b"\x80" + b"\xff" * 11) + DATA + END, "beyond the end"),
        (header(kind=b"S") + DATA + END, "of an unsupported kind"),
        (header(kind=b"?") + DATA + END, "of an unsupported kind"),
        (pax(record(b"size", b"-5")) + header() + DATA + END, "gives an invalid size"),
        (pax(record(b"size", b"9" * 30)) + header() + DATA + END, "gives an invalid size"),
        (pax(record(b"size", b"99999")) + header() + DATA + END, "beyond the end"),
        (pax(record(b"GNU.sparse.major", b"1")) + header() + DATA + END, "sparse"),
        (pax(b"99 path=x\n") + header() + DATA + END, "malformed"),
        (pax(b"0 path=x\n") + header() + DATA + END, "malformed"),
        (pax(b"-3 path=x\n") + header() + DATA + END, "malformed"),
        (pax(b"10 path\n") + header() + DATA + END, "malformed"),
        (pax(b"path=x\n") + header() + DATA + END, "malformed"),
        (pax(size=1 << 30) + header() + DATA + END, "declares 1,073,741,824 bytes of names"),
        (header(b"10000000000", b"L") + header() + DATA + END, "bytes of names"),
        (header(b"10000000000", b"g") + header() + DATA + END, "beyond the end"),
    ],
)
def test_a_malformed_tar_is_refused(raw: bytes, expected: str, tmp_path: Path) -> None:
    with pytest.raises(BadTar, match=expected):
        listed(raw, tmp_path)


def test_a_link_with_a_false_size_hides_no_entry(tmp_path: Path) -> None:
    raw = header(b"00000001000", b"2") + header() + DATA + END
    assert listed(raw, tmp_path) == [(b"a.jpg", b"abc")]


def test_random_bytes_in_a_tar_raise_no_other_error(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    good = pax(record(b"path", b"b.jpg")) + header() + DATA + header(kind=b"2") + END
    for _ in range(1000):
        raw = bytearray(good)
        for _ in range(int(random.integers(1, 5))):
            raw[random.integers(len(raw))] = random.integers(256)
        try:
            found = listed(bytes(raw), tmp_path)
        except BadTar:
            continue
        assert sum(len(content) for _, content in found) <= len(raw)
