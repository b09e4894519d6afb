"""The peers of bench_input.py: which there are, what each needs, and which of them run here.

A peer is made and tried on two pictures before anything is measured; one that is not installed, or fails at that, is
left out, with the reason. `pip install 'lars-train[bench]'` brings what pip can bring.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_input_decoders as decoders
import bench_input_pipelines as pipelines
import numpy as np
from bench_input_contenders import Contender, MakeView, of_bytes

from lars_train.data.dataset import Source
from lars_train.pack.packing import SourceSubset

BY_VIEW: dict[str, tuple[str, Callable[[], MakeView]]] = {
    "torchvision v2, Pillow": ("torchvision", decoders.v2_pillow),
    "torchvision v2, tensor": ("torchvision", decoders.v2_tensor),
    "Pillow, draft": ("pillow", decoders.pillow_draft),
    "OpenCV, area": ("opencv-python-headless", partial(decoders.opencv, reduced=False)),
    "OpenCV, area, reduced": ("opencv-python-headless", partial(decoders.opencv, reduced=True)),
    "torchcodec": ("torchcodec", decoders.torchcodec),
    "imagecodecs": ("imagecodecs", decoders.imagecodecs),
    "simplejpeg": ("simplejpeg", decoders.simplejpeg),
    "nvImageCodec, region": ("nvidia-nvimgcodec-cu12", decoders.nvimagecodec),
    "TurboJPEG 3, region": ("turbojpeg", decoders.turbojpeg),
}
"""By name: the package that pip installs, and what makes its view."""

BY_PASS: dict[str, tuple[str, Callable[[Path], Contender]]] = {
    "DALI, image_slice": ("nvidia-dali-cuda120", pipelines.dali),
    "tf.data, decode_and_crop_jpeg": ("tensorflow-cpu", pipelines.tensorflow),
    "turboloader, fused": ("turboloader", pipelines.turboloader),
}

SIMD = "pillow-simd"
# Other packages that bring the same.
_SAME = {
    "nvidia-nvimgcodec-cu12": ("nvidia-nvimgcodec-cu13",),
    "nvidia-dali-cuda120": ("nvidia-dali-cuda130",),
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python"),
    "tensorflow-cpu": ("tensorflow",),
}


def line_up(folder: Path, pictures: Source, simd: Path | None, skipped: list[str]) -> list[Contender]:
    """All that can run here; the others go to `skipped`, with the reason.

    `folder`: for what a peer writes. `simd`: where pillow-simd lies.
    """
    makers: dict[str, tuple[str, Callable[[], Contender]]] = {}
    for name, (package, make) in BY_VIEW.items():
        makers[name] = (package, partial(_by_view, name, make))
    for name, (package, make_all) in BY_PASS.items():
        makers[name] = (package, partial(make_all, folder))
    if simd is not None:
        makers[SIMD] = ("", partial(_simd, simd))
    else:
        skipped.append(f"{SIMD}: give --pillow-simd DIR, from pip install --no-deps --target DIR pillow-simd")
    found = []
    few = SourceSubset(pictures, np.arange(min(2, len(pictures))))
    for name, (package, made) in makers.items():
        try:
            peer = made()
        except (ImportError, OSError) as error:
            skipped.append(f"{name}: {_reason(error)} (pip install {package or SIMD})")
            continue
        try:
            for task in peer.tasks:
                peer.run(task, few, 0)
        except Exception as error:  # whatever a stranger's library raises
            skipped.append(f"{name}: {_reason(error)}")
            continue
        peer.versions = _version(package) if package else peer.versions
        found.append(peer)
    return found


def _by_view(name: str, make: Callable[[], MakeView]) -> Contender:
    return of_bytes(name, make())


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _version(package: str) -> str:
    for name in (package, *_SAME.get(package, ())):
        with suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return ""


def _simd(folder: Path) -> Contender:
    """pillow-simd out of `folder`, beside Pillow, whose name it has."""
    with _instead_of("PIL", folder):
        images = import_module("PIL.Image")
        images.preinit()
    if folder.resolve() not in Path(str(images.__file__)).resolve().parents:
        raise ImportError(f"there is none in {folder}")
    return of_bytes(SIMD, decoders.pillow(images, draft=False), f"{SIMD} {images.__version__}")


@contextmanager
def _instead_of(name: str, folder: Path) -> Iterator[None]:
    """Within it, the package `name` is the one that lies in `folder`; afterwards the one that was there again."""

    def taken() -> dict[str, Any]:
        return {key: sys.modules.pop(key) for key in list(sys.modules) if key == name or key.startswith(f"{name}.")}

    before = taken()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        taken()
        sys.modules.update(before)
