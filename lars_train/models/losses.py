"""Compute the training loss from logits and labels: the cross entropy, or the binary cross entropy of every class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CROSS_ENTROPY, BCE = "cross_entropy", "bce"


class MixedLabels(NamedTuple):
    """The labels of mixed images. Each image has its own label and that of its partner. Each tensor is (n,)."""

    labels: Tensor
    """int64: the images' own labels."""
    partners: Tensor
    """int64: the labels of the partners."""
    shares: Tensor
    """float64, in [0, 1]: the shares of `labels` in the targets. The rest is the share of `partners`."""

    def targets(self, logits: Tensor) -> Tensor:
        """Return the share of each class, with the shape and dtype of `logits`."""
        share = self.shares.to(logits.dtype)[:, None]
        return share * one_hot(self.labels, logits) + (1 - share) * one_hot(self.partners, logits)

    def main(self) -> Tensor:
        """Return the labels with the larger shares."""
        return torch.where(self.shares < 0.5, self.partners, self.labels)


@dataclass(frozen=True)
class TrainingLoss:
    """The sum of the losses of a micro-batch's samples.

    The loss of a sample is one of these, for targets t of the C classes:

    - `CROSS_ENTROPY`: -sum(t * log(softmax(logits))).
    - `BCE`: the mean over the classes of -t * log(p) - (1 - t) * log(1 - p), where p is the sigmoid of a class's logit.
      This is the loss of Wightman et al. 2021, arXiv:2110.00476, with the scale of timm's `BinaryCrossEntropy`,
      https://github.com/huggingface/pytorch-image-models/blob/main/timm/loss/binary_cross_entropy.py

    Label smoothing replaces t by (1 - label_smoothing) * t + label_smoothing / C. Then a `threshold` above 0, for `BCE`
    only, replaces targets above it by 1, and all others by 0.
    """

    label_smoothing: float = 0.0
    name: str = CROSS_ENTROPY
    threshold: float = 0.0

    def __call__(self, logits: Tensor, labels: Tensor | MixedLabels) -> Tensor:
        """Return the sum over the samples, a scalar. `logits`: (n, C); `labels`: int64 (n,), or mixed."""
        if self.name == CROSS_ENTROPY:
            given = labels.targets(logits) if isinstance(labels, MixedLabels) else labels
            return F.cross_entropy(logits, given, reduction="sum", label_smoothing=self.label_smoothing)
        classes = logits.shape[1]
        given = labels.targets(logits) if isinstance(labels, MixedLabels) else one_hot(labels, logits)
        targets = given * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.threshold:
            targets = (targets > self.threshold).to(targets.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / classes


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Return 1 for the class of each label and 0 for the others, with the shape and dtype of `logits`.

    Unlike torch's function of this name, it never reads a label on the host.
    """
    return (labels[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
