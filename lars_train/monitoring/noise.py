"""The gradient noise scale: what the gradients of two batch sizes tell of the noise in one sample's gradient.

Arithmetic on numbers that others measured; where they come from is in `training.measures`.
McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training",
https://arxiv.org/abs/1812.06162, appendix A.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.9
"""What an average keeps of itself at each estimate: about the last ten count."""


@dataclass
class NoiseScale:
    """Exponential averages of the two estimates. Their ratio is that of the averages, for it alone would be biased.

    `count`: estimates so far; `grad_sq` of |G|^2 and `trace` of tr(Sigma): the averages as they began, at 0.
    """

    count: int = 0
    grad_sq: float = 0.0
    trace: float = 0.0

    def add(self, small_sq: float, per_small: float, big_sq: float, per_big: float) -> None:
        """Enter an estimate, see `estimates`; one that is not finite (a float16 overflow) is left out."""
        found = estimates(small_sq, per_small, big_sq, per_big)
        if not all(map(math.isfinite, found)):
            return
        self.count += 1
        self.grad_sq = DECAY * self.grad_sq + (1 - DECAY) * found[0]
        self.trace = DECAY * self.trace + (1 - DECAY) * found[1]

    def values(self) -> dict[str, float]:
        """By the names of `fields.FIELDS`; nothing before the first estimate, and no scale from an |G|^2 below 0."""
        if not self.count:
            return {}
        began_at_zero = 1 - DECAY**self.count
        grad_sq, trace = self.grad_sq / began_at_zero, self.trace / began_at_zero
        values = {"noise/grad_sq": grad_sq, "noise/trace": trace}
        if grad_sq > 0 and trace > 0:
            values["noise/scale"] = trace / grad_sq
            values["noise/critical_batch"] = max(1, round(trace / grad_sq))
        return values


def estimates(small_sq: float, per_small: float, big_sq: float, per_big: float) -> tuple[float, float]:
    """Unbiased estimates of |G|^2 and tr(Sigma), from squared norms of mean gradients over two batch sizes.

    The mean gradient over b independent samples has the expected squared norm |G|^2 + tr(Sigma) / b; two sizes are
    two equations. Either estimate may come out below 0.

    Args:
        small_sq: |g|^2 of the smaller batch, or a mean of several's.
        per_small: 1 / b of it, or the mean of theirs; above `per_big`.
        big_sq: |g|^2 of the larger batch.
        per_big: 1 / b of it.
    """
    trace = (small_sq - big_sq) / (per_small - per_big)
    return big_sq - trace * per_big, trace
