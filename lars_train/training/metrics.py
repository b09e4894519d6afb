"""Measure values for log lines: gradients and updates of each layer, times, FLOPs relative to the peak."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lars_train.config import Config
from lars_train.data.transforms import TrainingSizes
from lars_train.models.blurpool import BlurPoolConv2d
from lars_train.models.factory import is_builtin
from lars_train.monitoring.layers import LayerValues
from lars_train.optim.lars import LARS
from lars_train.optim.rescale import clones
from lars_train.run_plan import Plan
from lars_train.training.device import Precision, copy_to, device_to_count_on

LR_FACTOR = "lr_factor"
"""The key in a parameter group for the factor between its learning rate and the schedule's."""


@dataclass
class Measures:
    """The norms of one update, for the n `parameters` that have gradients. All tensors are on the device.

    Call `before_step` before LARS changes the gradients, and `after_step` after the optimizer's step.
    """

    parameters: list[nn.Parameter]
    weights: Tensor
    """(n,): |w| before the update."""
    gradients: Tensor
    """(n,): |g|, where g is the mean over the global batch."""
    updates: Tensor
    """(n,): |w_after - w_before|."""
    weight_norm: Tensor
    """|w| of all parameters, a scalar."""
    grad_norm: Tensor
    """|g| of all parameters, a scalar."""
    before: list[Tensor] = field(default_factory=list)

    @classmethod
    def before_step(cls, network: nn.Module) -> Measures:
        """Measure the norms, and keep a copy of the weights for `after_step`."""
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
        """Return the values over all parameters, by their names in `fields.FIELDS`."""
        norms = torch.stack((self.grad_norm, self.weight_norm, torch.linalg.vector_norm(self.updates)))
        gradient, weight, update = norms.double().tolist()
        return {
            "train/grad_norm": gradient,
            "train/weight_norm": weight,
            "train/update_ratio": update / weight if weight else math.nan,
        }

    def layers(self, names: dict[int, str], optimizer: Optimizer, lr: float) -> LayerValues:
        """Return the values of each parameter, with trust ratios if `optimizer` is LARS. `names`: by parameter id."""
        ratios: dict[str, float] = {}
        if isinstance(optimizer, LARS) and (adapted := optimizer.layers()) is not None:
            of_each = adapted.values[2].tolist()
            ratios = {names[id(p)]: ratio for p, ratio in zip(adapted.parameters, of_each, strict=True)}
        weights, gradients, updates = torch.stack((self.weights, self.gradients, self.updates)).tolist()
        factored = (group for group in optimizer.param_groups if LR_FACTOR in group)
        factors = {names[id(p)]: group[LR_FACTOR] for group in factored for p in group["params"]}
        return LayerValues([names[id(p)] for p in self.parameters], weights, gradients, updates, lr, ratios, factors)


class FirstGradient:
    """Measures |g| of this rank's first micro-batch of an update, before other micro-batches and ranks are added.

    Hooks read `grad` of each parameter during the backward pass, so no gradient is computed twice.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]

    def take(self, parameter: Tensor, norms: list[Tensor]) -> None:
        """Append |g| of one parameter, once its gradient is complete."""
        if parameter.grad is not None:
            norms.append(torch.linalg.vector_norm(parameter.grad))

    @contextmanager
    def recording(self, norms: list[Tensor]) -> Iterator[None]:
        """Within the context, let the backward pass append |g| of each parameter to `norms`, as device scalars."""
        # Autograd calls these hooks when the gradient is complete, before DDP's hooks, which all-reduce the gradient.
        hooks: list[Any] = [p.register_post_accumulate_grad_hook for p in self.parameters]
        handles = [register(lambda parameter: self.take(parameter, norms)) for register in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def noise_terms(norms: list[Tensor], factor: Tensor, samples: int) -> Tensor:
    """Return this rank's terms of the noise scale (`monitoring.noise`) for the small batch, float64 (3,).

    The terms are |g|^2, where g is the mean gradient of `samples` samples; 1 / `samples`; and 1, to count ranks.
    The caller sums each term over the ranks.

    Args:
        norms: each parameter's |g| divided by `factor`.
        factor: a scalar on the device.
    """
    squared = (torch.stack(norms).double() * factor).square().sum()
    # Use `full_like`, which fills on the device. A tensor from Python numbers would need a copy from the host.
    return torch.stack((squared, torch.full_like(squared, 1 / samples), torch.ones_like(squared)))


@dataclass(frozen=True)
class Flops:
    """The floating-point operations of training, and the peak rate of the hardware."""

    per_image: float
    """Operations per image, forward and backward, in the first epoch."""
    peak: float | None
    """Operations per second; None if unknown, which leaves ``train/mfu`` out of the log."""
    by_size: dict[int, float] = field(default_factory=dict)
    """Operations per image, by the size of the image."""

    def of_size(self, size: int) -> Flops:
        """Return the operations of training on images of `size`."""
        return replace(self, per_image=self.by_size.get(size, self.per_image))


@dataclass
class Interval:
    """The time since the log line of `update`, or since training resumed there. All times are in seconds.

    `started` is a value of `time.perf_counter`. `exclude` moves it forward.
    """

    update: int
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Time spent waiting for input."""
    saving: float = 0.0
    """Time spent saving checkpoints, which does not count as time of the updates."""

    def exclude(self, seconds: float) -> None:
        """Exclude the time of an evaluation."""
        self.started += seconds

    def save(self, seconds: float) -> None:
        """Exclude the time of saving a checkpoint, which the log reports separately."""
        self.saving += seconds
        self.exclude(seconds)

    def values(self, update: int, now: float, *, global_batch: int, flops: Flops) -> dict[str, float]:
        """Return the values for the log line of `update`, by their names in `fields.FIELDS`.

        Args:
            update: the last update in the interval, which the device has finished.
            now: `time.perf_counter()` when the device had finished.
            global_batch: images per update.
            flops: the operations, with the total peak of all ranks.
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


# A backward pass costs as much as two forward passes, for the gradients of inputs and of weights. "Model FLOPs" are
# counted in this way by Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B.
_FORWARD_EQUIVALENTS = 3
# Rows and columns of the matrices: enough to approach a GPU's peak, and few enough to be quick on a CPU.
_MATRIX_SIZE = {"cpu": 512, "cuda": 4096}
_SECONDS, _LEAST = 0.03, 3


def count_flops(network: nn.Module, config: Config, plan: Plan, peak: float | None) -> Flops:
    """Count the operations per image of a run's training, for each size of its images."""
    sizes = TrainingSizes.from_config(config.data)
    counts = {size: flops_per_image(network, size) for size in {sizes.at(epoch) for epoch in range(plan.epochs)}}
    return Flops(counts[sizes.at(0)], peak, dict(counts))


