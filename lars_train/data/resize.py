"""From decoded pixels to a view: resizing by torch, and the window that is kept. decode.py says what for."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from lars_train.data.augment import Geometry

Pixels = npt.NDArray[np.uint8]

# Sizes in a ratio of whole numbers up to this put many sums half-way between two levels.
_SMALL_RATIO = 32


def resize(pixels: Pixels, out: Pixels) -> None:
    """Resize uint8 (H, W, 3) to `out`, uint8 (H', W', 3), both contiguous: antialiased bilinear, as Pillow's.

    torch has the same filter, four times as fast, with weights of 15 bits where Pillow has 22. Where sums are half-way
    between two levels, in both directions, it may be 2 levels away, so that of such sizes the second direction is left
    to Pillow. Else the two are at most 1 level apart but for about 5 values in a billion, which are 2 (docs/input.md).
    """
    (height, width), (high, wide) = pixels.shape[:2], out.shape[:2]
    if max(high // math.gcd(height, high), wide // math.gcd(width, wide)) > _SMALL_RATIO:
        _by_torch(pixels, out)
        return
    if width != wide:
        columns = np.empty((height, wide, 3), np.uint8)
        _by_torch(pixels, columns)
        pixels = columns
    out[:] = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))


def _by_torch(pixels: Pixels, out: Pixels) -> None:
    import torch

    source, target = (torch.from_numpy(array).permute(2, 0, 1)[None] for array in (pixels, out))
    # F.interpolate calls the same, into memory of its own: that costs half as much again.
    torch.ops.aten._upsample_bilinear2d_aa.out(source, list(out.shape[:2]), False, None, None, out=target)


def mirror(pixels: Pixels, out: Pixels) -> None:
    """Write uint8 (H, W, 3) to `out` with its columns in reverse: as `window`, in half of the time."""
    import torch

    torch.from_numpy(out).copy_(torch.flip(torch.from_numpy(pixels), [1]))


def window(pixels: Pixels, view: Geometry, out: Pixels) -> None:
    """Write the window of a view, (S, S, 3), of the resized picture (H, W) or (H, W, 3); zeros where it hangs over."""
    size = len(out)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    height, width = pixels.shape[:2]
    left, top = view.crop[0] - view.pad, view.crop[1] - view.pad
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, width), min(top + size, height)
    out[:] = 0
    rows, columns = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    if not view.flip:
        out[rows, columns] = pixels[y0:y1, x0:x1]
        return
    for channel in range(3):
        # One after the other: numpy is six times as slow at turning rows of three bytes each.
        out[:, ::-1, channel][rows, columns] = pixels[y0:y1, x0:x1, channel % pixels.shape[2]]
