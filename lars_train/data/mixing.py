"""Mix the images of each ghost batch in pairs, by mixup or cutmix, on the device.

Each ghost batch is mixed with its own reverse, as timm mixes a batch
(https://github.com/huggingface/pytorch-image-models/blob/main/timm/data/mixup.py). All images of a ghost batch share
the random numbers. The host draws them before the images are on the device, so it never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lars_train.data.order import mixing_uniforms
from lars_train.models.losses import MixedLabels

if TYPE_CHECKING:
    from lars_train.config import Config

_CUTMIX_SHARE = 0.5  # the share of ghost batches that get cutmix if both are on (timm's switch_prob)


class GhostMix(NamedTuple):
    """The mix of the images [start, stop) of a micro-batch: one ghost batch."""

    start: int
    stop: int
    share: float
    """The share of itself that an image keeps. For cutmix, before the box is rounded to pixels."""
    center: tuple[float, float] | None = None
    """The center of the box for cutmix, as shares of width and height; None for mixup."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return left, top, right, bottom of the box in an image of this size, within the image.

        Before the box is cut off at the edges of the image, its sides are sqrt(1 - share) times those of the image
        (Yun et al. 2019, arXiv:1905.04899, equation 2), rounded down to even numbers as in torchvision's CutMix.
        """
        assert self.center is not None
        side = math.sqrt(1 - self.share)
        half_width, half_height = int(width * side) // 2, int(height * side) // 2
        x, y = int(self.center[0] * width), int(self.center[1] * height)
        return max(x - half_width, 0), max(y - half_height, 0), min(x + half_width, width), min(y + half_height, height)


@dataclass(frozen=True)
class Mixing:
    """The settings of mixup and cutmix. The share is drawn from Beta(`mixup`, `mixup`) or Beta(`cutmix`, `cutmix`).

    0 means off. If both are on, half of the ghost batches get cutmix, and the others mixup.
    """

    mixup: float
    cutmix: float
    seed: int

    @classmethod
    def from_config(cls, config: Config) -> Mixing | None:
        """Return the mixing that the config group ``augment`` describes; None if it is off."""
        mixup, cutmix = config.augment.mixup or 0.0, config.augment.cutmix or 0.0
        return cls(mixup, cutmix, config.seed) if mixup or cutmix else None

    def draw(self, epoch: int, update: int, bounds: tuple[int, int], ghost_batch: int) -> tuple[GhostMix, ...]:
        """Draw the mixes of a micro-batch, which depend only on seed, epoch, update and number of the ghost batch.

        `update`: the number of the global batch in the run. `bounds`: the [start, stop) of the micro-batch in the
        global batch.
        """
        first, last = bounds
        mixes = []
        for start in range(first, last, ghost_batch):
            uniforms = mixing_uniforms(self.seed, epoch, update, start // ghost_batch)
            which, x, y = next(uniforms), next(uniforms), next(uniforms)
            cuts = which < _CUTMIX_SHARE if self.mixup and self.cutmix else bool(self.cutmix)
            share = symmetric_beta(self.cutmix if cuts else self.mixup, uniforms)
            stop = min(start + ghost_batch, last)
            mixes.append(GhostMix(start - first, stop - first, share, (x, y) if cuts else None))
        return tuple(mixes)


def symmetric_beta(alpha: float, uniforms: Iterator[float]) -> float:
    """Draw a number from the distribution Beta(alpha, alpha). Take pairs of numbers from `uniforms`, each in [0, 1).

    For alpha up to 1, this is Johnk's method (Devroye 1986, "Non-Uniform Random Variate Generation", section IX.3.5),
    which accepts at least half of the pairs. For larger alpha, it is Ulrich's method for symmetric distributions
    (section IX.4.2 of the same book). Both are exact. They need only uniform numbers, so the result does not depend on
    the version of numpy.
    """
    while True:
        u, v = 1 - next(uniforms), next(uniforms)  # u > 0
        if alpha > 1:
            return 0.5 + 0.5 * math.sqrt(1 - u ** (2 / (2 * alpha - 1))) * math.cos(2 * math.pi * v)
        # The logarithms of Johnk's u**(1 / alpha) and v**(1 / alpha), which may be too small for a float.
        x, y = math.log(u) / alpha, math.log(1 - v) / alpha
        if math.exp(x) + math.exp(y) <= 1:
            return 0.5 + 0.5 * math.tanh((x - y) / 2)


def mix_in_place(images: Tensor, labels: Tensor, mixes: Sequence[GhostMix]) -> MixedLabels:
    """Mix `images`, floating-point (n, 3, H, W), in place. Return the mixed form of their `labels`, int64 (n,).

    `mixes` has one entry per ghost batch, in order.
    """
    height, width = images.shape[2:]
    shares = torch.empty(len(labels), dtype=torch.float64, device=labels.device)
    for mix in mixes:
        part, share = images[mix.start : mix.stop], mix.share
        if mix.center is None:
            part.lerp_(part.flip(0), 1 - share)
        else:
            left, top, right, bottom = mix.box(height, width)
            box = part[:, :, top:bottom, left:right]
            box.copy_(box.flip(0))
            share = 1 - (right - left) * (bottom - top) / (height * width)
        shares[mix.start : mix.stop].fill_(share)
    return MixedLabels(labels, torch.cat([labels[mix.start : mix.stop].flip(0) for mix in mixes]), shares)
