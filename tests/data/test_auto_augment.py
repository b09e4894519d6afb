"""TrivialAugment and RandAugment give torchvision's images for the same draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lars_train.data.auto_augment import _OPERATIONS, RANDAUGMENT, TRIVIAL, AutoAugment
from lars_train.data.loading.reader import TrainReader
from lars_train.data.order import sample_uniforms
from lars_train.data.sources.builtin import open_synthetic
from lars_train.data.transforms import UNIFORMS, View

SIZE, OPERATIONS, MAGNITUDES = 20, 14, 31


def image(size: int = SIZE) -> npt.NDArray[np.uint8]:
    """Return an image with gradients and noise, so that no operation leaves it unchanged by accident."""
    rows, columns = np.mgrid[0:size, 0:size]
    noise = np.random.default_rng(0).integers(0, 60, (size, size, 3))
    return (np.stack([rows * 7, columns * 9, (rows + columns) * 4], 2) + noise + 20).clip(0, 255).astype(np.uint8)


def give(draws: Sequence[float | int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's random functions return `draws`, in order, to torchvision."""
    remaining = iter(draws)
    for name in ("randint", "rand"):
        monkeypatch.setattr(torch, name, lambda *_, **__: torch.tensor(next(remaining), dtype=torch.float64))


def theirs(transform: v2.Transform, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.asarray(transform(Image.fromarray(pixels)))


def middle(number: int, count: int) -> float:
    """Return the uniform number in the middle of those that choose `number` out of `count`."""
    return (number + 0.5) / count


@pytest.mark.parametrize("name", _OPERATIONS)
def test_trivial_augment_is_torchvisions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each operation at each magnitude and with both signs."""
    transform, ours, number = v2.TrivialAugmentWide(), AutoAugment(TRIVIAL), list(_OPERATIONS).index(name)
    assert tuple(transform._AUGMENTATION_SPACE) == tuple(_OPERATIONS)
    sized = transform._AUGMENTATION_SPACE[name][0](MAGNITUDES, SIZE, SIZE) is not None
    changed = 0
    for magnitude in range(MAGNITUDES):
        for sign in (0.5, np.nextafter(0.5, 1)):
            give([number, *([magnitude] if sized else []), sign], monkeypatch)
            expected, found = theirs(transform, image()), image()
            ours(found, [middle(number, OPERATIONS), middle(magnitude, MAGNITUDES), sign])
            np.testing.assert_array_equal(found, expected)
            changed += not np.array_equal(found, image())
    assert (changed > 40) == (name != "Identity")


@pytest.mark.parametrize("size", [SIZE, 33])
def test_rand_augment_is_torchvisions(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each operation at each magnitude, before another one."""
    space = v2.RandAugment()._AUGMENTATION_SPACE
    assert tuple(space) == tuple(_OPERATIONS)
    for magnitude in range(0, MAGNITUDES, 3):
        transform, ours = v2.RandAugment(3, magnitude), AutoAugment(RANDAUGMENT, 3, magnitude)
        for first in range(OPERATIONS):
            draws, uniforms = list[float](), list[float]()
            for number, sign in ((first, 0.2), ((first + 5) % OPERATIONS, 0.7), ((first + 9) % OPERATIONS, 0.5)):
                signed = list(space.values())[number][1]
                draws += [number, *([sign] if signed else [])]
                uniforms += [middle(number, OPERATIONS), 0.99, sign]
            give(draws, monkeypatch)
            expected, found = theirs(transform, image(size)), image(size)
            ours(found, uniforms)
            np.testing.assert_array_equal(found, expected)


def test_a_uniform_number_chooses_among_equal_parts() -> None:
    ours = AutoAugment(TRIVIAL)
    below, above = image(), image()
    edge = 6 / OPERATIONS
    ours(below, [edge - 1e-9, 1 - 2**-53, 0.9])  # Rotate by 135 degrees
    ours(above, [edge + 1e-9, 1 - 2**-53, 0.9])  # Brightness 1.99
    np.testing.assert_array_equal(below, np.asarray(Image.fromarray(image()).rotate(135)))
    assert above.mean() > 1.5 * image().mean()


def test_a_sample_takes_further_uniforms_of_its_own() -> None:
    """The view does not depend on the augmentation, whose numbers follow those of the view."""
    source = open_synthetic(8, 4, 4, SIZE).train
    view = View("pad_crop", SIZE, flip=True, pad=2, eval_crop=1.0)
    auto = AutoAugment(RANDAUGMENT, 2, 9)
    found = {}
    for kind in (None, auto):
        images, labels = np.empty((8, SIZE, SIZE, 3), np.uint8), np.empty(8, np.int64)
        TrainReader(source, view, "pillow", 7, "skip", auto=kind).fill(3, list(range(8)), images, labels)
        found[kind] = images
    for sample, pixels in enumerate(found[None]):
        auto(pixels, sample_uniforms(7, 3, sample, UNIFORMS + auto.uniforms)[UNIFORMS:].tolist())
    np.testing.assert_array_equal(found[auto], found[None])
