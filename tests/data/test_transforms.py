"""Views of images have the geometry and the distribution of torchvision's transforms."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision import transforms

from lars_train.config import DataConfig
from lars_train.config.recipe_schema import RowConfig
from lars_train.config.sizes import fill_sizes
from lars_train.data.transforms import UNIFORMS, Geometry, TrainingSizes, View

AUGMENTS = ["inception", "scale_crop", "pad_crop", "none"]
LARGEST = 1 - 2**-53
UNIT = st.floats(0, LARGEST)
DRAWS = st.lists(UNIT, min_size=UNIFORMS, max_size=UNIFORMS)


def draw(augment: str, width: int, height: int, uniforms: list[float], **changes: Any) -> Geometry:
    options: dict[str, Any] = {"size": 32, "flip": True, "pad": 4, "eval_crop": 0.875, **changes}
    return View(augment, **options).train(width, height, uniforms)


def evaluated(width: int, height: int, *, size: int, eval_crop: float) -> Geometry:
    return View("none", size, False, 0, eval_crop).evaluate(width, height)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def apply_view(image: Image.Image, view: Geometry, size: int) -> Image.Image:
    x, y = view.crop
    resized = image.crop(view.box).resize(view.size, Image.Resampling.BILINEAR)
    return resized.crop((x, y, x + size, y + size))


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from([0.5, 0.7, 0.875, 1.0]))
def test_evaluation_is_torchvisions_resize_and_center_crop(
    width: int, height: int, size: int, eval_crop: float
) -> None:
    image = noise(width, height)
    pipeline = transforms.Compose([transforms.Resize(round(size / eval_crop)), transforms.CenterCrop(size)])
    view = evaluated(width, height, size=size, eval_crop=eval_crop)
    np.testing.assert_array_equal(apply_view(image, view, size), pipeline(image))


@pytest.mark.parametrize(("size", "resize"), [(224, 232), (160, 161), (29, 31), (7, 7), (224, 999)])
def test_eval_resize_is_the_size_of_torchvisions_resize(size: int, resize: int) -> None:
    data = DataConfig(image_size=size, eval_resize=resize)
    fill_sizes(data, RowConfig())
    pipeline = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])
    for width, height in ((300, 200), (97, 131)):
        image = noise(width, height)
        view = View.from_config(data).evaluate(width, height)
        np.testing.assert_array_equal(apply_view(image, view, size), pipeline(image))


def test_imagenet_evaluation_resizes_to_256_and_crops_224() -> None:
    view = evaluated(500, 375, size=224, eval_crop=0.875)
    assert view == Geometry((0, 0, 500, 375), (341, 256), 0, (58, 16), False)


@given(st.integers(1, 300))
def test_a_full_evaluation_crop_keeps_an_image_of_the_right_size(size: int) -> None:
    view = evaluated(size, size, size=size, eval_crop=1.0)
    assert view == Geometry((0, 0, size, size), (size, size), 0, (0, 0), False)


@given(st.sampled_from(AUGMENTS), st.integers(1, 700), st.integers(1, 700), DRAWS, st.integers(1, 64))
def test_every_view_lies_inside_its_image(
    augment: str, width: int, height: int, uniforms: list[float], size: int
) -> None:
    view = draw(augment, width, height, uniforms, size=size)
    left, top, right, bottom = view.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert 0 <= view.crop[0] <= view.size[0] + 2 * view.pad - size
    assert 0 <= view.crop[1] <= view.size[1] + 2 * view.pad - size


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 500), (40, 90)])
def test_inception_boxes_have_torchvisions_distribution(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = Image.new("RGB", (width, height))
    ours, theirs = [], []
    for _ in range(3000):
        left, top, right, bottom = draw("inception", width, height, rng.random(UNIFORMS).tolist()).box
        ours.append((left, top, right - left, bottom - top))
        i, j, h, w = transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3])
        theirs.append((j, i, w, h))
    a, b = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    pairs = [*zip(a.T, b.T, strict=True)]
    pairs += [(a[:, 2] * a[:, 3], b[:, 2] * b[:, 3]), (a[:, 2] / a[:, 3], b[:, 2] / b[:, 3])]
    for found, expected in pairs:
        assert stats.ks_2samp(found, expected).pvalue > 1e-4


def test_an_inception_box_follows_the_definition() -> None:
    # Try 1 is refused (the whole area at ratio 4/3 is wider than 100); try 2: area 0.54, ratio 1.
    uniforms = [LARGEST, LARGEST, 0.5, 0.5, *[0.0] * 16, 0.25, 0.5, 0.5]
    side = round(math.sqrt(0.54 * 100 * 80))
    left, top = int(0.25 * (100 - side + 1)), int(0.5 * (80 - side + 1))
    view = draw("inception", 100, 80, uniforms)
    assert view == Geometry((left, top, left + side, top + side), (32, 32), 0, (0, 0), False)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (7, 400), (999, 31)])
def test_an_elongated_image_falls_back_to_torchvisions_center(width: int, height: int) -> None:
    i, j, h, w = transforms.RandomResizedCrop.get_params(Image.new("RGB", (width, height)), [0.08, 1.0], [3 / 4, 4 / 3])
    view = draw("inception", width, height, [0.5] * UNIFORMS)
    assert view.box == (j, i, j + w, i + h)


def test_pad_crop_reaches_every_offset_equally() -> None:
    rng = np.random.default_rng(1)
    views = [draw("pad_crop", 32, 32, rng.random(UNIFORMS).tolist()) for _ in range(8100)]
    assert {(view.box, view.size, view.pad) for view in views} == {((0, 0, 32, 32), (32, 32), 4)}
    counts = Counter(view.crop for view in views)
    assert set(counts) == {(x, y) for x in range(9) for y in range(9)}
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_pad_crop_takes_the_central_square_of_other_shapes() -> None:
    view = draw("pad_crop", 101, 50, [0.0] * UNIFORMS)
    assert (view.box, view.size) == ((25, 0, 75, 50), (32, 32))


def test_scale_crop_reaches_all_of_the_resized_image() -> None:
    corners = [draw("scale_crop", 500, 375, [u] * UNIFORMS, size=224).crop for u in (0.0, LARGEST)]
    assert corners == [(0, 0), (341 - 224, 256 - 224)]
    assert draw("scale_crop", 500, 375, [0.3] * UNIFORMS, size=224).size == (341, 256)


@given(DRAWS, st.integers(1, 500), st.integers(1, 500))
def test_without_augmentation_views_are_those_of_evaluation(uniforms: list[float], width: int, height: int) -> None:
    expected = evaluated(width, height, size=32, eval_crop=0.875)
    assert draw("none", width, height, uniforms, flip=False) == expected
    view = draw("none", width, height, uniforms)
    assert (view.box, view.size, view.crop) == (expected.box, expected.size, expected.crop)
    assert view.flip == (uniforms[-1] < 0.5)


@given(st.sampled_from(AUGMENTS), st.integers(1, 500), st.integers(1, 500), DRAWS)
def test_the_flip_has_its_own_uniform_and_changes_nothing_else(
    augment: str, width: int, height: int, uniforms: list[float]
) -> None:
    plain = draw(augment, width, height, uniforms, flip=False)
    mirrored = draw(augment, width, height, [*uniforms[:-1], 0.49])
    unflipped = draw(augment, width, height, [*uniforms[:-1], 0.5])
    assert not plain.flip
    assert unflipped == plain
    assert mirrored == Geometry(plain.box, plain.size, plain.pad, plain.crop, True)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 90), st.integers(0, 30), st.integers(0, 130))
def test_progressive_resizing_is_that_of_ffcv(start: int, end: int, first: int, length: int, epoch: int) -> None:
    sizes = TrainingSizes(32 * start, 32 * end, first, first + length)
    # get_resolution in https://github.com/libffcv/ffcv-imagenet/blob/main/train_imagenet.py, for epochs from 0.
    if epoch <= first:
        expected = 32 * start
    elif epoch >= first + length:
        expected = 32 * end
    else:
        on_the_line = np.interp([epoch], [first, first + length], [32 * start, 32 * end])[0]
        expected = 32 * int(np.round(on_the_line / 32))
    assert sizes.at(epoch) == expected
    assert sizes.at(epoch) <= sizes.largest


def test_a_schedule_in_the_config_sets_the_size_of_each_epoch() -> None:
    data = DataConfig(image_size=256, size_schedule=[160, 256, 1, 5], eval_crop=0.875)
    view = View.for_training(data)
    # 184, 208 and 232 lie between: 5.75, 6.5 and 7.25 times 32.
    assert [view.in_epoch(epoch).size for epoch in range(7)] == [160, 160, 192, 192, 224, 256, 256]
    assert (view.size, View.from_config(data).size) == (256, 256)


def test_an_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="'incption'"):
        draw("incption", 10, 10, [0.5] * UNIFORMS)


def test_a_view_takes_its_settings_from_the_data_config() -> None:
    config = DataConfig(augment="pad_crop", image_size=28, flip=False, pad=3, eval_crop=1.0)
    view = View.from_config(config)
    uniforms = [0.9] * UNIFORMS
    assert view.train(28, 28, uniforms) == Geometry((0, 0, 28, 28), (28, 28), 3, (6, 6), False)
    assert view.evaluate(28, 28) == Geometry((0, 0, 28, 28), (28, 28), 0, (0, 0), False)


def test_min_crop_is_the_least_share_of_the_area() -> None:
    view = View.from_config(DataConfig(augment="inception", image_size=28, flip=False, eval_crop=1.0, min_crop=0.36))
    # First try, with the smallest area and the ratio 1: 0.36 of 100 x 100 is 60 x 60.
    uniforms = [0.0, 0.5, *[0.5] * (UNIFORMS - 2)]
    assert view.train(100, 100, uniforms).box == (20, 20, 80, 80)
    default = View.from_config(DataConfig(augment="inception", image_size=28, flip=False, eval_crop=1.0))
    left, top, right, bottom = default.train(100, 100, uniforms).box
    assert (right - left, bottom - top) == (round(math.sqrt(800)), round(math.sqrt(800)))
