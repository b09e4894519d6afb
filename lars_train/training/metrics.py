"""Measure what a log line reports: gradients and updates of each layer, times, and FLOPs relative to the peak."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.monitoring.layers import LayerValues
from lars_train.optim.lars import LARS
from lars_train.optim.rescale import clones
from lars_train.training.device import Precision


@dataclass
class Measures:
    """The norms of one update: `before_step` takes them before LARS changes the gradients, `after_step` adds the rest.

    `parameters`: those with gradients, n of them. All tensors are on the device.
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
        """Measure the norms, and copy the weights until `after_step`."""
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
            clones(weights),
        )

    def after_step(self) -> None:
        """Measure how far the step moved the weights."""
        torch._foreach_sub_(self.before, [p.detach() for p in self.parameters])
        self.updates = torch.stack(torch._foreach_norm(self.before))
        self.before = []

    def values(self) -> dict[str, float]:
        """Return the values over all parameters, by the names of `fields.FIELDS`."""
        norms = torch.stack((self.grad_norm, self.weight_norm, torch.linalg.vector_norm(self.updates)))
        gradient, weight, update = norms.double().tolist()
        return {
            "train/grad_norm": gradient,
            "train/weight_norm": weight,
            "train/update_ratio": update / weight if weight else math.nan,
        }

    def layers(self, names: dict[int, str], optimizer: Optimizer, lr: float) -> LayerValues:
        """Return the values of each parameter. `names`: by id. With trust ratios, if `optimizer` is LARS."""
        ratios: dict[str, float] = {}
        if isinstance(optimizer, LARS) and (adapted := optimizer.layers()) is not None:
            of_each = adapted.values[2].tolist()
            ratios = {names[id(p)]: ratio for p, ratio in zip(adapted.parameters, of_each, strict=True)}
        weights, gradients, updates = torch.stack((self.weights, self.gradients, self.updates)).tolist()
        return LayerValues([names[id(p)] for p in self.parameters], weights, gradients, updates, lr, ratios)


