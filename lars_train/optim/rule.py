"""Compute trust ratios, for one tensor or for many at once. This module does not use an optimizer.

Notation, here and in `LARS`: w is a parameter, g its gradient, |x| the Euclidean norm of a whole tensor; wd and lr are
the weight decay and the learning rate of the parameter's group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .options import Options


class Rule(Options):
    """The options of LARS, and the trust ratios that follow from them."""

    @property
    def needs_lr(self) -> bool:
        """True if LARS uses the learning rate."""
        return self.clip == "lr" or self.lr_placement == "inside" or self.ratio_of == "step"

    @property
    def adds_decay(self) -> bool:
        """True if LARS adds the weight decay to the gradient; otherwise the base applies it."""
        return self.weight_decay == "coupled" and self.ratio_of == "gradient"

    @property
    def changes_step(self) -> bool:
        """True if LARS scales the change that the base made to the weights."""
        return self.ratio_placement == "outside" or self.ratio_of == "step"

    def ratio_function(self, decay: float, lr: Any) -> Callable[[float, float], tuple[float, float]]:
        """Return a function that maps a tensor's |w| and |g| to its trust ratio and its weight decay (`decay` or 0).

        With the combined denominator, pass |g + wd * w| for |g|. `decay` may be negative (maximize).
        """
        # Local names are faster than attributes, and the function is called for every tensor in every step.
        trust_coef, eps, clip, skip = self.trust_coef, self.eps, self.clip, self.zero_norm == "skip"
        in_denominator = abs(decay) if self.denominator == "split" else 0.0

        def ratio_of(weight_norm: float, grad_norm: float) -> tuple[float, float]:
            if weight_norm > 0 and grad_norm > 0:
                # Without this check, 0 times an infinite norm would give NaN.
                decayed = in_denominator * weight_norm if in_denominator else 0.0
                ratio = trust_coef * weight_norm / (grad_norm + decayed + eps)
            elif skip:
                return 1.0, 0.0
            else:
                ratio = 1.0
            if clip is None or math.isnan(ratio):
                return ratio, decay
            if clip == "lr":
                # min(ratio / lr, 1), without dividing by lr = 0.
                return (1.0 if ratio >= float(lr) else ratio / float(lr)), decay
            return min(max(ratio, clip[0]), clip[1]), decay

        return ratio_of

    def ratio(self, weight_norm: float, grad_norm: float, decay: float, lr: Any) -> tuple[float, float]:
        """Apply `ratio_function` to one tensor."""
        return self.ratio_function(decay, lr)(weight_norm, grad_norm)

    def ratios(self, weight_norms: Tensor, grad_norms: Tensor, decay: float, lr: Any) -> tuple[Tensor, Tensor | None]:
        """Compute `ratio` for many tensors at once, without waiting for the device.

        Norms and ratios have the shape (n,) and one floating-point dtype. The second value is the decay of each
        tensor, (n,), or None if `decay` applies to all.
        """
        nonzero = (weight_norms > 0) & (grad_norms > 0)
        denominators = grad_norms
        if self.denominator == "split" and decay != 0:
            denominators = torch.add(grad_norms, weight_norms, alpha=abs(decay))
        ratios = torch.where(nonzero, self.trust_coef * weight_norms / (denominators + self.eps), 1.0)
        if self.clip == "lr":
            ratios = torch.where(ratios >= lr, 1.0, ratios / lr)
        elif self.clip is not None:
            ratios = ratios.clamp(*self.clip)
        if self.zero_norm == "decay":
            return ratios, None
        return torch.where(nonzero, ratios, 1.0), nonzero.to(ratios.dtype) * decay
