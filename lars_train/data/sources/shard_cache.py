"""Whole files in a folder on a local disk that together take no more than so many bytes, shared by processes.

What is held stays; of the rest, what was used longest ago makes room. A file is there whole and verified, or not under
its name. Locks are the system's (flock), on the files themselves, so they go with the process that holds them: a kill
leaves nothing that has to be tidied by hand. Where the bytes come from is known by those who ask (remote.py).
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
"""Seconds without progress while another process fetches a file, or holds what should make room."""

MARK_BYTES = 256
"""Bytes that a file takes at most beside its own."""

_FOLDERS = "store-*"
_PARTIAL, _MARK = ".partial", ".mark"
_POLL_S = 0.05

Wait = Callable[[float], None]
"""Called with seconds, returns after them; raises where the waiting is to end."""


class Entry(NamedTuple):
    """A file that the cache can hold: its place below the cache's folder, ``store-X/...``, and its bytes.

    `fetch` writes it to a file descriptor; `check` says what is wrong with what is there, or nothing.
    """

    place: str
    size: int
    fetch: Callable[[int], None]
    check: Callable[[int], str]


class Held:
    """A file that is in the cache, verified, until it is released. A pickled one holds nothing."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        """A file descriptor to read from."""
        self._owner = os.getpid()

    def __reduce__(self) -> tuple[type[Held], tuple[int]]:
        return Held, (-1,)

    def __del__(self) -> None:
        self.release()

    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self.handle).st_size

    def release(self) -> None:
        """Let the file go, once: it was used just now, and may make room from now on."""
        handle, self.handle = self.handle, -1
        if handle < 0 or self._owner != os.getpid():
            return
        with contextlib.suppress(OSError):
            os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
        _let_go(handle)


@dataclass
class _Patience:
    """Raises `DataError` where `sign` has been the same for too long."""

    sign: object = None
    since: float = field(default_factory=time.monotonic)

    def go_on(self, sign: object, why: str) -> None:
        if sign != self.sign:
            self.sign, self.since = sign, time.monotonic()
        elif time.monotonic() - self.since > PATIENCE_S:
            raise DataError(f"{why}, and nothing has changed for {PATIENCE_S:.0f} s.")


class ShardCache:
    """The cache in `folder`, of at most `limit` bytes, or less where the disk has less room. Can be pickled."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._began = time.time()

    def hold(self, entry: Entry, wait: Wait = time.sleep) -> Held:
        """Hold a file, which is fetched where it is not there, or not what it should be.

        What an earlier run has left is checked before it is used. Raises `DataError` where there is no room for
        it or another process that fetches it makes no progress; OSError; and what `fetch` and `wait` raise.
        """
        path = self.folder / entry.place
        if entry.size + MARK_BYTES > self.limit:
            raise DataError(f"{path}: it has {entry.size:,} bytes; data.cache_gb allows {self.limit:,} for all.")
        patience = _Patience()
        while True:
            with self._alone():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = self._there(path) or self._reserved(path, entry.size)
            if isinstance(found, Held):
                return found
            if isinstance(found, _Busy):
                patience.go_on(found.sign, f"{path}: {found.why}")
                wait(_POLL_S)
            elif isinstance(found, _Unchecked):
                held = self._checked(path, found.handle, entry)
                if held is not None:
                    return held
            else:
                return self._fetched(path, found.handle, entry)

    def used(self) -> int:
        """Bytes of all that is in the cache, and of what is being fetched."""
        return sum(_size(path) for path in self._files())

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob(f"{_FOLDERS}/**/*") if path.is_file()]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "lock", timeout=PATIENCE_S):
                yield
        except Timeout:
            raise DataError(f"{self.folder}: its lock is not to be had; is it on a local disk?") from None

    def _there(self, path: Path) -> Held | _Unchecked | _Busy | None:
        """Return the file of this name, if there is one; call it under the lock."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        checked = _checked_at(path, handle)
        # What others hold they have checked.
        if not checked or not self._began <= checked <= time.time():
            if _locked(handle, fcntl.LOCK_EX):
                return _Unchecked(handle)
            if not checked:
                os.close(handle)
                return _Busy("another process checks it, or it was changed while it is in use")
        if _locked(handle, fcntl.LOCK_SH):
            return Held(handle)
        os.close(handle)
        return _Busy("another process checks it")

    def _reserved(self, path: Path, size: int) -> _Begun | _Busy:
        """A file to write to, locked, with room for it all; to be called alone."""
        partial = path.with_name(path.name + _PARTIAL)
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        if not _locked(handle, fcntl.LOCK_EX):
            try:
                return _Busy("another process fetches it", os.fstat(handle).st_mtime_ns)
            finally:
                os.close(handle)
        # What a kill left is fetched again.
        os.ftruncate(handle, 0)
        room = self._make_room(size + MARK_BYTES, spare=partial)
        if room < size + MARK_BYTES:
            partial.unlink()
            _let_go(handle)
            return _Busy(
                f"there is no room for it: of {self.limit:,} bytes, or what the disk has, all but {room:,} are in use "
                "(if by other runs, raise data.cache_gb or give each a data.cache_dir of its own)",
                room,
            )
        os.ftruncate(handle, size)
        return _Begun(handle)

    def _make_room(self, size: int, spare: Path) -> int:
        """Remove what nobody holds, as far as it takes for `size` bytes more; the bytes that there is room for."""
        used = self.used()
        # The disk may have less: it fills up with other things, too.
        room = min(self.limit - used, shutil.disk_usage(self.folder).free)
        files = [path for path in self._files() if path != spare and path.suffix != _MARK]
        for path in sorted(files, key=_last_used):
            if room >= size:
                break
            gone = _size(path) + _size(path.with_name(path.name + _MARK))
            if _removed(path):
                room += gone
        return room

    def _fetched(self, path: Path, handle: int, entry: Entry) -> Held:
        partial = path.with_name(path.name + _PARTIAL)
        try:
            entry.fetch(handle)
            os.fsync(handle)
            with self._alone():
                _mark(path, handle)
                partial.replace(path)
                fcntl.flock(handle, fcntl.LOCK_SH)
        except BaseException:
            with contextlib.suppress(OSError, DataError), self._alone():
                partial.unlink(missing_ok=True)
            _let_go(handle)
            raise
        return Held(handle)

    def _checked(self, path: Path, handle: int, entry: Entry) -> Held | None:
        """Hold the file that was there, once it is checked; None where it is not what it should be, and is gone."""
        try:
            wrong = entry.check(handle) if os.fstat(handle).st_size == entry.size else "its length is another one"
            with self._alone():
                if not wrong:
                    _mark(path, handle)
                    fcntl.flock(handle, fcntl.LOCK_SH)
                    return Held(handle)
                complain(f"{path}: {wrong}; it is fetched anew.")
                _remove(path)
        except BaseException:
            _let_go(handle)
            raise
        _let_go(handle)
        return None


class _Unchecked(NamedTuple):
    """A file that is there, locked for this process alone, which may be anything."""

    handle: int


class _Begun(NamedTuple):
    """A file that is to be fetched, under another name, locked for this process alone."""

    handle: int


class _Busy(NamedTuple):
    """Why it has to be waited for; as long as `sign` changes there is hope."""

    why: str
    sign: object = None


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go(handle: int) -> None:
    # Closing it would not do: a process that was forked meanwhile shares the lock.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _state(handle: int) -> list[int]:
    found = os.fstat(handle)
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _mark(path: Path, handle: int) -> None:
    """Write down that the file was found to be right just now."""
    path.with_name(path.name + _MARK).write_text(json.dumps([*_state(handle), time.time()]))


def _checked_at(path: Path, handle: int) -> float:
    """When the file was found to be right, if it is what it was then; else 0."""
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
    # What was never finished goes first.
    try:
        return 0 if path.suffix == _PARTIAL else path.stat().st_atime_ns
    except FileNotFoundError:
        return 0


def _removed(path: Path) -> bool:
    """Remove a file unless somebody holds it; whether it is gone."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _locked(handle, fcntl.LOCK_EX):
            return False
        _remove(path)
        return True
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(path.name + _MARK).unlink(missing_ok=True)
