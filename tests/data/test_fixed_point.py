"""Pillow's resizing by numba beside Pillow's own two passes: equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpegs import columns_first, views
from PIL import Image

from lars_train.data import library
from lars_train.data.augment import Geometry

fixed_point = pytest.importorskip("lars_train.data.fixed_point", reason="numba is not installed", exc_type=ImportError)


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1), st.data())
def test_any_view_of_any_pixels_is_pillows_columns_first(
    width: int, height: int, seed: int, data: st.DataObject
) -> None:
    view, size = data.draw(views(width, height))
    check(width, height, seed, view, size, data.draw(st.integers(0, 3)))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [1, 3, 224])
@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (65, 63), (64, 64), (800, 600), (3, 5000)])
def test_shapes_far_apart(shape: tuple[int, int], size: int, flip: bool) -> None:
    check(*shape, 0, Geometry((0, 0, *shape), (size, size), 0, (0, 0), flip), size, 0)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 60), st.integers(1, 60))
@example(5, 4)
@example(1, 2)
def test_sums_half_way_between_two_levels_are_rounded_as_pillow_rounds_them(source: int, to: int) -> None:
    # Steps of one level every few pixels, resized in a ratio of small numbers in both directions.
    side, size = 4 * source, 4 * to
    rows, columns = np.indices((side, side))
    pixels = np.repeat(((rows // 2 + columns // 3) % 256).astype(np.uint8)[..., None], 3, 2)
    view, out = Geometry((0, 0, side, side), (size, size), 0, (0, 0), False), np.empty((size, size, 3), np.uint8)
    assert fixed_point.show(pixels, (0, 0), view, out)
    np.testing.assert_array_equal(out, columns_first(Image.fromarray(pixels), view, size))


def test_a_pixel_of_thousands_in_a_row_is_left_to_pillow() -> None:
    pixels, out = np.full((1, 20_000, 3), 255, np.uint8), np.empty((1, 1, 3), np.uint8)
    for width, done in ((15_000, True), (20_000, False)):
        view = Geometry((0, 0, width, 1), (1, 1), 0, (0, 0), False)
        assert fixed_point.show(pixels, (0, 0), view, out) == done
        assert not done or (out == 255).all()


def test_pixels_that_are_not_there_are_not_read() -> None:
    view, out = Geometry((0, 0, 40, 40), (20, 20), 0, (0, 0), False), np.empty((20, 20, 3), np.uint8)
    for shape, at in (((40, 39), (0, 0)), ((39, 40), (0, 0)), ((40, 40), (1, 0)), ((40, 40), (0, 1))):
        assert not fixed_point.show(np.zeros((*shape, 3), np.uint8), at, view, out)


def check(width: int, height: int, seed: int, view: Geometry, size: int, more: int) -> None:
    """With those pixels alone that are needed, and `more` on all sides."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = columns_first(Image.fromarray(pixels), view, size)
    out = np.full((size, size, 3), 77, np.uint8)
    box = library.needed(view, size)
    if box is None:
        assert not expected.any()
        return
    left, top, right, bottom = box
    left, top = max(left - more, 0), max(top - more, 0)
    part = np.ascontiguousarray(pixels[top : bottom + more, left : right + more])
    assert fixed_point.show(part, (left, top), view, out)
    np.testing.assert_array_equal(out, expected)
