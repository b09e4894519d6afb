"""What bench_input.py measures beside its peers: torchvision's reference, ours, and libjpeg-turbo's floor.

Also what a contender is. Each makes one view of 224 x 224 pixels from the bytes of one JPEG at a time, on one core. The
crops are ours, drawn from the seed, the round and the picture's number, so that all of them do the same work; what a
contender needs to know of a picture, its size say, it finds out itself.
"""

from __future__ import annotations

import ctypes
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.decode import pillow as decoders
from lars_train.data.decode.pillow import decode
from lars_train.data.order import batch_uniforms
from lars_train.data.transforms import UNIFORMS, Geometry, View

SIZE = 224
VIEW = View("inception", SIZE, True, 0, 0.875)
BATCH = 64
TRAIN, EVAL = "train", "eval"
TASKS = (TRAIN, EVAL)
REFERENCE, NATIVE, PILLOW, FLOOR = "reference", "ours, native", "ours, Pillow", "floor"
OURS = (NATIVE, PILLOW)
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

FLOOR_C = """
#include <stdio.h>
#include <stdlib.h>
#include <jpeglib.h>

/* The rows from top to bottom and the columns from left to right, into a buffer of a few rows; the rows read. */
int region(const unsigned char *data, unsigned long length, int left, int top, int right, int bottom) {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jpeg.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, data, length);
    jpeg_read_header(&jpeg, TRUE);
    jpeg.out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(&jpeg);
    JDIMENSION first = left, width = right - left;
    if (first || width < jpeg.output_width) jpeg_crop_scanline(&jpeg, &first, &width);
    if (top > 1) jpeg_skip_scanlines(&jpeg, top / 2 * 2);
    const size_t stride = (4 * (size_t)width + 63) / 64 * 64;
    unsigned char *rows = malloc(2 * stride + 128), *at = rows + 16 + (64 - (size_t)rows % 64);
    JSAMPROW lines[2] = {at, at + stride};
    int read = 0;
    while ((int)jpeg.output_scanline < bottom) read += jpeg_read_scanlines(&jpeg, lines, 2);
    free(rows);
    jpeg_destroy_decompress(&jpeg);
    return read;
}
"""

Drawn = Callable[[int, int], Geometry]
"""From a picture's width and height to its view."""

MakeView = Callable[[bytes, Drawn], Any]
"""From the bytes of a JPEG to its view: uint8, an array (224, 224, 3) or a tensor (3, 224, 224), RGB."""


@dataclass
class Contender:
    """`run` makes one pass over pictures, for a task, in a numbered round.

    `views` gives the pixels of such a pass, in order, as `MakeView` does; None where they cannot be compared.
    `tasks` are those that it can do; `versions` those of the packages behind a peer.
    """

    name: str
    run: Callable[[str, Source, int], None]
    views: Callable[[str, Source, int], Iterator[Any]] | None
    tasks: tuple[str, ...] = TASKS
    versions: str = ""


def of_bytes(name: str, view: MakeView, versions: str = "") -> Contender:
    """The contender that takes pictures one by one."""

    def views(task: str, pictures: Source, number: int) -> Iterator[Any]:
        for data, drawn in drawings(task, pictures, number):
            yield view(data, drawn)

    def run(task: str, pictures: Source, number: int) -> None:
        for _ in views(task, pictures, number):
            pass

    return Contender(name, run, views, versions=versions)


def read(pictures: Source, sample: int) -> bytes:
    data = pictures.read(sample)
    assert isinstance(data, bytes)
    return data


def drawings(task: str, pictures: Source, number: int) -> Iterator[tuple[bytes, Drawn]]:
    """Each picture's bytes, read here and now, and how its view is drawn."""
    for start in range(0, len(pictures), BATCH):
        samples = list(range(start, min(start + BATCH, len(pictures))))
        for sample, uniforms in zip(samples, batch_uniforms(0, number, samples, UNIFORMS).tolist(), strict=True):
            drawn = partial(VIEW.train, uniforms=uniforms) if task == TRAIN else VIEW.evaluate
            yield read(pictures, sample), drawn


