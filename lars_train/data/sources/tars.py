"""Find the members of a tar file by its headers, and make headers for a new tar. Nothing is ever extracted.

Formats: POSIX.1-1988 ustar and POSIX.1-2001 pax (https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html,
"ustar Interchange Format", "pax Header Block"), and GNU's long names and large sizes
(https://www.gnu.org/software/tar/manual/html_node/Standard.html). A name never becomes a path on disk.

Python's tarfile takes three times as long, and accepts a tar that was truncated after a member.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from lars_train.fsutil import read_at

BLOCK = 512
# The most bytes of a pax header or of a long name. A path has at most 4,096 bytes on Linux.
_MAX_EXTRA = 1 << 20
_REGULAR, _SKIPPED, _SPARSE = b"0\x007", b"123456VMD", b"S"
_END = bytes(BLOCK)
_COUNTED = {b"1": "hard links", b"2": "symbolic links", b"3": "devices", b"4": "devices", b"6": "pipes"}


class Member(NamedTuple):
    """A regular file in a tar: its content is `size` bytes at `offset`."""

    name: bytes
    offset: int
    size: int


class BadTar(Exception):
    """The file is not a complete tar; str(e) is the reason, in one line."""


def members(handle: int, skipped: Counter[str] | None = None) -> Iterator[Member]:
    """Yield the regular files of the tar open at `handle`, in their order in the file.

    Links, folders and devices are skipped; `skipped` counts all but folders. Raises OSError. Raises `BadTar` for
    damaged headers, sparse files, negative sizes, sizes beyond the end of the file, and a missing end of the archive.
    """
    length = os.fstat(handle).st_size
    at, path, size = 0, None, None
    while True:
        header = read_at(handle, BLOCK, at)
        if header == _END:
            return
        if len(header) < BLOCK:
            raise BadTar(f"it ends early, at byte {at + len(header):,}, without an end-of-archive mark")
        kind, stated = header[156:157], _parse_size(header, at)
        begin = at + BLOCK
        if kind in (b"x", b"L"):
            if stated > min(_MAX_EXTRA, length - begin):
                raise BadTar(f"the header at byte {at:,} declares {stated:,} bytes of names")
            extra = read_at(handle, stated, begin)
            if kind == b"L":
                path = extra.rstrip(b"\0")
            else:
                path, size = _pax(extra, at, path, size)
            at = _next(begin, stated)
            continue
        if kind in (b"g", b"K"):
            # Records for all files, or the target of a link: neither is needed here.
            if stated > length - begin:
                raise BadTar(f"the entry at byte {at:,} would lie beyond the end of the file")
            at = _next(begin, stated)
            continue
        if kind in _SPARSE or not kind or kind not in _REGULAR + _SKIPPED:
            raise BadTar(f"the entry at byte {at:,} is of an unsupported kind ({kind!r})")
        content = stated if size is None else size
        # A folder, a link or a device has no content, whatever size its header states (pax, "typeflag").
        content = 0 if kind in b"123456" else content
        if content > length - begin:
            raise BadTar(f"the entry at byte {at:,} would lie beyond the end of the file")
        if kind in _REGULAR:
            name = path if path is not None else _name(header)
            if not name or b"\0" in name:
                raise BadTar(f"the entry at byte {at:,} has no name, or one with a NUL byte")
            # In old tars, a regular file whose name ends in a slash is a folder.
            if not name.endswith(b"/"):
                yield Member(name, begin, content)
        elif skipped is not None and kind in _COUNTED:
            skipped[_COUNTED[kind]] += 1
        at, path, size = _next(begin, content), None, None


def entry(name: bytes, content: bytes) -> tuple[bytes, bytes]:
    """Return the header blocks of a file with `content` in a tar, and the padding after the content.

    The header is pax if ustar's fields are too short. It records no time and no owner, so header and padding depend
    only on the name and the length.
    """
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"), bytes(-len(content) % BLOCK)


END = _END * 2
"""The end-of-archive mark."""


def _next(begin: int, size: int) -> int:
    return begin + size + (-size % BLOCK)


def _parse_size(header: bytes, at: int) -> int:
    checksum = _parse_number(header[148:156])
    if checksum is None or checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise BadTar(f"no header at byte {at:,}, where one is expected (its checksum is wrong)")
    size = _parse_number(header[124:136])
    if size is None:
        raise BadTar(f"the entry at byte {at:,} has no size, or a negative one")
    return size


def _parse_number(field: bytes) -> int | None:
    """Parse octal digits or GNU's base 256; None for anything else, such as a negative number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # GNU's own format stores other fields in place of ustar's prefix.
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(extra: bytes, at: int, path: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """Return path and size, updated by the records ``LENGTH KEY=VALUE\\n``."""
    position = 0
    while position < len(extra) and extra[position] != 0:
        digits, space, _ = extra[position : position + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = extra[position : position + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not space or not equals or len(record) != length or not record.endswith(b"\n"):
            raise BadTar(f"the pax header at byte {at:,} is malformed")
        if key.startswith(b"GNU.sparse."):
            raise BadTar(f"the entry at byte {at:,} is a sparse file, which is not supported")
        if key == b"path":
            path = value
        if key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise BadTar(f"the pax header at byte {at:,} gives an invalid size")
            size = int(value)
        position += length
    return path, size
