"""Reads JSON of run directories as what it is: text of strangers, which may be damaged, cut short, or far too large."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lars_train.text import printable

LARGEST_RECORD = 16 << 20
"""Bytes of a file that is read whole."""
LARGEST_LINE = 1 << 20
LARGEST_LOG = 1 << 30
LONGEST_TEXT = 300
# Above what any run can mean, and far from what a float's arithmetic overflows at.
_LARGEST_NUMBER = 1e15


class Unreadable(Exception):
    """Why a file cannot be used, in one line of printable text."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(printable(f"{path.name}: {next(iter(str(reason).splitlines()), '')}"[:LONGEST_TEXT]))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no file. Raises `Unreadable`."""
    try:
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size > LARGEST_RECORD:
                raise Unreadable(path, f"larger than {LARGEST_RECORD >> 20} MiB")
            found = _parsed(file.read(LARGEST_RECORD))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(path, error) from None
    if not isinstance(found, dict):
        raise Unreadable(path, "no JSON object")
    return found


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one in each line.

    Lines that are none are passed over, and told of in `problems`; a last line without its end is one that is just
    being written, and is not.
    """
    try:
        with _opened(path) as file:
            yield from _objects(file, path, problems)
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(str(Unreadable(path, error)))


def _objects(file: IO[bytes], path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    bad = read = 0
    while line := file.readline(LARGEST_LINE):
        read += len(line)
        if read > LARGEST_LOG:
            problems.append(str(Unreadable(path, f"what is beyond {LARGEST_LOG >> 20} MiB is left out")))
            break
        if not line.endswith(b"\n"):
            if len(line) < LARGEST_LINE:
                break
            while line and not line.endswith(b"\n"):
                line = file.readline(LARGEST_LINE)
                read += len(line)
            bad += 1
            continue
        try:
            found = _parsed(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            yield found
        else:
            bad += 1
    if bad:
        problems.append(str(Unreadable(path, f"{bad:,} damaged line{'s' if bad > 1 else ''} left out")))


def _opened(path: Path) -> IO[bytes]:
    """A regular file, opened: a named pipe would never answer, and a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("no regular file")
    return os.fdopen(descriptor, "rb")


def _parsed(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", "replace"))


def number(found: Any, key: str) -> float | None:
    """The finite number of sensible size that the object `found` has there, or None."""
    value = found.get(key) if isinstance(found, dict) else None
    return as_number(value)


def as_number(value: Any) -> float | None:
    """`value` if it is a finite number of sensible size, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER:  # NaN, too
        return None
    return float(value)


def as_setting(value: Any) -> float | None:
    """`value` if it is a finite number, of whatever size: a setting is shown and compared, and goes into no sum."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        plain = float(value)
    except OverflowError:
        return None
    return plain if math.isfinite(plain) else None


def whole(found: Any, key: str) -> int | None:
    """The whole number from 0 on that the object `found` has there, or None."""
    value = number(found, key)
    return int(value) if value is not None and value >= 0 and math.floor(value) == value else None


def share(found: Any, key: str) -> float | None:
    """The percentage that the object `found` has there, or None."""
    value = number(found, key)
    return value if value is not None and 0 <= value <= 100 else None


def text(found: Any, key: str) -> str | None:
    """The string that the object `found` has there, printable and not too long, or None."""
    value = found.get(key) if isinstance(found, dict) else None
    return shown(value) if isinstance(value, str) else None


def shown(value: Any) -> str:
    """Any value of a stored config as one short line."""
    line = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    line = printable(line[:LONGEST_TEXT])
    return line if len(line) < LONGEST_TEXT else line[: LONGEST_TEXT - 3] + "..."


def relative(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
