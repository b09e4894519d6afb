"""Files that are whole or not there: what stands on disk, and in which order it gets there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lars_train.durable import write_whole


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "record.json", list[str]()
    sync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"content {os.fstat(handle).st_size}")
        sync(handle)

    def replaced(source: Path, target: Path) -> Path:
        steps.append("name")
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_whole(path, [b"ab", memoryview(b"cde")])
    assert steps == ["content 5", "name", "folder"]
    assert path.read_bytes() == b"abcde"


def test_what_cannot_be_written_leaves_the_file_that_was_there_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_whole(path, [b"before"])

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, [b"after"])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("record.json", b"before")]
