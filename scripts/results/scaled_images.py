"""The images of reproduce_scaled_table.py, a folder or .zip: whether they can be used, and which they are."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

TRAINING, VALIDATION = "train", ("test", "val")


def fault_of(path: Path) -> str | None:
    """Why these can be no images of a study; None of a folder or .zip that has both parts."""
    if not path.exists():
        return "there is no such file or folder"
    if path.is_file() and not zipfile.is_zipfile(path):
        return "it is neither a folder nor a .zip"
    parts = {part for name, _ in _files(path) for part in Path(name).parts[:-1]}
    if TRAINING not in parts or parts.isdisjoint(VALIDATION):
        return f"it has not the folders {TRAINING}/ and {' or '.join(f'{name}/' for name in VALIDATION)}"
    return None


def described(path: Path) -> str:
    """How many images they are, and a digest of their names and sizes: the same of a folder and of a .zip of it."""
    files = sorted(_files(path))
    digest = hashlib.sha256("".join(f"{name}\0{size}\0" for name, size in files).encode()).hexdigest()
    return f"{len(files)} files, sha256 of names and sizes {digest[:16]}"


def _files(path: Path) -> Iterator[tuple[str, int]]:
    """Each file's name and bytes, less those that a system puts there for itself."""
    if path.is_dir():
        found = ((file.relative_to(path).as_posix(), file.stat().st_size) for file in path.rglob("*") if file.is_file())
    else:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        found = ((entry.filename, entry.file_size) for entry in entries if not entry.is_dir())
    for name, size in found:
        if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            yield name, size
