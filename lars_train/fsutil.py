"""Write files atomically, even across a power failure, and resolve user paths and the cache folder."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


def write_atomic(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file so that it is complete or missing, even after a power failure. Raises `OSError`."""
    temporary = stage(path, pieces)
    try:
        temporary.replace(path)
    except BaseException:
        discard(temporary)
        raise
    sync_folder(path.parent)


def stage(path: Path, pieces: Sequence[bytes | memoryview]) -> Path:
    """Write the content for `path` to a temporary file beside it, sync that to disk, and return its path.

    Raises `OSError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with name_in_errors(path), temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        discard(temporary)
        raise
    return temporary


def discard(path: Path) -> None:
    """Remove a file, ignoring errors."""
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add `path` to an `OSError` raised in the block if the error names no file, as after a failed write."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def read_at(handle: int, count: int, offset: int) -> bytes:
    """Read `count` bytes at `offset` of an open file, or fewer where the file ends.

    A single `os.pread` may return fewer bytes anywhere in the file.
    """
    data = os.pread(handle, count, offset)
    while len(data) < count:
        more = os.pread(handle, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of `folder` to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with name_in_errors(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


def wait_for(path: Path, token: str, seconds: float = 15.0) -> bool:
    """Return True once the file at `path`, written by any machine, contains `token`; False after `seconds`."""
    # Network file systems show a new file to other nodes only after their attribute cache expires.
    end = time.monotonic() + seconds
    while True:
        try:
            os.listdir(path.parent)
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def user_path(text: str) -> Path:
    """Return the path `text` with ``~`` expanded; without a home directory, the path as given."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def cache_folder() -> Path:
    """Return the folder for caches: ``$XDG_CACHE_HOME/lars_train``, else ``~/.cache/lars_train``.

    Without a home directory, return a private folder in the folder for temporary files.
    """
    if found := os.environ.get("XDG_CACHE_HOME"):
        return Path(found) / "lars_train"
    try:
        return Path.home() / ".cache" / "lars_train"
    except RuntimeError:
        return _temporary() / "lars_train"


@functools.cache
def _temporary() -> Path:
    """Return a folder that no other user can write to: caches contain compiled code, and all users share the parent."""
    folder = Path(tempfile.gettempdir(), f"lars-train-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lars-train-"))