class FirstGradient:
    """|g|^2 of this rank's first micro-batch of an update, before others are added or ranks exchange gradients.

    Every backward pass has that gradient in the parameters' `grad` for a moment, so nothing is computed twice.
    """

    def __init__(self, network: nn.Module) -> None:
        self._parameters = [p for p in network.parameters() if p.requires_grad]

    def take(self, parameter: Tensor, norms: list[Tensor]) -> None:
        """Append |g| of one parameter, once its gradient is complete."""
        if parameter.grad is not None:
            norms.append(torch.linalg.vector_norm(parameter.grad))

    @contextmanager
    def taken(self) -> Iterator[list[Tensor]]:
        """Yield a list that a backward pass within the context fills: |g| of each parameter, scalars on the device."""
        norms: list[Tensor] = []

        # Autograd calls these hooks once the gradient is complete, and after them DDP's own, which sends it.
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


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that training on an image takes, and how many a second are possible.

    `peak`: None if it is not known, and then there is no ``train/mfu``.
    """

    per_image: float
    peak: float | None


@dataclass
class Interval:
    """The time since the log line of `update`, or since training resumed there. All times in seconds.

    `started`: on the clock of `time.perf_counter`, later by what `leave_out` excludes.
    """

    update: int
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """For input."""
    saving: float = 0.0
    """For checkpoints; excluded from the time of the updates."""

    def leave_out(self, seconds: float) -> None:
        """Exclude the time of an evaluation."""
        self.started += seconds

    def save(self, seconds: float) -> None:
        """Exclude the time of a checkpoint, and report it by itself."""
        self.saving += seconds
        self.leave_out(seconds)

    def values(self, update: int, now: float, *, global_batch: int, flops: Flops) -> dict[str, float]:
        """Return values for the log line of `update`, by the names of `fields.FIELDS`.

        Args:
            update: the last one in the interval; the device has finished it.
            now: `time.perf_counter()` of that moment.
            global_batch: images of an update.
            flops: with the peak of all ranks together.
        """
        elapsed = now - self.started
        rate = (update - self.update) * global_batch / elapsed
        mfu = {} if flops.peak is None else {"train/mfu": rate * flops.per_image / flops.peak}
        return {
            "train/images_per_s": rate,
            **mfu,
            "train/wait_share": self.waited / elapsed,
            "checkpoint/wait_seconds": self.saving,
        }


# A backward pass costs two forward ones: the gradients of inputs and those of weights. That is the count of "model
# FLOPs" of Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
_PASSES = 3
# Rows and columns: large enough to come near the most that a device does, small enough to be done at once on a CPU.
_SIDE = {"cpu": 512, "cuda": 4096}
_SECONDS, _LEAST = 0.03, 3


def flops_per_image(network: nn.Module, image_size: int) -> int:
    """Floating-point operations that training on one (3, S, S) image takes: multiplications and additions of the
    convolutions and matrix products, forward and backward. The network stays as it is.
    """
    # Only the layers' shapes count, so the copy has no weights and computes little: 0.02 s for ResNet-50. Torch's
    # FlopCounterMode counts the same in 0.15 s where torchvision is loaded, and in 1.1 s where it is not: it imports
    # torch._dynamo (on one core; the networks of this package need no torchvision).
    nothing = torch.empty(0)
    memo: dict[int, Any] = {id(p): nn.Parameter(nothing) for p in network.parameters()}
    memo |= {id(b): nothing for b in network.buffers()}
    shadow, forward = copy.deepcopy(network, memo), 0

    def convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
        nonlocal forward
        assert not isinstance(layer.padding, str)
        each = zip(images.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        sides = [(side + 2 * pad - apart * (wide - 1) - 1) // step + 1 for side, pad, apart, wide, step in each]
        taps = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        forward += 2 * layer.out_channels * math.prod(sides) * taps
        return images.new_zeros(1, layer.out_channels, *sides)

    def multiply(layer: nn.Linear, features: Tensor) -> Tensor:
        nonlocal forward
        forward += 2 * layer.in_features * layer.out_features
        return features.new_zeros(1, layer.out_features)

    for module in shadow.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = functools.partial(convolve, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Linear):
            module.forward = functools.partial(multiply, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.BatchNorm2d):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    with torch.no_grad():
        shadow(torch.zeros(1, 3, image_size, image_size))
    return _PASSES * forward


@functools.cache
def peak_flops(precision: Precision, device: torch.device, threads: int) -> float:
    """Floating-point operations per second of square matrix products in `precision.compute`, the best of a few.

    On the CPU with `threads` threads, which the caller has set. The host waits for the device. float32 products are in
    TF32 where the convolutions are, as torch has those by itself: a peak without it would be one that they pass.
    """
    side = _SIDE.get(device.type, _SIDE["cuda"])
    # Of its own, so that a run draws the same numbers whether or not this was measured before.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=draw).to(precision.compute) for _ in range(2))
    best, end, done = float("inf"), time.perf_counter() + _SECONDS, 0
    with _products_as_convolutions():
        while done < _LEAST or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # The first call also sets the library up.
            best, done = min(best, time.perf_counter() - started), done + 1
    return 2 * side**3 / best


@contextmanager
def _products_as_convolutions() -> Iterator[None]:
    """Within it, CUDA's float32 products may use TF32 exactly where cuDNN's convolutions may."""
    products, convolutions = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    # torch before 2.9 has the older name alone. Newer versions raise for it in a process that has set the newer one.
    newer = hasattr(convolutions, "conv")
    name = "fp32_precision" if newer else "allow_tf32"
    before, wanted = getattr(products, name), getattr(convolutions.conv if newer else convolutions, name)
    if before == wanted:  # perhaps because both follow a setting for all, which a value of its own would end
        yield
        return
    setattr(products, name, wanted)
    try:
        yield
    finally:
        setattr(products, name, before)
