"""Peers of bench_input.py that are functions: what other libraries make of the bytes of a JPEG and a box.

All give uint8 and leave normalising to the device, as ours does, which is each one's best form, and use one thread.
Those that decode whole pictures cut the box out and resize it with an antialiased filter; those that decode regions
have the decoder cut it. Each library is imported when its peer is made, which raises ImportError or OSError where it is
not there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
from importlib.metadata import PackageNotFoundError, files
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench_input_contenders import SIZE, Drawn, MakeView, size_of, window
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional

from lars_train.data.transforms import Geometry

Pixels = npt.NDArray[np.uint8]


def shaped(image: Any, view: Geometry) -> Any:
    """torchvision's v2 functions on a picture or a tensor (3, H, W)."""
    left, top, right, bottom = view.box
    (wide, high), (x, y) = view.size, view.crop
    image = functional.crop(image, top, left, bottom - top, right - left)
    image = functional.resize(image, [high, wide], antialias=True)
    if (wide, high) != (SIZE, SIZE):
        image = functional.crop(image, y, x, SIZE, SIZE)
    return functional.horizontal_flip(image) if view.flip else image


def interpolated(pixels: Pixels, view: Geometry) -> torch.Tensor:
    """A whole picture (H, W, 3) by torch's antialiased interpolation."""
    left, top, right, bottom = view.box
    image = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    image = interpolate(image, size=view.size[::-1], mode="bilinear", antialias=True)
    x, y = view.crop
    image = image[0, :, y : y + SIZE, x : x + SIZE]
    return image.flip(-1) if view.flip else image


def from_region(pixels: Pixels, flip: bool) -> torch.Tensor:
    """A region (H, W, 3), which the window shows, likewise."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    image = interpolate(image, size=(SIZE, SIZE), mode="bilinear", antialias=True)[0]
    return image.flip(-1) if flip else image


def v2_pillow() -> MakeView:
    def view(data: bytes, drawn: Drawn) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return functional.pil_to_tensor(shaped(image, drawn(*image.size)))

    return view


def v2_tensor() -> MakeView:
    from torchvision.io import ImageReadMode, decode_image

    def view(data: bytes, drawn: Drawn) -> Any:
        image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        return shaped(image, drawn(image.shape[2], image.shape[1]))

    return view


def pillow(images: Any, draft: bool) -> MakeView:
    """`images`: the module PIL.Image, whosever it is."""

    def view(data: bytes, drawn: Drawn) -> Any:
        image = images.open(io.BytesIO(data))
        width, height = image.size
        shape = drawn(width, height)
        if draft:
            # The smallest of libjpeg's scales in which the box still has the pixels that are wanted.
            shares = [shape.size[axis] / (shape.box[axis + 2] - shape.box[axis]) for axis in (0, 1)]
            image.draft("RGB", (int(width * shares[0]), int(height * shares[1])))
        image = image.convert("RGB")
        across, down = image.width / width, image.height / height
        left, top, right, bottom = shape.box
        if across == down == 1:
            image = image.crop(shape.box) if shape.box != (0, 0, width, height) else image
            image = image.resize(shape.size, images.Resampling.BILINEAR)
        else:
            box = (left * across, top * down, right * across, bottom * down)
            image = image.resize(shape.size, images.Resampling.BILINEAR, box=box)
        x, y = shape.crop
        image = image.crop((x, y, x + SIZE, y + SIZE)) if image.size != (SIZE, SIZE) else image
        return np.asarray(image.transpose(images.Transpose.FLIP_LEFT_RIGHT) if shape.flip else image)

    return view


def pillow_draft() -> MakeView:
    return pillow(Image, draft=True)


def opencv(reduced: bool) -> MakeView:
    import cv2

    cv2.setNumThreads(1)
    scales = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}

    def view(data: bytes, drawn: Drawn) -> Any:
        width, height = size_of(data)
        shape = drawn(width, height)
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


def torchcodec() -> MakeView:
    from torchcodec.decoders import decode_jpeg

    def view(data: bytes, drawn: Drawn) -> Any:
        image = decode_jpeg(data, mode="RGB")
        return shaped(image, drawn(image.shape[2], image.shape[1]))

    return view


def imagecodecs() -> MakeView:
    from imagecodecs import jpeg8_decode

    def view(data: bytes, drawn: Drawn) -> Any:
        pixels = jpeg8_decode(data, outcolorspace="RGB")
        return interpolated(pixels, drawn(pixels.shape[1], pixels.shape[0]))

    return view


def simplejpeg() -> MakeView:
    from simplejpeg import decode_jpeg

    def view(data: bytes, drawn: Drawn) -> Any:
        pixels = decode_jpeg(data, "RGB")
        return interpolated(pixels, drawn(pixels.shape[1], pixels.shape[0]))

    return view


def nvimagecodec() -> MakeView:
    from nvidia import nvimgcodec

    cpu = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
    decoder = nvimgcodec.Decoder(nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, 1, [cpu])
    params = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def view(data: bytes, drawn: Drawn) -> Any:
        stream = nvimgcodec.CodeStream(data)
        shape = drawn(stream.width, stream.height)
        left, top, right, bottom = window(shape)
        part = stream.get_sub_code_stream(region=nvimgcodec.Region(top, left, bottom, right))
        return from_region(np.asarray(decoder.decode(part, params=params)), shape.flip)

    return view


def turbojpeg_library() -> str:
    """libturbojpeg out of the package of that name, which has 3.0, or the system's."""
    try:
        found = [str(file.locate()) for file in files("turbojpeg") or () if file.name.startswith("libturbojpeg")]
    except PackageNotFoundError:
        found = []
    found += filter(None, [ctypes.util.find_library("turbojpeg")])
    if not found:
        raise ImportError("there is no libturbojpeg")
    return found[0]


class Region(ctypes.Structure):
    """tjregion of turbojpeg.h."""

    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


def turbojpeg() -> MakeView:
    """The API of TurboJPEG 3, https://github.com/libjpeg-turbo/libjpeg-turbo/blob/main/src/turbojpeg.h."""
    library = ctypes.CDLL(turbojpeg_library())
    if not hasattr(library, "tj3SetCroppingRegion"):
        raise ImportError("libturbojpeg is older than 3.0, which has no decoding of regions")
    decompress, subsampling, wide, high, rgb = 1, 4, 5, 6, 0
    unit = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}  # width of a block, by TJSAMP
    pointer = ctypes.c_void_p
    library.tj3Init.restype = pointer
    library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    library.tj3Get.argtypes = [pointer, ctypes.c_int]
    library.tj3SetCroppingRegion.argtypes = [pointer, Region]
    library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, ctypes.c_int, ctypes.c_int]
    handle = library.tj3Init(decompress)

    def view(data: bytes, drawn: Drawn) -> Any:
        library.tj3SetCroppingRegion(handle, Region(0, 0, 0, 0))
        if library.tj3DecompressHeader(handle, data, len(data)):
            raise ValueError("tj3DecompressHeader")
        shape = drawn(library.tj3Get(handle, wide), library.tj3Get(handle, high))
        left, top, right, bottom = window(shape)
        first = left - left % unit[library.tj3Get(handle, subsampling)]
        pixels = np.empty((bottom - top, right - first, 3), np.uint8)
        if library.tj3SetCroppingRegion(handle, Region(first, top, right - first, bottom - top)):
            raise ValueError("tj3SetCroppingRegion")
        if library.tj3Decompress8(handle, data, len(data), pixels.ctypes.data, 0, rgb):
            raise ValueError("tj3Decompress8")
        return from_region(pixels[:, left - first :], shape.flip)

    return view
