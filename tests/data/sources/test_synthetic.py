"""Synthetic images are a function of the id, can be learned, and take no memory."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest

from lars_train.data.dataset import fingerprint
from lars_train.data.sources.builtin import class_colors, open_synthetic


def test_synthetic_images_can_have_imagenets_counts() -> None:
    data = open_synthetic(1_281_167, 50_000, 1000, 224)
    assert (len(data.train), len(data.val), len(data.classes)) == (1_281_167, 50_000, 1000)
    assert data.train.labels.dtype == np.int32
    last = data.train.read(1_281_166)
    assert isinstance(last, np.ndarray)
    assert last.shape == (224, 224, 3)
    assert last.dtype == np.uint8
    assert data.train.labels[1_281_166] == 1_281_166 % 1000
    # Only the labels grow with the count.
    assert len(pickle.dumps(data.train)) - data.train.labels.nbytes < 10_000


def test_an_image_depends_only_on_its_id() -> None:
    small, large = open_synthetic(100, 10, 7, 32), open_synthetic(10_000, 10, 7, 32)
    for sample in (0, 1, 99):
        assert np.array_equal(small.train.read(sample), large.train.read(sample))
        assert np.array_equal(pickle.loads(pickle.dumps(small.train)).read(sample), large.train.read(sample))


def test_images_differ_from_one_another_and_between_splits() -> None:
    data = open_synthetic(500, 500, 1, 16)
    images = {bytes(np.asarray(s.read(i))) for s in (data.train, data.val) for i in range(500)}
    assert len(images) == 1000


@pytest.mark.parametrize("num_classes", [1, 2, 10, 1000])
def test_every_class_has_a_different_color(num_classes: int) -> None:
    colors = class_colors(num_classes)
    assert len(np.unique(colors, axis=0)) == num_classes
    assert colors.max() < 128


def test_the_mean_color_identifies_the_class() -> None:
    data = open_synthetic(400, 200, 10, 32)
    train = np.array([np.asarray(data.train.read(i)).mean((0, 1)) for i in range(400)])
    val = np.array([np.asarray(data.val.read(i)).mean((0, 1)) for i in range(200)])
    centers = np.array([train[data.train.labels == k].mean(0) for k in range(10)])
    nearest = ((val[:, None] - centers) ** 2).sum(2).argmin(1)
    assert (nearest == data.val.labels).mean() > 0.95


def test_an_image_of_32_pixels_is_cheap() -> None:
    source = open_synthetic(1000, 1, 10, 32).train
    source.read(0)

    def once() -> float:
        start = time.perf_counter()
        for sample in range(200):
            source.read(sample)
        return (time.perf_counter() - start) / 200

    assert min(once() for _ in range(20)) < 50e-6


def test_names_and_fingerprint_follow_the_rules_of_all_sources() -> None:
    data = open_synthetic(30, 20, 12, 8)
    assert data.classes == tuple(sorted(data.classes))
    names = [[s.name(i).encode() for i in range(len(s))] for s in (data.train, data.val)]
    assert names[0] == sorted(names[0])
    assert data.train.location(3) == "synthetic train/00000003"
    runs = [[name + b"\0" for name in split] for split in names]
    assert data.fingerprint == fingerprint(data.classes, (runs[0], data.train.labels), (runs[1], data.val.labels))
