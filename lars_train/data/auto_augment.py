"""Augment the decoded view of a sample by TrivialAugment or RandAugment, as torchvision augments a Pillow image.

The operations are those of torchvision.transforms.v2.functional with torchvision's defaults: nearest pixel instead of
interpolation, and black outside the image. On Pillow images they use one thread, also in forked processes.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

if TYPE_CHECKING:
    from lars_train.config.augment import AugmentConfig

TRIVIAL, RANDAUGMENT = "trivial", "randaugment"

_BINS = 31  # torchvision's num_magnitude_bins
_DRAWS = 3  # per operation: the operation, its magnitude, its sign

# Each takes torchvision's module `functional`, an image and a magnitude.
_OPERATIONS: dict[str, Callable[[Any, Any, float], Any]] = {
    "Identity": lambda f, image, m: image,
    "ShearX": lambda f, image, m: f.affine(image, 0.0, [0, 0], 1.0, [_degrees(m), 0.0], center=[0, 0]),
    "ShearY": lambda f, image, m: f.affine(image, 0.0, [0, 0], 1.0, [0.0, _degrees(m)], center=[0, 0]),
    "TranslateX": lambda f, image, m: f.affine(image, 0.0, [int(m), 0], 1.0, [0.0, 0.0]),
    "TranslateY": lambda f, image, m: f.affine(image, 0.0, [0, int(m)], 1.0, [0.0, 0.0]),
    "Rotate": lambda f, image, m: f.rotate(image, m),
    "Brightness": lambda f, image, m: f.adjust_brightness(image, 1.0 + m),
    "Color": lambda f, image, m: f.adjust_saturation(image, 1.0 + m),
    "Contrast": lambda f, image, m: f.adjust_contrast(image, 1.0 + m),
    "Sharpness": lambda f, image, m: f.adjust_sharpness(image, 1.0 + m),
    "Posterize": lambda f, image, m: f.posterize(image, int(m)),
    "Solarize": lambda f, image, m: f.solarize(image, 255.0 * m),
    "AutoContrast": lambda f, image, m: f.autocontrast(image),
    "Equalize": lambda f, image, m: f.equalize(image),
}
_NAMES = tuple(_OPERATIONS)
_SIGNED = _NAMES[1:10]  # ShearX to Sharpness


class AutoAugment:
    """TrivialAugment, or RandAugment with `ops` operations of `magnitude`, an index from 0 to 30.

    For the same draws, the results are those of torchvision's `TrivialAugmentWide` (Müller, Hutter 2021,
    arXiv:2103.10158) and `RandAugment` (Cubuk et al. 2020, arXiv:1909.13719),
    https://github.com/pytorch/vision/blob/main/torchvision/transforms/v2/_auto_augment.py

    Attributes:
        uniforms: the number of uniform random numbers per image.
    """

    def __init__(self, name: str, ops: int = 1, magnitude: int = 0) -> None:
        self._name, self._magnitude = name, magnitude
        self.uniforms = _DRAWS * ops
        # The import takes a second.
        self._functional = importlib.import_module("torchvision.transforms.v2.functional")

    @classmethod
    def from_config(cls, augment: AugmentConfig) -> AutoAugment | None:
        """Return the augmentation that the config group ``augment`` describes; None if it is off."""
        if augment.auto in (None, "none"):
            return None
        return cls(augment.auto, augment.randaugment_ops or 1, augment.randaugment_magnitude or 0)

    def __call__(self, pixels: npt.NDArray[np.uint8], uniforms: Sequence[float]) -> None:
        """Augment `pixels`, uint8 (S, S, 3), in place, with `self.uniforms` numbers in [0, 1)."""
        magnitudes = _magnitudes(self._name, len(pixels))
        image = Image.fromarray(pixels)
        for first in range(0, self.uniforms, _DRAWS):
            which, size, sign = uniforms[first : first + _DRAWS]
            name = _NAMES[int(which * len(_NAMES))]
            number = int(size * _BINS) if self._name == TRIVIAL else self._magnitude
            magnitude = magnitudes[name][number] if name in magnitudes else 0.0
            signed = name in _SIGNED and sign <= 0.5
            image = _OPERATIONS[name](self._functional, image, -magnitude if signed else magnitude)
        pixels[:] = np.asarray(image)


@functools.cache
def _magnitudes(name: str, size: int) -> dict[str, list[float]]:
    """Return the magnitudes of each operation that has one, for images of `size` x `size` pixels."""
    shear, shift, angle, color, bits = 0.3, 150.0 / 331.0 * size, 30.0, 0.9, 4
    if name == TRIVIAL:
        shear, shift, angle, color, bits = 0.99, 32.0, 135.0, 0.99, 6
    highest = dict(zip(_SIGNED, (shear, shear, shift, shift, angle, color, color, color, color), strict=True))
    return {
        **{operation: torch.linspace(0.0, high, _BINS).tolist() for operation, high in highest.items()},
        "Posterize": (8 - torch.arange(_BINS) / ((_BINS - 1) / bits)).round().tolist(),
        "Solarize": torch.linspace(1.0, 0.0, _BINS).tolist(),
    }


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))
