"""Mixed images and labels are those of torchvision and timm for the same draws, in each ghost batch by itself."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from lars_train.data.mixing import GhostMix, Mixing, mix_in_place, symmetric_beta
from lars_train.data.order import mixing_uniforms

CLASSES, HEIGHT, WIDTH = 4, 12, 10
MIXES = [
    (0.3, None),
    (0.9, None),
    (0.25, (0.5, 0.5)),
    (0.84, (0.05, 0.99)),
    (0.999, (0.3, 0.3)),
    (0.0, (0.4, 0.6)),
]


def batch(count: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, HEIGHT, WIDTH, generator=draw, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (count,), generator=draw)


def mixed(images: Tensor, labels: Tensor, mixes: list[GhostMix]) -> tuple[Tensor, Tensor]:
    """Return our images and the share of each class."""
    out = images.clone(memory_format=torch.channels_last)
    found = mix_in_place(out, labels, mixes)
    targets = found.targets(torch.empty(len(labels), CLASSES, dtype=torch.float64))
    assert torch.equal(found.main(), torch.where(found.shares >= 0.5, labels, found.partners))
    return out, targets


# timm 1.0 makes a box with odd sides one pixel larger than torchvision and Yun et al.'s code do.
ODD_SIDES = [(0.6, (0.05, 0.99)), (0.5, (0.5, 0.5))]


@pytest.mark.parametrize(("share", "center"), [*MIXES, *ODD_SIDES])
def test_a_pair_is_mixed_as_by_torchvision(
    share: float, center: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = batch(2)  # torchvision rolls a batch by one, which reverses a pair
    theirs = (v2.MixUp if center is None else v2.CutMix)(alpha=1.0, num_classes=CLASSES)
    given = torch.tensor(share, dtype=torch.float64)
    monkeypatch.setattr(theirs, "_dist", SimpleNamespace(sample=lambda _: given))
    if center is not None:
        pixels = iter([torch.tensor([int(center[0] * WIDTH)]), torch.tensor([int(center[1] * HEIGHT)])])
        monkeypatch.setattr(torch, "randint", lambda *_, **__: next(pixels))
    expected_images, expected_targets = theirs(images, labels)
    ours, targets = mixed(images, labels, [GhostMix(0, 2, share, center)])
    torch.testing.assert_close(ours, expected_images, rtol=0, atol=1e-15)
    torch.testing.assert_close(targets, expected_targets.double(), rtol=0, atol=1e-6)  # theirs is float32


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize(("share", "center"), MIXES)
def test_a_ghost_batch_is_mixed_as_a_batch_by_timm(
    share: float, center: tuple[float, float] | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("timm.data.mixup")
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0} if center else {"mixup_alpha": 1.0, "cutmix_alpha": 0.0}
    monkeypatch.setattr(np.random, "beta", lambda *_: share)
    if center is not None:
        pixels = iter([int(center[1] * HEIGHT), int(center[0] * WIDTH)])
        monkeypatch.setattr(np.random, "randint", lambda *_, **__: next(pixels))
    images, labels = batch(count)
    theirs = module.Mixup(label_smoothing=0.0, num_classes=CLASSES, **alphas)
    expected_images, expected_targets = theirs(images.clone(), labels)
    ours, targets = mixed(images, labels, [GhostMix(0, count, share, center)])
    torch.testing.assert_close(ours, expected_images, rtol=0, atol=1e-15)
    torch.testing.assert_close(targets, expected_targets.double(), rtol=0, atol=1e-6)


def test_each_ghost_batch_is_mixed_by_itself() -> None:
    images, labels = batch(11)
    mixes = [GhostMix(0, 4, 0.3), GhostMix(4, 8, 0.8, (0.2, 0.7)), GhostMix(8, 11, 0.6, (0.9, 0.1))]
    ours, targets = mixed(images, labels, mixes)
    for mix in mixes:
        alone = slice(mix.start, mix.stop)
        length = mix.stop - mix.start
        expected = mixed(images[alone], labels[alone], [mix._replace(start=0, stop=length)])
        assert torch.equal(ours[alone], expected[0])
        assert torch.equal(targets[alone], expected[1])
    # The middle one of three images is its own partner.
    assert torch.equal(ours[9], images[9])
    assert torch.equal(targets[9], F.one_hot(labels[9], CLASSES).double())


def test_mixing_commutes_with_normalization() -> None:
    images, labels = batch(4)
    for mix in (GhostMix(0, 4, 0.3), GhostMix(0, 4, 0.3, (0.4, 0.4))):
        after, before = (images - 0.4) / 0.2, images.clone()
        mix_in_place(after, labels, [mix])
        mix_in_place(before, labels, [mix])
        torch.testing.assert_close(after, (before - 0.4) / 0.2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 1.5, 4.0, 32.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    drawn = [symmetric_beta(alpha, mixing_uniforms(0, 0, update, 0)) for update in range(4000)]
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert np.var(drawn) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 1.0, 1.0000001, 1e9])
def test_any_alpha_gives_a_share(alpha: float) -> None:
    last = 1 - 2**-53
    for first in itertools.product((0.0, 0.3, last), repeat=2):
        assert 0 <= symmetric_beta(alpha, iter([*first, 0.9, 0.6])) <= 1


def drawn(mixing: Mixing, updates: int) -> list[GhostMix]:
    return [mix for update in range(updates) for mix in mixing.draw(update // 50, update, (0, 64), 16)]


def test_both_methods_take_half_of_the_ghost_batches_each() -> None:
    both = drawn(Mixing(0.2, 1.0, 3), 300)
    cuts = [mix for mix in both if mix.center is not None]
    assert len(cuts) == pytest.approx(600, abs=75)
    centers = np.array([mix.center for mix in cuts])
    for column in (*centers.T, [mix.share for mix in cuts]):
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert len({mix.share for mix in both}) == len(both)
    assert all(mix.center is None for mix in drawn(Mixing(0.2, 0.0, 3), 20))
    assert all(mix.center is not None for mix in drawn(Mixing(0.0, 1.0, 3), 20))


def test_mixes_never_change() -> None:
    first, second = Mixing(0.2, 1.0, 7).draw(2, 13, (8, 14), 4)
    assert (first.start, first.stop, second.start, second.stop) == (0, 4, 4, 6)
    assert (first.share, second.share) == pytest.approx((0.9982521586059661, 0.0006716242018233176), rel=1e-9)
    first, second = Mixing(0.0, 2.0, 7).draw(2, 13, (8, 14), 4)
    assert (first.share, second.share) == pytest.approx((0.4904666024968839, 0.07381048361117981), rel=1e-9)
    assert first.center == (0.36470336538575976, 0.9693277774900422)


def test_mixes_depend_on_seed_epoch_update_and_ghost_batch_alone() -> None:
    whole = Mixing(0.2, 1.0, 7).draw(2, 13, (0, 30), 4)
    assert [(mix.start, mix.stop) for mix in whole] == [*((i, i + 4) for i in range(0, 28, 4)), (28, 30)]
    parts = [Mixing(0.2, 1.0, 7).draw(2, 13, bounds, 4) for bounds in ((0, 8), (8, 20), (20, 30))]
    assert [mix[2:] for part in parts for mix in part] == [mix[2:] for mix in whole]
    others = [
        Mixing(0.2, 1.0, seed).draw(epoch, update, (0, 4), 4)
        for seed, epoch, update in ((8, 2, 13), (7, 3, 13), (7, 2, 14))
    ]
    assert len({whole[0].share, whole[1].share, *(mix.share for (mix,) in others)}) == 5
