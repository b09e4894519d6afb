"""The arithmetic of a trust ratio: one tensor's, or those of many at once. Nothing here touches an optimizer.

Notation, here and in `LARS`: w a parameter, g its gradient, |x| the Euclidean norm of a whole tensor, wd and
lr the weight decay and the learning rate of its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a LARS computes; every option is described in `LARS`.

    Raises:
        ValueError: an option is none of its choices or out of range, or two do not go together.
    """

    eps: float = 1e-8
    trust_coef: float = 0.001
    denominator: Literal["split", "combined"] = "split"
    clip: Literal["lr"] | tuple[float, float] | None = None
    zero_norm: Literal["decay", "skip"] = "decay"
    zero_decay: Literal["adapt", "skip"] = "adapt"
    weight_decay: Literal["coupled", "base"] = "coupled"
    ratio_placement: Literal["inside", "outside"] = "inside"
    lr_placement: Literal["outside", "inside"] = "outside"
    clamp: float | None = None

    def __post_init__(self) -> None:
        for name in ("eps", "trust_coef", "clamp"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (name == "clamp" and value is None):
                raise ValueError(f"{name}={value!r}: it must be a number")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps={self.eps}: it must be finite and at least 0")
        if not (math.isfinite(self.trust_coef) and self.trust_coef > 0):
            raise ValueError(f"trust_coef={self.trust_coef}: it must be finite and above 0")
        if self.clamp is not None and not self.clamp > 0:
            raise ValueError(f"clamp={self.clamp}: it must be above 0, or None")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(map(repr, choices))}")
        self._check_clip()
        if self.ratio_placement == "outside" and self.lr_placement == "inside":
            raise ValueError("the ratio outside the momentum and the lr inside it: no known rule combines them so")
        if self.weight_decay == "base" and (self.ratio_placement, self.lr_placement) != ("inside", "outside"):
            raise ValueError("weight_decay='base' goes with ratio_placement='inside' and lr_placement='outside' only")

    def _check_clip(self) -> None:
        if self.clip is None or self.clip == "lr":
            return
        bounds = self.clip
        if (
            not isinstance(bounds, tuple | list)
            or len(bounds) != 2
            or not _are_numbers(bounds)
            or not 0 <= bounds[0] <= bounds[1]
        ):
            raise ValueError(f"clip={bounds!r}: give None, 'lr', or a pair of bounds such as (0, 50)")
        # State dicts and configs bring lists.
        object.__setattr__(self, "clip", tuple(bounds))

    @property
    def needs_lr(self) -> bool:
        """Whether the rescaled gradient depends on the learning rate."""
        return self.clip == "lr" or self.lr_placement == "inside"

    def ratios_on_the_host(self, decay: float, lr: Any) -> Callable[[float, float], tuple[float, float]]:
        """A function from |w| and |g| of a tensor to its ratio and to the weight decay in its gradient, `decay` or 0.

        |g| is |g + wd * w| for the combined denominator; `decay` may be negative (maximize).
        """
        # Names of the function's own: it is called for every tensor in every step.
        trust_coef, eps, clip, skip = self.trust_coef, self.eps, self.clip, self.zero_norm == "skip"
        in_denominator = abs(decay) if self.denominator == "split" else 0.0

        def ratio_of(weight_norm: float, grad_norm: float) -> tuple[float, float]:
            if weight_norm > 0 and grad_norm > 0:
                # A factor of 0 would make a norm that is infinite NaN.
                decayed = in_denominator * weight_norm if in_denominator else 0.0
                ratio = trust_coef * weight_norm / (grad_norm + decayed + eps)
            elif skip:
                return 1.0, 0.0
            else:
                ratio = 1.0
            if clip is None or math.isnan(ratio):
                return ratio, decay
            if clip == "lr":
                # min(ratio / lr, 1), also for lr = 0.
                return (1.0 if ratio >= float(lr) else ratio / float(lr)), decay
            return min(max(ratio, clip[0]), clip[1]), decay

        return ratio_of

    def ratio(self, weight_norm: float, grad_norm: float, decay: float, lr: Any) -> tuple[float, float]:
        """`ratios_on_the_host` for one tensor."""
        return self.ratios_on_the_host(decay, lr)(weight_norm, grad_norm)

    def ratios(self, weight_norms: Tensor, grad_norms: Tensor, decay: float, lr: Any) -> tuple[Tensor, Tensor | None]:
        """`ratio` for many tensors at once, without a wait for the device.

        Norms and ratios have the shape (n,) and one floating-point dtype. The second value is the decay
        of each tensor, (n,), or None where `decay` is that of all.
        """
        normal = (weight_norms > 0) & (grad_norms > 0)
        below = grad_norms
        if self.denominator == "split" and decay != 0:
            below = torch.add(grad_norms, weight_norms, alpha=abs(decay))
        ratios = torch.where(normal, self.trust_coef * weight_norms / (below + self.eps), 1.0)
        if self.clip == "lr":
            ratios = torch.where(ratios >= lr, 1.0, ratios / lr)
        elif self.clip is not None:
            ratios = ratios.clamp(*self.clip)
        if self.zero_norm == "decay":
            return ratios, None
        return torch.where(normal, ratios, 1.0), normal.to(ratios.dtype) * decay


def _are_numbers(values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


_CHOICES = {
    "denominator": ("split", "combined"),
    "zero_norm": ("decay", "skip"),
    "zero_decay": ("adapt", "skip"),
    "weight_decay": ("coupled", "base"),
    "ratio_placement": ("inside", "outside"),
    "lr_placement": ("outside", "inside"),
}
