"""Named numpy arrays and a little JSON in one file that is written whole or not at all, and read by mapping it.

Mapped, its pages are shared by all processes of a machine. A reader takes no pickle and no object arrays from it, and
checks every bound: such a file may lie in a store that somebody else made.

Layout, little-endian: magic (8 bytes), CRC-32 of the header (u4), its length (u4), the header (JSON), then the arrays,
each at a multiple of 64 bytes.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lars_train.durable import write_whole

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"LARSARR1"
_HEAD = struct.Struct("<8sII")
_ALIGN = 64
_DTYPES = ("|u1", "<u4", "<i4", "<i8", "<u8")


class Damaged(Exception):
    """The file is not what `write_mapped` writes; str(e) is the reason, in one line."""


def write_mapped(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write `meta` (JSON) and `arrays` (1-D, of `_DTYPES`) to `path`, which is there whole or not. Raises OSError."""
    described, offset, crc = {}, 0, 0
    pieces: list[bytes | memoryview] = []
    for name, array in arrays.items():
        if array.dtype.str not in _DTYPES or array.ndim != 1:
            raise ValueError(f"{name}: {array.dtype.str} of {array.ndim} dimensions cannot be kept")
        data = np.ascontiguousarray(array).view(np.uint8).data
        described[name] = [array.dtype.str, len(array), offset]
        for piece in (data, bytes(-len(data) % _ALIGN)):
            pieces.append(piece)
            crc = zlib.crc32(piece, crc)
            offset += len(piece)
    header = json.dumps({"meta": meta, "arrays": described, "bytes": offset, "crc": crc}).encode()
    header += b" " * (-(_HEAD.size + len(header)) % _ALIGN)
    head = _HEAD.pack(_MAGIC, zlib.crc32(header), len(header))
    write_whole(path, [head, header, *pieces])


def read_mapped(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The meta data and the arrays, read-only views of the mapped file. Raises OSError, and `Damaged`."""
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < _HEAD.size:
            raise Damaged("it is empty or cut short")
        whole = np.frombuffer(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ), np.uint8)
    try:
        magic, crc, size = _HEAD.unpack(whole[: _HEAD.size].tobytes())
        header = whole[_HEAD.size : _HEAD.size + size].tobytes()
        if magic != _MAGIC or len(header) != size or zlib.crc32(header) != crc:
            raise Damaged("its header does not hold together")
        content = json.loads(header)
        body = whole[_HEAD.size + size :]
        if len(body) != content["bytes"] or zlib.crc32(body.data) != content["crc"]:
            raise Damaged("its length or its CRC-32 is wrong")
        meta = content["meta"]
        if not isinstance(meta, dict):
            raise Damaged("its header is of another form")
        return meta, {name: _view(body, *where) for name, where in content["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"its header is of another form ({type(error).__name__})") from None


def _view(body: npt.NDArray[np.uint8], dtype: str, count: int, offset: int) -> npt.NDArray[Any]:
    if dtype not in _DTYPES or type(count) is not int or type(offset) is not int:
        raise Damaged("its header asks for arrays of another kind")
    end = offset + count * np.dtype(dtype).itemsize
    if not 0 <= offset <= end <= len(body) or offset % _ALIGN:
        raise Damaged("its header asks for more than there is")
    return body[offset:end].view(dtype)
