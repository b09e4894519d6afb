from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from lars_train.monitoring.noise import DECAY, NoiseScale, estimates


def test_estimates_match_appendix_a1_of_the_paper() -> None:
    # For |G|^2 = 4 and tr(Sigma) = 24, these are the expected norms at 8 and at 48 samples.
    grad_sq, trace = estimates(4 + 24 / 8, 1 / 8, 4 + 24 / 48, 1 / 48)
    assert (grad_sq, trace) == pytest.approx((4, 24))
    # The paper's formulas.
    small, big, at_small, at_big = 8, 48, 7.3, 4.1
    grad_sq, trace = estimates(at_small, 1 / small, at_big, 1 / big)
    assert grad_sq == pytest.approx((big * at_big - small * at_small) / (big - small))
    assert trace == pytest.approx((at_small - at_big) / (1 / small - 1 / big))


def test_estimates_are_unbiased() -> None:
    """This holds for ranks with different counts, and although the small batches are parts of the large one."""
    draw, sizes, dimensions, batches = np.random.default_rng(0), (2, 6), 5, 40_000
    gradient, deviations = np.array([1.0, -2.0, 0.5, 0.0, 1.0]), np.array([3.0, 1.0, 2.0, 0.5, 4.0])
    samples = gradient + deviations * draw.standard_normal((batches, sum(sizes), dimensions))
    small = [part.mean(1) for part in np.split(samples, [sizes[0]], axis=1)]
    small_sq = sum((g**2).sum(1) for g in small) / len(sizes)
    found = [
        estimates(float(at_small), sum(1 / n for n in sizes) / len(sizes), float(at_big), 1 / sum(sizes))
        for at_small, at_big in zip(small_sq, (samples.mean(1) ** 2).sum(1), strict=True)
    ]
    grad_sq, trace = np.mean(found, axis=0)
    assert grad_sq == pytest.approx((gradient**2).sum(), rel=0.03)
    assert trace == pytest.approx((deviations**2).sum(), rel=0.01)


def test_the_scale_is_a_ratio_of_averages() -> None:
    noise = NoiseScale()
    assert noise.values() == {}
    given = [(7.0, 4.5), (10.0, 5.0), (5.0, 4.0)]
    for small_sq, big_sq in given:
        noise.add(small_sq, 1 / 8, big_sq, 1 / 48)
    found = [estimates(small_sq, 1 / 8, big_sq, 1 / 48) for small_sq, big_sq in given]
    weights = [DECAY**2, DECAY, 1.0]
    grad_sq, trace = (sum(w * e[i] for w, e in zip(weights, found, strict=True)) / sum(weights) for i in (0, 1))
    values = noise.values()
    assert values["noise/grad_sq"] == pytest.approx(grad_sq)
    assert values["noise/trace"] == pytest.approx(trace)
    assert values["noise/scale"] == pytest.approx(trace / grad_sq)
    assert values["noise/critical_batch"] == round(trace / grad_sq)


def test_a_restored_average_continues_bit_for_bit() -> None:
    unbroken = NoiseScale()
    unbroken.add(7.0, 1 / 8, 4.5, 1 / 48)
    resumed = NoiseScale(**asdict(unbroken))
    for noise in (unbroken, resumed):
        noise.add(6.0, 1 / 8, 4.0, 1 / 48)
    assert resumed.values() == unbroken.values()


def test_an_overflow_does_not_change_the_averages() -> None:
    noise = NoiseScale()
    noise.add(7.0, 1 / 8, 4.5, 1 / 48)
    before = noise.values()
    noise.add(math.inf, 1 / 8, 4.5, 1 / 48)
    noise.add(7.0, 1 / 8, math.nan, 1 / 48)
    assert noise.values() == before


def test_nonpositive_estimates_give_no_scale() -> None:
    noise = NoiseScale()
    noise.add(40.0, 1 / 8, 1.0, 1 / 48)  # the estimate of |G|^2 is below 0
    assert noise.values().keys() == {"noise/grad_sq", "noise/trace"}
