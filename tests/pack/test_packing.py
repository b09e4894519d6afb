"""A store equals the folder it was packed from, for every reader and after any interruption."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import everything, request, tree
from PIL import Image

from lars_train.config import DataConfig
from lars_train.data.open import open_validation
from lars_train.data.sources import index_files
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.errors import ConfigError, DataError
from lars_train.pack import packing, writer
from lars_train.pack.encode import Encoding
from lars_train.pack.lars_data import main
from lars_train.pack.packing import Request, pack, silent

RANDOM = np.random.default_rng(0)
CLASSES = ("a", "a-b", "a0", "é")
# Paths that sort in unusual ways, and that webdataset would confuse: dots, suffixes, percent signs.
WITHIN = (
    "2.jpg",
    "10.JPEG",
    "x.y.jpg",
    "x.z.jpg",
    "x.png",
    "x.jpg",
    "x.jpeg",
    "50%25.jpg",
    "deep.er/1.jpg",
    f"{'long' * 40}.jpg",
)
FILES = {
    f"{split}/{name}/{within}": RANDOM.bytes(int(RANDOM.integers(0, 3000)))
    for split in ("train", "val")
    for name in CLASSES
    for within in WITHIN
}


def put(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return put(tmp_path / "data", FILES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return a folder with `FILES`, and a store of it. Tests only read them."""
    path = tmp_path_factory.mktemp("packed")
    root = put(path / "data", FILES)
    pack(request(root, path / "store"), silent)
    return root, path / "store"


@pytest.mark.parametrize("holdout", [None, 0.3])
def test_a_store_equals_its_folder_and_has_its_fingerprint(packed: tuple[str, Path], holdout: float | None) -> None:
    root, path = packed
    folder, store = open_folder(root, holdout), open_folder(str(path), holdout)
    assert everything(store) == everything(folder)
    assert store.classes == folder.classes
    assert store.fingerprint == folder.fingerprint
    assert open_imagenet(str(path), holdout, None).fingerprint == store.fingerprint
    location = store.train.location(0)
    assert location.startswith(f"{path / 'train'}/train-00000")
    assert location.endswith(f"!{store.train.name(0)}")


def test_a_store_keeps_the_labels_of_a_flat_validation_folder(tmp_path: Path) -> None:
    files = {f"train/n{c}/n{c}_{i}.JPEG": b"%d" % i for c in range(3) for i in range(3)}
    files |= {f"val/{i}.JPEG": b"v%d" % i for i in range(5)}
    files["LOC_val_solution.csv"] = b"0,n2\n1,n0\n2,n2\n3,n0\n4,n0\n"  # no images of n1
    root = put(tmp_path / "data", files)
    pack(request(root, tmp_path / "store"), silent)
    folder = open_imagenet(root, None, None)
    for opened in (open_imagenet(str(tmp_path / "store"), None, None), open_folder(str(tmp_path / "store"), None)):
        assert everything(opened) == everything(folder)
        assert opened.fingerprint == folder.fingerprint
    assert opened.val.labels.tolist() == [2, 0, 2, 0, 0]


def test_a_folder_without_a_validation_set_is_packed(tmp_path: Path) -> None:
    for prefix in ("train/", ""):
        root = put(tmp_path / f"data{prefix}", {f"{prefix}{c}/{i}.jpg": b"x" for c in "ab" for i in range(4)})
        pack(request(root, tmp_path / f"store{len(prefix)}"), silent)
        store = str(tmp_path / f"store{len(prefix)}")
        assert open_folder(store, 0.25).fingerprint == open_folder(root, 0.25).fingerprint
        with pytest.raises(ConfigError, match=r"no validation set"):
            open_folder(store, None)