def flops_per_image(network: nn.Module, image_size: int) -> int:
    """Return the floating-point operations of training on one (3, S, S) image, forward and backward.

    Count the multiplications and additions of convolutions and matrix products. The network stays unchanged.
    """
    if not is_builtin(network):
        try:
            return _FORWARD_EQUIVALENTS * _counted(network, image_size, "meta")
        except Exception:  # the user's network may depend on values
            return _FORWARD_EQUIVALENTS * _counted(network, image_size, "cpu")
    # Only the layers' shapes matter, so run a copy without weights, which takes 0.02 s for ResNet-50 on one core.
    # Torch's FlopCounterMode gives the same count in 0.15 s if torchvision is loaded. Without torchvision, which the
    # networks of this package do not need, it imports torch._dynamo and takes 1.1 s.
    nothing = torch.empty(0)
    memo: dict[int, Any] = {id(p): nn.Parameter(nothing) for p in network.parameters()}
    memo |= {id(b): nothing for b in network.buffers()}
    shadow, forward = copy.deepcopy(network, memo), 0

    def convolve(layer: nn.Conv2d, images: Tensor) -> Tensor:
        nonlocal forward
        assert not isinstance(layer.padding, str)
        each = zip(images.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        sides = [(n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n, pad, dilation, kernel, stride in each]
        taps = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        forward += 2 * layer.out_channels * math.prod(sides) * taps
        if isinstance(layer, BlurPoolConv2d):
            forward += 2 * layer.in_channels * math.prod(images.shape[2:]) * layer.blur_taps
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
        shadow(torch.zeros(1, 3, image_size, image_size, device=device_to_count_on()))
    return _FORWARD_EQUIVALENTS * forward


def _counted(network: nn.Module, image_size: int, device: str) -> int:
    """Return the operations of a forward pass of one image, from the operators that it calls."""
    from torch.utils.flop_counter import FlopCounterMode

    shadow = copy_to(network, device).float().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.zeros(1, 3, image_size, image_size, device=device))
    total: int = counter.get_total_flops()
    return total


@functools.cache
def peak_flops(precision: Precision, device: torch.device, threads: int) -> float:
    """Measure the floating-point operations per second of square matrix products in `precision.compute`.

    The result is the best of a few measurements. The host waits for the device. `threads` is part of the cache key: the
    caller has set this number of CPU threads. float32 products use TF32 if convolutions do (torch's default),
    because convolutions with TF32 would exceed a peak that was measured without TF32.
    """
    side = _MATRIX_SIZE.get(device.type, _MATRIX_SIZE["cuda"])
    # A separate generator, so that a run draws the same random numbers with or without this measurement.
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(side, side, device=device, generator=draw).to(precision.compute) for _ in range(2))
    best, end, done = float("inf"), time.perf_counter() + _SECONDS, 0
    with _matmul_precision_of_cudnn():
        while done < _LEAST or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            # Keep the best of several, because the first call also initializes the library.
            best, done = min(best, time.perf_counter() - started), done + 1
    return 2 * side**3 / best


@contextmanager
def _matmul_precision_of_cudnn() -> Iterator[None]:
    """Within the context, let CUDA's float32 matrix products use TF32 if and only if cuDNN's convolutions may."""
    products, convolutions = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    # torch before 2.9 has only the old name. Newer versions raise for the old name once a process has set the new one.
    newer = hasattr(convolutions, "conv")
    name = "fp32_precision" if newer else "allow_tf32"
    before, target = getattr(products, name), getattr(convolutions.conv if newer else convolutions, name)
    if before == target:  # Both may follow a global setting, and assigning one of them would detach it.
        yield
        return
    setattr(products, name, target)
    try:
        yield
    finally:
        setattr(products, name, before)
