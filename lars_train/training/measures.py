"""What an update is measured by where a log line follows: norms per parameter, and the gradient of a small batch.

All of it stays on the device until a log line asks for it (`Measures.values`, `Measures.layers`, where the host waits
for the device), and nothing changes a gradient or a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.monitoring.layers import LayerValues
from lars_train.optim.lars import LARS


@dataclass
class Measures:
    """Of one update, before LARS. `parameters`: those with gradients, n of them; all else lies on the device.

    Made by `before_step`, completed by `after_step`.
    """

    parameters: list[nn.Parameter]
    weights: Tensor
    """(n,): |w| before the update."""
    gradients: Tensor
    """(n,): |g|, g the mean over the global batch."""
    updates: Tensor
    """(n,): |w_after - w_before|."""
    weight_norm: Tensor
    """|w| of all parameters, a scalar."""
    grad_norm: Tensor
    """|g| of all, a scalar."""
    before: list[Tensor] = field(default_factory=list)

    @classmethod
    def before_step(cls, network: nn.Module) -> Measures:
        """The norms, and a copy of the weights, which `after_step` gives back."""
        parameters = [p for p in network.parameters() if p.grad is not None]
        weights = [p.detach() for p in parameters]
        each = list(torch._foreach_norm(weights))
        gradients = torch.stack(torch._foreach_norm([p.grad for p in parameters if p.grad is not None]))
        others = [torch.linalg.vector_norm(p.detach()) for p in network.parameters() if p.grad is None]
        norms = torch.stack(each)
        return cls(
            parameters,
            norms,
            gradients,
            torch.zeros_like(norms),
            torch.linalg.vector_norm(torch.stack([*each, *others]) if others else norms),
            torch.linalg.vector_norm(gradients),
            list(torch._foreach_clone(weights)),
        )

    def after_step(self) -> None:
        """Measure how far the step has moved the weights."""
        torch._foreach_sub_(self.before, [p.detach() for p in self.parameters])
        self.updates = torch.stack(torch._foreach_norm(self.before))
        self.before = []

    def values(self) -> dict[str, float]:
        """Of all parameters as one, by the names of `fields.FIELDS`."""
        norms = torch.stack((self.grad_norm, self.weight_norm, torch.linalg.vector_norm(self.updates)))
        gradient, weight, update = norms.double().tolist()
        return {
            "train/grad_norm": gradient,
            "train/weight_norm": weight,
            "train/update_ratio": update / weight if weight else math.nan,
        }

    def layers(self, names: dict[int, str], optimizer: Optimizer, lr: float) -> LayerValues:
        """By parameter; `names`: the name of each, by its id. With the trust ratios, if `optimizer` is LARS."""
        ratios: dict[str, float] = {}
        if isinstance(optimizer, LARS) and (adapted := optimizer.layers()) is not None:
            of_each = adapted.values[2].tolist()
            ratios = {names[id(p)]: ratio for p, ratio in zip(adapted.parameters, of_each, strict=True)}
        weights, gradients, updates = torch.stack((self.weights, self.gradients, self.updates)).tolist()
        return LayerValues([names[id(p)] for p in self.parameters], weights, gradients, updates, lr, ratios)


class FirstGradient:
    """|g|^2 of the first micro-batch of an update on this rank, before another is added or ranks exchange theirs.

    That gradient is in the parameters' `grad` for a moment of every backward pass, so nothing is computed twice.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = [p for p in network.parameters() if p.requires_grad]

    def take(self, parameter: Tensor, norms: list[Tensor]) -> None:
        """Append |g| of one parameter, now that its gradient is there."""
        if parameter.grad is not None:
            norms.append(torch.linalg.vector_norm(parameter.grad))

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Yields a list that one backward pass within it fills: |g| of each parameter, scalars on the device."""
        norms: list[Tensor] = []

        # Autograd calls them when the gradient is there, and DDP's own, which sends it off, after them.
        hooks: list[Any] = [p.register_post_accumulate_grad_hook for p in self._parameters]
        handles = [register(lambda parameter: self.take(parameter, norms)) for register in hooks]
        try:
            yield norms
        finally:
            for handle in handles:
                handle.remove()


def small_batch(norms: list[Tensor], factor: Tensor, samples: int) -> Tensor:
    """(3,) float64 for the sum over ranks: |g|^2 of the mean gradient of `samples` samples, 1 / samples, and 1.

    `norms`: of the gradient times 1 / `factor` (a scalar on the device), by parameter.
    """
    squared = (torch.stack(norms).double() * factor).square().sum()
    # Filled on the device: a tensor made from numbers would be a copy that the host waits for.
    return torch.stack((squared, torch.full_like(squared, 1 / samples), torch.ones_like(squared)))
