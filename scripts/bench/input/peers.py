"""Peers of bench_input.py: other libraries, which make a view from a JPEG and a box, with one thread each.

All return uint8, the fastest form of each library, and leave normalization to the device. Decoders of whole images crop
the box and resize it with an antialiased filter; decoders of regions crop themselves.

A library is imported when its peer is created, and tried on two images before the measurement. A library that is not
installed or fails is skipped, with the reason. `pip install 'lars-train[bench]'` installs most of them.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from contenders import SIZE, Contender, Decode, Draw, by_image, size_of, window
from PIL import Image
from pipelines import dali, tensorflow, turboloader
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from lars_train.data.dataset import Source
from lars_train.data.transforms import Geometry
from lars_train.pack.packing import SourceSubset

Pixels = npt.NDArray[np.uint8]
PACKAGES = (
    *("torchvision", "pillow", "numpy", "opencv-python-headless", "torchcodec", "imagecodecs", "simplejpeg"),
    *("nvidia-nvimgcodec-cu12", "turbojpeg", "nvidia-dali-cuda120", "tensorflow-cpu", "turboloader"),
)


def transformed(image: Any, view: Geometry) -> Any:
    """Apply torchvision's v2 functions to an image or a tensor (3, H, W)."""
    left, top, right, bottom = view.box
    (wide, high), (x, y) = view.size, view.crop
    image = functional.crop(image, top, left, bottom - top, right - left)
    image = functional.resize(image, [high, wide], antialias=True)
    if (wide, high) != (SIZE, SIZE):
        image = functional.crop(image, y, x, SIZE, SIZE)
    return functional.horizontal_flip(image) if view.flip else image


def interpolated(pixels: Pixels, view: Geometry) -> torch.Tensor:
    """Return the view of a whole image (H, W, 3) by torch's antialiased interpolation."""
    left, top, right, bottom = view.box
    image = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    image = interpolate(image, size=view.size[::-1], mode="bilinear", antialias=True)
    x, y = view.crop
    image = image[0, :, y : y + SIZE, x : x + SIZE]
    return image.flip(-1) if view.flip else image


def from_region(pixels: Pixels, flip: bool) -> torch.Tensor:
    """Return the view of a decoded region (H, W, 3) by torch's antialiased interpolation."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    image = interpolate(image, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return image.flip(-1) if flip else image


def of_tensors(decode: Callable[[bytes], Any]) -> Decode:
    """Return a decoder to tensors (3, H, W), with torchvision's v2 functions."""

    def view(data: bytes, draw: Draw) -> Any:
        image = decode(data)
        return transformed(image, draw(image.shape[2], image.shape[1]))

    return view


def of_arrays(decode: Callable[[bytes], Pixels]) -> Decode:
    """Return a decoder to arrays (H, W, 3), with torch's interpolation."""

    def view(data: bytes, draw: Draw) -> Any:
        pixels = decode(data)
        return interpolated(pixels, draw(pixels.shape[1], pixels.shape[0]))

    return view


def v2_pillow() -> Decode:
    def view(data: bytes, draw: Draw) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return functional.pil_to_tensor(transformed(image, draw(*image.size)))

    return view


def v2_tensor() -> Decode:
    from torchvision.io import ImageReadMode, decode_image

    return of_tensors(
        lambda data: decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    )


def torchcodec() -> Decode:
    from torchcodec.decoders import decode_jpeg

    return of_tensors(partial(decode_jpeg, mode="RGB"))


def imagecodecs() -> Decode:
    return of_arrays(partial(import_module("imagecodecs").jpeg8_decode, outcolorspace="RGB"))


def simplejpeg() -> Decode:
    return of_arrays(partial(import_module("simplejpeg").decode_jpeg, colorspace="RGB"))


def pillow(module: Any, draft: bool) -> Decode:
    """Return Pillow, or a library with its interface; `module` is its PIL.Image."""

    def view(data: bytes, draw: Draw) -> Any:
        image = module.open(io.BytesIO(data))
        width, height = image.size
        shape = draw(width, height)
        if draft:
            # The smallest of libjpeg's scales at which the box has enough pixels for the view.
            shares = [shape.size[axis] / (shape.box[axis + 2] - shape.box[axis]) for axis in (0, 1)]
            image.draft("RGB", (int(width * shares[0]), int(height * shares[1])))
        image = image.convert("RGB")
        across, down = image.width / width, image.height / height
        left, top, right, bottom = shape.box
        if across == down == 1:
            image = image.crop(shape.box) if shape.box != (0, 0, width, height) else image
            image = image.resize(shape.size, module.Resampling.BILINEAR)
        else:
            box = (left * across, top * down, right * across, bottom * down)
            image = image.resize(shape.size, module.Resampling.BILINEAR, box=box)
        x, y = shape.crop
        image = image.crop((x, y, x + SIZE, y + SIZE)) if image.size != (SIZE, SIZE) else image
        return np.asarray(image.transpose(module.Transpose.FLIP_LEFT_RIGHT) if shape.flip else image)

    return view


def pillow_simd(folder: Path) -> Decode:
    """Return pillow-simd from `folder`, imported under Pillow's name beside Pillow."""
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == "PIL"}
    sys.path.insert(0, str(folder))
    try:
        images = import_module("PIL.Image")
        images.preinit()
    finally:
        sys.path.remove(str(folder))
        for key in [key for key in sys.modules if key.partition(".")[0] == "PIL"]:
            del sys.modules[key]
        sys.modules.update(before)
    if folder.resolve() not in Path(str(images.__file__)).resolve().parents:
        raise ImportError(f"{folder} does not contain pillow-simd")
    return pillow(images, draft=False)


