"""The training losses are those of torch and timm."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lars_train.models.losses import BCE, TrainingLoss, one_hot

CLASSES = 5
LOGITS = torch.randn(7, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def test_the_cross_entropy_is_torchs_sum() -> None:
    expected = F.cross_entropy(LOGITS, LABELS, reduction="sum", label_smoothing=0.1)
    assert torch.equal(TrainingLoss(0.1)(LOGITS, LABELS), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_the_mean_over_the_classes_of_each_sample(smoothing: float) -> None:
    expected = 0.0
    for logits, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        for number, logit in enumerate(logits):
            target = (1 - smoothing) * (number == label) + smoothing / CLASSES
            p = 1 / (1 + math.exp(-logit))
            expected -= (target * math.log(p) + (1 - target) * math.log(1 - p)) / CLASSES
    assert float(TrainingLoss(smoothing, BCE)(LOGITS, LABELS)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("smoothing", "threshold"), [(0.0, None), (0.1, None), (0.0, 0.2)])
def test_bce_is_timms(smoothing: float, threshold: float | None) -> None:
    timms = pytest.importorskip("timm.loss").BinaryCrossEntropy(smoothing, threshold)
    ours = TrainingLoss(smoothing, BCE, threshold or 0.0)(LOGITS, LABELS)
    assert float(ours) == pytest.approx(len(LABELS) * float(timms(LOGITS, LABELS)), rel=1e-12)


def test_one_hot_is_torchs() -> None:
    assert torch.equal(one_hot(LABELS, LOGITS), F.one_hot(LABELS, CLASSES).double())
