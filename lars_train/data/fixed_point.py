"""Pillow's resizing without C of our own: numba compiles it when this is imported. library.py says what for.

Columns first, each direction rounded to 8 bits, with weights of 22 bits: what jpeg.c does and Pillow up to 12, to the
last bit. Loops are over many pixels at a time, so that LLVM makes vectors of them: over rows of the picture where
columns are resized, over columns where rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lars_train.data.augment import Geometry

if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("NUMBA_DISABLE_JIT is set, and Python itself is far too slow")

Pixels = npt.NDArray[np.uint8]

_BITS = 22  # of a weight, as Pillow has it: 30 with those of a pixel, and sums of them fit into 32
_HALF = 1 << (_BITS - 1)
_MOST_TAPS = 16000  # of a result: with more the errors of their rounding could add up to a level above 255
_ROWS = 64  # whose columns are resized at once: loops long enough to pay for their start, and a strip stays in cache
_U8, _U16, _U22, _U24 = np.uint32(8), np.uint32(16), np.uint32(_BITS), np.uint32(24)
_BYTE = np.uint32(255)


def show(pixels: Pixels, at: tuple[int, int], view: Geometry, out: Pixels) -> bool:
    """Write a view to `out`, uint8 (S, S, 3), contiguous, zeros where its window hangs over; whether it could be done.

    `pixels`: those of the picture that `library.needed` tells of, or more, uint8 (H, W, 3), contiguous, of which the
    first lies `at` (left, top) there. With fewer it cannot be done, nor where one pixel is made of thousands in a row.
    """
    left, top, right, bottom = view.box
    x, y = view.crop[0] - view.pad, view.crop[1] - view.pad
    (wide, high), side = view.size, len(out)
    across = (right - left, wide, x, left - at[0], pixels.shape[1])
    down = (bottom - top, high, y, top - at[1], pixels.shape[0])
    return bool(_show(pixels, *across, *down, view.flip, side, out))


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiled for these types, and kept in numba's cache (NUMBA_CACHE_DIR) where one can be used."""

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        # With files that are damaged, then with new ones; at last without, for want of a folder that may be written.
        for cached in (True, True, False):
            made: Any = numba.njit(nogil=True)(function)
            try:
                if cached:
                    made.enable_caching()
                made.compile(signature)
                break
            except Exception:  # whatever numba meets in what it finds
                if not cached:
                    raise
                _forget(made.stats.cache_path, function.__name__)
        made.disable_compile()
        compiled: Callable[..., Any] = made
        return compiled

    return compile_


def _forget(folder: str | None, name: str) -> None:
    """Remove what numba keeps of a function in its cache; None: it has no folder."""
    if folder is None:
        return
    for file in Path(folder).glob(f"{Path(__file__).stem}.{name}-*.nb?"):
        with suppress(OSError):
            file.unlink()


@_compiled(
    "Tuple((int64[::1], uint32[:,::1], int64, int64, boolean))(int64, int64, int64, int64, int64, int64, boolean)"
)
def _weigh(source: int, to: int, start: int, shift: int, room: int, side: int, flip: bool) -> Any:
    """Of one direction: each result's first pixel and weights, the first place and how many in the window; whether all
    pixels are there.

    `source` pixels are resized to `to`, of which the window begins at `start`; the first of `source` is number `shift`
    of the `room` pixels that are there. Results are made up to a multiple of four. A result's weights are 1 in sum
    before they are rounded (precompute_coeffs in https://github.com/python-pillow/Pillow/blob/main/src/libImaging/Resample.c).
    """
    low, high = max(start, 0), min(start + side, to)
    count = max(high - low, 0)
    begin = side - (high - start) if flip else low - start
    scale = source / to
    reach = max(scale, 1.0)
    inverse = 1.0 / reach
    many = (count + 3) // 4 * 4
    first, number = np.zeros(many, np.int64), np.zeros(many, np.int64)
    taps, lowest, highest = 1, room, 0
    for i in range(count):
        place = high - 1 - i if flip else low + i
        center = (place + 0.5) * scale
        # Of a direction that stays as it is, not its neighbours, whose weights are none.
        first[i] = place if source == to else max(int(center - reach + 0.5), 0)
        number[i] = 1 if source == to else min(int(center + reach + 0.5), source) - first[i]
        taps = max(taps, number[i])
        lowest, highest = min(lowest, first[i] + shift), max(highest, first[i] + number[i] + shift)
    if lowest < 0 or highest > room or taps > _MOST_TAPS:
        return first, np.zeros((0, 0), np.uint32), begin, count, False
    weights = np.zeros((many, taps), np.uint32)
    exact = np.zeros(taps, np.float64)
    for i in range(count):
        center = ((high - 1 - i if flip else low + i) + 0.5) * scale
        total = 0.0
        for t in range(number[i]):
            away = abs((t + first[i] - center + 0.5) * inverse)
            exact[t] = 1.0 - away if away < 1.0 else 0.0
            total += exact[t]
        first[i] += shift
        # So that all have the same number of pixels, and none behind the last that is there.
        back = max(first[i] + taps - room, 0)
        first[i] -= back
        for t in range(number[i]):
            weights[i, t + back] = np.uint32(int(0.5 + exact[t] / (total if total != 0.0 else 1.0) * (1 << _BITS)))
    for i in range(count, many):
        first[i] = lowest
    return first, weights, begin, count, True


