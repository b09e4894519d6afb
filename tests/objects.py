"""Datasets, networks and settings for tests of a Python program's own objects, and of functions that make them."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TRAIN, VAL, SIDE, CLASSES = 48, 13, 8, 4
OWN = (
    "batch.size=16 optimizer.lr=0.5 epochs=3 schedule.warmup_epochs=0 model.ghost_batch=4 precision=fp64 device=cpu "
    "launch.threads=1 data.image_size=8 data.augment=pad_crop data.pad=1 data.eval_crop=1 checkpoint.every_updates=2 "
    "verbosity=0 log_every=1"
).split()
"""Settings of a run of nine updates."""


class Images:
    """Random images, uint8 (3, 8, 8), with a color for each class. `signals`: see `__getitem__`."""

    def __init__(self, count: int = TRAIN, seed: int = 0, signals: dict[int, signal.Signals] | None = None) -> None:
        draw = np.random.default_rng(seed)
        self.answers = draw.integers(0, CLASSES, count)
        self.images = draw.integers(0, 128, (count, 3, SIDE, SIDE), dtype=np.uint8)
        self.images += (30 * self.answers).astype(np.uint8)[:, None, None, None]
        self.signals = signals or {}
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label. The read whose number is in `signals` sends the signal to this process."""
        self.reads += 1
        if self.reads in self.signals:
            os.kill(os.getpid(), self.signals[self.reads])
        return torch.from_numpy(self.images[index]), int(self.answers[index])


def sets(seed: int = 0) -> tuple[Images, Images]:
    """Return a training and a validation set."""
    return Images(TRAIN, seed), Images(VAL, seed + 1)


def flat(num_classes: int = CLASSES) -> nn.Module:
    """Return a small network with batch norm."""
    layers: list[Any] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, num_classes))
