"""Contenders of bench_input.py: torchvision's transforms, lars-train's decoders, TurboJPEG and DALI.

Each makes views of 224 x 224 pixels from the bytes of JPEGs, in one thread, and reads an image's size itself. The
reference draws its own crops. All others use lars-train's crops, drawn from the seed, the round and the number of the
image, so they do the same work. They return uint8, and leave normalization to the device.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import files
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as v2

from lars_train.data.dataset import Source
from lars_train.data.decode import native
from lars_train.data.decode import pillow as decoders
from lars_train.data.order import batch_uniforms
from lars_train.data.transforms import UNIFORMS, Geometry, View
from lars_train.pack.packing import SourceSubset

SIZE, BATCH = 224, 64
VIEW = View("inception", SIZE, True, 0, 0.875)
TASKS = TRAIN, EVAL = ("train", "eval")
REFERENCE, NATIVE, PILLOW = "reference", "ours, native", "ours, Pillow"
NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PACKAGES = ("torchvision", "pillow", "numpy", "turbojpeg", "nvidia-dali-cuda120")

Draw = Callable[[int, int], Geometry]
"""Maps the width and height of an image to its view."""
Decode = Callable[[bytes, Draw], Any]
"""Decodes a JPEG to its view: an array (224, 224, 3) or a tensor (3, 224, 224)."""
Contender = Callable[[str, Source, int], Iterator[Any]]
"""Yields the views of all images for a task and a round, in order."""


def read(images: Source, sample: int) -> bytes:
    """Return the bytes of an image."""
    data = images.read(sample)
    assert isinstance(data, bytes)
    return data


def draws(task: str, images: Source, number: int) -> Iterator[tuple[bytes, Draw]]:
    """Read image by image; yield the bytes, and the function that draws the view."""
    for start in range(0, len(images), BATCH):
        samples = list(range(start, min(start + BATCH, len(images))))
        for sample, uniforms in zip(samples, batch_uniforms(0, number, samples, UNIFORMS).tolist(), strict=True):
            yield read(images, sample), partial(VIEW.train, uniforms=uniforms) if task == TRAIN else VIEW.evaluate


def by_image(decode: Decode) -> Contender:
    """Return a contender that decodes images one by one."""

    def views(task: str, images: Source, number: int) -> Iterator[Any]:
        for data, draw in draws(task, images, number):
            yield decode(data, draw)

    return views


def reference_transform(task: str) -> Any:
    """Return torchvision's v1 transforms of an image for a task."""
    train = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    first = train if task == TRAIN else [transforms.Resize(256), transforms.CenterCrop(SIZE)]
    return transforms.Compose([*first, transforms.ToTensor(), NORMALIZE])


def reference(task: str, images: Source, number: int) -> Iterator[torch.Tensor]:
    """Yield the views of torchvision's and PyTorch's training scripts, with their own crops."""
    torch.manual_seed(number)
    transform = reference_transform(task)
    for sample in range(len(images)):
        yield transform(Image.open(io.BytesIO(read(images, sample))).convert("RGB"))


def expected(data: bytes, draw: Draw) -> Any:
    """Return the view to compare with: Pillow's full decode and torchvision's v1 functions, with our boxes."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    view = draw(*image.size)
    left, top, right, bottom = view.box
    image = functional.resized_crop(image, top, left, bottom - top, right - left, [view.size[1], view.size[0]])
    image = functional.crop(image, view.crop[1], view.crop[0], SIZE, SIZE)
    return functional.hflip(image) if view.flip else image


def ours(decoder: str) -> Contender:
    """Return a decoder of lars-train that writes into a reused batch buffer, as in the loader."""
    batch = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8)

    def views(task: str, images: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        for i, (data, draw) in enumerate(draws(task, images, number)):
            yield decoders.decode(data, draw, SIZE, decoder=decoder, out=batch[i % BATCH])

    return views


def torchvision_v2(data: bytes, draw: Draw) -> Any:
    """Return the view by `decode_image` and torchvision's v2 functions on a tensor."""
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    view = draw(image.shape[2], image.shape[1])
    left, top, right, bottom = view.box
    image = v2.crop(image, top, left, bottom - top, right - left)
    image = v2.resize(image, [view.size[1], view.size[0]], antialias=True)
    image = v2.crop(image, view.crop[1], view.crop[0], SIZE, SIZE)
    return v2.horizontal_flip(image) if view.flip else image


def region(view: Geometry) -> tuple[int, int, int, int]:
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


