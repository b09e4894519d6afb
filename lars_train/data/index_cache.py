"""Where indexes that this program makes are kept, and how processes share them: the cache directory.

What an index holds, and whether it still holds, is known by those who ask (folder_index.py, webdataset.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lars_train.data.mapped import Arrays, Damaged, read_mapped, write_mapped
from lars_train.monitoring.say import complain
from lars_train.text import printable

T = TypeVar("T")
# Indexes kept of one path. More than one: nodes with copies of their own may share a cache directory; and the file that
# another run has mapped is not taken away from it at once.
_KEPT = 4


def cache_directory() -> Path:
    """Where indexes are kept: ``$XDG_CACHE_HOME/lars_train/index``, or below ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lars_train" / "index"


def load(place: Path, use: Callable[[dict[str, Any], Arrays], T | None]) -> T | None:
    """What `use` makes of the newest index of `place` that it does not refuse by None.

    One that is damaged, or from which `use` raises what comes of odd values, is told of on stderr and removed.
    """
    for path in _files(place):
        try:
            found = use(*read_mapped(path))
        except FileNotFoundError:
            continue
        except (Damaged, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            complain(f"NOTE: {path}: the index of {_shown(place)} is damaged ({error}); it is made anew.")
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            continue
        if found is not None:
            return found
    return None


def keep(place: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    """Keep an index of `place`, and let go of old ones; to be called under `alone`. What prevents it is told."""
    key = _key(place)
    try:
        write_mapped(cache_directory() / f"{key}-{time.time_ns():x}.index", meta, arrays)
        # And what a kill has left half written.
        for old in (*_files(place)[_KEPT:], *cache_directory().glob(f".{key}-*")):
            old.unlink(missing_ok=True)
    except OSError as error:
        _cannot_keep(place, error)


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Hold the lock of the index of `place`; without it where it cannot be had, which is told."""
    from filelock import FileLock

    lock = FileLock(cache_directory() / f"{_key(place)}.lock")
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _cannot_keep(place, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _key(place: Path) -> str:
    return hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]


def _files(place: Path) -> list[Path]:
    """The indexes of one path, the newest first."""
    try:
        return sorted(cache_directory().glob(f"{_key(place)}-*.index"), key=lambda path: path.name, reverse=True)
    except OSError:
        return []


def _cannot_keep(place: Path, error: Exception) -> None:
    complain(
        f"no index of {_shown(place)} can be kept in {cache_directory()} ({error}): the folder is read at every start; "
        "set XDG_CACHE_HOME to a folder that can be written to."
    )


def _shown(place: Path) -> str:
    return printable(os.fsencode(place))
