"""Read a zip file in place, as a `Tree`, and its samples as a `Source`.

Nothing is extracted, and no name in the zip becomes a path on disk. Entries may be stored or deflated. The zip's
directory is read once: a source keeps the name and 29 bytes more per sample, so worker processes need not read the
directory again. A `zipfile.ZipFile` in each thread would hold the whole directory: 650 bytes an entry, 0.8 GB for
ImageNet.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import weakref
import zipfile
import zlib
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lars_train.data.dataset import Labels, NamedSource, Names, NamesBuilder, Source
from lars_train.data.inventory import LOOSE, UNSAFE, Inventory, merge_counts
from lars_train.data.sources.tree import (
    HiddenFilter,
    Listing,
    Rows,
    count_skipped,
    is_hidden,
    is_image,
    join,
    make_listing,
)
from lars_train.data.splits import is_split_name
from lars_train.errors import ConfigError
from lars_train.fsutil import read_at
from lars_train.messages import printable

_ENTRY = np.dtype([("header", "<i8"), ("packed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("deflated", "?")])
# Local file header (APPNOTE.TXT 4.3.7): signature, 22 bytes that the directory has too, two lengths.
_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED, _UTF8 = 0x1, 0x800
# The highest compression factor of deflate (https://zlib.net/zlib_tech.html, "Maximum Compression Factor").
_RATIO = 1032
# The most bytes of a deflated image after decompression. Only a zip bomb exceeds it, because images are compressed
# already. A stored image needs no limit: it takes no more memory than in the zip.
_MAX_INFLATED = 128 << 20
# The most bytes that `ZipTree.read` reads: it reads tables of labels (ImageNet's longest has 2 MB).
_MAX_READ = 64 << 20
# The byte after the slash in ASCII: every path in the folder x sorts before x0.
_AFTER_SLASH = b"0"
_LINKS = "symbolic links"


class ZipSource(NamedSource):
    """Samples that are entries of the zip at `path`, below the folder `inside`.

    `entries`: one record of dtype `_ENTRY` per sample. Safe to use from several threads.
    """

    def __init__(self, path: Path, inside: bytes, names: Names, labels: Labels, entries: npt.NDArray[np.void]) -> None:
        super().__init__(names, labels)
        self._file = _ZipFile(path)
        self._inside = inside
        self._entries = entries

    def location(self, sample: int) -> str:
        """Return ``ZIP!NAME`` for messages."""
        return printable(f"{self._file.path}!") + printable(join(self._inside, self._names[sample]))

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises OSError if reading fails, or if the size or the CRC-32 is wrong."""
        header, packed, size, crc, deflated = self._entries[sample].item()
        try:
            data = self._file.entry(header, packed)
            if deflated:
                # One byte more than the stated size is enough to detect a wrong size.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise OSError(f"cannot be read: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("damaged: the size or the CRC-32 differs from the zip's directory")
        return data


