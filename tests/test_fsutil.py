"""Files are written completely or not at all, and the user's paths work without a home directory."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lars_train import fsutil
from lars_train.fsutil import cache_folder, user_path, write_atomic


def test_the_content_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    write_atomic(path, [b"ab", memoryview(b"cde")])
    assert steps == ["content 5", "name", "folder"]
    assert path.read_bytes() == b"abcde"


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, [b"before"])

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, [b"after"])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("record.json", b"before")]


@pytest.fixture
def without_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Remove the home directory, and return the folder for temporary files."""

    def none(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", none)
    monkeypatch.setattr(Path, "home", lambda: none(Path()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fsutil._temporary.cache_clear()
    yield tmp_path
    fsutil._temporary.cache_clear()


def test_caches_are_in_xdg_cache_home_or_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/ada/.cache/lars_train")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert cache_folder() == Path("/fast/lars_train")


def test_without_a_home_directory_caches_are_in_a_private_folder(without_home: Path) -> None:
    assert cache_folder() == without_home / f"lars-train-{os.getuid()}" / "lars_train"
    assert stat.S_IMODE(cache_folder().parent.stat().st_mode) == 0o700
    assert user_path("~/x") == Path("~/x")


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_cache_folder_that_others_can_write_to_is_not_used(kind: str, without_home: Path) -> None:
    path, elsewhere = without_home / f"lars-train-{os.getuid()}", without_home / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "file":
        path.touch()
    else:
        path.mkdir()
        path.chmod(0o777)
    found = cache_folder().parent
    assert found != path
    assert found.resolve().parent == without_home.resolve()
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    assert cache_folder().parent == found
