"""A directory on disk as a `Tree`, and its samples as a `Source`: one file per sample."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lars_train.data.folder_index import Folder, Found, listing_by_index
from lars_train.data.listing import Listing
from lars_train.data.source import Labels, Names, Source
from lars_train.data.tree import Ranks, is_hidden, is_image, join
from lars_train.errors import ConfigError
from lars_train.text import printable


class FileSource:
    """Samples that are files below `root`."""

    def __init__(self, root: Path, names: Names, labels: Labels) -> None:
        self.labels = labels
        self._root = root
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, sample: int) -> str:
        return os.fsdecode(self._names[sample])

    def where(self, sample: int) -> str:
        return printable(os.fsencode(self._root / self.name(sample)))

    def read(self, sample: int) -> bytes:
        # Opened without waiting: a pipe among the images would hold the run for good.
        handle = os.open(self._root / self.name(sample), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError("not a regular file")
            return file.read()


class DirectoryTree:
    """The folders and files below the directory `root`. Symbolic links are followed, but not in circles."""

    variant = ""

    def __init__(self, root: Path) -> None:
        self.place = str(root)
        self.path = root

    def folders(self, inside: bytes) -> list[bytes]:
        return sorted(entry.name for entry in self._entries(inside) if entry.is_dir())

    def files(self, inside: bytes) -> list[bytes]:
        return sorted(entry.name for entry in self._entries(inside) if not entry.is_dir())

    def listing(self, inside: bytes) -> Listing:
        return listing_by_index(self._path(inside), self.folders(inside), lambda name: self._found(join(inside, name)))

    def read(self, path: bytes) -> bytes:
        return self._path(path).read_bytes()

    def source(self, inside: bytes, names: Names, labels: Labels, ranks: Ranks | None = None) -> Source:
        return FileSource(self._path(inside), names, labels)

    def _path(self, inside: bytes) -> Path:
        return self.path / os.fsdecode(inside)

    def _entries(self, inside: bytes) -> Iterator[os.DirEntry[bytes]]:
        folder = os.fsencode(self._path(inside))
        try:
            with os.scandir(folder) as entries:
                yield from (entry for entry in entries if not is_hidden(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ConfigError(
                f"data.root: cannot list {printable(folder)} ({error.strerror}); "
                "make it readable, or point data.root elsewhere."
            ) from error

    def _found(self, inside: bytes) -> Found:
        images: list[tuple[bytes, int]] = []
        folders: list[Folder] = []
        self._walk(inside, b"", (), images, folders)
        return Found(sorted(images), folders)

    def _walk(
        self,
        inside: bytes,
        below: bytes,
        above: tuple[Path, ...],
        images: list[tuple[bytes, int]],
        folders: list[Folder],
    ) -> None:
        path = self._path(join(inside, below))
        here = path.resolve()
        if here in above:
            return
        # Before its entries are read: what comes in between is seen as a change.
        folders.append(Folder.at(path, below))
        for entry in self._entries(join(inside, below)):
            if entry.is_dir():
                self._walk(inside, join(below, entry.name), (*above, here), images, folders)
            elif is_image(entry.name):
                images.append((join(below, entry.name), _size(entry)))


def _size(entry: os.DirEntry[bytes]) -> int:
    """Bytes of a file; -1 where that cannot be told, as for a link that leads nowhere."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def user_path(text: str) -> Path:
    """A path from the config, in which ``~`` is the home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user
        return Path(text)


def is_file(path: Path) -> bool:
    """Whether it is a file that can be seen; no error where permissions forbid to look."""
    try:
        return path.is_file()
    except OSError:
        return False
