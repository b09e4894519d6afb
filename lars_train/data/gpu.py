"""JPEGs by nvImageCodec on a CUDA device, several at once; their views come back to the host.

A worker thread has its part of a batch decoded and resized on a stream of its own, and copied into the loader's
buffer, so that all that comes after is as with the other decoders. What the device does not decode is Pillow's. Boxes,
sizes and flips are those of the other decoders; pixels are nvJPEG's, which need not be near libjpeg's.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lars_train.data import library
from lars_train.data.augment import Geometry
from lars_train.data.decode import MAX_PIXELS
from lars_train.data.jpeg_file import frame_of, is_whole

REMEDY = (
    "It takes device=cuda and pip install 'lars-train[decode]' (nvidia-nvimgcodec-cu13[nvjpeg]; where torch is built "
    "for CUDA 12, nvidia-nvimgcodec-cu12[nvjpeg] in its stead)."
)
"""What to do where it is not there, in one line."""

Views = Sequence[Callable[[int, int], Geometry]]

_FAR = 8.0  # levels, on average: further from Pillow's is another picture


class GpuDecoder:
    """Decodes on `device`; each thread has a decoder and a stream of its own there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._own = threading.local()

    def decode(self, items: Sequence[object], geometries: Views, out: npt.NDArray[np.uint8]) -> list[bool]:
        """Write the views of pictures to `out`, uint8 (n, S, S, 3), contiguous; which of them were decoded.

        Of the others `out` holds anything, and they are for Pillow: what is not bytes, no whole JPEG of a kind that
        jpeg_file.py knows, or refused by the device. Raises `RuntimeError` where the device fails.
        """
        done = [False] * len(items)
        slots, streams, views = [], [], []
        for slot, (item, geometry) in enumerate(zip(items, geometries, strict=True)):
            view = _view(item, geometry)
            if view is not None and (stream := _stream(item, view)) is not None:
                slots.append(slot)
                streams.append(stream)
                views.append(view)
        if not slots:
            return done
        with self._in_order() as handle:
            images = self._decoder().decode(streams, params=library.parameters(), cuda_stream=handle)
            batch = torch.zeros(out.shape, dtype=torch.uint8, device=self._device)
            for slot, view, image in zip(slots, views, images, strict=True):
                left, top, right, bottom = view.box
                if image is not None and tuple(image.shape) == (bottom - top, right - left, 3):
                    _show(self._pixels(image), view, batch[slot])
                    done[slot] = True
            torch.from_numpy(out).copy_(batch, non_blocking=True)
        return done

    def _pixels(self, image: Any) -> Tensor:
        # By its __cuda_array_interface__: no copy.
        return torch.as_tensor(np.asarray(image) if self._device.type == "cpu" else image, device=self._device)

    @contextmanager
    def _in_order(self) -> Iterator[int]:
        """Everything within happens on this thread's stream, whose handle is given, and is done at the end."""
        if self._device.type == "cpu":  # a stand-in's, in tests
            yield 0
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._own.stream):
            yield self._own.stream.cuda_stream
            self._own.stream.synchronize()

    def _decoder(self) -> Any:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = _new_decoder(self._device)
        return self._own.decoder


def current_device() -> torch.device:
    """The calling thread's."""
    return torch.device("cuda", torch.cuda.current_device())


def is_possible() -> bool:
    """Whether the package and a CUDA device are here. No device is touched."""
    return library.nvimgcodec() is not None and torch.cuda.device_count() > 0


def fault(device: torch.device) -> str | None:
    """Why decoding on `device` cannot be done, found by decoding a picture; None if it can."""
    ramp = np.arange(64, dtype=np.uint8)
    pixels = np.stack([np.add.outer(ramp, 2 * ramp), np.add.outer(3 * ramp, 0 * ramp), np.add.outer(0 * ramp, ramp)], 2)
    file, out = io.BytesIO(), np.zeros((1, 32, 32, 3), np.uint8)
    Image.fromarray(pixels).resize((96, 80)).save(file, "JPEG", quality=95)
    whole = Geometry((8, 16, 88, 80), (32, 32), 0, (0, 0), False)
    try:
        (done,) = GpuDecoder(device).decode([file.getvalue()], [lambda width, height: whole], out)
    except Exception as error:  # whatever the package, its interface or CUDA has to say
        return " ".join(str(error).split()) or type(error).__name__
    if not done:
        return "it refuses a common JPEG"
    wanted = Image.open(file).crop(whole.box).resize(whole.size, Image.Resampling.BILINEAR)
    apart = float(np.abs(out[0].astype(int) - np.asarray(wanted)).mean())
    return None if apart < _FAR else f"it decodes a JPEG wrongly, {apart:.0f} levels away from Pillow"


def _new_decoder(device: torch.device) -> Any:
    package = library.nvimgcodec()
    kinds = (package.HW_GPU_ONLY, package.HYBRID_CPU_GPU, package.GPU_ONLY)
    return package.Decoder(
        device_id=device.index or 0,
        max_num_cpu_threads=1,
        backends=[package.Backend(kind) for kind in kinds],
        options=library.OPTIONS,
    )


def _view(item: object, geometry: Callable[[int, int], Geometry]) -> Geometry | None:
    if not isinstance(item, bytes):
        return None
    frame = frame_of(item)
    if frame is None or frame.width * frame.height > MAX_PIXELS or not is_whole(item, frame):
        return None
    view = geometry(frame.width, frame.height)
    return view if view.size[0] * view.size[1] <= MAX_PIXELS else None


def _stream(item: object, view: Geometry) -> Any:
    """The part of a picture that a view is cut from, for the package; None for what it cannot read."""
    package = library.nvimgcodec()
    left, top, right, bottom = view.box
    try:
        return package.CodeStream(item).get_sub_code_stream(region=package.Region(top, left, bottom, right))
    except RuntimeError:
        return None


def _show(pixels: Tensor, view: Geometry, out: Tensor) -> None:
    """Resize a box's pixels, uint8 (H, W, 3), and write their window to `out`, uint8 (S, S, 3), zeros; as window.py."""
    wide, high = view.size
    if pixels.shape[:2] != (high, wide):
        planes = pixels.permute(2, 0, 1)[None].float()
        planes = F.interpolate(planes, size=(high, wide), mode="bilinear", antialias=True, align_corners=False)
        pixels = planes[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
    size = len(out)
    left, top = view.crop[0] - view.pad, view.crop[1] - view.pad
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + size, wide), min(top + size, high)
    shown = pixels[y0:y1, x0:x1]
    columns = slice(size - (x1 - left), size - (x0 - left)) if view.flip else slice(x0 - left, x1 - left)
    out[y0 - top : y1 - top, columns] = shown.flip(1) if view.flip else shown