@_compiled("void(uint8[:,:,::1], int64, int64, int64[::1], uint32[:,::1], uint32[:,::1])")
def _across(pixels: Pixels, begin: int, end: int, first: Any, weights: Any, words: Any) -> None:
    """Resize the columns of rows `begin` to `end`; `words`, a row for each, has the bytes of three-byte pixels.

    Four pixels are three words: of numbers in little-endian order, which all are that numba compiles for.
    """
    wide, (many, taps) = pixels.shape[1], weights.shape
    strip = np.empty((wide, _ROWS), np.uint32)
    red, green, blue = np.empty(_ROWS, np.uint32), np.empty(_ROWS, np.uint32), np.empty(_ROWS, np.uint32)
    four = np.empty((4, _ROWS), np.uint32)
    for top in range(begin, end, _ROWS):
        rows = min(_ROWS, end - top)
        for row in range(rows):
            line = pixels[top + row]
            for i in range(wide):
                strip[i, row] = np.uint32(line[i, 0]) | np.uint32(line[i, 1]) << _U8 | np.uint32(line[i, 2]) << _U16
        for quarter in range(many // 4):
            for k in range(4):
                i = 4 * quarter + k
                for row in range(_ROWS):
                    red[row] = green[row] = blue[row] = _HALF
                for t in range(taps):
                    weight, column = weights[i, t], strip[first[i] + t]
                    for row in range(_ROWS):
                        pixel = column[row]
                        red[row] += (pixel & _BYTE) * weight
                        green[row] += (pixel >> _U8 & _BYTE) * weight
                        blue[row] += (pixel >> _U16) * weight
                for row in range(_ROWS):
                    four[k, row] = red[row] >> _U22 | green[row] >> _U22 << _U8 | blue[row] >> _U22 << _U16
            for row in range(_ROWS):
                red[row] = four[0, row] | four[1, row] << _U24
                green[row] = four[1, row] >> _U8 | four[2, row] << _U16
                blue[row] = four[2, row] >> _U16 | four[3, row] << _U8
            for row in range(rows):
                to = top + row - begin
                words[to, 3 * quarter], words[to, 3 * quarter + 1] = red[row], green[row]
                words[to, 3 * quarter + 2] = blue[row]


@_compiled("void(uint8[:,::1], int64, uint32[::1], uint8[::1])")
def _down(lines: Pixels, at: int, weights: Any, out: Pixels) -> None:
    """One row, of the lines from `at` on, a weight for each."""
    count = len(out)
    sums = np.empty(count, np.uint32)
    for i in range(count):
        sums[i] = _HALF
    for t in range(len(weights)):
        weight, line = weights[t], lines[at + t]
        for i in range(count):
            sums[i] += np.uint32(line[i]) * weight
    for i in range(count):
        out[i] = sums[i] >> _U22


@_compiled(
    "boolean(uint8[:,:,::1], int64, int64, int64, int64, int64, int64, int64, int64, int64, int64, boolean, int64, "
    "uint8[:,:,::1])"
)
def _show(
    pixels: Pixels,
    width: int,
    wide: int,
    x: int,
    shift_x: int,
    room_x: int,
    height: int,
    high: int,
    y: int,
    shift_y: int,
    room_y: int,
    flip: bool,
    side: int,
    out: Pixels,
) -> bool:
    first, weights, column, columns, inside = _weigh(width, wide, x, shift_x, room_x, side, flip)
    row_first, row_weights, row, rows, row_inside = _weigh(height, high, y, shift_y, room_y, side, False)
    if not (inside and row_inside):
        return False
    if columns < side or rows < side:
        out[:] = 0
    if columns == 0 or rows == 0:
        return True
    taps = row_weights.shape[1]
    begin, end = row_first[0], row_first[rows - 1] + taps
    words = np.empty((end - begin, len(first) // 4 * 3), np.uint32)
    _across(pixels, begin, end, first, weights, words)
    lines = words.view(np.uint8)
    flat = out.reshape(side, 3 * side)
    for i in range(rows):
        _down(lines, row_first[i] - begin, row_weights[i], flat[row + i, 3 * column : 3 * (column + columns)])
    return True