class ZipTree:
    """The folders and files in the zip at `path`. If a single folder holds everything, that folder is the root.

    Raises `ConfigError` if the file is not a zip, or if images are encrypted, duplicate, or compressed by a method
    other than deflate.
    """

    variant = ""

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self.path = path
        self._base = b""
        members, self._hidden, unsafe = _members(path)
        self.inventory = Inventory(skipped=unsafe)
        _check(path, members)
        self._members = dict(members)
        self._sorted = [name for name, _ in members]
        top = self.folders(b"")
        if len(top) == 1 and not is_split_name(os.fsdecode(top[0])) and self.folders(top[0]):
            loose = sum(map(is_image, self.files(b"")))
            self.inventory = Inventory(skipped=merge_counts(unsafe, {LOOSE: loose} if loose else {}, self.hidden()))
            self._base = top[0]
            self.place = f"{path}!{printable(top[0])}"

    def folders(self, inside: bytes) -> list[bytes]:
        """Return the names of the visible folders directly in `inside`, in bytewise order."""
        return self._list(inside)[0]

    def files(self, inside: bytes) -> list[bytes]:
        """Return the names of the visible files directly in `inside`, in bytewise order."""
        return self._list(inside)[1]

    def hidden(self) -> Counter[str]:
        """Count the hidden entries and links directly in the root, by reason."""
        skipped: Counter[str] = Counter()
        paths = HiddenFilter(skipped)
        for path in _below(self._hidden, self._prefix(b"")):
            if is_hidden(path.partition(b"/")[0]):
                paths.hides(path)
            elif b"/" not in path:
                skipped[_LINKS] += 1
        return skipped

    def listing(self, inside: bytes) -> Listing:
        """List the images of the class folders in `inside`."""
        classes = self.folders(inside)
        return make_listing(classes, [self._images(join(inside, name)) for name in classes], self._skipped(inside))

    def read(self, path: bytes) -> bytes:
        """Return the content of the entry `path`, at most 64 MiB. Raises OSError."""
        info = self._members.get(join(self._base, path))
        problem = "does not exist" if info is None else _problem(info, self.path.stat().st_size)
        if info is not None and info.file_size > _MAX_READ:
            problem = f"is larger than {_MAX_READ >> 20} MiB"
        if problem:
            raise OSError(f"{printable(path)} {problem}")
        name = NamesBuilder()
        name.extend([path])
        data = self.source(b"", name.build(), np.zeros(1, np.int32)).read(0)
        assert isinstance(data, bytes)
        return data

    def source(self, inside: bytes, names: Names, labels: Labels, rows: Rows | None = None) -> Source:
        """Return a source of the entries `names`, which lie below `inside`."""
        inside = join(self._base, inside)
        entries = np.empty(len(names), _ENTRY)
        for sample in range(len(names)):
            info = self._members[join(inside, names[sample])]
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            entries[sample] = (info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
        return ZipSource(self.path, inside, names, labels, entries)

    def _images(self, inside: bytes) -> list[bytes]:
        """Return the paths, relative to `inside`, of all images in it and below it, in bytewise order."""
        return [path for path in _below(self._sorted, self._prefix(inside)) if is_image(path)]

    def _skipped(self, inside: bytes) -> Counter[str]:
        """Count the files below `inside` that are not images, or not in a class folder."""
        skipped: Counter[str] = Counter()
        prefix, hidden = self._prefix(inside), HiddenFilter(skipped)
        for path in _below(self._hidden, prefix):
            if not hidden.hides(path):
                skipped[_LINKS] += 1
        for path in _below(self._sorted, prefix):
            if not is_image(path):
                if path and not path.endswith(b"/"):
                    count_skipped(skipped, path.rpartition(b"/")[2])
            elif b"/" not in path:
                skipped[LOOSE] += 1
        return skipped

    def _list(self, inside: bytes) -> tuple[list[bytes], list[bytes]]:
        """Return the folders and the files directly in `inside`, without visiting the entries of those folders."""
        prefix = self._prefix(inside)
        folders, files = [], []
        index = bisect_left(self._sorted, prefix)
        while index < len(self._sorted) and self._sorted[index].startswith(prefix):
            name, slash, _ = self._sorted[index][len(prefix) :].partition(b"/")
            if slash:
                folders.append(name)
                index = bisect_left(self._sorted, prefix + name + _AFTER_SLASH)
            else:
                files.append(name)
                index += 1
        return sorted(folders), [name for name in files if name]

    def _prefix(self, inside: bytes) -> bytes:
        folder = join(self._base, inside)
        return folder + b"/" if folder else b""


class _ZipFile:
    """The zip file of a source. ``pread`` reads it, so threads and forked processes share no file position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._opening = threading.Lock()

    def __reduce__(self) -> tuple[type[_ZipFile], tuple[Path]]:
        return _ZipFile, (self.path,)

    def entry(self, header: int, packed: int) -> bytes:
        """Return the `packed` bytes of the entry whose local header is at `header`."""
        signature, name_length, extra_length = _HEADER.unpack(self._read_exactly(_HEADER.size, header))
        if signature != b"PK\x03\x04":
            raise OSError("no entry at the offset in the zip's directory; was the file replaced during the run?")
        return self._read_exactly(packed, header + _HEADER.size + name_length + extra_length)

    def _read_exactly(self, count: int, offset: int) -> bytes:
        data = read_at(self._open(), count, offset)
        if len(data) < count:
            raise EOFError("the zip is too short")
        return data

    def _open(self) -> int:
        with self._opening:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._handle)
            return self._handle


def _below(paths: list[bytes], prefix: bytes) -> list[bytes]:
    """Return the sorted `paths` that begin with `prefix`, with the prefix removed."""
    first = bisect_left(paths, prefix)
    end = bisect_left(paths, True, lo=first, key=lambda path: not path.startswith(prefix))
    return [path[len(prefix) :] for path in paths[first:end]]


def _members(path: Path) -> tuple[list[tuple[bytes, zipfile.ZipInfo]], list[bytes], Counter[str]]:
    """Return the visible entries, the names of hidden entries and of links, and the count of unsafe entries.

    Entries and names are in bytewise order. Folders end in ``/``. For a link, the visible entries have the folder that
    contains it, so that a folder exists even if it holds only links. Unsafe entries, whose names lead out of the zip,
    are skipped.
    """
    skipped: Counter[str] = Counter()
    shown, hidden = [], []
    hidden_filter = HiddenFilter(skipped)
    try:
        with zipfile.ZipFile(path) as opened:
            for info in opened.infolist():
                name = _raw_name(info)
                unsafe = skipped[UNSAFE]
                if not name or not hidden_filter.hides(name):
                    if stat.S_ISLNK(info.external_attr >> 16):
                        hidden.append(name)
                        name = name[: name.rfind(b"/") + 1]
                    if name:
                        shown.append((name, info))
                elif skipped[UNSAFE] == unsafe:
                    hidden.append(name)
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, UnicodeError, struct.error) as error:
        raise ConfigError(
            f"data.root={path} is not a valid zip ({error}); make or download it again, or give the folder "
            "that it was made from."
        ) from error
    shown.sort(key=lambda member: member[0])
    unsafe = skipped[UNSAFE]
    return shown, sorted(hidden), Counter({UNSAFE: unsafe} if unsafe else {})


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    """Return the name as stored in the zip: zipfile decodes names without the UTF-8 flag as code page 437.

    Some programs on Windows write ``\\`` where the format requires ``/`` (APPNOTE.TXT 4.4.17.1), and some begin names
    with ``./``.
    """
    name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
    return name.replace(b"\\", b"/").removeprefix(b"./")


def _check(path: Path, members: list[tuple[bytes, zipfile.ZipInfo]]) -> None:
    """Raise `ConfigError` for the first image that `ZipSource` could not read."""
    length = path.stat().st_size
    before = b""
    for name, info in members:
        if not is_image(name):
            continue
        problem = "appears twice" if name == before else _problem(info, length)
        if problem:
            raise ConfigError(
                f"data.root={path}: {printable(name)} {problem}; make the zip again, for example with `zip -r -0`."
            )
        before = name


def _problem(info: zipfile.ZipInfo, length: int) -> str:
    """Return the reason why `ZipSource` could not read this entry of a zip of `length` bytes; empty if it could."""
    if info.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is neither stored nor deflated"
    if info.header_offset + info.compress_size > length:
        return "lies beyond the end of the file"
    if info.file_size > _RATIO * info.compress_size:
        return "states a size that deflate cannot reach"
    if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > _MAX_INFLATED:
        return f"is deflated, and would have {info.file_size:,} bytes, more than the limit of {_MAX_INFLATED:,}"
    return ""