class _Region(ctypes.Structure):
    """tjregion of turbojpeg.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


def turbojpeg() -> Contender:
    """Return TurboJPEG 3, which decodes regions, from the package turbojpeg, and torch's antialiased resize.

    https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/src/turbojpeg.h
    """
    paths = [file.locate() for file in files("turbojpeg") or () if file.name.startswith("libturbojpeg")]
    library = ctypes.CDLL(str(paths[0]))
    decompress, subsampling, wide, high, rgb = 1, 4, 5, 6, 0
    unit = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # width of a block, by TJSAMP
    pointer = ctypes.c_void_p
    library.tj3Init.restype = pointer
    library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    library.tj3Get.argtypes = [pointer, ctypes.c_int]
    library.tj3SetCroppingRegion.argtypes = [pointer, _Region]
    library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, ctypes.c_int, ctypes.c_int]
    handle = library.tj3Init(decompress)

    def check(name: str, *arguments: Any) -> None:
        if getattr(library, name)(handle, *arguments):
            raise ValueError(name)

    def decode(data: bytes, draw: Draw) -> torch.Tensor:
        library.tj3SetCroppingRegion(handle, _Region(0, 0, 0, 0))
        check("tj3DecompressHeader", data, len(data))
        view = draw(library.tj3Get(handle, wide), library.tj3Get(handle, high))
        left, top, right, bottom = region(view)
        first = left - left % unit[library.tj3Get(handle, subsampling)]
        pixels = np.empty((bottom - top, right - first, 3), np.uint8)
        check("tj3SetCroppingRegion", _Region(first, top, right - first, bottom - top))
        check("tj3Decompress8", data, len(data), pixels.ctypes.data, 0, rgb)
        image = torch.from_numpy(pixels[:, left - first :]).permute(2, 0, 1)[None]
        image = interpolate(image, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
        return image.flip(-1) if view.flip else image

    return by_image(decode)


def dali() -> Contender:
    """Return DALI's decoder of regions on the CPU, with our boxes (image_random_crop would draw its own)."""
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        inputs = ("data", "start", "shape", "flip")
        data, start, shape, flip = (fn.external_source(name=one, device="cpu") for one in inputs)
        how = {"axes": [0, 1], "output_type": types.RGB, "adjust_orientation": False}
        pixels = fn.decoders.image_slice(data, start=start, shape=shape, **how)
        how = {"interp_type": types.INTERP_LINEAR, "antialias": True, "device": "cpu"}
        pipe.set_outputs(fn.flip(fn.resize(pixels, resize_x=SIZE, resize_y=SIZE, **how), horizontal=flip))
    pipe.build()

    def views(task: str, images: Source, number: int) -> Iterator[npt.NDArray[np.uint8]]:
        drawn = [
            (data, draw(*(native.size_of(data) or Image.open(io.BytesIO(data)).size)))
            for data, draw in draws(task, images, number)
        ]
        for batch in (drawn[i : i + BATCH] for i in range(0, len(drawn), BATCH)):
            boxes = np.array([region(view) for _, view in batch], np.int32)
            starts, ends = (np.ascontiguousarray(boxes[:, corner]) for corner in ([1, 0], [3, 2]))
            pipe.feed_input("data", [np.frombuffer(data, np.uint8) for data, _ in batch])
            pipe.feed_input("start", list(starts))
            pipe.feed_input("shape", list(ends - starts))
            pipe.feed_input("flip", [np.int32(view.flip) for _, view in batch])
            (decoded,) = pipe.run()
            yield from (np.array(decoded.at(i)) for i in range(len(decoded)))

    return views


def make_contenders(images: Source, skipped: list[str]) -> dict[str, Contender]:
    """Return all contenders that run here, the reference first; add others to `skipped`, with the reason."""
    found: dict[str, Contender] = {REFERENCE: reference, PILLOW: ours(decoders.PILLOW)}
    if native.is_available():
        found[NATIVE] = ours(decoders.NATIVE)
    else:
        skipped.append(f"{NATIVE}: {native.REMEDY}")
    peers: dict[str, Callable[[], Contender]] = {
        "torchvision v2, tensor": lambda: by_image(torchvision_v2),
        "TurboJPEG 3, region": turbojpeg,
        "DALI, image_slice": dali,
    }
    few = SourceSubset(images, np.arange(min(2, len(images))))
    for name, make in peers.items():
        try:
            peer = make()
            for task in TASKS:
                list(peer(task, few, 0))
        except Exception as error:  # anything that another library raises
            skipped.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            found[name] = peer
    return found
