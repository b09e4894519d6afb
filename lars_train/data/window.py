"""The window of a resized picture that a view keeps. decode.py says what for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lars_train.data.augment import Geometry

Pixels = npt.NDArray[np.uint8]


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
