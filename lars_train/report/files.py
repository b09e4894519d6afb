"""Read the JSON files of run directories, which may be damaged, cut short by a kill, or too large to load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lars_train.messages import counted, first_line, printable

LARGEST_RECORD = 16 << 20
"""Bytes of the largest file that is loaded at once."""
LARGEST_LOG = 1 << 30
LONGEST_TEXT = 300


class Unreadable(Exception):
    """A file cannot be used. The message is one line of printable text."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(printable(f"{path.name}: {first_line(str(reason))}"[:LONGEST_TEXT]))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file; empty if the file does not exist. Raises `Unreadable`."""
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise Unreadable(path, f"larger than {LARGEST_RECORD >> 20} MiB")
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Unreadable(path, error) from None
    if not isinstance(found, dict):
        raise Unreadable(path, "not a JSON object")
    return found


def read_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file.

    Other lines are skipped, and their count is added to `problems`. A last line without a newline is not counted: a
    run may still be writing it.
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
            problems.append(str(Unreadable(path, f"ignored beyond {LARGEST_LOG >> 20} MiB")))
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
        problems.append(str(Unreadable(path, f"{counted(bad, 'damaged line')} ignored")))


def number(record: dict[str, Any], key: str) -> float | None:
    """Return ``record[key]`` as a float if it is a finite number, else None."""
    return as_number(record.get(key))


def as_number(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def integer(record: dict[str, Any], key: str) -> int | None:
    """Return ``record[key]`` if it is an integer, else None."""
    value = record.get(key)
    return value if isinstance(value, int) else None


def text(record: dict[str, Any], key: str) -> str | None:
    """Return ``record[key]`` as one short printable line if it is a string, else None."""
    value = record.get(key)
    return as_line(value) if isinstance(value, str) else None


def commit_of(git: dict[str, Any]) -> str | None:
    """Describe the recorded git state of a start: commit, and whether the checkout had changes; None if unknown."""
    commit = text(git, "commit")
    return f"commit {commit[:12]}{' with changes' if git.get('dirty') else ''}" if commit else None


def as_line(value: Any) -> str:
    """Return any value of a stored config as one short printable line."""
    line = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    line = printable(line[:LONGEST_TEXT])
    return line if len(line) < LONGEST_TEXT else line[: LONGEST_TEXT - 3] + "..."


def relative_path(path: Path, folder: Path) -> str:
    """Return `path` relative to `folder`, with forward slashes."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()
