"""A store at a URL gives the same samples as its local copy, also with a small cache and an unreliable server."""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lars_train.config import DataConfig
from lars_train.data import shard_cache
from lars_train.data.dataset import Dataset, sample_shards
from lars_train.data.loading import shard_prefetch
from lars_train.data.loading.loader import EvalSpec, LoaderSpec, Stream, View, eval_loader, train_loader
from lars_train.data.loading.shard_windows import training_room, training_windows
from lars_train.data.open import open_validation
from lars_train.data.order import shard_order
from lars_train.data.sources import remote
from lars_train.data.sources.folder import open_folder
from lars_train.data.sources.imagenet import open_imagenet
from lars_train.data.sources.index_files import read_mapped, write_mapped
from lars_train.data.sources.remote import CacheSettings, RemoteSource
from lars_train.errors import ConfigError, DataError
from lars_train.pack.encode import Encoding
from lars_train.pack.packing import Request, pack, silent

fsspec = pytest.importorskip("fsspec")

VIEW = View("none", 8, False, 0, 1.0)
PLENTY = 10**9


def image(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 72 + 24 images in 6 + 2 shards."""
    folder = tmp_path_factory.mktemp("packed")
    for split, count in (("train", 36), ("val", 12)):
        for name in "ab":
            (folder / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                content = image(hash((split, name, number)) % 2**32)
                (folder / "data" / split / name / f"{number}.png").write_bytes(content)
    pack(Request(str(folder / "data"), str(folder / "store"), Encoding(), shards=6), silent)
    return folder / "store"


@pytest.fixture
def store(packed: Path, tmp_path: Path) -> Path:
    """Return a copy of the store that a test may damage."""
    return Path(shutil.copytree(packed, tmp_path / "store"))


@pytest.fixture
def local(packed: Path) -> Dataset:
    return open_folder(str(packed), None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "PIECE_BYTES", 3000)
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 5.0)


class Flaky(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A fake server with objects in memory. A test makes it fail by `before` and `after`."""

    protocol = "flaky"
    objects: dict[str, bytes] = {}  # noqa: RUF012
    before: Callable[[str], object] = staticmethod(lambda path: None)
    after: Callable[[bytes], bytes] = staticmethod(lambda data: data)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        content = self._content(path)
        return {"name": path, "type": "file", "size": len(content), "ETag": hashlib.sha256(content).hexdigest()}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        Flaky.before(path)
        return Flaky.after(self._content(path)[start:end])

    def _content(self, path: str) -> bytes:
        try:
            return Flaky.objects[self._strip_protocol(path)]
        except KeyError:
            raise FileNotFoundError(path) from None


def upload(store: Path) -> dict[str, bytes]:
    return {f"bucket/{path.relative_to(store)}": path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture
def flaky(packed: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "objects", upload(packed))
    for name in ("before", "after"):
        monkeypatch.setattr(Flaky, name, staticmethod(getattr(Flaky, name)))
    return "flaky://bucket"


@pytest.fixture(scope="module")
def web(packed: Path) -> Iterator[str]:
    """Serve the store over HTTP without support for ranges, and return the URL."""
    pytest.importorskip("aiohttp")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(packed)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bucket(packed: Path) -> Iterator[str]:
    """Copy the store to a bucket of a local S3 server, and return its URL."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("images")
        fs.put(str(packed) + "/", "images/imagenet/", recursive=True)
        yield "s3://images/imagenet"
    server.stop()


def opened(url: str, tmp_path: Path, limit: int = PLENTY) -> Dataset:
    return open_folder(url, None, CacheSettings(str(tmp_path / "cache"), limit))


def same(one: Dataset, other: Dataset) -> bool:
    assert (one.fingerprint, one.classes) == (other.fingerprint, other.classes)
    assert one.inventory == other.inventory
    for mine, theirs in ((one.train, other.train), (one.val, other.val)):
        assert [mine.name(i) for i in range(len(mine))] == [theirs.name(i) for i in range(len(theirs))]
        assert mine.labels.tolist() == theirs.labels.tolist()
        assert sample_shards(mine).tolist() == sample_shards(theirs).tolist()
        assert all(mine.read(i) == theirs.read(i) for i in range(len(mine)))
    return True


def stream(source: Any, start_update: int = 0, stop_update: int = 18, **changes: Any) -> Stream:
    options: dict[str, Any] = {
        **{"seed": 3, "batch": 12, "ghost_batch": 4, "ghosts_per_micro": 1, "updates_per_epoch": 6},
        **{"rank": 0, "world": 1, "workers": 0, "pin_memory": False, "on_error": "fail", "window": 2},
    }
    spec = LoaderSpec(source=source, view=VIEW, **{**options, **changes})
    return train_loader(spec, start_update, stop_update)


def drawn(batches: Stream) -> list[tuple[bytes, list[int]]]:
    try:
        return [(batch.images.numpy().tobytes(), batch.labels.tolist()) for batch in batches]
    finally:
        batches.close()


def on_disk(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue
    return sum(sizes)


@pytest.mark.parametrize("where", ["bucket", "web", "flaky"])
def test_a_store_at_a_url_equals_its_local_copy(
    where: str, request: pytest.FixtureRequest, tmp_path: Path, local: Dataset
) -> None:
    assert same(opened(request.getfixturevalue(where), tmp_path), local)


def test_an_evaluation_reads_only_the_validation_images_at_a_url(packed: Path, tmp_path: Path, local: Dataset) -> None:
    shutil.copytree(packed.parent / "data" / "val", tmp_path / "data" / "val")
    shutil.copytree(packed.parent / "data" / "val", tmp_path / "classes")
    for name in ("data", "classes"):
        pack(Request(str(tmp_path / name), str(tmp_path / f"{name}-store"), Encoding()), silent)
        for place in (str(tmp_path / f"{name}-store"), f"file://{tmp_path}/{name}-store", f"file://{packed}"):
            cache_dir = str(tmp_path / "cache") if place.startswith("file:") else None
            data = open_validation(DataConfig(name="folder", root=place, cache_dir=cache_dir))
            assert len(data.train) == 0
            assert [(data.val.name(i), data.val.read(i)) for i in range(24)] == [
                (local.val.name(i), local.val.read(i)) for i in range(24)
            ]
            assert data.val.labels.tolist() == local.val.labels.tolist()
            assert data.classes == local.classes


def test_imagenet_opens_a_store_at_a_url(packed: Path, tmp_path: Path, local: Dataset) -> None:
    assert same(open_imagenet(f"file://{packed}", None, None, CacheSettings(str(tmp_path))), local)


def test_images_of_a_remote_store_can_be_held_out(packed: Path, tmp_path: Path) -> None:
    settings = CacheSettings(str(tmp_path / "cache"))
    assert same(open_folder(f"file://{packed}", 0.25, settings), open_folder(str(packed), 0.25))


def test_a_second_run_fetches_nothing(flaky: str, tmp_path: Path, local: Dataset) -> None:
    assert same(opened(flaky, tmp_path), local)
    Flaky.objects = {name: content for name, content in Flaky.objects.items() if "index" in name}
    assert same(opened(flaky, tmp_path), local)


@pytest.mark.parametrize(("workers", "kind"), [(0, None), (2, "threads"), (2, "processes")])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_batches_equal_those_of_a_local_copy_with_a_small_cache(
    workers: int, kind: str | None, flaky: str, tmp_path: Path, local: Dataset
) -> None:
    dataset = opened(flaky, tmp_path)
    assert isinstance(dataset.train, RemoteSource)
    fetched: list[str] = []
    Flaky.before = staticmethod(fetched.append)
    size = int(dataset.train.sizes.max()) + shard_cache.MARK_BYTES
    index = next((tmp_path / "cache").glob("*/*.index")).stat().st_size + shard_cache.MARK_BYTES
    limit = index + 5 * size  # of 8 shards
    dataset.train.split.cache.limit = limit
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            most.append(on_disk(tmp_path / "cache"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    batches = stream(dataset.train, workers=workers, kind=kind, window=1)
    assert drawn(batches) == drawn(stream(local.train, window=1))
    ended.set()
    watcher.join()
    assert 2 * size < max(most) <= limit
    assert {f"bucket/train/train-00000{i}.tar" for i in range(6)} <= set(fetched)
    # A finished stream holds nothing.
    dataset.train.split.cache.limit = index + size
    assert len(dataset.train.read(0)) > 0


def test_ranks_that_share_the_smallest_cache_take_all_samples(packed: Path, tmp_path: Path, local: Dataset) -> None:
    parts: list[list[tuple[bytes, list[int]]]] = [[], [], []]
    alone = drawn(stream(local.train, window=1))
    together = threading.Barrier(3, timeout=20)
    shard = sample_shards(local.train)
    windows = training_windows(shard, 1, seed=3, batch=12, updates_per_epoch=6, updates=18)

    def run(rank: int) -> None:
        train = opened(f"file://{packed}", tmp_path).train
        assert isinstance(train, RemoteSource)
        room = training_room(windows, 12, train.sizes) + train.split.index.size() + 7 * shard_cache.MARK_BYTES
        train.split.cache.limit = room
        batches = stream(train, rank=rank, world=3, start_update=4, window=1)
        for batch in batches:
            parts[rank].append((batch.images.numpy().tobytes(), batch.labels.tolist()))
            # As in a run, the ranks wait for each other at the end of each update.
            together.wait()
        batches.close()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [None] * 3
    # Three micro-batches per update, one for each rank, starting in the middle of an epoch.
    assert [part for update in zip(*parts, strict=True) for part in update] == alone[12:]


def test_samples_come_in_the_order_by_shards(local: Dataset) -> None:
    labels = [label for _, part in drawn(stream(local.train, stop_update=6)) for label in part]
    order = shard_order(3, 0, sample_shards(local.train), 2)
    assert labels == local.train.labels[order].tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_with_a_small_cache_sees_every_sample_once(
    world: int, packed: Path, tmp_path: Path, local: Dataset
) -> None:
    dataset = opened(f"file://{packed}", tmp_path)
    assert isinstance(dataset.val, RemoteSource)
    dataset.val.split.cache.limit = int(dataset.val.sizes.sum()) + 20_000
    common: dict[str, Any] = {"view": VIEW, "micro_batch": 5, "workers": 0, "pin_memory": False}
    specs = [EvalSpec(source=local.val, rank=rank, world=world, by_shards=True, **common) for rank in range(world)]
    for spec in specs:
        assert drawn(eval_loader(replace(spec, source=dataset.val))) == drawn(eval_loader(spec))
    seen = [b for spec in specs for b in eval_loader(spec)]
    everything = list(eval_loader(EvalSpec(source=local.val, rank=0, world=1, **common)))
    assert sum(b.checksum for b in seen) % 2**32 == sum(b.checksum for b in everything) % 2**32
    assert sorted(im.numpy().tobytes() for b in seen for im in b.images) == sorted(
        im.numpy().tobytes() for b in everything for im in b.images
    )


def test_occasional_failures_of_the_server_change_nothing(flaky: str, tmp_path: Path, local: Dataset) -> None:
    # Of the requests for each object, two fail, one is cut short, and one succeeds.
    calls: Counter[str] = Counter()
    here = threading.local()

    def fail(path: str) -> None:
        calls[path] += 1
        here.cut = calls[path] % 4 == 3
        if calls[path] % 4 in (1, 2):
            raise (ConnectionResetError("reset by peer"), TimeoutError())[calls[path] % 4 - 1]

    Flaky.before = staticmethod(fail)
    Flaky.after = staticmethod(lambda data: data[:-1] if here.cut else data)
    dataset = opened(flaky, tmp_path)
    assert drawn(stream(dataset.train, stop_update=6)) == drawn(stream(local.train, stop_update=6))
    assert min(calls.values()) >= 4


def test_a_lost_server_ends_the_stream_with_url_and_reason(
    flaky: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = opened(flaky, tmp_path)

    def fail(path: str) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    Flaky.before = staticmethod(fail)
    with pytest.raises(
        DataError, match=r"flaky://bucket/train/train-00000\d\.tar cannot be read \(Conn.*refused\); tried 8 times"
    ):
        drawn(stream(dataset.train))
    assert "Connection refused; retrying in" in capsys.readouterr().err


def test_a_server_that_never_responds_ends_the_stream(
    flaky: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(flaky, tmp_path)
    monkeypatch.setattr(shard_prefetch, "PATIENCE_S", 0.5)
    monkeypatch.setattr(shard_prefetch, "_CLOSE_S", 0.1)
    answer = threading.Event()
    Flaky.before = staticmethod(lambda path: answer.wait(30))
    with pytest.raises(DataError, match=r"flaky://bucket: no response"):
        drawn(stream(dataset.train))
    answer.set()


@pytest.mark.parametrize("damage", ["truncated", "longer", "changed", "missing"])
def test_a_shard_that_does_not_match_the_index_is_an_error(damage: str, store: Path, tmp_path: Path) -> None:
    dataset = opened(f"file://{store}", tmp_path)
    path = store / "train/train-000002.tar"
    content = path.read_bytes()
    at = content.index(b"PNG")
    changed = content[:at] + b"X" + content[at + 1 :]
    instead = {"truncated": content[:-512], "longer": content + b"\0", "changed": changed}
    path.unlink()
    if damage != "missing":
        path.write_bytes(instead[damage])
    reason = {"changed": "the checksum of ./.*png in it is wrong", "missing": "cannot be read.*No such file"}
    with pytest.raises(DataError, match=rf"{path}.*{reason.get(damage, 'bytes, not')}"):
        drawn(stream(dataset.train))


def test_a_damaged_shard_in_the_cache_is_fetched_again(packed: Path, tmp_path: Path, local: Dataset) -> None:
    assert same(opened(f"file://{packed}", tmp_path), local)
    for path in (tmp_path / "cache").rglob("*.tar"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"PNG", b"XYZ"))
    index = next((tmp_path / "cache").glob("*/*.index"))
    index.write_bytes(index.read_bytes()[:-1] + b"X")
    dataset = opened(f"file://{packed}", tmp_path)
    assert drawn(stream(dataset.train)) == drawn(stream(local.train))
    assert same(dataset, local)


def test_a_store_that_was_repacked_is_detected(flaky: str, tmp_path: Path, packed: Path) -> None:
    before = opened(flaky, tmp_path)
    again = tmp_path / "again"
    pack(Request(str(packed.parent / "data"), str(again), Encoding(), shards=3), silent)
    Flaky.objects = upload(again)
    after = opened(flaky, tmp_path)
    assert same(after, open_folder(str(again), None))
    with pytest.raises(DataError):
        drawn(stream(before.train))


def test_a_url_without_a_usable_store_is_bad_input(flaky: str, store: Path, tmp_path: Path) -> None:
    for url, message in (
        ("flaky://elsewhere", r"index\.lars cannot be read \(FileNotFoundError.*lars-data pack"),
        ("nonsense://bucket", r"nonsense://bucket cannot be used .*nonsense"),
        (f"file://{store}/train", r"index\.lars cannot be read .*Only packed stores can be read from URLs"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(url, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .* cannot be used"):
        open_folder(flaky, None, CacheSettings("/proc/nowhere"))
    with pytest.raises(ConfigError, match=r"data\.cache_gb allows 1,000"):
        opened(flaky, tmp_path, limit=1000)
    with pytest.raises(ConfigError, match=r"only lars-train's data\.root can be a URL"):
        open_folder(flaky, None)


def test_an_inconsistent_index_is_refused(store: Path, tmp_path: Path) -> None:
    meta, arrays = read_mapped(store / "index.lars")
    shards = meta["splits"]["train"]["shards"]
    for wrong in (["../../x.tar", 1024], ["train/../x.tar", 1024], ["train/x.tar", -5], ["train/x.tar", 10]):
        meta["splits"]["train"]["shards"] = [wrong, *shards[1:]]
        write_mapped(store / "index.lars", meta, arrays)
        with pytest.raises(ConfigError, match=r"index\.lars cannot be used"):
            opened(f"file://{store}", tmp_path)
    (store / "index.lars").write_bytes(b"no index")
    with pytest.raises(ConfigError, match=r"index\.lars cannot be used \(it is empty or cut short\)"):
        opened(f"file://{store}", tmp_path)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"Install s3fs to access S3.*pip install s3fs aiohttp"):
        opened("s3://bucket/x", tmp_path)


def test_a_bad_image_is_replaced_by_the_next_of_its_shard(packed: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(packed.parent / "data", tmp_path / "data"))
    for name in ("a/3.png", "b/7.png", "b/8.png"):
        (root / "train" / name).write_bytes(b"no image")
    pack(Request(str(root), str(tmp_path / "store"), Encoding(), shards=6), silent)
    local, remote = open_folder(str(tmp_path / "store"), None), opened(f"file://{tmp_path}/store", tmp_path)
    shard = sample_shards(local.train).tolist()
    names = {local.train.name(i): i for i in range(72)}
    bad = {names[name] for name in ("a/3.png", "b/7.png", "b/8.png")}

    def stand_in(sample: int) -> int:
        own = [i for i in range(72) if shard[i] == shard[sample]]
        place = own.index(sample)
        return next(i for i in own[place:] + own[:place] if i not in bad)

    order = shard_order(3, 0, sample_shards(local.train), 2).tolist()
    expected = [int(local.train.labels[stand_in(sample)]) for sample in order]
    found = drawn(stream(local.train, on_error="skip", stop_update=6))
    assert [label for _, part in found for label in part] == expected
    assert drawn(stream(remote.train, on_error="skip", stop_update=6)) == found
    batches = stream(remote.train, on_error="skip", stop_update=6)
    where = {sample.where for batch in batches for sample in batch.bad}
    assert all(place.startswith(f"file://{tmp_path}/store/train/train-00000") for place in where)
    assert {place.rpartition("!")[2] for place in where} == {"a/3.png", "b/7.png", "b/8.png"}


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_shard_removed_from_the_cache_ends_the_stream(kind: str, packed: Path, tmp_path: Path) -> None:
    dataset = opened(f"file://{packed}", tmp_path)
    batches = stream(dataset.train, workers=1, kind=kind, on_error="skip", stop_update=1800)
    next(batches)
    # The prefetcher may rename a file of the folder at this moment, and then fails first.
    shutil.rmtree(next((tmp_path / "cache").glob("store-*")) / "train", ignore_errors=True)
    reads, renames = r"png cannot be read in the cache .*No such file", r"cache cannot be written to .*No such file"
    with pytest.raises(DataError, match=f"{reads}|{renames}"):
        drawn(batches)


def test_a_source_can_be_pickled_and_used_after_a_fork(flaky: str, tmp_path: Path, local: Dataset) -> None:
    train = opened(flaky, tmp_path).train
    expected = [local.train.read(i) for i in range(4)]
    again = pickle.loads(pickle.dumps(train))
    assert [again.read(i) for i in range(4)] == expected
    context = multiprocessing.get_context("fork")
    verdict: Any = context.SimpleQueue()
    process = context.Process(target=lambda: verdict.put([train.read(i) for i in range(4)] == expected))
    process.start()
    assert verdict.get()
    process.join()


def test_a_remote_source_is_not_read_in_the_global_order(packed: Path, tmp_path: Path) -> None:
    dataset = opened(f"file://{packed}", tmp_path)
    with pytest.raises(ValueError, match="only be read by shards"):
        stream(dataset.train, window=None)
    with pytest.raises(ValueError, match="only be read by shards"):
        EvalSpec(source=dataset.val, view=VIEW, micro_batch=5, rank=0, world=1, workers=0, pin_memory=False)


def test_the_next_shards_are_fetched_before_they_are_needed(flaky: str, tmp_path: Path) -> None:
    dataset = opened(flaky, tmp_path)
    fetched: set[str] = set()
    Flaky.before = staticmethod(fetched.add)
    batches = stream(dataset.train, window=1)
    next(batches)
    end = time.monotonic() + 10
    while len(fetched) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    batches.close()
