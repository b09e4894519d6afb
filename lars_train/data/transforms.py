"""Compute the geometry of augmentation: the crop box of an image, its resize and padding, the window and the flip.

The modules in decode/ apply it to pixels. The caller passes uniform random numbers in [0, 1). Each has a fixed position
in the sequence, so a sample's flip does not depend on how many tries its crop took.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lars_train.config import DataConfig

_TRIES = 10
# Positions in `uniforms`. The numbers before them are the (area, ratio) pairs of the tries.
_X, _Y, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2
UNIFORMS = 2 * _TRIES + 3
"""Uniform random numbers that `View.train` takes per sample."""

MIN_CROP = 0.08  # of the image's area
_RATIO = (3 / 4, 4 / 3)  # width / height
_MULTIPLE = 32  # pixels; sizes between the two ends of `TrainingSizes` are multiples of it


class Geometry(NamedTuple):
    """The steps from an image to a view, in this order: cut the box, resize, pad, crop the window, flip.

    All lengths are whole pixels. The box is cut out before resizing, so pixels outside it do not affect the view.
    """

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in the source image."""
    size: tuple[int, int]
    """Width and height to which the box is resized."""
    pad: int
    """Zeros added on each side after resizing."""
    crop: tuple[int, int]
    """Left and top of the square window that is kept, in the padded image."""
    flip: bool
    """True if the window is flipped left to right."""


class TrainingSizes(NamedTuple):
    """The side of the training views, in pixels, as a function of the epoch, which counts from 0."""

    start: int
    end: int
    first: int = 0
    """The last epoch with the size `start`."""
    last: int = 0
    """The first epoch with the size `end`."""

    @classmethod
    def from_config(cls, data: DataConfig) -> TrainingSizes:
        """Return the sizes that the resolved config group `data` describes."""
        if data.size_schedule is not None:
            return cls(*data.size_schedule)
        assert data.image_size is not None
        size = data.image_size if data.train_size is None else data.train_size
        return cls(size, size)

    @property
    def largest(self) -> int:
        """The largest size."""
        return max(self.start, self.end)

    def at(self, epoch: int) -> int:
        """Return the size in an epoch.

        Between the epochs `first` and `last`, it changes linearly, rounded half to even to a multiple of 32, as in
        FFCV's `get_resolution`: https://github.com/libffcv/ffcv-imagenet/blob/main/train_imagenet.py
        """
        if epoch <= self.first:
            return self.start
        if epoch >= self.last:
            return self.end
        slope = (self.end - self.start) / (self.last - self.first)
        return round((slope * (epoch - self.first) + self.start) / _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class View:
    """The settings that decide which part of an image a model sees; `train` and `evaluate` compute the geometry."""

    augment: str
    size: int
    """The side of the view, in pixels."""
    flip: bool
    pad: int
    eval_crop: float
    min_crop: float = MIN_CROP
    sizes: TrainingSizes | None = None
    """The size in each epoch of training; None: `size` in all."""

    @classmethod
    def from_config(cls, data: DataConfig) -> View:
        """Return the view for evaluation that the resolved config group `data` describes."""
        assert data.image_size is not None
        assert data.eval_crop is not None
        min_crop = MIN_CROP if data.min_crop is None else data.min_crop
        return cls(data.augment, data.image_size, data.flip, data.pad, data.eval_crop, min_crop)

    @classmethod
    def for_training(cls, data: DataConfig) -> View:
        """Return the view for training that the resolved config group `data` describes, with the largest size."""
        sizes = TrainingSizes.from_config(data)
        return replace(cls.from_config(data), size=sizes.largest, sizes=sizes)

    def in_epoch(self, epoch: int) -> View:
        """Return the view with the size of a training epoch."""
        return self if self.sizes is None else replace(self, size=self.sizes.at(epoch))

    def train(self, width: int, height: int, uniforms: Sequence[float]) -> Geometry:
        """Return the view of a width x height image for training, drawn with `UNIFORMS` uniform numbers.

        - `inception`: a random box of `min_crop` to 1 of the area with a width / height ratio of 3/4 to 4/3, resized
          to size x size (Szegedy et al. 2015, arXiv:1409.4842, section 6). Draws, rounding, the ten tries and
          the fallback to the center follow torchvision's RandomResizedCrop,
          https://docs.pytorch.org/vision/stable/generated/torchvision.transforms.RandomResizedCrop.html
        - `scale_crop`: the short side resized to round(size / eval_crop), then a random size x size window.
        - `pad_crop`: the central square resized to size x size, `pad` zeros on each side, then a random
          size x size window (He et al. 2016, arXiv:1512.03385, section 4.2).
        - `none`: the view for evaluation.

        With `flip`, half of the views are flipped. Raises ValueError for an unknown `augment`.
        """
        size = self.size
        flipped = self.flip and uniforms[_FLIP] < 0.5
        if self.augment == "inception":
            box = _random_box(width, height, uniforms, self.min_crop)
            return Geometry(box, (size, size), 0, (0, 0), flipped)
        if self.augment == "pad_crop":
            short = min(width, height)
            left, top = (width - short) // 2, (height - short) // 2
            crop = (_pick(uniforms[_X], 2 * self.pad + 1), _pick(uniforms[_Y], 2 * self.pad + 1))
            return Geometry((left, top, left + short, top + short), (size, size), self.pad, crop, flipped)
        if self.augment == "scale_crop":
            new_width, new_height = _short_side_to(width, height, round(size / self.eval_crop))
            crop = (_pick(uniforms[_X], new_width - size + 1), _pick(uniforms[_Y], new_height - size + 1))
            return Geometry((0, 0, width, height), (new_width, new_height), 0, crop, flipped)
        if self.augment == "none":
            return self.evaluate(width, height)._replace(flip=flipped)
        raise ValueError(f"unknown augmentation {self.augment!r}")

    def evaluate(self, width: int, height: int) -> Geometry:
        """Return the view of a width x height image for evaluation: the center, at a fixed scale.

        The short side is resized to round(size / eval_crop), then the central size x size window is cropped. The
        arithmetic is that of torchvision's Resize and CenterCrop. `eval_crop` lies in (0, 1]; at 1, a size x size image
        stays unchanged.
        """
        new_width, new_height = _short_side_to(width, height, round(self.size / self.eval_crop))
        crop = (round((new_width - self.size) / 2), round((new_height - self.size) / 2))
        return Geometry((0, 0, width, height), (new_width, new_height), 0, crop, False)


def _pick(uniform: float, choices: int) -> int:
    return int(uniform * choices)


def _short_side_to(width: int, height: int, target: int) -> tuple[int, int]:
    if width <= height:
        return target, int(target * height / width)
    return int(target * width / height), target


def _random_box(width: int, height: int, uniforms: Sequence[float], min_crop: float) -> tuple[int, int, int, int]:
    area = width * height
    log_low, log_high = math.log(_RATIO[0]), math.log(_RATIO[1])
    for attempt in range(_TRIES):
        target = area * (min_crop + (1 - min_crop) * uniforms[2 * attempt])
        ratio = math.exp(log_low + (log_high - log_low) * uniforms[2 * attempt + 1])
        box_width, box_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = _pick(uniforms[_X], width - box_width + 1)
            top = _pick(uniforms[_Y], height - box_height + 1)
            return left, top, left + box_width, top + box_height
    # The largest central box with an allowed ratio. Unlike torchvision's, it is at least one pixel wide and high.
    box_width = max(1, min(width, round(height * _RATIO[1])))
    box_height = max(1, min(height, round(width / _RATIO[0])))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height
