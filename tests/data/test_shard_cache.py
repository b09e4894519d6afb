"""The shard cache never exceeds its limit, never returns damaged files, and never evicts held ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lars_train.data import shard_cache
from lars_train.data.shard_cache import MARK_BYTES, CacheEntry, Held, ShardCache
from lars_train.errors import DataError

SIZE = 10_000
ROOM = SIZE + MARK_BYTES
FORK = multiprocessing.get_context("fork")


class Origin:
    """A fake store with numbered files of `SIZE` bytes, which records each fetch."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        self.during: Callable[[], None] = lambda: None

    def entry(self, number: int, size: int = SIZE) -> CacheEntry:
        def fetch(handle: int) -> None:
            self.fetched.append(number)
            os.pwrite(handle, self.content(number)[: size // 2], 0)
            self.during()
            os.pwrite(handle, self.content(number)[size // 2 : size], size // 2)

        def check(handle: int) -> str:
            return "" if os.pread(handle, size, 0) == self.content(number)[:size] else "it is another"

        return CacheEntry(f"store-x/{number}.tar", size, fetch, check)

    @staticmethod
    def content(number: int) -> bytes:
        return bytes([number]) * SIZE


@pytest.fixture
def origin() -> Origin:
    return Origin()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "PATIENCE_S", 0.3)


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("store-x/*.tar")}


def read(held: Held) -> bytes:
    data = os.pread(held.handle, 2 * SIZE, 0)
    held.release()
    return data


def test_the_least_recently_used_file_without_a_hold_is_evicted(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, 3 * ROOM)
    first = cache.hold(origin.entry(1))
    for number in (2, 3, 2, 4, 5):
        assert read(cache.hold(origin.entry(number))) == origin.content(number)
        assert on_disk(folder) <= 3 * ROOM
    # 3 was evicted for 4, then 2 for 5; 1 is held.
    assert names(folder) == {"1.tar", "4.tar", "5.tar"}
    assert origin.fetched == [1, 2, 3, 4, 5]
    assert read(first) == origin.content(1)


def test_concurrent_threads_never_exceed_the_limit(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, 4 * ROOM)
    used: list[int] = []
    origin.during = lambda: used.append(cache.used())

    def use(number: int) -> bool:
        return read(cache.hold(origin.entry(number % 9))) == origin.content(number % 9)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(use, range(60)))
    assert len(used) > 9  # some were fetched more than once
    assert max(used) <= 4 * ROOM


@pytest.mark.usefixtures("short_timeout")
def test_holding_a_file_without_space_for_it_raises(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, 2 * ROOM)
    held = [cache.hold(origin.entry(number)) for number in (1, 2)]
    with pytest.raises(
        DataError, match=r"3\.tar: there is no room for it: only .* of 20,512 bytes.*separate data\.cache_dir"
    ):
        cache.hold(origin.entry(3))
    held[0].release()
    assert read(cache.hold(origin.entry(3))) == origin.content(3)
    with pytest.raises(DataError, match=r"has 10,000 bytes, but data\.cache_gb allows 9,000 in total"):
        ShardCache(folder, 9000).hold(origin.entry(4))


def test_a_full_disk_counts_as_a_smaller_limit(folder: Path, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = 2 * ROOM + 100

    class Usage:
        def __init__(self, _: Path) -> None:
            self.free = disk - on_disk(folder)

    monkeypatch.setattr(shard_cache.shutil, "disk_usage", Usage)
    cache = ShardCache(folder, 100 * ROOM)
    for number in range(5):
        assert read(cache.hold(origin.entry(number))) == origin.content(number)
        assert on_disk(folder) <= disk


@pytest.mark.parametrize("damage", ["content", "length", "time set back", "mark"])
def test_a_damaged_file_in_the_cache_is_fetched_again(
    folder: Path, origin: Origin, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(ShardCache(folder, 3 * ROOM).hold(origin.entry(1))) == origin.content(1)
    path = folder / "store-x/1.tar"
    before = path.stat()
    path.write_bytes(b"x" * (SIZE - (damage == "length")))
    if damage == "time set back":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    if damage == "mark":
        path.with_name("1.tar.mark").write_text("[]")
    assert read(ShardCache(folder, 3 * ROOM).hold(origin.entry(1))) == origin.content(1)
    assert origin.fetched == [1, 1]
    assert "1.tar: it" in capsys.readouterr().err


def test_a_file_that_changes_during_a_run_is_fetched_again(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, 3 * ROOM)
    cache.hold(origin.entry(1)).release()
    (folder / "store-x/1.tar").write_bytes(b"x" * SIZE)
    assert read(cache.hold(origin.entry(1))) == origin.content(1)


def test_files_of_an_earlier_run_are_checked_once_and_reused(folder: Path, origin: Origin) -> None:
    ShardCache(folder, 3 * ROOM).hold(origin.entry(1)).release()
    entry, checks = origin.entry(1), []
    entry = entry._replace(check=lambda handle: checks.append(handle) or "")  # type: ignore[func-returns-value]
    cache = ShardCache(folder, 3 * ROOM)
    for _ in range(3):
        cache.hold(entry).release()
    assert len(checks) == 1
    assert origin.fetched == [1]


def test_a_failed_fetch_leaves_nothing(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, 2 * ROOM)

    def fail() -> None:
        raise DataError("gone")

    origin.during = fail
    with pytest.raises(DataError, match="gone"):
        cache.hold(origin.entry(1))
    assert cache.used() == 0
    origin.during = lambda: None
    assert read(cache.hold(origin.entry(1))) == origin.content(1)


@pytest.fixture
def process() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Return a function that starts a forked process, which ends with the test."""
    started = []

    def start(work: Callable[[], Any]) -> Any:
        started.append(FORK.Process(target=work))
        started[-1].start()
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.join()


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("short_timeout")
def test_a_killed_process_leaves_no_partial_file_and_no_hold(folder: Path, origin: Origin, process: Any) -> None:
    def work() -> None:
        cache = ShardCache(folder, 2 * ROOM)
        kept = [cache.hold(origin.entry(1))]
        origin.during = lambda: time.sleep(100)
        kept.append(cache.hold(origin.entry(2)))

    killed = process(work)
    partial = folder / "store-x/2.tar.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size == SIZE)
    cache = ShardCache(folder, 2 * ROOM)
    with pytest.raises(DataError, match="there is no room"):
        cache.hold(origin.entry(3))
    assert cache.used() <= 2 * ROOM
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    for number in (2, 3):
        assert read(cache.hold(origin.entry(number))) == origin.content(number)
    assert names(folder) == {"2.tar", "3.tar"}
    assert not partial.exists()


def test_processes_fetch_a_file_once(folder: Path, origin: Origin, process: Any) -> None:
    results: Any = FORK.SimpleQueue()
    origin.during = lambda: time.sleep(0.2)

    def work() -> None:
        held = ShardCache(folder, 2 * ROOM).hold(origin.entry(1))
        results.put((read(held) == origin.content(1), len(origin.fetched)))

    for _ in range(3):
        process(work)
    found = [results.get() for _ in range(3)]
    assert all(right for right, _ in found)
    assert sum(count for _, count in found) == 1


@pytest.mark.usefixtures("short_timeout")
def test_waiting_for_a_process_without_progress_raises(folder: Path, origin: Origin, process: Any) -> None:
    origin.during = lambda: time.sleep(100)
    process(lambda: ShardCache(folder, 2 * ROOM).hold(origin.entry(1)))
    wait_until(lambda: (folder / "store-x/1.tar.partial").exists())
    with pytest.raises(DataError, match=r"1\.tar: another process is fetching it; no progress for 0 s"):
        ShardCache(folder, 2 * ROOM).hold(origin.entry(1))


@pytest.mark.usefixtures("short_timeout")
def test_a_forked_process_does_not_share_its_parents_hold(folder: Path, origin: Origin, process: Any) -> None:
    cache = ShardCache(folder, ROOM)
    held = cache.hold(origin.entry(1))
    ready, proceed = FORK.Event(), FORK.Event()

    def work() -> None:
        held.release()
        ready.set()
        proceed.wait(20)

    process(work)
    assert ready.wait(20)
    with pytest.raises(DataError, match="there is no room"):
        cache.hold(origin.entry(2))
    held.release()
    assert read(cache.hold(origin.entry(2))) == origin.content(2)
    proceed.set()


def test_other_files_in_the_folder_are_kept(folder: Path, origin: Origin) -> None:
    folder.mkdir()
    (folder / "thesis.tar").write_bytes(b"x" * SIZE)
    cache = ShardCache(folder, ROOM)
    for number in range(3):
        cache.hold(origin.entry(number)).release()
    assert (folder / "thesis.tar").exists()


def test_a_wait_can_be_interrupted(folder: Path, origin: Origin) -> None:
    cache = ShardCache(folder, ROOM)
    held = cache.hold(origin.entry(1))
    ended = threading.Event()

    def wait(seconds: float) -> None:
        ended.set()
        raise KeyError("interrupted")

    with pytest.raises(KeyError):
        cache.hold(origin.entry(2), wait)
    assert ended.is_set()
    held.release()
