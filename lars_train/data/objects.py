"""Whole objects below a URL, by fsspec: ranges of bytes, asked for again when something fails, written to a file.

fsspec knows the protocols, and credentials, endpoints and the like from its own settings. What the objects are, and
whether they are right, is for others to know (remote.py).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from lars_train.data.shard_cache import Wait
from lars_train.errors import DataError
from lars_train.monitoring.say import complain
from lars_train.text import printable

T = TypeVar("T")

ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 8, 1.0, 30.0
"""How often a request is made, with pauses that double and are shortened at random by up to a half: 90 s in all."""

PIECE = 16 << 20
"""Bytes of a shard that are asked for at a time."""

# What no second attempt mends.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError, NotImplementedError)


class Objects:
    """What lies below a URL. Can be pickled, and used after a fork: connections are made on first use in each process.

    Its methods raise `DataError`, which names the object and the reason, for what cannot be had.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._made: tuple[int, Any, str] | None = None

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.url,)

    def about(self, name: str, attempts: int = ATTEMPTS, wait: Wait = time.sleep) -> dict[str, Any]:
        """What the file system says of an object: its ``size`` in bytes and more."""
        return self._tried(name, _about, attempts, wait)

    def fetch(self, name: str, size: int, handle: int, wait: Wait = time.sleep, attempts: int = ATTEMPTS) -> None:
        """Write an object, which must have `size` bytes, to a file descriptor. Raises OSError of the latter alone."""
        length = self.about(name, attempts, wait).get("size")
        if length is not None and length != size:
            raise DataError(
                f"{self.place(name)} has {length:,} bytes, not {size:,}: the store was changed, or not copied whole; "
                "copy it again."
            )
        at = 0
        while at < size:
            piece = partial(_range, start=at, stop=min(at + PIECE, size), size=size)
            data = self._tried(name, piece, attempts, wait)
            while data:
                written = os.pwrite(handle, data, at)
                data, at = data[written:], at + written
            wait(0)

    def place(self, name: str) -> str:
        """An object's URL, to be shown."""
        return f"{self.url}/{printable(name)}"

    def _tried(self, name: str, ask: Callable[[Any, str], T], attempts: int, wait: Wait) -> T:
        fs, root = self._file_system()
        pause = FIRST_PAUSE_S
        for left in reversed(range(attempts)):
            try:
                return ask(fs, f"{root}/{name}")
            except _FINAL as error:
                raise DataError(f"{self.place(name)} cannot be read ({_told(error)}).") from error
            # Each library that fsspec builds on has errors of its own.
            except Exception as error:
                reason = _told(error)
                if not left:
                    raise DataError(f"{self.place(name)} cannot be read ({reason}); tried {attempts} times.") from error
            seconds = pause * random.SystemRandom().uniform(0.5, 1)
            complain(f"{self.place(name)}: {reason}; tried again in {seconds:.1f} s.")
            wait(seconds)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        raise AssertionError

    def _file_system(self) -> tuple[Any, str]:
        # Not the one of the process that this one was forked from.
        if self._made is None or self._made[0] != os.getpid():
            try:
                from fsspec.core import url_to_fs

                fs, root = url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                remedy = "for s3:// and https://: pip install 'lars-train[remote]'"
                raise DataError(f"{self.url}: a library is missing ({error}; {remedy}).") from error
            except Exception as error:
                raise DataError(f"{self.url} cannot be used ({_told(error)}).") from error
            self._made = (os.getpid(), fs, root.rstrip("/"))
        return self._made[1:]


def _about(fs: Any, path: str) -> dict[str, Any]:
    return dict(fs.info(path))


def _range(fs: Any, path: str, start: int, stop: int, size: int) -> bytes:
    data: bytes = fs.cat_file(path, start=start, end=stop)
    # A plain web server may know no ranges, and send it all.
    if len(data) == size:
        data = data[start:stop]
    if len(data) != stop - start:
        raise OSError(f"{len(data):,} bytes came, not the {stop - start:,} from {start:,} on")
    return data


def _told(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
