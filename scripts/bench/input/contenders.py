"""Contenders of bench_input.py: torchvision's reference, lars-train's decoders, and libjpeg-turbo's floor.

Each makes a view of 224 x 224 pixels from the bytes of one JPEG at a time, on one core. All use lars-train's crops,
drawn from the seed, the round and the number of the image, so that all do the same work; only the reference draws its
own. A contender reads the size of an image itself.
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
from images import read
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.decode import pillow as decoders
from lars_train.data.order import batch_uniforms
from lars_train.data.transforms import UNIFORMS, Geometry, View

SIZE, BATCH = 224, 64
VIEW = View("inception", SIZE, True, 0, 0.875)
TASKS = TRAIN, EVAL = ("train", "eval")
REFERENCE, NATIVE, PILLOW, FLOOR = "reference", "ours, native", "ours, Pillow", "floor"
OURS = (NATIVE, PILLOW)
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

FLOOR_C = """
#include <stdio.h>
#include <stdlib.h>
#include <jpeglib.h>

/* Decode rows top to bottom and columns left to right into a buffer of two rows; return the number of rows. */
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

Draw = Callable[[int, int], Geometry]
"""Maps the width and height of an image to its view."""
Decode = Callable[[bytes, Draw], Any]
"""Decodes a JPEG to its view: RGB, uint8, an array (224, 224, 3) or a tensor (3, 224, 224)."""
Pass = Callable[[str, Source, int], Iterator[Any]]
"""Yields the views of all images for a task and a round, in order."""


@dataclass
class Contender:
    """A pass to time, and a pass whose pixels can be compared, or None."""

    name: str
    timed: Pass
    compared: Pass | None
    tasks: tuple[str, ...] = TASKS

    def run(self, task: str, images: Source, number: int) -> None:
        """Make one pass."""
        for _ in self.timed(task, images, number):
            pass


def by_image(name: str, decode: Decode) -> Contender:
    """Return a contender that decodes images one by one."""

    def views(task: str, images: Source, number: int) -> Iterator[Any]:
        for data, draw in draws(task, images, number):
            yield decode(data, draw)

    return Contender(name, views, views)


def draws(task: str, images: Source, number: int) -> Iterator[tuple[bytes, Draw]]:
    """Read image by image; yield the bytes, and the function that draws the view."""
    for start in range(0, len(images), BATCH):
        samples = list(range(start, min(start + BATCH, len(images))))
        for sample, uniforms in zip(samples, batch_uniforms(0, number, samples, UNIFORMS).tolist(), strict=True):
            yield read(images, sample), partial(VIEW.train, uniforms=uniforms) if task == TRAIN else VIEW.evaluate


def size_of(data: bytes) -> tuple[int, int]:
    """Read width and height from the header, with the native decoder if it is available."""
    return native.size_of(data) or Image.open(io.BytesIO(data)).size


def window(view: Geometry) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the region that a view shows, in whole source pixels.

    In training it is the box. In evaluation it is rounded: decoders of regions are up to half a pixel off.
    """
    corners = []
    for axis in (0, 1):
        scale = (view.box[axis + 2] - view.box[axis]) / view.size[axis]
        begin = view.box[axis] + view.crop[axis] * scale
        corners.append((round(begin), max(round(begin) + 1, round(begin + SIZE * scale))))
    (left, right), (top, bottom) = corners
    return left, top, right, bottom


def reference(task: str, images: Source, number: int) -> Iterator[torch.Tensor]:
    """Yield the views of torchvision's and PyTorch's training scripts, with their own crops."""
    torch.manual_seed(number)
    transform = reference_transform(task)
    for sample in range(len(images)):
        yield transform(Image.open(io.BytesIO(read(images, sample))).convert("RGB"))


def reference_transform(task: str) -> Any:
    """Return torchvision's v1 transforms of an image for a task."""
    train = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    first = train if task == TRAIN else [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    return transforms.Compose([*first, transforms.ToTensor(), NORMALIZE])


def full_decode(task: str, images: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the views for comparisons: Pillow's full decode and torchvision's v1 transforms, with our boxes."""
    for data, draw in draws(task, images, number):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if task == EVAL:
            image = functional.center_crop(functional.resize(image, 256), [SIZE, SIZE])
        else:
            view = draw(*image.size)
            left, top, right, bottom = view.box
            image = functional.resized_crop(image, top, left, bottom - top, right - left, [SIZE, SIZE])
            image = functional.hflip(image) if view.flip else image
        yield np.asarray(image)


def ours(name: str, decoder: str) -> Contender:
    """Return a decoder of lars-train that writes into a reused batch buffer, as in the loader."""
    batch = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)

    def views(task: str, images: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        for i, (data, draw) in enumerate(draws(task, images, number)):
            yield decoders.decode(data, draw, SIZE, decoder=decoder, out=batch[i % BATCH])

    return Contender(name, views, views)


def source_box(view: Geometry) -> tuple[int, int, int, int]:
    """Return the box of source pixels that contribute to a view, with the margin of the resize filter."""
    bounds = []
    for axis in (0, 1):
        low, high = view.box[axis], view.box[axis + 2]
        scale = (high - low) / view.size[axis]
        reach = max(scale, 1.0)
        begin, end = (view.crop[axis] + 0.5) * scale - reach, (view.crop[axis] + SIZE - 0.5) * scale + reach
        bounds.append((low + max(0, floor(begin + 0.5)), min(high, low + floor(end + 0.5))))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def make_floor(folder: Path) -> Contender:
    """Compile the floor in `folder`: libjpeg-turbo decoding the same crops, and nothing else."""
    source, compiled = folder / "floor.c", folder / "floor.so"
    source.write_text(FLOOR_C)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-ljpeg", "-o", str(compiled)], check=True)
    region = ctypes.CDLL(str(compiled)).region
    region.argtypes = [ctypes.c_char_p, ctypes.c_ulong, *[ctypes.c_int] * 4]

    def rows(task: str, images: Source, number: int) -> Iterator[int]:
        for data, draw in draws(task, images, number):
            yield region(data, len(data), *source_box(draw(*size_of(data))))

    return Contender(FLOOR, rows, None)


def own_contenders(folder: Path, skipped: list[str]) -> list[Contender]:
    """Return all contenders that run here; add others to `skipped`, with the reason."""
    found = [Contender(REFERENCE, reference, full_decode), ours(PILLOW, decoders.PILLOW)]
    if native.is_available():
        found.append(ours(NATIVE, decoders.NATIVE))
    else:
        skipped.append(f"{NATIVE}: {native.REMEDY}")
    try:
        found.append(make_floor(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        skipped.append(f"{FLOOR}: {error}")
    return found
