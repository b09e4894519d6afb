"""Cache whole files in a folder on a local disk, up to a limit in bytes, for several processes.

To make room, the cache removes the least recently used files, but never files that a process holds. A file gets its
final name only when it is complete and verified. Processes lock the files themselves (flock), so a killed process
leaves no stale locks. The caller fetches the bytes (remote.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lars_train.errors import DataError
from lars_train.messages import complain

PATIENCE_S = 300.0
"""Seconds to wait without progress while another process fetches a file, or holds files that take up the room."""

MARK_BYTES = 256
"""Most bytes that the cache stores beside each file."""

_FOLDERS = "store-*"
_PARTIAL, _MARK = ".partial", ".mark"
_POLL_S = 0.05

Wait = Callable[[float], None]
"""A function like `time.sleep`. It may raise an exception to end the wait."""


class CacheEntry(NamedTuple):
    """A file that the cache can hold: its path below the cache's folder, ``store-X/...``, and its size in bytes.

    `fetch` writes it to a file descriptor. `check` returns the reason why the content is invalid; empty if it is valid.
    """

    name: str
    size: int
    fetch: Callable[[int], None]
    check: Callable[[int], str]


class Held:
    """A verified file that stays in the cache until it is released. A pickled copy holds nothing."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        """A file descriptor to read from."""
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[Held], tuple[int]]:
        return Held, (-1,)

    def __del__(self) -> None:
        self.release()

    def size(self) -> int:
        """Return the size in bytes."""
        return os.fstat(self.handle).st_size

    def release(self) -> None:
        """Mark the file as just used, and allow its removal. Further calls do nothing."""
        handle, self.handle = self.handle, -1
        if handle < 0 or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
        _release(handle)


@dataclass
class _StallCheck:
    """Raises `DataError` if `progress` has not changed for `PATIENCE_S` seconds."""

    progress: object = None
    since: float = field(default_factory=time.monotonic)

    def check(self, progress: object, why: str) -> None:
        if progress != self.progress:
            self.progress, self.since = progress, time.monotonic()
        elif time.monotonic() - self.since > PATIENCE_S:
            raise DataError(f"{why}; no progress for {PATIENCE_S:.0f} s.")


class ShardCache:
    """A cache in `folder` of at most `limit` bytes, or fewer if the disk has less room. Can be pickled."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._started = time.time()

    def hold(self, entry: CacheEntry, wait: Wait = time.sleep) -> Held:
        """Hold a file, after fetching it if it is missing or damaged. Files of earlier runs are verified first.

        Raises `DataError` if there is no room for the file, or if another process that fetches it makes no progress.
        Also raises OSError, and the exceptions of `fetch` and `wait`.
        """
        path = self.folder / entry.name
        if entry.size + MARK_BYTES > self.limit:
            raise DataError(f"{path} has {entry.size:,} bytes, but data.cache_gb allows {self.limit:,} in total.")
        stall = _StallCheck()
        while True:
            with self._exclusive():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = self._hold_existing(path) or self._reserve(path, entry.size)
            if isinstance(found, Held):
                return found
            if isinstance(found, _Busy):
                stall.check(found.progress, f"{path}: {found.why}")
                wait(_POLL_S)
            elif isinstance(found, _Unverified):
                held = self._verify(path, found.handle, entry)
                if held is not None:
                    return held
            else:
                return self._fetch(path, found.handle, entry)

    def used(self) -> int:
        """Return the bytes of all files in the cache, including those that are being fetched."""
        return sum(_size(path) for path in self._files())

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob(f"{_FOLDERS}/**/*") if path.is_file()]

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=PATIENCE_S):
                yield
        except Timeout:
            raise DataError(f"{self.folder} could not be locked; is it on a local disk?") from None

    def _hold_existing(self, path: Path) -> Held | _Unverified | _Busy | None:
        """Hold the existing file at `path`; None if there is none. Call under the lock."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        checked = _verified_at(path, handle)
        # If another process holds the file, that process has verified it.
        if not checked or not self._started <= checked <= time.time():
            if _try_lock(handle, fcntl.LOCK_EX):
                return _Unverified(handle)
            if not checked:
                os.close(handle)
                return _Busy("another process is verifying it, or it was changed while in use")
        if _try_lock(handle, fcntl.LOCK_SH):
            return Held(handle)
        os.close(handle)
        return _Busy("another process is verifying it")

    def _reserve(self, path: Path, size: int) -> _Partial | _Busy:
        """Create and lock a file to write to, with room for all of it. Call under the lock."""
        partial = path.with_name(path.name + _PARTIAL)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not _try_lock(handle, fcntl.LOCK_EX):
            try:
                return _Busy("another process is fetching it", os.fstat(handle).st_mtime_ns)
            finally:
                os.close(handle)
        # Discard what a killed process fetched.
        os.ftruncate(handle, 0)
        room = self._make_room(size + MARK_BYTES, spare=partial)
        if room < size + MARK_BYTES:
            partial.unlink()
            _release(handle)
            return _Busy(
                f"there is no room for it: only {room:,} of {self.limit:,} bytes are free in the cache or on its disk "
                "(if other runs use the rest, raise data.cache_gb or give each run a separate data.cache_dir)",
                room,
            )
        os.ftruncate(handle, size)
        return _Partial(handle)

    def _make_room(self, size: int, spare: Path) -> int:
        """Remove files that no process holds until `size` bytes fit, and return the bytes that fit."""
        used = self.used()
        # Other files may have filled the disk.
        room = min(self.limit - used, shutil.disk_usage(self.folder).free)
        files = [path for path in self._files() if path != spare and path.suffix != _MARK]
        for path in sorted(files, key=_last_used):
            if room >= size:
                break
            size_on_disk = _size(path) + _size(path.with_name(path.name + _MARK))
            if _try_remove(path):
                room += size_on_disk
        return room

    def _fetch(self, path: Path, handle: int, entry: CacheEntry) -> Held:
        partial = path.with_name(path.name + _PARTIAL)
        try:
            entry.fetch(handle)
            os.fsync(handle)
            with self._exclusive():
                _write_mark(path, handle)
                partial.replace(path)
                fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            with contextlib.suppress(OSError, DataError), self._exclusive():
                partial.unlink(missing_ok=True)
            _release(handle)
            raise
        return Held(handle)

    def _verify(self, path: Path, handle: int, entry: CacheEntry) -> Held | None:
        """Verify an existing file and hold it. If it is damaged, remove it and return None."""
        try:
            wrong = entry.check(handle) if os.fstat(handle).st_size == entry.size else "its length is wrong"
            with self._exclusive():
                if not wrong:
                    _write_mark(path, handle)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    return Held(handle)
                complain(f"{path}: {wrong}; it is fetched again.")
                _remove(path)
        except BaseException:
            _release(handle)
            raise
        _release(handle)
        return None


class _Unverified(NamedTuple):
    """An existing file that is not verified yet, locked exclusively."""

    handle: int


class _Partial(NamedTuple):
    """A temporary file to fetch into, locked exclusively."""

    handle: int


class _Busy(NamedTuple):
    """The reason to wait for another process. A change in `progress` shows that it is working."""

    why: str
    progress: object = None


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(handle: int) -> None:
    # Closing is not enough: a process forked in the meantime shares the lock.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _state(handle: int) -> list[int]:
    found = os.fstat(handle)
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _write_mark(path: Path, handle: int) -> None:
    """Record that the file was verified just now."""
    path.with_name(path.name + _MARK).write_text(json.dumps([*_state(handle), time.time()]))


def _verified_at(path: Path, handle: int) -> float:
    """Return the time at which the file was verified; 0 if it was not, or has changed since."""
    try:
        *state, when = json.loads(path.with_name(path.name + _MARK).read_text())
        return float(when) if state == _state(handle) else 0.0
    except (OSError, ValueError, TypeError):
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_used(path: Path) -> int:
    # Unfinished files are removed first.
    try:
        return 0 if path.suffix == _PARTIAL else path.stat().st_atime_ns
    except FileNotFoundError:
        return 0


def _try_remove(path: Path) -> bool:
    """Remove a file unless a process holds it. Return True if it is removed."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _try_lock(handle, fcntl.LOCK_EX):
            return False
        _remove(path)
        return True
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name + _MARK).unlink(missing_ok=True)