def test_a_zip_is_packed_like_the_folder_in_it(packed: tuple[str, Path], tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    pack(request(str(tmp_path / "data.zip"), tmp_path / "store"), silent)
    assert tree(tmp_path / "store" / "train") == tree(packed[1] / "train")


def webdataset_samples(path: Path) -> list[dict[str, Any]]:
    """Return the samples of a shard by webdataset's rules.

    Neighbors whose names agree up to the first dot of the last component are one sample. Its fields are the extensions
    in lower case; a repeated field is an error.
    """
    samples: list[dict[str, Any]] = []
    with tarfile.open(path, "r|") as archive:
        for info in archive:
            if not info.isreg():
                continue
            folder, _, base = info.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if not samples or samples[-1]["__key__"] != key:
                samples.append({"__key__": key})
            assert extension.lower() not in samples[-1]
            content = archive.extractfile(info)
            assert content is not None
            samples[-1][extension.lower()] = content.read()
    return samples


def test_webdataset_reads_every_image_with_its_label(packed: tuple[str, Path]) -> None:
    for split in ("train", "val"):
        shards = sorted((packed[1] / split).glob("*.tar"))
        assert len(shards) == 3
        found = [sample for path in shards for sample in webdataset_samples(path)]
        assert len({sample["__key__"] for sample in found}) == len(found)
        pairs = []
        for sample in found:
            assert set(sample) in ({"__key__", "cls", suffix} for suffix in ("jpg", "jpeg", "png"))
            (image,) = (value for name, value in sample.items() if name in ("jpg", "jpeg", "png"))
            pairs.append((CLASSES[int(sample["cls"])], image))
            assert sample["__key__"].split("/")[0] == CLASSES[int(sample["cls"])]
        expected = [(name.split("/")[1], content) for name, content in FILES.items() if name.startswith(f"{split}/")]
        assert sorted(pairs) == sorted(expected)


def test_each_shard_has_several_classes(packed: tuple[str, Path]) -> None:
    for path in (packed[1] / "train").glob("*.tar"):
        labels = [int(sample["cls"]) for sample in webdataset_samples(path)]
        assert len(set(labels)) > 2
        assert labels != sorted(labels)


def test_packing_does_not_change_the_original(root: str, tmp_path: Path) -> None:
    def state() -> list[tuple[str, int, int]]:
        return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(root).rglob("*"))]

    before, content = state(), tree(Path(root))
    pack(request(root, tmp_path / "store"), silent)
    assert state() == before
    assert tree(Path(root)) == content


@pytest.mark.parametrize("store", [".", "store", "..", "train/x"])
def test_a_store_must_lie_outside_the_original(root: str, store: str) -> None:
    before = tree(Path(root))
    with pytest.raises(ConfigError, match="must lie outside"):
        pack(request(root, Path(root) / store), silent)
    assert tree(Path(root)) == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_store_does_not_depend_on_the_number_of_processes(packed: tuple[str, Path], tmp_path: Path) -> None:
    root, store = packed
    pack(request(root, tmp_path / "store", jobs=2), silent)
    assert tree(tmp_path / "store") == tree(store)


