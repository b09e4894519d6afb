"""Write and memory-map index files (named numpy arrays and a little JSON), and cache them per data set.

All processes of a machine share the mapped pages. An index may come with a store that somebody else made, so the reader
accepts no pickles and no object arrays, and checks every bound. directory.py and webdataset.py decide what an index
holds and whether it is up to date. safetensors is a similar format, but would be an additional required package, and
has no checksum of its header.

Layout, little-endian: magic (8 bytes), CRC-32 of the header (u4), its length (u4), the header (JSON), then the arrays,
each at a multiple of 64 bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lars_train.fsutil import cache_folder, write_atomic
from lars_train.messages import complain, printable

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"LARSARR1"
_HEAD = struct.Struct("<8sII")
_ALIGN = 64
_DTYPES = ("|u1", "<u4", "<i4", "<i8", "<u8")


class Damaged(Exception):
    """An index is malformed or does not match its data; str(e) is the reason, in one line."""


MALFORMED = (Damaged, ValueError, KeyError, TypeError, IndexError, AttributeError)
"""The exceptions that parsing an index raises if its JSON or its arrays are malformed."""


def describe_damage(error: Exception) -> str:
    """Return the reason for an error in `MALFORMED`, in one line."""
    return str(error) if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"


def write_mapped(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write `meta` (as JSON) and `arrays` (1-D, of `_DTYPES`) to `path` atomically. Raises OSError."""
    described, offset, crc = {}, 0, 0
    pieces: list[bytes | memoryview] = []
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES or array.ndim != 1:
            raise ValueError(f"{name}: {array.dtype.str} of {array.ndim} dimensions cannot be stored")
        data = np.ascontiguousarray(array).view(np.uint8).data
        described[name] = [array.dtype.str, len(array), offset]
        for piece in (data, bytes(-len(data) % _ALIGN)):
            pieces.append(piece)
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
    header = json.dumps({"meta": meta, "arrays": described, "bytes": offset, "crc": crc}).encode()
    header += b" " * (-(_HEAD.size + len(header)) % _ALIGN)
    head = _HEAD.pack(_MAGIC, zlib.crc32(header), len(header))
    write_atomic(path, [head, header, *pieces])


def read_mapped(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and the arrays, read-only views of the mapped file. Raises OSError and `Damaged`."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < _HEAD.size:
            raise Damaged("it is empty or cut short")
        whole = np.frombuffer(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ), np.uint8)
    try:
        magic, crc, size = _HEAD.unpack(whole[: _HEAD.size].tobytes())
        header = whole[_HEAD.size : _HEAD.size + size].tobytes()
        if magic != _MAGIC or len(header) != size or zlib.crc32(header) != crc:
            raise Damaged("the magic number or the checksum of its header is wrong")
        content = json.loads(header)
        body = whole[_HEAD.size + size :]
        if len(body) != content["bytes"] or zlib.crc32(body.data) != content["crc"]:
            raise Damaged("its length or its CRC-32 is wrong")
        meta = content["meta"]
        if not isinstance(meta, dict):
            raise Damaged("its header is malformed")
        return meta, {name: _view(body, *where) for name, where in content["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"its header is malformed ({type(error).__name__})") from None


def _view(body: npt.NDArray[np.uint8], dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    if dtype not in _DTYPES or type(count) is not int or type(offset) is not int:
        raise Damaged("its header describes arrays of an unsupported type")
    end = offset + count * np.dtype(dtype).itemsize
    if not 0 <= offset <= end <= len(body) or offset % _ALIGN:
        raise Damaged("its header describes arrays beyond the end of the file")
    return body[offset:end].view(dtype)


T = TypeVar("T")
# Indexes kept per path. Several, because nodes with separate copies of the data may share a cache directory, and
# another run may still map an older index.
_KEPT = 4


class Outdated(Exception):
    """The index was made by another version of this program, which read the data differently."""


def cache_directory() -> Path:
    """Return the folder of cached indexes."""
    return cache_folder() / "index"


def load_index(place: Path, use: Callable[[dict[str, Any], Arrays], T | None]) -> T | None:
    """Call `use` on each index of `place`, newest first, and return the first result other than None.

    Removes outdated indexes, and those that are damaged or make `use` raise one of `MALFORMED`, with a note on stderr.
    """
    for path in _index_files(place):
        try:
            found = use(*read_mapped(path))
        except FileNotFoundError:
            continue
        except Outdated:
            complain(
                f"NOTE: {path}: the index of {_printable_path(place)} was made by another version of lars-train; it is "
                "rebuilt."
            )
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            continue
        except (OSError, *MALFORMED) as error:
            complain(f"NOTE: {path}: the index of {_printable_path(place)} is damaged ({error}); it is rebuilt.")
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            continue
        if found is not None:
            return found
    return None


def save_index(place: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    """Save an index of `place` in the cache, and remove old ones. Call under `index_lock`. Reports any failure."""
    key = _key(place)
    try:
        write_mapped(cache_directory() / f"{key}-{time.time_ns():x}.index", meta, arrays)
        # Also removes temporary files of killed processes.
        for old in (*_index_files(place)[_KEPT:], *cache_directory().glob(f".{key}-*")):
            old.unlink(missing_ok=True)
    except OSError as error:
        _report_unsaved(place, error)


@contextlib.contextmanager
def index_lock(place: Path) -> Iterator[None]:
    """Hold the lock of the index of `place`. If locking fails, reports that and continues without the lock."""
    from filelock import FileLock

    lock = FileLock(cache_directory() / f"{_key(place)}.lock")
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        _report_unsaved(place, error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _key(place: Path) -> str:
    return hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]


def _index_files(place: Path) -> list[Path]:
    """Return the indexes of `place`, newest first."""
    try:
        return sorted(cache_directory().glob(f"{_key(place)}-*.index"), key=lambda path: path.name, reverse=True)
    except OSError:
        return []


def _report_unsaved(place: Path, error: Exception) -> None:
    complain(
        f"no index of {_printable_path(place)} can be saved in {cache_directory()} ({error}), so the folder is read at "
        "every start; set XDG_CACHE_HOME to a writable folder."
    )


def _printable_path(place: Path) -> str:
    return printable(os.fsencode(place))
