"""Reads the JSON files of run directories, which may be damaged, cut short by a kill, or too large to read whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lars_train.messages import counted, first_line, printable

LARGEST_RECORD = 16 << 20
"""Bytes of a file that is read whole."""
LARGEST_LOG = 1 << 30
LONGEST_TEXT = 300


class Unreadable(Exception):
    """Why a file cannot be used, in one line of printable text."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(printable(f"{path.name}: {first_line(str(reason))}"[:LONGEST_TEXT]))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file; empty if there is no file. Raises `Unreadable`."""
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise Unreadable(path, f"larger than {LARGEST_RECORD >> 20} MiB")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Unreadable(path, error) from None
    if not isinstance(found, dict):
        raise Unreadable(path, "no JSON object")
    return found


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file with one in each line.

    Lines that are none are skipped and counted in `problems`. A last line without its end is still being written, and
    is not counted.
    """
    try:
        with path.open("rb") as file:
            yield from _objects(file, path, problems)
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(str(Unreadable(path, error)))


def _objects(file: IO[bytes], path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    bad = read = 0
    for line in file:
        read += len(line)
        if read > LARGEST_LOG:
            problems.append(str(Unreadable(path, f"what is beyond {LARGEST_LOG >> 20} MiB is left out")))
            break
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if isinstance(found, dict):
            yield found
        else:
            bad += 1
    if bad:
        problems.append(str(Unreadable(path, f"{counted(bad, 'damaged line')} left out")))


def number(found: dict[str, Any], key: str) -> float | None:
    """The finite number that `found` has there, or None."""
    return as_number(found.get(key))


def as_number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def integer(found: dict[str, Any], key: str) -> int | None:
    """The whole number that `found` has there, or None."""
    value = found.get(key)
    return value if isinstance(value, int) else None


def text(found: dict[str, Any], key: str) -> str | None:
    """The string that `found` has there, printable and not too long, or None."""
    value = found.get(key)
    return as_line(value) if isinstance(value, str) else None


def commit_of(git: dict[str, Any]) -> str | None:
    """The commit in a record of a run's start, and whether the checkout had changes; None where none is recorded."""
    commit = text(git, "commit")
    return f"commit {commit[:12]}{' with changes' if git.get('dirty') else ''}" if commit else None


def as_line(value: Any) -> str:
    """Any value of a stored config as one short line."""
    line = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    line = printable(line[:LONGEST_TEXT])
    return line if len(line) < LONGEST_TEXT else line[: LONGEST_TEXT - 3] + "..."


def relative_path(path: Path, folder: Path) -> str:
    """`path` as seen from `folder`, with forward slashes."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