def pack_until_killed(number: int, asked: Request) -> None:
    """Pack, and kill this process at the `number`-th call of `os.fsync` or `Path.replace`."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, Path.replace

    def killing_fsync(handle: int) -> None:
        count()
        fsync(handle)

    def killing_replace(self: Path, target: Path) -> Path:
        count()
        return replace(self, target)

    os.fsync, Path.replace = killing_fsync, killing_replace  # type: ignore[assignment, method-assign]
    pack(asked, silent)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_point_packing_resumes_to_the_same_store(tmp_path: Path) -> None:
    root = put(
        tmp_path / "data", {f"{s}/{c}/{i}.jpg": b"%d" % i for s in ("train", "val") for c in "ab" for i in (1, 2)}
    )
    pack(request(root, tmp_path / "undisturbed", shards=2), silent)
    context = multiprocessing.get_context("fork")
    kills = 0
    while True:
        # Each kill comes a little later, with the files of the earlier attempts in place.
        process = context.Process(
            target=pack_until_killed, args=(kills % 9 + 1, request(root, tmp_path / "store", shards=2))
        )
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        if not (tmp_path / "store" / "index.lars").exists() and (tmp_path / "store").exists():
            with pytest.raises(ConfigError, match=r"is an incomplete store; run its `lars-data pack` command again"):
                open_folder(str(tmp_path / "store"), None)
    assert kills > 15
    assert tree(tmp_path / "store") == tree(tmp_path / "undisturbed")


def test_complete_shards_are_not_written_again(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = writer.ShardWriter.__call__

    def watched(self: writer.ShardWriter, plan: Any, tick: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(plan.name)
        write(self, plan, tick)

    monkeypatch.setattr(writer.ShardWriter, "__call__", watched)
    with pytest.raises(KeyboardInterrupt):
        pack(request(root, tmp_path / "store"), silent)
    first, written[:] = list(written), []
    # A shard that has been truncated is written again.
    os.truncate(tmp_path / "store" / "train" / first[1], 512)
    monkeypatch.setattr(writer.ShardWriter, "__call__", lambda *a: (written.append(a[1].name), write(*a)))
    pack(request(root, tmp_path / "store"), silent)
    assert len(first) == 2
    assert first[0] not in written
    assert len(written) == 5
    assert open_folder(str(tmp_path / "store"), None).fingerprint == open_folder(root, None).fingerprint


def test_packing_neither_resumes_nor_replaces_another_store(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_write_index", lambda tree: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(request(root, store), silent)
    with pytest.raises(ConfigError, match="packing began with other settings"):
        pack(request(root, store, shards=2), silent)
    pack(request(root, store), silent)
    assert "already" in pack(request(root, store), silent)
    with pytest.raises(ConfigError, match=r"already holds another store \(short: none there, 8 requested\)"):
        pack(request(root, store, encoding=Encoding(short=8)), silent)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        pack(request(root, tmp_path / "full"), silent)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["mine"]


def test_a_damaged_shard_is_found_and_written_again(root: str, tmp_path: Path) -> None:
    replace = Path.replace

    def spoil(self: Path, target: Path) -> Path:
        if target.name == "train-000001.tar":
            raw = bytearray(self.read_bytes())
            raw[next(raw.index(data) for data in FILES.values() if len(data) > 100 and data in raw)] ^= 1
            self.write_bytes(raw)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "replace", spoil)
        with pytest.raises(DataError, match=r"1 problem.*train-000001\.tar!.*checksum is wrong.*Run the same command"):
            pack(request(root, tmp_path / "store"), silent)
    assert not (tmp_path / "store" / "train" / "train-000001.tar").exists()
    pack(request(root, tmp_path / "store"), silent)
    assert open_folder(str(tmp_path / "store"), None).fingerprint == open_folder(root, None).fingerprint


def test_an_original_that_changes_during_packing_is_refused(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = packing._verify

    def change_before_verifying(*arguments: Any) -> None:
        (Path(root) / "train/a/2.jpg").write_bytes(b"other")
        verify(*arguments)

    monkeypatch.setattr(packing, "_verify", change_before_verifying)
    with pytest.raises(DataError, match=r"a/2\.jpg: differs from the original"):
        pack(request(root, tmp_path / "store"), silent)

    def change_after_verifying(*arguments: Any) -> None:
        verify(*arguments)
        (Path(root) / "train/a/new.jpg").write_bytes(b"other")

    monkeypatch.setattr(packing, "_verify", change_after_verifying)
    with pytest.raises(DataError, match="files appeared or vanished"):
        pack(request(root, tmp_path / "store"), silent)


def test_the_summary_has_count_and_checksum_of_every_class(packed: tuple[str, Path]) -> None:
    root, store = packed
    summary = json.loads((store / "store.json").read_bytes())
    assert summary["fingerprint"] == open_folder(root, None).fingerprint
    for split in ("train", "val"):
        for entry in summary["splits"][split]["classes"]:
            prefix = f"{split}/{entry['name']}/"
            own = {name[len(split) + 1 :]: data for name, data in FILES.items() if name.startswith(prefix)}
            checksum = hashlib.sha256()
            for name in sorted(own, key=os.fsencode):
                checksum.update(os.fsencode(name) + b"\0" + hashlib.blake2b(own[name], digest_size=8).digest())
            assert (entry["pictures"], entry["checksum"]) == (len(WITHIN), checksum.hexdigest()[:16])


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    # Opaque, slowly changing colors, which a JPEG stores almost exactly.
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [128 + 100 * np.sin(x / (40 + k) + y / 45 + k) for k in range(3)]
    pixels = np.stack([*waves, np.full(x.shape, 255)], -1).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, kind, **options)
    return file.getvalue()


IMAGES = {
    "wide.jpg": encoded((60, 40), "JPEG"),
    "high.jpg": encoded((33, 100), "JPEG"),
    "small.jpg": encoded((20, 16), "JPEG", quality=30),
    "heavy.jpg": encoded((20, 16), "JPEG", quality=100, subsampling=0),
    "gray.jpg": encoded((50, 50), "JPEG", "L"),
    "cmyk.JPEG": encoded((50, 40), "JPEG", "CMYK"),
    "small_cmyk.jpg": encoded((16, 12), "JPEG", "CMYK"),
    "png.JPEG": encoded((40, 50), "PNG", "RGBA"),
    "line.png": encoded((400, 1), "PNG"),
}


@pytest.mark.parametrize("rule", ["short", "longest"])
def test_reencoded_images_have_the_requested_size_and_mode(tmp_path: Path, rule: str) -> None:
    files = {f"{split}/a/{name}": data for split in ("train", "val") for name, data in IMAGES.items()}
    files |= {f"{split}/b/1.jpg": IMAGES["wide.jpg"] for split in ("train", "val")}
    root = put(tmp_path / "data", files)
    encoding = Encoding(**{rule: 24}, quality=80)
    pack(request(root, tmp_path / "store", shards=1, encoding=encoding), silent)
    data, original = open_folder(str(tmp_path / "store"), None), open_folder(root, None)
    assert data.fingerprint != original.fingerprint
    assert [data.train.name(i) for i in range(len(data.train))] == [
        *sorted(f"a/{name}" for name in IMAGES),
        "b/1.jpg",
    ]
    for i in range(len(IMAGES)):
        name, found = data.train.name(i)[2:], data.train.read(i)
        assert isinstance(found, bytes)
        before, after = (Image.open(io.BytesIO(raw)) for raw in (IMAGES[name], found))
        side = min(before.size) if rule == "short" else max(before.size)
        scale = min(1.0, 24 / side)
        assert after.size == tuple(max(1, round(length * scale)) for length in before.size)
        assert after.format == "JPEG"
        assert after.mode == ("L" if name == "gray.jpg" else "RGB")
        assert (found == IMAGES[name]) == (name == "small.jpg")
        assert name not in ("small.jpg", "heavy.jpg") or len(found) <= len(IMAGES[name])
        # The same image: as close to Pillow's resizing as the JPEG is.
        plain = before.convert("RGB").resize(after.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(plain, float) - np.asarray(after.convert("RGB"), float)).mean() < 8


def test_the_fingerprint_depends_on_the_encoding(tmp_path: Path) -> None:
    root = put(tmp_path / "data", {f"{s}/{c}/1.jpg": IMAGES["wide.jpg"] for s in ("train", "val") for c in "ab"})
    prints = set()
    for number, encoding in enumerate(
        (Encoding(), Encoding(short=24), Encoding(longest=24), Encoding(short=24, quality=50))
    ):
        pack(request(root, tmp_path / str(number), encoding=encoding, shards=1), silent)
        prints.add(open_folder(str(tmp_path / str(number)), None).fingerprint)
    assert len(prints) == 4
    with pytest.raises(ConfigError, match="re-encoded images"):
        pack(request(str(tmp_path / "1"), tmp_path / "again", shards=1), silent)
    pack(request(str(tmp_path / "0"), tmp_path / "again", shards=1), silent)
    assert tree(tmp_path / "again" / "train") == tree(tmp_path / "0" / "train")


def test_a_broken_image_ends_packing_or_is_left_out_and_listed(tmp_path: Path) -> None:
    files = {f"{s}/a/{name}": data for s in ("train", "val") for name, data in IMAGES.items()}
    files |= {"train/a/broken.jpg": IMAGES["wide.jpg"][:300], "val/a/text.png": b"text"}
    files |= {f"{s}/b/1.jpg": IMAGES["wide.jpg"] for s in ("train", "val")}
    root = put(tmp_path / "data", files)
    small = {"encoding": Encoding(short=24), "shards": 2}
    with pytest.raises(DataError, match=r"(broken\.jpg|text\.png): .*Fix it, or .*--on-error skip"):
        pack(request(root, tmp_path / "store", **small), silent)
    summary = pack(request(root, tmp_path / "store", skip=True, **small), silent)
    assert [(left["split"], left["image"]) for left in summary["skipped"]] == [
        ("train", "a/broken.jpg"),
        ("val", "a/text.png"),
    ]
    data = open_folder(str(tmp_path / "store"), None)
    assert (len(data.train), len(data.val)) == (len(IMAGES) + 1, len(IMAGES) + 1)
    assert data.inventory.skipped == {"images left out by lars-data pack": 2}
    # Original bytes are stored without decoding, so training decides whether they are an image.
    pack(request(root, tmp_path / "plain"), silent)
    assert open_folder(str(tmp_path / "plain"), None).fingerprint == open_folder(root, None).fingerprint


def test_an_unreadable_file_counts_as_broken(tmp_path: Path) -> None:
    root = put(tmp_path / "data", {f"{s}/{c}/{i}.jpg": b"x" for s in ("train", "val") for c in "ab" for i in range(3)})
    (Path(root) / "train/a/1.jpg").unlink()
    (Path(root) / "train/a/1.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1\.jpg: No such file"):
        pack(request(root, tmp_path / "store"), silent)
    assert len(pack(request(root, tmp_path / "store", skip=True), silent)["skipped"]) == 1
    assert len(open_folder(str(tmp_path / "store"), None).train) == 5


def test_packing_needs_images_of_every_training_class(tmp_path: Path) -> None:
    good, bad = IMAGES["wide.jpg"], IMAGES["wide.jpg"][:300]
    files = {f"{split}/{c}/{i}.jpg": good for split in ("train", "val") for c in "ab" for i in range(2)}
    small = {"encoding": Encoding(short=24), "skip": True}
    some = put(tmp_path / "some", files | {f"train/b/{i}.jpg": bad for i in range(2)})
    with pytest.raises(DataError, match=r"no image of class b in train/ can be packed \(2 were left out, the first"):
        pack(request(some, tmp_path / "one", **small), silent)
    none = put(tmp_path / "none", dict.fromkeys(files, bad))
    with pytest.raises(DataError, match=r"no image in train/ can be packed"):
        pack(request(none, tmp_path / "other", **small), silent)
    for store in ("one", "other"):
        with pytest.raises(ConfigError, match="is an incomplete store"):
            open_folder(str(tmp_path / store), None)
    # A class may have no validation images.
    val = put(tmp_path / "val", files | {f"val/b/{i}.jpg": bad for i in range(2)})
    pack(request(val, tmp_path / "third", **small), silent)


@pytest.mark.parametrize("inside", ["val/", "Test/", ""])
def test_a_validation_set_alone_is_packed_and_evaluated(tmp_path: Path, inside: str) -> None:
    files = {f"{inside}{name}/{i}.jpg": f"{name}{i}".encode() for name in ("a", "b") for i in range(5)}
    root = put(tmp_path / "data", {**files, f"{inside}a/x.txt": b"", **({"loose.jpg": b""} if inside else {})})
    pack(request(root, tmp_path / "store"), silent)
    # Class folders without a split become the training split.
    split = "val" if inside else "train"
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["index.lars", "store.json", split]
    folder, store = (
        open_validation(DataConfig(name="folder", root=place)) for place in (root, str(tmp_path / "store"))
    )
    assert everything(store) == everything(folder)
    assert store.inventory.record() == folder.inventory.record()
    assert (len(store.val), store.fingerprint, len(store.inventory.skipped)) == (
        10,
        folder.fingerprint,
        1 + bool(inside),
    )
    main(["verify", str(tmp_path / "store"), "--source", root, "--jobs", "1"])
    main(["info", str(tmp_path / "store")])


def test_a_flat_validation_folder_alone_is_packed(tmp_path: Path) -> None:
    files = {f"val/{i}.JPEG": b"%d" % i for i in range(4)} | {"LOC_val_solution.csv": b"0,n2\n1,n0\n2,n2\n3,n0\n"}
    root = put(tmp_path / "data", files)
    pack(request(root, tmp_path / "store"), silent)
    store = open_validation(DataConfig(name="folder", root=str(tmp_path / "store")))
    assert (store.classes, store.val.labels.tolist()) == (("n0", "n2"), [1, 0, 1, 0])


@pytest.mark.parametrize("beside", ["cat", "training"])
def test_folders_beside_a_lone_validation_set_are_refused(tmp_path: Path, beside: str) -> None:
    root = put(tmp_path / "data", {f"{name}/{c}/1.jpg": b"" for name in ("val", beside) for c in "ab"})
    with pytest.raises(ConfigError, match=r"has no train/ folder; found .*Name the split folders"):
        pack(request(root, tmp_path / "store"), silent)
    assert not (tmp_path / "store").exists()


def test_more_shards_than_images_are_refused(root: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--shards=1000: train/ has 40 images"):
        pack(request(root, tmp_path / "store", shards=1000), silent)


def test_a_full_disk_is_reported_and_loses_nothing(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(path: Path, pieces: list[bytes]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_atomic", full)
        with pytest.raises(DataError, match=r"000000\.tar: .*No space left on device.*the same command resumes"):
            pack(request(root, tmp_path / "store"), silent)
    assert not list((tmp_path / "store").rglob("*.tmp"))
    pack(request(root, tmp_path / "store"), silent)
    assert index_files.read_mapped(tmp_path / "store" / "index.lars")[0]["kind"] == "store"