def window(view: Geometry) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the source pixels that the view's window shows, rounded; for training its box.

    Those who decode regions alone take this for evaluation and resize it to the view, up to half a pixel beside it.
    """
    corners = []
    for axis in (0, 1):
        scale = (view.box[axis + 2] - view.box[axis]) / view.size[axis]
        begin = view.box[axis] + view.crop[axis] * scale
        corners.append((round(begin), max(round(begin) + 1, round(begin + SIZE * scale))))
    (left, right), (top, bottom) = corners
    return left, top, right, bottom


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height by the header, for those who want a box before they decode: the quickest way there is."""
    return native.size_of(data) or Image.open(io.BytesIO(data)).size


def reference(task: str, pictures: Source, number: int) -> None:
    """As torchvision's and PyTorch's own training scripts do it, with their own drawing of the crops."""
    torch.manual_seed(number)
    first = (
        [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
        if task == TRAIN
        else [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    )
    transform = transforms.Compose([*first, transforms.ToTensor(), NORMALIZE])
    for sample in range(len(pictures)):
        transform(Image.open(io.BytesIO(read(pictures, sample))).convert("RGB"))


def full_decode(task: str, pictures: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
    """What pixels are compared with: Pillow's full decode and torchvision's v1 transforms, with our boxes."""
    for data, drawn in drawings(task, pictures, number):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if task == EVAL:
            image = functional.center_crop(functional.resize(image, 256), [SIZE, SIZE])
        else:
            view = drawn(*image.size)
            left, top, right, bottom = view.box
            image = functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
            image = functional.hflip(image) if view.flip else image
        yield np.asarray(image)


def ours(name: str, decoder: str) -> Contender:
    """As the loader does it: into the buffer of a batch, which is used again and again."""

    batch = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)

    def views(task: str, pictures: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        for i, (data, drawn) in enumerate(drawings(task, pictures, number)):
            yield decode(data, drawn, SIZE, decoder=decoder, out=batch[i % BATCH])

    def run(task: str, pictures: Source, number: int) -> None:
        for _ in views(task, pictures, number):
            pass

    return Contender(name, run, views)


def only_regions(region: Callable[..., int], task: str, pictures: Source, number: int) -> None:
    """libjpeg-turbo on the same crops."""
    for data, drawn in drawings(task, pictures, number):
        region(data, len(data), *needed(drawn(*size_of(data))))


def needed(view: Geometry) -> tuple[int, int, int, int]:
    """The box of source pixels that have a share in the window of a view: its own, and the filter's reach beside it."""
    bounds = []
    for axis in (0, 1):
        low, high = view.box[axis], view.box[axis + 2]
        scale = (high - low) / view.size[axis]
        reach = max(scale, 1.0)
        begin, end = (view.crop[axis] + 0.5) * scale - reach, (view.crop[axis] + SIZE - 0.5) * scale + reach
        bounds.append((low + max(0, floor(begin + 0.5)), min(high, low + floor(end + 0.5))))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def compiled_floor(folder: Path) -> Callable[..., int]:
    """The C function `region`. Raises OSError or CalledProcessError where it cannot be compiled."""
    source, compiled = folder / "floor.c", folder / "floor.so"
    source.write_text(FLOOR_C)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-ljpeg", "-o", str(compiled)], check=True)
    region = ctypes.CDLL(str(compiled)).region
    region.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_int] * 4]
    return region


def line_up(folder: Path, skipped: list[str]) -> list[Contender]:
    """All that can run here; the others go to `skipped`, with the reason."""
    found = [Contender(REFERENCE, reference, full_decode), ours(PILLOW, decoders.PILLOW)]
    if native.is_available():
        found.append(ours(NATIVE, decoders.NATIVE))
    else:
        skipped.append(f"{NATIVE}: {native.REMEDY}")
    try:
        found.append(Contender(FLOOR, partial(only_regions, compiled_floor(folder)), None))
    except (OSError, subprocess.CalledProcessError) as error:
        skipped.append(f"{FLOOR}: {error}")
    return found
