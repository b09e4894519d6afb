"""Trees of files for the tests of sources, written to a folder or into a zip."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

# Paths are str or bytes.
Files = Mapping[Any, bytes]
MakeTree = Callable[[Files], str]


@pytest.fixture
def make_directory(tmp_path: Path) -> MakeTree:
    """Return a function that writes files below a folder and returns its path.

    A path with a final slash is an empty folder.
    """

    def make(files: Files) -> str:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for name, content in files.items():
            path = root / os.fsdecode(name)
            if os.fsencode(name).endswith(b"/"):
                path.mkdir(parents=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return str(root)

    return make


@pytest.fixture
def make_zip(tmp_path: Path) -> MakeTree:
    """Return a function that writes files into a deflated zip, in reverse order, and returns its path."""

    def make(files: Files) -> str:
        path = tmp_path / "data.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in reversed(list(files)):
                archive.writestr(os.fsdecode(name), files[name])
        return str(path)

    return make


@pytest.fixture(params=["directory", "zip"])
def make_tree(request: pytest.FixtureRequest) -> MakeTree:
    """Return `make_directory` and `make_zip`, in turn."""
    make: MakeTree = request.getfixturevalue(f"make_{request.param}")
    return make