def opencv(reduced: bool) -> Decode:
    import cv2

    cv2.setNumThreads(1)
    scales = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}

    def view(data: bytes, draw: Draw) -> Any:
        shape = draw(*size_of(data))
        left, top, right, bottom = shape.box
        share = min((right - left) / shape.size[0], (bottom - top) / shape.size[1])
        scale = max((one for one in scales if reduced and one <= share), default=1)
        how = scales.get(scale, cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), how)
        image = image[top // scale : -(-bottom // scale), left // scale : -(-right // scale)]
        image = cv2.resize(image, shape.size, interpolation=cv2.INTER_AREA)
        x, y = shape.crop
        image = image[y : y + SIZE, x : x + SIZE]
        return cv2.cvtColor(cv2.flip(image, 1) if shape.flip else image, cv2.COLOR_BGR2RGB)

    return view


def nvimagecodec() -> Decode:
    from nvidia import nvimgcodec

    cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    decoder = nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, 1, [cpu])
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def view(data: bytes, draw: Draw) -> Any:
        stream = nvimgcodec.CodeStream(data)
        shape = draw(stream.width, stream.height)
        left, top, right, bottom = window(shape)
        part = stream.get_sub_code_stream(region=nvimgcodec.Region(top, left, bottom, right))
        return from_region(np.asarray(decoder.decode(part, params=params)), shape.flip)

    return view


class Region(ctypes.Structure):
    """tjregion of turbojpeg.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


def turbojpeg() -> Decode:
    """Return TurboJPEG 3, https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/src/turbojpeg.h."""
    try:  # the package turbojpeg contains version 3.0
        found = [str(file.locate()) for file in files("turbojpeg") or () if file.name.startswith("libturbojpeg")]
    except PackageNotFoundError:
        found = []
    library = ctypes.CDLL([*found, ctypes.util.find_library("turbojpeg") or "libturbojpeg.so"][0])
    if not hasattr(library, "tj3SetCroppingRegion"):
        raise ImportError("libturbojpeg is older than 3.0, which cannot decode regions")
    decompress, subsampling, wide, high, rgb = 1, 4, 5, 6, 0
    unit = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # width of a block, by TJSAMP
    pointer = ctypes.c_void_p
    library.tj3Init.restype = pointer
    library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    library.tj3Get.argtypes = [pointer, ctypes.c_int]
    library.tj3SetCroppingRegion.argtypes = [pointer, Region]
    library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, ctypes.c_int, ctypes.c_int]
    handle = library.tj3Init(decompress)

    def check(name: str, *arguments: Any) -> None:
        if getattr(library, name)(handle, *arguments):
            raise ValueError(name)

    def view(data: bytes, draw: Draw) -> Any:
        library.tj3SetCroppingRegion(handle, Region(0, 0, 0, 0))
        check("tj3DecompressHeader", data, len(data))
        shape = draw(library.tj3Get(handle, wide), library.tj3Get(handle, high))
        left, top, right, bottom = window(shape)
        first = left - left % unit[library.tj3Get(handle, subsampling)]
        pixels = np.empty((bottom - top, right - first, 3), np.uint8)
        check("tj3SetCroppingRegion", Region(first, top, right - first, bottom - top))
        check("tj3Decompress8", data, len(data), pixels.ctypes.data, 0, rgb)
        return from_region(pixels[:, left - first :], shape.flip)

    return view


def peer_contenders(folder: Path, images: Source, simd: Path | None, skipped: list[str]) -> list[Contender]:
    """Return all peers that run here; add others to `skipped`, with the reason.

    Args:
        folder: for files that peers write.
        simd: the folder of pillow-simd.
    """
    decoders: dict[str, Callable[[], Decode]] = {
        "torchvision v2, Pillow": v2_pillow,
        "torchvision v2, tensor": v2_tensor,
        "Pillow, draft": partial(pillow, Image, draft=True),
        "OpenCV, area": partial(opencv, reduced=False),
        "OpenCV, area, reduced": partial(opencv, reduced=True),
        "torchcodec": torchcodec,
        "imagecodecs": imagecodecs,
        "simplejpeg": simplejpeg,
        "nvImageCodec, region": nvimagecodec,
        "TurboJPEG 3, region": turbojpeg,
    }
    pipelines: dict[str, Callable[[str], Contender]] = {
        "DALI, image_slice": dali,
        "tf.data, decode_and_crop_jpeg": tensorflow,
        "turboloader, fused": partial(turboloader, folder),
    }
    if simd is not None:
        decoders["pillow-simd"] = partial(pillow_simd, simd)
    else:
        skipped.append("pillow-simd: pip install --no-deps --target DIR pillow-simd, then pass --pillow-simd DIR")
    few = SourceSubset(images, np.arange(min(2, len(images))))
    found = []
    for name in (*decoders, *pipelines):
        try:
            peer = by_image(name, decoders[name]()) if name in decoders else pipelines[name](name)
            for task in peer.tasks:
                peer.run(task, few, 0)
        except Exception as error:  # anything that another library raises
            skipped.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            found.append(peer)
    return found
