"""Estimate the gradient noise scale from the gradients of two batch sizes.

Pure arithmetic: `training.metrics` measures the norms.
McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training",
https://arxiv.org/abs/1812.06162, appendix A.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.9
"""Factor of the exponential averages: about the last ten estimates count."""


@dataclass
class NoiseScale:
    """Exponential averages of the estimates of |G|^2 (`grad_sq`) and tr(Sigma) (`trace`), both started at 0.

    The noise scale is the ratio of the two averages: an average of ratios would be biased. `count`: estimates so far.
    """

    count: int = 0
    grad_sq: float = 0.0
    trace: float = 0.0

    def add(self, small_sq: float, per_small: float, big_sq: float, per_big: float) -> None:
        """Add the estimates of one update (see `estimates`), unless they are not finite (a float16 overflow)."""
        found = estimates(small_sq, per_small, big_sq, per_big)
        if not all(map(math.isfinite, found)):
            return
        self.count += 1
        self.grad_sq = DECAY * self.grad_sq + (1 - DECAY) * found[0]
        self.trace = DECAY * self.trace + (1 - DECAY) * found[1]

    def values(self) -> dict[str, float]:
        """Return the log's noise fields: none before the first estimate, no scale unless both averages are positive."""
        if not self.count:
            return {}
        bias_correction = 1 - DECAY**self.count
        grad_sq, trace = self.grad_sq / bias_correction, self.trace / bias_correction
        values = {"noise/grad_sq": grad_sq, "noise/trace": trace}
        if grad_sq > 0 and trace > 0:
            values["noise/scale"] = trace / grad_sq
            values["noise/critical_batch"] = max(1, round(trace / grad_sq))
        return values


def estimates(small_sq: float, per_small: float, big_sq: float, per_big: float) -> tuple[float, float]:
    """Return unbiased estimates of |G|^2 and tr(Sigma) from the squared norms of mean gradients over two batch sizes.

    The mean gradient over b independent samples has the expected squared norm |G|^2 + tr(Sigma) / b; two batch sizes
    give two equations. Either estimate may be below 0.

    Args:
        small_sq: |g|^2 of the smaller batch, or its mean over several small batches.
        per_small: 1 / b of the smaller batch, or its mean; above `per_big`.
        big_sq: |g|^2 of the larger batch.
        per_big: 1 / b of the larger batch.
    """
    trace = (small_sq - big_sq) / (per_small - per_big)
    return big_sq - trace * per_big, trace
