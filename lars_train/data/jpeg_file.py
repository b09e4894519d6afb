"""What the markers of a JPEG file say of it: its kind and size, and whether all of it is there. No pixel is decoded.

For decoders that judge less strictly than jpeg.c does: what does not look whole here is left to Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all of them Huffman-coded
_PROGRESSIVE, _SCAN, _END = 0xC2, 0xDA, 0xD9
_MANY = 100
# Tables, application data and comments: what may come before the frame header.
_BEFORE_FRAME = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}


class Frame(NamedTuple):
    """The frame header of an 8-bit JPEG, grey or of three components with at most 2 x 2 samples of the first."""

    width: int
    height: int
    progressive: bool
    components: tuple[int, ...]
    """Their ids."""
    end: int
    """Where in the file the header ends."""


def frame_of(data: bytes) -> Frame | None:
    """The frame header; None for what is no JPEG of those kinds, or has no frame header where it should be."""
    if not data.startswith(b"\xff\xd8"):
        return None
    for marker, start, end in _segments(data, 2):
        if marker in _FRAMES:
            return _frame(marker, data[start:end], end)
        if marker not in _BEFORE_FRAME:
            return None
    return None


def is_whole(data: bytes, frame: Frame) -> bool:
    """Whether the file has its end, no marker where none should be, and of a progressive one all bits of everything.

    Of a file that has not, libjpeg makes up the rest: grey areas, or blocks smoothed by those around them. Files of
    many scans, or of one for each component, are rare and count as not whole: decode.py has a limit for them.
    """
    left, scans = set[tuple[int, int]](), 0
    if frame.progressive:
        left = {(component, k) for component in frame.components for k in range(64)}
    for marker, start, end in _segments(data, frame.end):
        if marker == _END:
            return not left
        if marker == _SCAN:
            scans += 1
            if end > len(data) or end - start < 6 or end - start != 4 + 2 * data[start] or scans > _MANY:
                return False
            if not frame.progressive:
                return data[start] == len(frame.components) and _next_marker(data, end) == _END
            first, last, bits = data[end - 3], data[end - 2], data[end - 1] & 15
            for component in data[start + 1 : end - 3 : 2]:
                found = {(component, k) for k in range(first, min(last, 63) + 1)}
                left = left - found if bits == 0 else left | found
    return False


def _next_marker(data: bytes, at: int) -> int | None:
    """The first marker in a scan's data from `at` on, other than the restarts that belong there."""
    # Most files have no restarts: then it is the first 0xFF that does not stand for itself. To see that takes half as
    # long as to find all of them.
    rest = np.frombuffer(data, np.uint8)[at:]
    if len(rest) > 1:
        found = rest[:-1] == 0xFF
        found &= rest[1:] != 0
        first = int(found.argmax())
        if found[first] and rest[first + 1] == _END:
            return _END
    places = _markers(data, at)
    return data[places[0] + 1] if len(places) else None


def _markers(data: bytes, at: int) -> npt.NDArray[np.int64]:
    """Where from `at` on a marker may be that ends a scan's data. A pattern of `re` takes thirty times as long."""
    rest = np.frombuffer(data, np.uint8)[at:]
    places = np.flatnonzero(rest[:-1] == 0xFF)
    what = rest[1:][places]
    kept: npt.NDArray[np.int64] = at + places[(what != 0) & (what != 0xFF) & (what & 0xF8 != 0xD0)]
    return kept


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """From `at` on: each marker, and where what belongs to it begins and ends; a scan's data are passed over."""
    markers = None
    while data[at : at + 1] == b"\xff" and at + 1 < len(data):
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == _END:
            yield marker, at + 2, at + 2
            return
        if at + 4 > len(data):
            return
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, end
        at = end
        if marker == _SCAN:
            markers = _markers(data, at) if markers is None else markers[np.searchsorted(markers, at) :]
            if not len(markers):
                return
            at = int(markers[0])


def _frame(marker: int, body: bytes, end: int) -> Frame | None:
    if len(body) < 6 or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    ids, samples = tuple(body[6::3]), tuple(body[7::3])
    grey = samples == (0x11,)
    colour = len(samples) == 3 and samples[0] in (0x11, 0x12, 0x21, 0x22) and samples[1:] == (0x11, 0x11)
    if not (grey or colour) or not width or not height or len(set(ids)) != len(ids):
        return None
    return Frame(width, height, marker == _PROGRESSIVE, ids, end)
